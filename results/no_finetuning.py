"""How close to the dense network's tokens selection comes without any fine-tuning, on real DINOv2 weights.

    python results/no_finetuning.py --weights=FILE --score=DIR > results/no_finetuning.json
    python results/no_finetuning.py --rows=choices --selectors=FILE ... > results/selection/choices_dinov2.json
    python results/no_finetuning.py --rows=bypass --fit=DIR ... > results/selection/bypass_dinov2.json

--rows=budgets: redundancy at several budgets, and beside it ToMe (Bolya et al. 2023), which merges for good and copies
at the end; it is written here from the paper: bipartite matching of keys, size-weighted means, proportional attention.
--rows=choices: every way to choose tokens, at keep .5, .3 and .15;
selectors must have been fitted on other pictures than those under --score. --rows=bypass: the low-rank bypass by rank,
and choices by what a bypass is expected to miss, fitted on 128 crops of the pictures under --fit. `share` is of the
dense network's multiply-adds; cosines are means over images, to the dense network's final tokens: of the class token,
and of the patches; with 95 % intervals by resampling images.
"""

import argparse
import functools
import json
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import tosa_jax
from tosa_jax.data.crops import random_crops
from tosa_jax.data.image_files import find_images
from tosa_jax.distributed.devices import describe_device, versions
from tosa_jax.errors import ConfigError
from tosa_jax.models import cost
from tosa_jax.models.bypass_fit import fit_bypass
from tosa_jax.models.factory import abstract_model
from tosa_jax.models.params import set_params, split
from tosa_jax.ops.attention import attention
from tosa_jax.ops.token_matching import (
    bipartite_matching,
    least_after_matching,
    spread_groups,
    sum_groups,
)
from tosa_jax.performance.comparison import cosine, features
from tosa_jax.reporting.intervals import by_picture, interval

NAME = "vit_small_patch14_dinov2"
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def crops(folder: Path, count: int, size: int) -> np.ndarray:
    """Normalised square crops [count size size 3] of the pictures in a folder."""
    images, _ = random_crops(find_images([str(folder)]), count, size)
    return ((images / 255 - MEAN) / STD).astype(np.float32)


def final_tokens(graphdef, params, images):
    """The forward pass of a network of this project."""
    return set_params(graphdef, params)(images, key=jax.random.key(0)).tokens


