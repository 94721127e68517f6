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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import fsspec

from tosa_jax.config import STAGES, RunConfig, run_differences, to_json
from tosa_jax.distributed import coordination
from tosa_jax.distributed.messages import say
from tosa_jax.errors import WorkdirError, one_line
from tosa_jax.models.weights.run_checkpoints import has_checkpoint, recorded_run
from tosa_jax.paths import (
    AnyPath,
    as_path,
    is_remote,
    parse_json,
    remove_unfinished,
    write_atomically,
)
from tosa_jax.train.branching import branch

BEAT_SECONDS = 20.0
"""How often a run renews its lease on a bucket; three times as long without a beat, and another run takes over."""

VISIBLE_SECONDS = 20.0
"""How long a network file system may take to show one machine what another has written."""


@contextlib.contextmanager
def open_workdir(
    workdir: str | os.PathLike, run: RunConfig, *, extend: bool = False, branch_from: str = ""
) -> Iterator[AnyPath]:
    """Makes or re-opens the work directory of a run and locks it; all processes of the run call this.

    extend       the run may be the one that is there with a longer last stage: a finished one then goes on.
    branch_from  a checkpoint of another run that a new work directory starts from; "": none.

    Raises WorkdirError on all of them if another run works in it, if it cannot be written, if it holds a run of another
    configuration (the fields that differ are named), or if one of them does not see it. A run that came to no
    checkpoint leaves it free. A finished run is opened even where nothing can be written.
    """
    workdir = as_path(workdir)
    with contextlib.ExitStack() as held:

        def claim() -> None:
            if not coordination.is_main():
                _wait_for(workdir / "config.json")
                return
            if not is_remote(workdir) and workdir.exists() and not workdir.is_dir():
                raise WorkdirError(f"{workdir} is a file; give another --workdir")
            finished = (workdir / "report.json").exists()
            begun = finished or has_checkpoint(workdir)
            longer = _check_config(workdir, run, extend) if begun else False
            try:
                workdir.mkdir(parents=True, exist_ok=True)
                held.enter_context(lease(workdir) if is_remote(workdir) else lock(workdir))
                if not is_remote(workdir):
                    for folder in (Path(workdir), *Path(workdir).glob("checkpoints/*")):
                        remove_unfinished(folder)
                if branch_from:
                    branch(branch_from, workdir)
                if longer and finished:
                    (workdir / "report.json").rename(workdir / "report.before.json")
                if longer or not (begun and (workdir / "config.json").exists()):
                    text = json.dumps(to_json(run), indent=2)
                    write_atomically(workdir / "config.json", text.encode())
            except OSError as error:
                if finished and not longer:
                    return  # another user's, perhaps: its report can be read
                what = "written" if workdir.exists() else "made"
                raise WorkdirError(
                    f"{workdir} cannot be {what} ({error.strerror or error}); mend that, or give another --workdir"
                ) from error

        coordination.together(claim)
        yield workdir


def _check_config(workdir: AnyPath, run: RunConfig, extend: bool) -> bool:
    """Whether the run is the one that was begun in a work directory, but longer. Raises WorkdirError: it is another.

    Without config.json a checkpoint tells the configuration.
    """
    begun = _begun(workdir)
    lines = run_differences(begun, run)
    if lines and extend:
        _check_longer(begun, run, lines)
        return True
    if lines:
        more = f"; and {len(lines) - 6} more" if len(lines) > 6 else ""
        raise WorkdirError(
            f"{workdir} holds a run of another configuration ({'; '.join(lines[:6])}{more}); "
            "give another --workdir, or set these fields back. --extend lets the last stage be longer"
        )
    return False


def _check_longer(begun: Mapping[str, Any], run: RunConfig, lines: list[str]) -> None:
    """Raises WorkdirError unless only the last stage is longer than it was: the others have begun from it."""
    last = [stage for stage in STAGES if run.has_stage(stage)][-1:]
    names = [line.partition(":")[0] for line in lines]
    allowed = {f"{stage}.{unit}" for stage in last for unit in ("epochs", "steps")}
    if other := [line for line, name in zip(lines, names, strict=True) if name not in allowed]:
        raise WorkdirError(
            f"--extend changes the length of {', '.join(last) or 'a stage'} alone, not {'; '.join(other[:6])}"
        )
    for name in names:
        stage, unit = name.split(".")
        if not getattr(getattr(run, stage), unit) > begun[stage][unit]:
            raise WorkdirError(f"--extend makes a run longer: {'; '.join(lines)}")
    say(
        f"{last[0]} goes on to its new length. From where it stopped its learning rate follows the schedule of that "
        "length, so it is not what one run of that length would have been"
    )


