"""Several processes that train one network: agreeing, proving that they run the same thing, ending together.

They talk through the key-value store of `jax.distributed`'s coordination service, not through the devices.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
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

T = TypeVar("T")  # what some work returns

BEAT_SECONDS = 3.0
"""How often a process shows that it lives."""

SILENT_SECONDS = 20.0
"""One that has been silent for so long is dead, and the others stop with a line that says so."""

WAIT_SECONDS = 24 * 3600.0
"""How long a process waits for another that lives: preparing a data set takes hours."""

_ENDED = "tosa_jax/ended"  # key of what the first process to fail said
_NOTHING = "."  # before each text: the service holds no empty ones
_ROUNDS = itertools.count()
_leaving = threading.Event()

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
"""Those whose versions decide results, which all processes must have alike."""


def are_several() -> bool:
    """Whether other processes train with this one."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_main() -> bool:
    """Whether this is the process that writes and talks."""
    return jax.process_index() == 0


def watch() -> None:
    """Starts the thread that ends this process when another one has ended."""
    threading.Thread(target=_watch, name="watch", daemon=True).start()


def part() -> None:
    """The regular end: nobody leaves before all are done."""
    first_said("")
    _leaving.set()


def first_said(text: str) -> str:
    """The first text of any process that is not empty, in their order, or ""; all of them call this.

    It goes through the coordination service, not through the devices: a process may wait here for hours.
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
    """Process 0 does some work, then the others do; what it returns.

    Raises ProcessError on all of them where it was a UserError on any; alone, that UserError itself.
    """
    if not are_several():
        return work()
    for turn in (True, False):
        message = ""
        if is_main() == turn:
            try:
                result = work()
            except UserError as error:
                message = str(error) if turn else f"process {jax.process_index()}: {error}"
        if message := first_said(message):
            raise ProcessError(message)
    return result


def check_same(
    facts: Mapping[str, Any], compare: Callable[[Any, Any], list[str]] | None = None
) -> None:
    """Raises ProcessError on all processes unless they hold the same facts (JSON values by name).

    compare   gives lines for what differs between two processes' facts; default: the names of those that do.
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
    """What to print for an error that is not the user's: another process's end in one line, else the traceback."""
    text = str(error)
    if not re.search(r"Gloo|NCCL|heartbeat|[Bb]arrier|[Cc]oordination", text):
        return "".join(traceback.format_exception(error))
    return (
        f"error: another process of this run has stopped, and says why in its own output "
        f"({text.splitlines()[0][:120]}); start the same command again in all processes to go on\n"
    )


def end_all(status: int, why: str) -> int:
    """Ends this process and tells the others why, where there are others; else returns the status.

    At a regular exit this process would wait for the others, and they may be waiting for it in a collective.
    """
    if not are_several():
        return status
    _leaving.set()
    with contextlib.suppress(Exception):  # whatever the service says, this is the end
        _client().key_value_set(_ENDED, f"process {jax.process_index()}: {why}")
    if is_main():
        time.sleep(BEAT_SECONDS + 1)  # it hosts the service: the others must get to read that
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _watch() -> None:
    """Ends this process when another has said that it ends, or the next one has been silent for too long.

    A collective whose partner has died may hang, and after `joining.HEARTBEAT_SECONDS` the service would abort the
    process with a stack trace. Each process watches one other, so that the service has little to do for any number.
    """
    client, own = _client(), jax.process_index()
    watched = (own + 1) % jax.process_count()
    heard, heard_at = "", time.monotonic()
    for beat in itertools.count():
        time.sleep(BEAT_SECONDS)
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
            print(
                f"error: another process of this run has stopped ({ended}); start the same command again in all "
                "processes to go on",
                file=sys.stderr,
                flush=True,
            )
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
