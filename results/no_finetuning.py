"""How close to the dense network's tokens selection comes without any fine-tuning, on real DINOv2 weights.

    python results/no_finetuning.py --weights=FILE --fit=DIR --score=DIR > results/no_finetuning.json
    python results/no_finetuning.py --rows=choices --selectors=FILE ... > results/choices_dinov2.json

--rows=budgets: selective layers with each bypass, redundancy at falling budgets, and beside them ToMe (Bolya et al.
2023), which merges for good and copies at the end; it is written here from the paper: bipartite matching of keys,
size-weighted means, proportional attention. --rows=choices: every way to choose tokens, at keep .5, .3 and .15. What is
fitted (the low-rank bypass, selectors) is fitted on the pictures under --fit and scored on those under --score. `share`
is of the dense network's multiply-adds; cosines are means over images, to the dense network's final tokens: of the
class token, and of the patches; with 95 % intervals by resampling images.
"""

import argparse
import json
import math
import platform
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

import tosa_jax
from tosa_jax import cost
from tosa_jax.attention_ops import attention
from tosa_jax.errors import ConfigError
from tosa_jax.models.bypass_fit import fit_bypass
from tosa_jax.models.params import set_params, split
from tosa_jax.stand_ins import least_dissimilar, select_dissimilar, spread_groups, sum_groups

NAME = "vit_small_patch14_dinov2"
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
EVERY = ("standard",) + ("redundancy",) * 11


def crops(folder: Path, count: int, size: int, seed: int = 0) -> np.ndarray:
    """Normalised square crops [count size size 3] of the pictures in a folder, shorter side resized to `size`."""
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    rng = np.random.default_rng(seed)
    rng.shuffle(files)
    images = []
    for i in range(count):
        with Image.open(files[i % len(files)]) as picture:
            picture = picture.convert("RGB")
            scale = size / min(picture.size)
            wide, high = (max(size, round(side * scale)) for side in picture.size)
            picture = picture.resize((wide, high), Image.Resampling.BICUBIC)
        x, y = rng.integers(0, wide - size + 1), rng.integers(0, high - size + 1)
        images.append(np.asarray(picture.crop((x, y, x + size, y + size))))
    return ((np.stack(images) / 255 - MEAN) / STD).astype(np.float32)


def run(forward, params, images: np.ndarray, batch: int = 16) -> np.ndarray:
    """Final tokens of all images."""
    parts = [forward(params, images[i : i + batch]) for i in range(0, len(images), batch)]
    return np.concatenate([np.asarray(part, np.float32) for part in parts])


def tome(config, reduce: int, proportional: bool):
    """ToMe's forward pass on this project's blocks, and its multiply-adds an image; `reduce` tokens leave a layer."""
    prefix, n = config.num_prefix_tokens, config.num_tokens
    counts = [n]
    for _ in range(config.depth):
        counts.append(max(counts[-1] - reduce, least_dissimilar(counts[-1], prefix)))

    def forward(graphdef, params, images):
        model = set_params(graphdef, params)
        tokens, sizes, merged = model.embed(images), None, []
        for block, left in zip(model.blocks, counts[1:], strict=True):
            bias = jnp.log(sizes[:, :, 0]) if sizes is not None and proportional else None

            def attend(q, k, v, bias=bias):
                return attention(q, k, v, bias), k.mean(axis=2)

            update, keys = block.attn_branch(tokens, attend)
            tokens = tokens + update
            chosen, _ = select_dissimilar(keys, left, prefix)
            sizes = jnp.ones((*tokens.shape[:2], 1)) if sizes is None else sizes
            total = sum_groups(sizes, chosen)
            tokens, sizes = sum_groups(tokens * sizes, chosen) / total, total
            merged.append(chosen)
            tokens = tokens + block.mlp_branch(tokens)
        for chosen in reversed(merged):
            tokens = spread_groups(tokens, chosen)
        return model.norm(tokens)

    model = cost.abstract_model(config)
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


