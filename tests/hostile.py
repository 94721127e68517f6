"""Damages files of every format that the project reads, at random and by design, and says what reading them does.

    python -m tests.hostile [--cases=100000] [--seed=0] [--formats=png,idx]

Each case is one file, or one command line. It must give a result that can be right, or an error of the project in one
line. Cases run in child processes with little memory to spare, a time limit, and a watch on what they open, so that a
crash, a hang, a write outside of their folder or a program that is started is counted. Prints a JSON object with the
counts by format, and a line for each kind of failure. Ends with status 1 if there was any.
"""

import argparse
import collections
import dataclasses
import json
import os
import resource
import select
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests import hostile_images, hostile_records, hostile_runs, hostile_weights
from tests.hostile_format import DEEP, Format, mutate, mutate_json

SECONDS = 10.0
"""A case that takes more seconds of processors, or ten times as many by the clock, counts as a hang."""

MEMORY = 2 * 2**30
"""Bytes that a case may have beside what the process has at its start."""

CHUNK = 500
"""Cases of one child process."""

MAKERS: dict[str, Callable[[], Format]] = {
    "jpeg": hostile_images.images,
    "png": hostile_images.pngs,
    "png16": hostile_images.deep_pngs,
    "other images": hostile_images.other_images,
    "idx": hostile_records.idx,
    "tfrecord": hostile_records.tfrecord,
    "arrayrecord": hostile_records.of_set("digits-train", 2),
    "dataset_info": hostile_records.of_set("dataset_info", 1, is_json=True, bombs=DEEP),
    "features": hostile_records.of_set(
        "features", 1, is_json=True, bombs=DEEP + hostile_records.IMPORTS
    ),
    "hdf5": hostile_records.hdf5,
    "pth": hostile_weights.pth,
    "pth legacy": hostile_weights.legacy_pth,
    "safetensors": hostile_weights.safetensor,
    "npz": hostile_weights.npz,
    "selectors": hostile_runs.saved_model(selectors=True),
    "predictor": hostile_runs.saved_model(selectors=False),
    "checkpoint": hostile_runs.checkpoint,
    "config.json": hostile_runs.config_json,
    "weights config": hostile_weights.weights_config,
    "report": hostile_runs.report_json,
    "metrics": hostile_runs.metrics_jsonl,
    "flags": hostile_runs.config_flags,
    "classes": hostile_records.class_names,
}
"""What makes each format. A case depends on the place of its format in a run: new ones come last."""


def case(form: Format, index: int, number: int, seed: int) -> bytes:
    """The content of a case: first the bombs that the format has, then mutations of its samples."""
    if number < len(form.bombs):
        return form.bombs[number]
    rng = np.random.default_rng([seed, index, number])
    sample = form.samples[int(rng.integers(len(form.samples)))]
    if form.mutate is not None:
        return form.mutate(sample, rng, mutate)
    if form.is_json and rng.random() < 0.7:
        return mutate_json(sample, rng)
    return mutate(sample, rng)


def outcome(form: Format, content: bytes, folder: Path, watch: "Watch") -> str:
    """What reading does: "right", "refused", or a failure."""
    from tosa_jax.data.decoding import BadImageError
    from tosa_jax.errors import UserError

    watch.seen.clear()
    try:
        form.read(content, folder)
        result = "right"
    except (UserError, BadImageError) as error:
        text = str(error)
        result = (
            "refused" if text.isprintable() and 0 < len(text) < 2500 else f"no line: {text[:60]!r}"
        )
    except AssertionError as error:
        result = f"wrong result: {error}"
    except BaseException as error:
        frames = error.__traceback__
        while frames.tb_next is not None:
            frames = frames.tb_next
        where = f"{Path(frames.tb_frame.f_code.co_filename).name}:{frames.tb_lineno}"
        result = f"traceback: {type(error).__name__} in {where}: {str(error)[:80]}"
    return f"touched {sorted(watch.seen)[0]}" if watch.seen else result


class Watch:
    """Notes what this process does outside of a folder: writing, starting programs, connecting."""

    FORBIDDEN = (
        "os.system",
        "os.exec",
        "os.fork",
        "os.posix_spawn",
        "subprocess.Popen",
        "socket.connect",
    )
    WRITING = (
        "os.remove",
        "os.rename",
        "os.mkdir",
        "os.rmdir",
        "os.link",
        "os.symlink",
        "os.truncate",
    )

    def __init__(self, folder: Path) -> None:
        self.inside, self.seen = str(folder), set()
        self.cache = os.environ.get("MPLCONFIGDIR", "/dev/")  # of matplotlib
        sys.addaudithook(self.look)

    def look(self, event: str, args: tuple) -> None:
        """The audit hook of Python."""
        if event in self.FORBIDDEN:
            self.seen.add(event)
        elif event in self.WRITING or (event == "open" and self._writes(args)):
            path = os.fsdecode(args[0]) if isinstance(args[0], str | bytes | os.PathLike) else ""
            if os.path.isabs(path) and not path.startswith((self.inside, self.cache, "/dev/")):
                self.seen.add(f"{event} {path}")

    @staticmethod
    def _writes(args: tuple) -> bool:
        _, mode, flags = args
        return bool(set(mode or "") & set("wax+")) or bool((flags or 0) & (os.O_WRONLY | os.O_RDWR))


