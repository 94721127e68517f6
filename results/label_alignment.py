"""What labels that travel with tokens (TL-Align) are worth: cutmix with and without them, and no mixing, on the digits.

    python results/label_alignment.py [--seeds=3] [--data_dir=DIR]

The three are the variants of `configs/label_alignment.py`, trained as long. Scores are top-1 accuracy of the test
split, of the dense network and of ToSA, after their stages. Intervals are 95 % over seeds (Student's t), `paired` those
of the difference at equal seeds. results/label_alignment.json is written anew after each seed.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).parents[1] / "configs"))
import label_alignment as recipe

from tosa_jax.config import make_run_config
from tosa_jax.distributed.devices import describe_device, versions
from tosa_jax.reporting.intervals import seeds_record
from tosa_jax.train.runner import run_stages
from tosa_jax.train.workdir import open_workdir

VARIANTS = {"aligned": "", "mixing": "mixing", "plain": "plain"}
ROWS = ("dense_pretrained", "tosa", "dense")
OUT = Path(__file__).with_suffix(".json")


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data_dir", default="")
    args = parser.parse_args()
    runs: list[dict] = []
    for seed in range(args.seeds):
        for name, variant in VARIANTS.items():
            runs.append({"variant": name, "seed": seed} | scores(variant, seed, args.data_dir))
            print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
            jax.clear_caches()
        OUT.write_text(json.dumps(record(runs, seed + 1), indent=1) + "\n")


def scores(variant: str, seed: int, data_dir: str) -> dict[str, float]:
    """Top-1 accuracy of each row of one run."""
    config = recipe.get_config(variant)
    config.data.data_dir = data_dir or config.data.data_dir
    run = dataclasses.replace(make_run_config(config), seed=seed)
    with tempfile.TemporaryDirectory() as folder, open_workdir(folder, run) as workdir:
        results = run_stages(run, workdir)["results"]
    return {row["name"]: row["metrics"]["acc1"] for row in results}


def record(runs: list[dict], seeds: int) -> dict:
    """What the file says: the runs, means and differences."""
    of = {
        name: {row: [run[row] for run in runs if run["variant"] == name] for row in ROWS}
        for name in VARIANTS
    }
    pairs = {
        f"aligned - {other}": {
            row: seeds_record(
                [a - b for a, b in zip(of["aligned"][row], of[other][row], strict=True)]
            )
            for row in ROWS
        }
        for other in ("mixing", "plain")
    }
    return {
        "command": f"python results/label_alignment.py --seeds={seeds}",
        "device": describe_device(),
        "versions": versions(),
        "summary": {
            name: {row: seeds_record(x) for row, x in rows.items()} for name, rows in of.items()
        },
        "paired": pairs,
        "runs": runs,
    }


if __name__ == "__main__":
    main()
