"""Coordination of the processes that train one model: exchange of texts, checks that all run the same, a common end.

Processes use the key-value store of `jax.distributed`'s coordination service, not the devices.
"""

import contextlib
import ctypes
import hashlib
import itertools
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import jax
from jax._src import distributed  # its key-value store has no public name

from tosa_jax.errors import ProcessError, UserError

T = TypeVar("T")  # the result of a function

BEAT_SECONDS = 3.0
"""Seconds between two heartbeats of a process."""

SILENT_SECONDS = 20.0
"""A process without a heartbeat for so many seconds counts as dead, and the others stop with an error."""

WAIT_SECONDS = 24 * 3600.0
"""Seconds that a process waits for a text of another one: preparing a data set takes hours."""

STOPPED = (
    "error: another process of this run has stopped ({}); start the same command again in all "
    "processes to go on"
)
"""What the processes that are left say, with the reason as far as they know it."""

_ENDED = "tosa_jax/ended"  # key of the error of the first process that failed
_NOTHING = "."  # stands before each text, because the service stores no empty values
_ROUNDS = itertools.count()
_leaving = threading.Event()
_statuses: list[int] = []  # with which this process is about to end

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
"""Packages that must have the same version in all processes, because results depend on them."""


def are_several() -> bool:
    """Whether the run has more than one process."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_main() -> bool:
    """Whether this is process 0, which alone writes files and prints."""
    return jax.process_index() == 0


def watch() -> None:
    """Starts a thread that ends this process when another process of the run has failed or died."""
    threading.Thread(target=_watch, name="watch", daemon=True).start()


def explain_aborts() -> None:
    """From now on this process ends with a line and status 1, should JAX abort it because process 0 has died.

    JAX's client aborts the process as soon as the connection breaks, before `_watch` or a collective can notice, and
    says so amid a stack trace. Its own callback for this case fails in jaxlib 0.10 (`std::bad_cast`). While process 0
    answers, an abort has another cause and goes on.
    """
    ctypes.CDLL(None).signal(signal.SIGABRT, _on_abort)


def finish() -> None:
    """Waits until every process has finished its work. Each process calls this at its normal end."""
    first_said("")
    _leaving.set()


def first_said(text: str) -> str:
    """Returns, in every process, the first text that is not empty, in the order of the processes; "" if all are.

    Every process must call this. It may block for hours, up to `WAIT_SECONDS`.
    """
    if not are_several():
        return text
    client, name = _client(), f"tosa_jax/said/{next(_ROUNDS)}"
    client.key_value_set(f"{name}/{jax.process_index()}", _NOTHING + text)
    if is_main():
        texts = [_get(f"{name}/{i}").removeprefix(_NOTHING) for i in range(jax.process_count())]
        client.key_value_set(f"{name}/first", _NOTHING + next((x for x in texts if x), ""))
    return _get(f"{name}/first").removeprefix(_NOTHING)


def together(work: Callable[[], T]) -> T:
    """Calls `work` in process 0, then in the others, and returns its result.

    If it raises a UserError in any process, all of them raise a ProcessError with its text. A run of one process raises
    the UserError itself.
    """
    if not are_several():
        return work()
    results: list[T] = []
    for main_turn in (True, False):
        message = ""
        if is_main() == main_turn:
            try:
                results.append(work())
            except UserError as error:
                message = str(error) if main_turn else f"process {jax.process_index()}: {error}"
        if message := first_said(message):
            raise ProcessError(message)
    return results[0]


def check_same(
    facts: Mapping[str, Any], compare: Callable[[Any, Any], list[str]] | None = None
) -> None:
    """Raises ProcessError in all processes unless they have the same facts (JSON values by name).

    compare  describes the differences of two processes' facts, one text each; None: the names of the facts that differ.
    """
    if not are_several():
        return
    own = json.loads(json.dumps(facts))
    first = json.loads(first_said(json.dumps(facts) if is_main() else ""))
    lines = compare(first, own) if compare else sorted(k for k in first if first[k] != own.get(k))
    message = f"process {jax.process_index()} differs from process 0 ({'; '.join(lines)})"
    if message := first_said(message if lines else ""):
        raise ProcessError(
            f"{message}; start all processes with the same code, packages and command line"
        )


def code_versions() -> dict[str, str]:
    """What this process runs: a digest of the project's source files, and the packages that decide results."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return {"code": digest.hexdigest()[:12]} | {name: metadata.version(name) for name in PACKAGES}


def explain(error: BaseException) -> str:
    """The text to print for an error that is no UserError: one line if another process stopped, else the traceback."""
    text = str(error)
    if not re.search(r"Gloo|NCCL|heartbeat|[Bb]arrier|[Cc]oordination", text):
        return "".join(traceback.format_exception(error))
    return STOPPED.format(f"its own output says why: {text.splitlines()[0][:120]}") + "\n"


def end_all(status: int, why: str) -> int:
    """Ends this process with `status` and tells the other processes why. In a run of one process it returns `status`.

    A normal exit would wait for the other processes, which may themselves wait for this one in a collective.
    """
    if not are_several():
        return status
    _leaving.set()
    _statuses.append(status)
    with contextlib.suppress(Exception):  # the process ends, whether or not the service answers
        _client().key_value_set(_ENDED, f"process {jax.process_index()}: {why}")
    if is_main():
        time.sleep(
            BEAT_SECONDS + 1
        )  # process 0 hosts the service: the others need time to read the reason
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _on_abort(signum: int) -> None:
    """A handler of C, as Python's own handlers run too late. Returning from it lets the abort go on."""
    if _statuses:  # it has said why, and gives the others time to read it
        os._exit(_statuses[0])
    host, _, port = (distributed.global_state.coordinator_address or "").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, ValueError):
        os.write(2, f"{STOPPED.format('process 0: does not answer')}\n".encode())
        os._exit(1)


def _watch() -> None:
    """Ends this process when another one has reported its end, or when the next one has sent no heartbeat for too long.

    Without this, a collective with a dead process may hang, and after `initialisation.HEARTBEAT_SECONDS` the service
    aborts with a stack trace. Each process watches only the next one: the load of the service grows linearly.
    """
    client, own = _client(), jax.process_index()
    watched = (own + 1) % jax.process_count()
    heard, heard_at = "", time.monotonic()
    for beat in itertools.count():
        time.sleep(BEAT_SECONDS)
        now = heard
        try:
            client.key_value_set(f"tosa_jax/alive/{own}", str(beat), allow_overwrite=True)
            ended = _try_get(_ENDED)
            now = _try_get(f"tosa_jax/alive/{watched}")
        except jax.errors.JaxRuntimeError:
            ended = "process 0: does not answer"
        if now != heard:
            heard, heard_at = now, time.monotonic()
        if not ended and heard_at + SILENT_SECONDS < time.monotonic():
            ended = f"process {watched}: silent for {SILENT_SECONDS:.0f} s"
            with contextlib.suppress(Exception):
                client.key_value_set(_ENDED, ended)
        if _leaving.is_set():
            return
        if ended:
            print(STOPPED.format(ended), file=sys.stderr, flush=True)
            _statuses.append(1)
            if own == 0:
                time.sleep(BEAT_SECONDS + 1)
            os._exit(1)


def _client() -> Any:
    return distributed.global_state.client


def _get(key: str) -> str:
    return _client().blocking_key_value_get(key, int(WAIT_SECONDS * 1000))


def _try_get(key: str) -> str:
    try:
        return _client().key_value_try_get(key)
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" in str(error):
            return ""
        raise
