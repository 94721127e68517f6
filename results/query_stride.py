"""What a selector loses that reads every second, fourth or eighth query row, on real DINOv2 weights.

    python results/query_stride.py --weights=dinov2_vits14.safetensors --score=DIR > results/query_stride.json

`same` is the share of the patches chosen from all rows of the dense network's maps that are chosen from fewer rows too,
for the layers before a selection. Cosines are those of the final tokens of a network with six selective layers to the
dense network's, with untrained selectors, which predict the map of the layer before. No fine-tuning.
"""

import argparse
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from no_finetuning import NAME, closeness, cosine, crops, interval, make

from tosa_jax.data.image_files import find_images
from tosa_jax.distributed.devices import describe_device, versions
from tosa_jax.models import cost
from tosa_jax.models.params import set_params, split
from tosa_jax.ops.attention import walk_map
from tosa_jax.ops.token_selection import overlap
from tosa_jax.performance.comparison import features

STRIDES, KEEPS = (1, 2, 4, 8), (0.5, 0.3)


def column_sums(model, images):
    """Column sums [layers strides b n] of the maps of the layers before a selection; mean over heads."""
    tokens, found = model.embed(images), []

    def attend(query, key, value):
        def summarise(logits, attn_map, _):
            parts = [attn_map[:, :, ::stride].sum(axis=2).mean(axis=1) for stride in STRIDES]
            return jnp.stack(parts)

        return walk_map(query, key, value, summarise)

    for block in model.blocks:
        tokens, sums = block(tokens, attend)
        found.append(sums)
    return jnp.stack(found[:-1:2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", required=True)
    parser.add_argument("--score", type=Path, required=True, help="pictures to score on")
    parser.add_argument("--images", type=int, default=64)
    args = parser.parse_args()
    args.image_size, args.selectors, args.fit = 224, None, None
    images = crops(args.score, args.images, args.image_size)
    graphdef, params = split(dense := make(args))
    prefix, patches = dense.config.num_prefix_tokens, dense.config.num_patches
    sums = jax.jit(lambda p, x: column_sums(set_params(graphdef, p), x))
    parts = [sums(params, images[i : i + 16]) for i in range(0, len(images), 16)]
    sums = jnp.concatenate(parts, axis=2)
    rows = []
    for at, stride in enumerate(STRIDES):
        row = {"stride": stride}
        for keep in KEEPS:
            count = prefix + round(keep * patches)
            same = jnp.stack([overlap(x[at], x[0], count, prefix) for x in sums]).mean(axis=0)
            row[f"same_{keep}"] = float(same.mean())
            row[f"same_{keep}_interval"] = interval(np.asarray(same))
        rows.append(row)
    forward = jax.jit(lambda p, x: set_params(graphdef, p)(x).tokens)
    truth = features(forward, params, images)
    for row in rows:
        model = make(args, plan="selective", keep_rate=0.5, selector_query_stride=row["stride"])
        own, weights = split(model)
        forward = jax.jit(lambda p, x, own=own: set_params(own, p)(x).tokens)
        near = cosine(features(forward, weights, images), truth)
        row["gmacs"] = cost.gmacs(model.config)
        row |= closeness(near[:, 0], near[:, 1:].mean(axis=1))
        print(row, file=sys.stderr)
    json.dump({
        "command": "python results/query_stride.py --weights=dinov2_vits14.safetensors"
        f" --score=DIR --images={args.images}",
        "data": f"{args.images} crops of {args.image_size} px of the pictures under --score",
        "device": describe_device(), "versions": versions(), "seed": 0, "model": NAME,
        "results": rows, "pictures": [Path(x).name for x in find_images([str(args.score)])],
    }, sys.stdout, indent=1)  # fmt: skip
    print()


if __name__ == "__main__":
    main()
