"""What labels that travel with tokens (TL-Align) are worth: cutmix with and without them, and no mixing.

    python results/label_alignment.py --data=digits [--seeds=3] [--data_dir=DIR]
    python results/label_alignment.py --data=clutter --source_dir=DIR

The three are variants of `configs/label_alignment.py`, trained as long. Scores are top-1 accuracy of the test split, of
each network that the recipe trains: the dense one, and on the digits after fine-tuning also ToSA and the dense one.
`spread` says how far labels travel: the standard deviation, over test images that are mixed by the same box, of the
class token's label, which is a share of 1; labels by area have 0. Intervals are 95 % over seeds (Student's t),
`paired` those of the difference at equal seeds. The file is written anew after each seed.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "configs"))
import label_alignment as recipe

import tosa_jax
from tosa_jax.config import RunConfig, make_run_config
from tosa_jax.data.pipeline import open_dataset
from tosa_jax.distributed.devices import describe_device, versions
from tosa_jax.models.params import set_params, split
from tosa_jax.reporting.intervals import seeds_record
from tosa_jax.tasks.mixing import MixingConfig, mix_images, own_shares, patch_shares
from tosa_jax.train.runner import run_stages
from tosa_jax.train.workdir import open_workdir

VARIANTS = {
    "digits": {"aligned": "", "mixing": "mixing", "plain": "plain"},
    "clutter": {"aligned": "clutter", "mixing": "clutter_mixing", "plain": "clutter_plain"},
}
OUT = {name: Path(__file__).with_name(f"label_alignment{end}.json")
       for name, end in (("digits", ""), ("clutter", "_clutter"))}  # fmt: skip
BOXES = 20


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=tuple(VARIANTS), default="digits")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--source_dir", default="")
    parser.add_argument("--data_dir", default="")
    args = parser.parse_args()
    runs: list[dict] = []
    for seed in range(args.seeds):
        for name, variant in VARIANTS[args.data].items():
            runs.append({"variant": name, "seed": seed} | trained(variant, seed, args))
            print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
            jax.clear_caches()
        OUT[args.data].write_text(json.dumps(record(runs, args.data, seed + 1), indent=1) + "\n")


def trained(variant: str, seed: int, args: argparse.Namespace) -> dict[str, float]:
    """Top-1 accuracy of each row of one run, and the spread of labels in its last network."""
    config = recipe.get_config(variant)
    config.data.source_dir = args.source_dir
    config.data.data_dir = args.data_dir or config.data.data_dir
    run = dataclasses.replace(make_run_config(config), seed=seed)
    with tempfile.TemporaryDirectory() as folder, open_workdir(folder, run) as workdir:
        results = run_stages(run, workdir, timed=False)["results"]
        model = tosa_jax.load(folder).model
    return {row["name"]: row["metrics"]["acc1"] for row in results} | {"spread": spread(run, model)}


def spread(run: RunConfig, model) -> float:
    """Root of the mean variance of labels over images of the test split, each box by itself."""
    graphdef, params = split(model)
    batch = next(iter(open_dataset(run.data).eval_batches(batch_size=200)))
    mean, std = run.inputs.mean[0], run.inputs.std[0]
    images = (jnp.asarray(batch["image"], jnp.float32) / 255 - mean) / std
    mixing = MixingConfig(cutmix=1.0, align_labels=True)

    @jax.jit
    def variance(params, key):
        own = own_shares(mixing, key, images.shape[1:3])
        share = patch_shares(own, run.model.patch_size)
        shares = jnp.broadcast_to(share, (len(images), len(share)))
        out = set_params(graphdef, params)(mix_images(images, own), patch_labels=shares)
        return out.aux["label"].var()

    keys = jax.random.split(jax.random.key(0), BOXES)
    return float(np.sqrt(np.mean([variance(params, key) for key in keys])))


def record(runs: list[dict], data: str, seeds: int) -> dict:
    """What the file says: the runs, means and differences."""
    rows = [name for name in runs[0] if name not in ("variant", "seed")]
    of = {
        name: {row: [run[row] for run in runs if run["variant"] == name] for row in rows}
        for name in VARIANTS[data]
    }
    pairs = {
        f"aligned - {other}": {
            row: seeds_record(
                [a - b for a, b in zip(of["aligned"][row], of[other][row], strict=True)]
            )
            for row in rows
        }
        for other in ("mixing", "plain")
    }
    return {
        "command": f"python results/label_alignment.py --data={data} --seeds={seeds}",
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
