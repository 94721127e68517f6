"""Trains a tiny network for many steps, with evaluations and checkpoints, and tells whether memory grows.

    python -m tests.long_run [--steps=20000] [--warmup=10000] [--parts run unsaved orbax] [--out=results/long_run.json]

Resident memory, the bytes that are allocated of it, the blocks that Python holds, open files and threads are read at
each record, when no checkpoint is being written and glibc gave back what is free. What is allocated grows by a leak
alone; resident memory also by gaps between allocations. The first steps do not count: caches fill. Readings next to
each other are alike, so that their number says little: the medians of ten equal parts of the rest are what a straight
line over steps is fitted to, and what gives its standard error. Three parts, each in a process of its own:

    run     the run as it is;
    unsaved the same, but Orbax is not called, so that growth of the run itself shows;
    orbax   Orbax alone, as it is, which saves as many arrays as often, so that its own growth shows.

Prints and writes a JSON object.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

from tests.kill_starts import arguments, prepare

LOG_STEPS = 50
SAVE_STEPS = 100
MEDIANS = 10
"""Medians of readings that a line is fitted to."""

STATE_ARRAYS = 130
"""Arrays in the state of the run: parameters, two moments and the average of each, and counters."""

PARTS = ("run", "unsaved", "orbax")


class _Mallinfo2(ctypes.Structure):
    """What glibc says of its heaps, all threads' together."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    ]  # fmt: skip


def read_process() -> dict[str, int]:
    """Resident and allocated bytes, blocks that Python holds, open files and threads of this process."""
    gc.collect()
    allocated = 0
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        libc = ctypes.CDLL("libc.so.6")
        libc.malloc_trim(0)
        libc.mallinfo2.restype = _Mallinfo2
        info = libc.mallinfo2()
        allocated = info.uordblks + info.hblkhd
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "resident": pages * os.sysconf("SC_PAGE_SIZE"),
        "allocated": allocated,
        "blocks": sys.getallocatedblocks(),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
    }


def run(steps: int, folder: Path, *, saved: bool = True) -> list[dict[str, int]]:
    """What `read_process` gave at each record of training."""
    from tosa_jax import main
    from tosa_jax.train.checkpoints import Checkpoints, Manager
    from tosa_jax.train.metric_writer import MetricWriter

    if not saved:
        Manager.save = lambda self, *args, **how: True
    samples, write, save = [], MetricWriter.write, Checkpoints.save
    saving = None

    def sampled(self, stage, step, metrics, **extra):
        if "train/loss" in metrics:
            if saving is not None:
                saving.wait()
            samples.append({"step": step} | read_process())
        write(self, stage, step, metrics, **extra)

    def remembered(self, *args):
        nonlocal saving
        saving = self
        save(self, *args)

    MetricWriter.write, Checkpoints.save = sampled, remembered
    argv = arguments(
        folder, folder / "run", "one",
        f"--config.pretrain.steps={steps}", f"--config.log_steps={LOG_STEPS}",
        f"--config.pretrain.eval_steps={LOG_STEPS * 4}",
        f"--config.pretrain.checkpoint_steps={SAVE_STEPS}", "--config.checkpoint_minutes=0",
    )  # fmt: skip
    try:
        assert main.main(argv) == 0
    finally:
        MetricWriter.write, Checkpoints.save = write, save
    return samples


def orbax_alone(steps: int, folder: Path) -> list[dict[str, int]]:
    """What `read_process` gave after each save of a tree of as many arrays as the run's state has."""
    import jax.numpy as jnp
    import orbax.checkpoint as ocp

    state = {f"array {i}": jnp.ones((16, 16)) for i in range(STATE_ARRAYS)}
    args = ocp.args.Composite(state=ocp.args.PyTreeSave(state), facts=ocp.args.JsonSave({"a": 1}))
    samples = []
    with ocp.CheckpointManager(
        folder / "alone", options=ocp.CheckpointManagerOptions(max_to_keep=2)
    ) as manager:
        for step in range(SAVE_STEPS, steps + 1, SAVE_STEPS):
            manager.save(step, args=args)
            manager.wait_until_finished()
            samples.append({"step": step} | read_process())
    return samples


def slope(xs: np.ndarray, ys: np.ndarray) -> tuple[float, float]:
    """The slope of the line of least squares through `MEDIANS` medians, and its standard error."""
    xs, ys = (
        np.array([np.median(part) for part in np.array_split(values, MEDIANS)])
        for values in (xs, ys)
    )
    x, y = xs - xs.mean(), ys - ys.mean()
    rise = (x @ y) / (x @ x)
    rest = y - rise * x
    return float(rise), float(np.sqrt(rest @ rest / (len(x) - 2) / (x @ x)))


def summary(samples: list[dict[str, int]], warmup: int) -> dict[str, object]:
    """Slopes of memory and of Python's blocks, least and most of files and threads, after `warmup` steps."""
    late = [x for x in samples if x["step"] > warmup]
    steps = np.array([x["step"] for x in late], float)
    slopes = {}
    for name in ("resident", "allocated", "blocks"):
        found, error = slope(steps, np.array([x[name] for x in late], float))
        slopes |= {f"{name}_per_step": round(found, 3), f"{name}_standard_error": round(error, 3)}
    spans = {
        name: [min(x[name] for x in late), max(x[name] for x in late)]
        for name in ("files", "threads")
    }
    return {
        "steps": samples[-1]["step"],
        "resident_mib": [
            round(late[0]["resident"] / 2**20, 1),
            round(late[-1]["resident"] / 2**20, 1),
        ],
        **slopes,
        **spans,
    }


def part(name: str, steps: int, warmup: int) -> dict[str, object]:
    """One part of the trial, in this process."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if name == "orbax":
            samples = orbax_alone(steps, folder)
        else:
            prepare(folder)
            samples = run(steps, folder, saved=name == "run")
    thin = samples[:: max(1, len(samples) // 40)]
    kept = [[x["step"], round(x["resident"] / 2**20, 1), x["files"], x["threads"]] for x in thin]
    return summary(samples, warmup) | {"samples": kept}


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--warmup", type=int, default=10000, help="first steps that do not count")
    parser.add_argument("--out", default="")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--part", choices=PARTS, help="this one alone, in this process")
    args, began = parser.parse_args(), time.monotonic()
    if args.steps < (least := args.warmup + MEDIANS * SAVE_STEPS):
        parser.error(f"--steps={args.steps} must be at least {least} with --warmup={args.warmup}")
    if args.part:
        print(json.dumps(part(args.part, args.steps, args.warmup)))
        return 0
    lengths = f"--steps={args.steps} --warmup={args.warmup}"
    found: dict[str, object] = {
        "command": f"python -m tests.long_run {lengths} --parts {' '.join(args.parts)}",
        "device": "cpu",
        "versions": {name: version(name) for name in ("jax", "orbax-checkpoint", "tensorstore")},
        "state_arrays": STATE_ARRAYS,
        "save_steps": SAVE_STEPS,
    }
    for name in args.parts:
        command = [sys.executable, "-m", "tests.long_run", *lengths.split(), f"--part={name}"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
    found["seconds"] = round(time.monotonic() - began)
    text = json.dumps(found)
    print(text)
    if args.out:
        Path(args.out).write_text(text + "\n")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", "1")
    sys.exit(main())
