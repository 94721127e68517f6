"""The work directory of a run, local or in a bucket: checks that it belongs to the run, and locks it."""

import contextlib
import fcntl
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

import fsspec

from tosa_jax.config import RunConfig, differences, from_json, to_json
from tosa_jax.distributed import coordination
from tosa_jax.distributed.messages import say
from tosa_jax.errors import ConfigError, WorkdirError
from tosa_jax.models.weights.run_checkpoints import has_checkpoint
from tosa_jax.paths import AnyPath, as_path, is_remote, parse_json, write_atomically

BEAT_SECONDS = 20.0
"""How often a run renews its lease on a bucket; three times as long without a beat, and another run takes over."""

VISIBLE_SECONDS = 20.0
"""How long a network file system may take to show one machine what another has written."""


@contextlib.contextmanager
def open_workdir(workdir: str | os.PathLike, run: RunConfig) -> Iterator[AnyPath]:
    """Makes or re-opens the work directory of a run and locks it; all processes of the run call this.

    Raises WorkdirError on all of them if another run works in it, if it cannot be made, if it holds a run of another
    configuration (the fields that differ are named), or if one of them does not see it. A run that came to no
    checkpoint leaves it free.
    """
    workdir = as_path(workdir)
    with contextlib.ExitStack() as held:

        def claim() -> None:
            if not coordination.is_main():
                _wait_for(workdir / "config.json")
                return
            if not is_remote(workdir) and workdir.exists() and not workdir.is_dir():
                raise WorkdirError(f"{workdir} is a file; give another --workdir")
            begun = has_checkpoint(workdir) or (workdir / "report.json").exists()
            if begun:
                _check_config(workdir / "config.json", run)
            try:
                workdir.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise WorkdirError(
                    f"{workdir} cannot be made ({error.strerror}); give another --workdir"
                ) from error
            held.enter_context(lease(workdir) if is_remote(workdir) else lock(workdir))
            if not (begun and (workdir / "config.json").exists()):
                text = json.dumps(_as_json(run), indent=2)
                write_atomically(workdir / "config.json", text.encode())

        coordination.together(claim)
        yield workdir


def _as_json(run: RunConfig) -> dict:
    return json.loads(json.dumps(to_json(run)))


def _check_config(path: AnyPath, run: RunConfig) -> None:
    if not path.exists():
        return
    try:
        begun = parse_json(path.read_bytes())
        if not isinstance(begun, dict):
            raise ValueError("it holds no fields")
    except (ValueError, OSError) as error:
        raise WorkdirError(
            f"{path} cannot be read ({error}). Delete that file alone: the same command then goes on from the "
            "checkpoints, and refuses if they are of another configuration"
        ) from error
    with contextlib.suppress(ConfigError):
        begun = _as_json(from_json(begun))  # with the defaults of fields that are newer than it
    lines = differences(begun, _as_json(run))
    if lines:
        more = f"; and {len(lines) - 6} more" if len(lines) > 6 else ""
        raise WorkdirError(
            f"{path.parent} holds a run of another configuration ({'; '.join(lines[:6])}{more}); "
            "give another --workdir, or set these fields back"
        )


def _wait_for(path: AnyPath) -> None:
    end = time.monotonic() + VISIBLE_SECONDS
    while not path.exists():
        if time.monotonic() > end:
            raise WorkdirError(
                f"{path.parent} is not what process 0 sees under that name; --workdir must be in a bucket or on a "
                "file system that all machines share"
            )
        time.sleep(0.2)


@contextlib.contextmanager
def lock(workdir: AnyPath) -> Iterator[None]:
    """A lock that the kernel releases when the process ends, in whatever way. Raises WorkdirError if another has it."""
    with open(workdir / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WorkdirError(
                f"{workdir} is in use by another process; wait for it, or give another --workdir"
            ) from None
        yield


@contextlib.contextmanager
def lease(workdir: AnyPath, beat: float = BEAT_SECONDS) -> Iterator[None]:
    """The lock of a bucket: an object that only one can create, rewritten every `beat` seconds while it is held.

    One that has not changed for three beats, on this machine's clock, belongs to a run that was killed, and is taken
    over. Two that take over at once: the later one wins, and the other finds another's name at the end of its first
    beat, before it has done anything; should one ever find that later, it saves and stops as by SIGTERM.

    Raises WorkdirError if another run holds it.
    """
    fs, path = fsspec.url_to_fs(f"{workdir}/.lease")
    owner = f"{socket.gethostname()} {os.getpid()} {uuid.uuid4()}"

    def write(mode: str) -> None:
        fs.pipe_file(path, json.dumps({"owner": owner, "beat": time.time()}).encode(), mode=mode)

    def is_ours() -> bool:
        fs.invalidate_cache()
        return fs.exists(path) and parse_json(fs.cat_file(path))["owner"] == owner

    try:
        write("create")
    except FileExistsError:
        _outlast(fs, path, workdir, beat)
        write("overwrite")
        time.sleep(beat)
        if not is_ours():
            raise WorkdirError(
                f"{workdir} has just been taken by another run; wait for it"
            ) from None
    stop = threading.Event()

    def keep() -> None:
        while not stop.wait(beat):
            if not is_ours():
                say(f"error: {workdir} was taken by another run; stopping")
                signal.raise_signal(signal.SIGTERM)
                return
            write("overwrite")

    thread = threading.Thread(target=keep, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        if is_ours():
            fs.rm_file(path)


def _outlast(fs: fsspec.AbstractFileSystem, path: str, workdir: AnyPath, beat: float) -> None:
    """Waits three beats. Raises WorkdirError as soon as another run renews its lease."""

    def read() -> bytes:
        fs.invalidate_cache()
        content: Any = fs.cat_file(path) if fs.exists(path) else b""
        return content

    found, end = read(), time.monotonic() + 3 * beat
    say(f"{workdir}: a lease is there; waiting {3 * beat:.0f} s for a sign of life")
    while time.monotonic() < end:
        time.sleep(beat / 4)
        if read() != found:
            raise WorkdirError(
                f"{workdir} is in use by another run; wait for it, or give another --workdir"
            )