def _begun(workdir: AnyPath) -> dict[str, Any]:
    """The configuration of the run that was begun, as JSON; {} if nothing says it."""
    path = workdir / "config.json"
    if not path.exists():
        return recorded_run(workdir).get("config") or {}
    try:
        begun = parse_json(path.read_bytes())
        if not isinstance(begun, dict):
            raise ValueError("it holds no fields")
    except (ValueError, OSError) as error:
        raise WorkdirError(
            f"{path} cannot be read ({error}). Delete that file alone: the same command then goes on from the "
            "checkpoints, and refuses if they are of another configuration"
        ) from error
    return begun


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
    """A lock that the kernel releases when the process ends, in whatever way. Raises WorkdirError if another has it.

    The folder itself is locked too, where its file system can do that: so a lock file that somebody deletes lets no
    second run in.
    """
    with contextlib.ExitStack() as held:
        folder = os.open(workdir, os.O_RDONLY)
        held.callback(os.close, folder)
        file = held.enter_context(open(workdir / ".lock", "w"))
        for thing in (file, folder):
            try:
                fcntl.flock(thing, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise WorkdirError(
                    f"{workdir} is in use by another process; wait for it, or give another --workdir"
                ) from None
            except OSError:
                if thing is file:
                    raise
        yield


@contextlib.contextmanager
def lease(workdir: AnyPath, beat: float = BEAT_SECONDS) -> Iterator[None]:
    """The lock of a bucket: an object that only one can create, rewritten every `beat` seconds while it is held.

    One that has not changed for three beats, on this machine's clock, belongs to a run that was killed, and is taken
    over. Two that take over at once: the later one wins, and the other finds another's name at the end of its first
    beat, before it has done anything; should one ever find that later, it saves and stops as by SIGTERM. So does one
    that cannot renew its lease before it runs out. A lease of garbage is like that of a run that was killed.

    Raises WorkdirError if another run holds it.
    """
    held = _Lease(workdir, beat)
    held.take()
    thread = threading.Thread(target=held.keep, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        held.stop.set()
        thread.join()
        held.give_back()


class _Lease:
    """The object `.lease` of a work directory in a bucket, and this run as its owner."""

    def __init__(self, workdir: AnyPath, beat: float) -> None:
        self.workdir, self.beat, self.stop = workdir, beat, threading.Event()
        self.fs, self.path = fsspec.url_to_fs(f"{workdir}/.lease")
        self.owner = f"{socket.gethostname()} {os.getpid()} {uuid.uuid4()}"

    def write(self, mode: str) -> None:
        """Writes this run's name. mode  "create" or "overwrite"."""
        text = json.dumps({"owner": self.owner, "beat": time.time()})
        self.fs.pipe_file(self.path, text.encode(), mode=mode)

    def is_ours(self) -> bool:
        """Whether the lease has this run's name; garbage is nobody's."""
        self.fs.invalidate_cache()
        try:
            content: Any = self.fs.cat_file(self.path) if self.fs.exists(self.path) else b""
            return parse_json(content)["owner"] == self.owner
        except (ValueError, KeyError, TypeError):
            return False

    def take(self) -> None:
        """Makes the lease this run's. Raises WorkdirError: another run holds it."""
        try:
            self.write("create")
        except FileExistsError:
            _outlast(self.fs, self.path, self.workdir, self.beat)
            self.write("overwrite")
            time.sleep(self.beat)
            if not self.is_ours():
                raise WorkdirError(
                    f"{self.workdir} has just been taken by another run; wait for it"
                ) from None

    def keep(self) -> None:
        """Renews the lease at every beat until `stop` is set; sends SIGTERM to this process if that is not possible."""
        renewed = time.monotonic()
        while not self.stop.wait(self.beat):
            try:
                if not self.is_ours():
                    say(f"error: {self.workdir} was taken by another run; stopping")
                    break
                self.write("overwrite")
                renewed = time.monotonic()
            except Exception as error:  # clients of buckets have errors of their own
                why = one_line(str(error))[:160]
                say(f"{self.workdir}: the lease cannot be renewed ({why})")
                # After a third beat another run may take it.
                if time.monotonic() - renewed > 2 * self.beat:
                    say(f"error: {self.workdir}: the lease runs out; stopping")
                    break
        else:
            return
        signal.raise_signal(signal.SIGTERM)

    def give_back(self) -> None:
        """Removes the lease; one that cannot be removed runs out by itself."""
        with contextlib.suppress(Exception):
            if self.is_ours():
                self.fs.rm_file(self.path)


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