def child(form: Format, index: int, numbers: range, seed: int, folder: Path, pipe: int) -> None:
    """Runs cases and reports each through a pipe: a line before it, and its outcome after it."""
    warnings.simplefilter("ignore")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    os.chdir(folder)
    os.fsync = lambda number: None  # waiting for a disk is no part of this
    if form.start is not None:
        form.start(folder)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    watch = Watch(folder)
    for number in numbers:
        os.write(pipe, b"\n")
        content = case(form, index, number, seed)
        os.write(
            pipe, outcome(form, content, folder, watch).replace("\n", " ").encode(errors="replace")
        )


def run_cases(form: Format, index: int, count: int, seed: int, folder: Path) -> list[str]:
    """The outcome of each case. A child that crashes or hangs costs one case, and another goes on after it."""
    outcomes: list[str] = []
    while len(outcomes) < count:
        numbers = range(len(outcomes), min(count, len(outcomes) + CHUNK))
        end, pipe = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(end)
            try:
                child(form, index, numbers, seed, folder, pipe)
            finally:
                os._exit(0)
        os.close(pipe)
        outcomes += _collected(pid, end, numbers)
        os.close(end)
    return outcomes


def _collected(pid: int, end: int, numbers: range) -> list[str]:
    said, hangs = b"", False
    began, used = time.monotonic(), 0.0
    while True:
        ready, _, _ = select.select([end], [], [], 1.0)
        if not ready:
            allowed = SECONDS if said else 6 * SECONDS  # at first it opens what all cases need
            late = time.monotonic() - began > 10 * allowed or _seconds_used(pid) - used > allowed
            if late and not hangs:
                hangs = True
                os.kill(pid, signal.SIGKILL)
            continue
        if not (more := os.read(end, 2**16)):
            break
        said += more
        began, used = time.monotonic(), _seconds_used(pid)
    _, status = os.waitpid(pid, 0)
    lines = said.decode().split("\n")[1:]
    if hangs or os.WIFSIGNALED(status):
        what = "hang" if hangs else f"crash: {signal.Signals(os.WTERMSIG(status)).name}"
        return [*lines[:-1], what]
    if len(lines) < len(numbers):
        lines = [*[line for line in lines if line], "the child process ended"]
    return lines


def _seconds_used(pid: int) -> float:
    """Seconds of processors that a process has used."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def try_formats(
    cases: int, seed: int, names: list[str], folder: Path, small: bool
) -> dict[str, dict[str, int]]:
    """Counts of outcomes by format. Each format gets its share of the cases, and at least its bombs."""
    formats = {name: MAKERS[name]() for name in names}
    if small:
        bombs = {name: tuple(b for b in x.bombs if len(b) < 10_000) for name, x in formats.items()}
        formats = {name: dataclasses.replace(x, bombs=bombs[name]) for name, x in formats.items()}
    whole = sum(form.share for form in formats.values())
    counts: dict[str, dict[str, int]] = {}
    for index, (name, form) in enumerate(formats.items()):
        own = folder / name
        own.mkdir()
        count = max(round(cases * form.share / whole), len(form.bombs) + 4)
        began = time.monotonic()
        outcomes = run_cases(form, index, count, seed, own)
        counts[name] = dict(collections.Counter(outcomes)) | {"cases": len(outcomes)}
        counts[name]["seconds"] = round(time.monotonic() - began)
        for text in sorted(set(outcomes) - {"right", "refused"}):
            first = outcomes.index(text)
            print(
                f"{name}: {counts[name][text]} x {text} (first case {first})",
                file=sys.stderr,
                flush=True,
            )
    return counts


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="without the bombs that take seconds")
    parser.add_argument("--formats", default="", help="some of them, with commas between")
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MPLCONFIGDIR"] = folder
        names = args.formats.split(",") if args.formats else list(MAKERS)
        counts = try_formats(args.cases, args.seed, names, Path(folder).resolve(), args.small)
    told = {"right", "refused", "cases", "seconds"}
    failures = sum(n for own in counts.values() for text, n in own.items() if text not in told)
    total = sum(own["cases"] for own in counts.values())
    seconds = round(time.monotonic() - began)
    short = {name: {k: n for k, n in own.items() if k in told} for name, own in counts.items()}
    print(json.dumps({"cases": total, "failures": failures, "seconds": seconds, "formats": short}))
    return int(failures > 0)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    sys.exit(main())
