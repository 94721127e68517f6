"""Damages the newest checkpoint of a small stage at random, and says what opening it again makes of it.

    python -m tests.flips [--flips=200] [--seed=0]

One bit of one byte is flipped in each case, at a place drawn by size from all files of the checkpoint. Prints a JSON
object: how often the damage was found and the checkpoint before it restored, and how often it did no harm. Ends with
status 1 if other numbers were restored, or without a line that says what was passed over.
"""

import argparse
import collections
import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SHAPES = {"a": (40, 11), "b": (7,), "c": (3, 5, 2)}
OLD, NEW = 3, 7
"""The two steps of the stage."""


def state_at(step: int) -> dict[str, np.ndarray]:
    """Arrays that are others at each step."""
    return {name: np.full(shape, step, np.float32) for name, shape in SHAPES.items()}


def make_stage(folder: Path) -> None:
    """Writes a stage with two checkpoints, as the training loop does."""
    from tosa_jax.train.checkpoints import Checkpoints

    with Checkpoints(folder, "acc1", keep=2) as checkpoints:
        for step in (OLD, NEW):
            checkpoints.save(step, state_at(step), {"steps": step})
            checkpoints.score(step, {"acc1": 0.5})


def flip(folder: Path, rng: np.random.Generator) -> None:
    """Flips one bit of the files below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    place = int(rng.integers(sum(path.stat().st_size for path in files)))
    for path in files:
        if place < path.stat().st_size:
            data = bytearray(path.read_bytes())
            data[place] ^= 1 << int(rng.integers(8))
            path.write_bytes(data)
            return
        place -= path.stat().st_size


def opened(folder: Path) -> str:
    """What opening a stage gives: "whole", "older" (the checkpoint before, with one line), or what is wrong."""
    import jax

    from tosa_jax.train.checkpoints import Checkpoints

    abstract = {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in state_at(0).items()}
    said = io.StringIO()
    with contextlib.redirect_stderr(said), Checkpoints(folder, "acc1", keep=2) as checkpoints:
        found = checkpoints.restore(abstract)
    assert found is not None
    state, facts = found
    for step, name in ((NEW, "whole"), (OLD, "older")):
        if facts == {"steps": step} and all(
            np.array_equal(state[k], x) for k, x in state_at(step).items()
        ):
            lines = said.getvalue().count(f"the checkpoint of step {NEW} is passed over")
            return name if lines == (name == "older") else f"{name} with {lines} lines"
    return "other numbers"


def try_flips(flips: int, seed: int, folder: Path) -> dict[str, int]:
    """How often each result of `opened` came out of so many single flips."""
    rng, counts = np.random.default_rng(seed), collections.Counter()
    make_stage(folder / "whole")
    for number in range(flips):
        stage = shutil.copytree(folder / "whole", folder / f"flip{number}")
        flip(stage / str(NEW), rng)
        counts[opened(stage)] += 1
        shutil.rmtree(stage)
    return dict(counts)


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--flips", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args, began = parser.parse_args(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        counts = try_flips(args.flips, args.seed, Path(folder))
    print(
        json.dumps(
            {"flips": args.flips, "seed": args.seed, "seconds": round(time.monotonic() - began)}
            | counts
        )
    )
    return int(counts.keys() - {"whole", "older"} != set())


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.exit(main())