def contestants(budgets: tuple[float, ...]):
    """Rows as (name, fields of the model); redundancy's `keep_rate` is solved for each share of multiply-adds."""
    yield "dense", {}
    yield "skip", {"plan": "skip"}
    yield "previous, identity, keep 0.5", {"plan": "previous", "keep_rate": 0.5}
    for budget in budgets:
        for schedule in ("linear", "uniform"):
            fields = {"plan": EVERY, "budget": schedule, "budget_gmacs": budget}
            yield f"redundancy, {schedule}, share {budget}", fields
        yield f"redundancy in pairs, linear, share {budget}", {
            "plan": ("standard", "redundancy") * 6, "budget": "linear", "budget_gmacs": budget
        }  # fmt: skip


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def interval(values: np.ndarray) -> list[float]:
    """Where the mean lies in 95 % of the resamples of images."""
    rows = np.random.default_rng(0).integers(0, len(values), (2000, len(values)))
    return np.percentile(values[rows].mean(axis=1), [2.5, 97.5]).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", required=True)
    parser.add_argument("--fit", type=Path, required=True, help="pictures to fit on")
    parser.add_argument("--score", type=Path, required=True, help="other pictures, to score on")
    parser.add_argument(
        "--selectors", help="a file of save_selectors, for the rows of ToSA's own scores"
    )
    parser.add_argument("--rows", choices=("budgets", "choices"), default="budgets")
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--fit_images", type=int, default=128)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.87, 0.75, 0.65, 0.5])
    args = parser.parse_args()
    size = args.image_size
    images, fit_images = (
        crops(args.score, args.images, size),
        crops(args.fit, args.fit_images, size),
    )

    def make(**fields):
        model = tosa_jax.create_model(
            NAME, num_classes=1, image_size=size, rngs=nnx.Rngs(0), **fields
        )
        own = args.selectors if fields.get("plan") == "selective" else None
        tosa_jax.load_pretrained(model, args.weights, selectors=own, on_message=lambda line: None)
        return model

    dense = make()
    graphdef, shared = split(dense)
    dense_macs = cost.macs(dense)
    truth, rows = None, []

    def report(name, tokens, work, seconds):
        near = cosine(tokens, truth)
        of_class, of_patches = near[:, 0], near[:, 1:].mean(axis=1)
        rows.append({
            "name": name, "share": work / dense_macs,
            "class_cosine": float(of_class.mean()), "class_interval": interval(of_class),
            "patch_cosine": float(of_patches.mean()), "patch_interval": interval(of_patches),
            "seconds": seconds,
        })  # fmt: skip
        print(rows[-1], file=sys.stderr)

    compared = (
        choices(bool(args.selectors))
        if args.rows == "choices"
        else contestants(tuple(args.budgets))
    )
    for name, fields in compared:
        if share := fields.pop("budget_gmacs", None):
            fields["budget_gmacs"] = share * dense_macs / 1e9
        try:
            model = make(**fields)
        except ConfigError as error:
            print(f"{name}: left out: {error}", file=sys.stderr)
            continue
        own_graph, params = split(model)
        fitted = fit_bypass(model, [fit_images[i : i + 16] for i in range(0, len(fit_images), 16)])
        forward = jax.jit(
            lambda p, x, g=own_graph: set_params(g, p)(x, key=jax.random.key(0)).tokens
        )
        start = time.time()
        tokens = run(forward, params | fitted, images)
        truth = tokens if truth is None else truth
        report(name, tokens, cost.macs(model), time.time() - start)
    for reduce in (5, 10, 14, 17, 20) if args.rows == "budgets" else ():
        for proportional in (True, False):
            forward, work = tome(dense.config, reduce, proportional)
            start = time.time()
            step = jax.jit(lambda p, x, f=forward: f(graphdef, p, x))
            name = f"ToMe, r {reduce}" + (
                "" if proportional else ", without proportional attention"
            )
            report(name, run(step, shared, images), work, time.time() - start)
    json.dump({
        "command": f"python results/no_finetuning.py --rows={args.rows} --weights=dinov2_vits14.safetensors"
        " --fit=DIR --score=DIR",
        "data": f"{args.images} crops of {size} px scored, {args.fit_images} crops of other pictures fitted on",
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "seed": 0, "model": NAME, "results": rows,
    }, sys.stdout, indent=1)  # fmt: skip
    print()


if __name__ == "__main__":
    main()
