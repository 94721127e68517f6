"""Trains a tiny network for many steps, with evaluations and checkpoints, and tells whether memory grows.

    python -m tests.long_run [--steps=20000] [--out=results/long_run.json]

Resident memory, open files and threads are read at each record. A straight line is fitted to memory over steps, without
the first quarter, in which caches fill. Prints and writes a JSON object.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tests.kill_starts import arguments, prepare

LOG_STEPS = 50


def read_process() -> dict[str, int]:
    """Resident bytes, open files and threads of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "resident": pages * os.sysconf("SC_PAGE_SIZE"),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
    }


def run(steps: int, folder: Path) -> list[dict[str, int]]:
    """What `read_process` gave at each record of training."""
    from tosa_jax import main
    from tosa_jax.train.metric_writer import MetricWriter

    samples, write = [], MetricWriter.write

    def sampled(self, stage, step, metrics, **extra):
        if "train/loss" in metrics:
            samples.append({"step": step} | read_process())
        write(self, stage, step, metrics, **extra)

    MetricWriter.write = sampled
    argv = arguments(
        folder, folder / "run", "one",
        f"--config.pretrain.steps={steps}", f"--config.log_steps={LOG_STEPS}",
        f"--config.pretrain.eval_steps={LOG_STEPS * 4}",
        f"--config.pretrain.checkpoint_steps={LOG_STEPS * 2}",
    )  # fmt: skip
    try:
        assert main.main(argv) == 0
    finally:
        MetricWriter.write = write
    return samples


def slope(xs: np.ndarray, ys: np.ndarray) -> tuple[float, float]:
    """The slope of the line of least squares, and its standard error."""
    x, y = xs - xs.mean(), ys - ys.mean()
    rise = (x @ y) / (x @ x)
    rest = y - rise * x
    return float(rise), float(np.sqrt(rest @ rest / (len(x) - 2) / (x @ x)))


def summary(samples: list[dict[str, int]]) -> dict[str, object]:
    """The slope of memory, and the least and most of files and threads, without the first quarter."""
    late = samples[len(samples) // 4 :]
    steps, resident = (np.array([x[k] for x in late], float) for k in ("step", "resident"))
    rise, error = slope(steps, resident)
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
        "bytes_per_step": round(rise, 1),
        "standard_error": round(error, 1),
        **spans,
    }


def main() -> int:
    """Runs the command."""
    import jax

    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--out", default="")
    args, began = parser.parse_args(), time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        prepare(Path(temporary))
        samples = run(args.steps, Path(temporary))
    found = {
        "command": f"python -m tests.long_run --steps={args.steps}",
        "jax": jax.__version__,
        "device": "cpu",
        "seconds": round(time.monotonic() - began),
    } | summary(samples)
    found["samples"] = [
        [x["step"], round(x["resident"] / 2**20, 1), x["files"], x["threads"]]
        for x in samples[:: max(1, len(samples) // 40)]
    ]
    text = json.dumps(found)
    print(text)
    if args.out:
        Path(args.out).write_text(text + "\n")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", "1")
    sys.exit(main())