def tome(config, reduce: int, proportional: bool):
    """ToMe's forward pass on this project's blocks, and its multiply-adds an image; `reduce` tokens leave a layer."""
    prefix, n = config.num_prefix_tokens, config.num_tokens
    counts = [n]
    for _ in range(config.depth):
        counts.append(max(counts[-1] - reduce, least_after_matching(counts[-1], prefix)))

    def forward(graphdef, params, images):
        model = set_params(graphdef, params)
        tokens, sizes, merged = model.embed(images), None, []
        for block, left in zip(model.blocks, counts[1:], strict=True):
            bias = jnp.log(sizes[:, :, 0]) if sizes is not None and proportional else None

            def attend(q, k, v, bias=bias):
                return attention(q, k, v, bias), k.mean(axis=2)

            update, keys = block.attn_branch(tokens, attend)
            tokens = tokens + update
            chosen, _ = bipartite_matching(keys, left, prefix)
            sizes = jnp.ones((*tokens.shape[:2], 1)) if sizes is None else sizes
            total = sum_groups(sizes, chosen)
            tokens, sizes = sum_groups(tokens * sizes, chosen) / total, total
            merged.append(chosen)
            tokens = tokens + block.mlp_branch(tokens)
        for chosen in reversed(merged):
            tokens = spread_groups(tokens, chosen)
        return model.norm(tokens)

    model = abstract_model(config)
    block = model.blocks[0]
    work = cost.macs(model)
    for into, left in zip(counts, counts[1:], strict=False):
        matching = math.ceil((into - prefix) / 2) * ((into - prefix) // 2 + prefix)
        work += block.attn_macs(into) + block.mlp_macs(left) - block.macs(n)
        work += matching * (config.embed_dim // config.num_heads)
        work += (into - left) * left * config.embed_dim
    return forward, work


def choices(selectors: bool):
    """Rows as (name, fields of the model): six layers, each kind of choice at each budget."""
    yield "dense", {}
    yield "skip", {"plan": "skip"}
    kinds = ("random", "previous", "class_attention", "true_map")
    for keep in (0.5, 0.3, 0.15):
        for bypass in ("identity", "shared"):
            own = ("selective",) if selectors else ()
            oracle = ("worst_bypass",) if bypass != "shared" else ()
            for kind in (*kinds, *own, *oracle):
                fields = {"plan": kind, "bypass": bypass, "keep_rate": keep}
                yield f"{kind}, {bypass}, keep {keep}", fields
        redundant = {"plan": "previous", "bypass": "shared", "keep_rate": keep}
        for weight in (0.75, 1.0):
            name = f"previous, shared, redundancy_weight {weight}, keep {keep}"
            yield name, redundant | {"redundancy_weight": weight}


def bypasses():
    """Rows as (name, fields of the model): six layers, what is fitted in closed form, at each budget."""
    yield "dense", {}
    for keep in (0.5, 0.3, 0.15):
        for rank in (16, 64, 256):
            fields = {
                "plan": "previous",
                "bypass": "low_rank",
                "bypass_rank": rank,
                "keep_rate": keep,
            }
            yield f"previous, low_rank {rank}, keep {keep}", fields
        for kind in ("worst_bypass", "predicted_bypass"):
            for bypass in ("identity", "low_rank"):
                fields = {"plan": kind, "bypass": bypass, "keep_rate": keep}
                yield f"{kind}, {bypass}, keep {keep}", fields


def candidates(budgets: list[float]):
    """Rows as (name, fields of the model); redundancy's `keep_rate` is solved for each share of multiply-adds."""
    yield "dense", {}
    yield "skip", {"plan": "skip"}
    yield "previous, identity, keep 0.5", {"plan": "previous", "keep_rate": 0.5}
    for budget in budgets:
        for schedule in ("linear", "uniform"):
            fields = {"plan": "redundancy", "budget": schedule, "budget_gmacs": budget}
            yield f"redundancy, {schedule}, share {budget}", fields


def closeness(of_class: np.ndarray, of_patches: np.ndarray) -> dict:
    """Mean cosines to the dense network's tokens, of the class token and of the patches, with their intervals."""
    return {
        "class_cosine": float(of_class.mean()), "class_interval": interval(of_class),
        "patch_cosine": float(of_patches.mean()), "patch_interval": interval(of_patches),
    }  # fmt: skip


COSINES: dict[str, tuple[np.ndarray, np.ndarray]] = {}
"""Cosines of each image by row: of the class token, and the mean of the patches."""


def paired(rows: list[dict], pictures: int) -> list[dict]:
    """Differences, redundancy's minus ToMe's, at the nearest share of multiply-adds.

    With 95 % intervals. Both saw the same images. Pictures are resampled, not their crops, which are alike; image i is
    of picture `i % pictures`.
    """
    found = []
    for row in (x for x in rows if x["name"].startswith("redundancy, linear")):
        theirs = [x for x in rows if x["name"].startswith("ToMe") and "without" not in x["name"]]
        near = min(theirs, key=lambda other: abs(other["share"] - row["share"]), default=None)
        if near is None or abs(near["share"] - row["share"]) > 0.02:
            continue
        pair = {
            "ours": row["name"],
            "shares": [row["share"], near["share"]],
            "theirs": near["name"],
        }
        for part, ours, other in zip(
            ("class", "patch"), COSINES[row["name"]], COSINES[near["name"]], strict=True
        ):
            apart = by_picture(ours - other, [i % pictures for i in range(len(ours))])
            pair[f"{part}_difference"] = float(apart.mean())
            pair[f"{part}_interval"] = interval(apart)
        found.append(pair)
    return found


FITTED: dict[tuple, dict] = {}
"""What was fitted, by rank and whether choices were: no budget changes it."""


def make(args: argparse.Namespace, **fields):
    """The network with the released weights, selectors where it reads them, and what is fitted where it has that."""
    model = tosa_jax.create_model(
        NAME, num_classes=1, image_size=args.image_size, rngs=nnx.Rngs(0), **fields
    )
    own = args.selectors if fields.get("plan") == "selective" else None
    model = tosa_jax.load_pretrained(
        model, args.weights, selectors=own, on_message=lambda line: None
    )
    if not args.fit:
        return model
    graphdef, params = split(model)
    which = tuple(
        sorted((name, x.shape) for name, x in params.items() if name.startswith("kinds/"))
    )
    if which not in FITTED:
        images = crops(args.fit, 128, args.image_size)
        FITTED[which] = fit_bypass(model, [images[i : i + 16] for i in range(0, len(images), 16)])
    return set_params(graphdef, params | FITTED[which])


def measure(args: argparse.Namespace) -> tuple[list[dict], dict[str, str]]:
    """The rows, dense first, and why others were left out, by name."""
    images = crops(args.score, args.images, args.image_size)
    graphdef, weights = split(dense := make(args))
    dense_macs, truth, rows, left_out = cost.macs(dense), None, [], {}

    def report(name, forward, params, macs):
        nonlocal truth
        tokens = features(forward, params, images)
        truth = tokens if truth is None else truth
        near = cosine(tokens, truth)
        COSINES[name] = near[:, 0], near[:, 1:].mean(axis=1)
        rows.append({"name": name, "share": macs / dense_macs} | closeness(*COSINES[name]))
        print(rows[-1], file=sys.stderr)

    budgets = args.rows == "budgets"
    rows_of = {
        "budgets": lambda: candidates(args.budgets),
        "choices": lambda: choices(bool(args.selectors)),
        "bypass": bypasses,
    }
    for name, fields in rows_of[args.rows]():
        if share := fields.pop("budget_gmacs", None):
            fields["budget_gmacs"] = share * dense_macs / 1e9
        try:
            own, params = split(model := make(args, **fields))
        except ConfigError as error:
            left_out[name] = str(error)
            continue
        report(name, functools.partial(final_tokens, own), params, cost.macs(model))
    for reduce in args.reduce if budgets else ():
        for proportional in (True, False):
            forward, work = tome(dense.config, reduce, proportional)
            name = f"ToMe, r {reduce}"
            name += "" if proportional else ", without proportional attention"
            report(name, functools.partial(forward, graphdef), weights, work)
    return rows, left_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", required=True)
    parser.add_argument("--score", type=Path, required=True, help="pictures to score on")
    parser.add_argument("--selectors", help="a file of save_selectors, for ToSA's own choice")
    parser.add_argument("--fit", type=Path, help="pictures to fit on, others than those of --score")
    parser.add_argument("--rows", choices=("budgets", "choices", "bypass"), default="budgets")
    parser.add_argument(
        "--reduce", type=int, nargs="+", default=[5, 10, 14, 17, 20], help="ToMe's r"
    )
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.87, 0.75, 0.65, 0.58, 0.51])
    args = parser.parse_args()
    rows, left_out = measure(args)
    given = " --selectors=FILE" if args.selectors else ""
    given += " --fit=DIR" if args.fit else ""
    json.dump({
        "command": f"python results/no_finetuning.py --rows={args.rows} --weights=dinov2_vits14.safetensors"
        f" --score=DIR --images={args.images}{given}",
        "data": f"{args.images} crops of {args.image_size} px of the pictures under --score",
        "device": describe_device(), "versions": versions(), "seed": 0, "model": NAME,
        "left_out": left_out, "results": rows, "pictures": [x.name for x in find_images([str(args.score)])],
        "paired": paired(rows, len(find_images([str(args.score)]))) if args.rows == "budgets" else [],
    }, sys.stdout, indent=1)  # fmt: skip
    print()


if __name__ == "__main__":
    main()
