"""k-nearest neighbours on Fashion-MNIST with real DINOv2-S features: dense, and at three quarters of the multiply-adds.

    python results/knn.py --weights=FILE --data=/usr/share/datasets/fashion-mnist > results/knn.json

The class token after the final norm, 20 neighbours weighted by exp(cosine / .07), as DINO's evaluation does (Caron et
al. 2021). Nothing is trained or fitted. Images are enlarged to 112 pixels, which gives 64 patches.
"""

import argparse
import json
import sys

import jax
import numpy as np
from flax import nnx
from PIL import Image

import tosa_jax
from tosa_jax import cost
from tosa_jax.data.builders.idx import read_split
from tosa_jax.devices import describe_device, versions
from tosa_jax.models.params import set_params, split

NAME, SIZE, BATCH = "vit_small_patch14_dinov2", 112, 50
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
NEIGHBOURS, TEMPERATURE = 20, 0.07


def features(forward, params, images: np.ndarray) -> np.ndarray:
    """Unit vectors of the class token."""
    found = []
    for i in range(0, len(images), BATCH):
        large = [
            np.asarray(Image.fromarray(x).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
            for x in images[i : i + BATCH]
        ]
        grey = np.stack(large)[..., None] / 255
        found.append(np.asarray(forward(params, ((grey - MEAN) / STD).astype(np.float32))))
    found = np.concatenate(found)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def accuracy(train: np.ndarray, labels: np.ndarray, test: np.ndarray, truth: np.ndarray) -> float:
    """Share of test images whose neighbours vote for their class."""
    cosines = test @ train.T
    nearest = np.argsort(-cosines, axis=1)[:, :NEIGHBOURS]
    weights = np.exp(np.take_along_axis(cosines, nearest, axis=1) / TEMPERATURE)
    votes = np.zeros((len(test), labels.max() + 1))
    np.add.at(votes, (np.arange(len(test))[:, None], labels[nearest]), weights)
    return float((votes.argmax(axis=1) == truth).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", required=True)
    parser.add_argument("--data", required=True, help="folder of Fashion-MNIST's IDX files")
    parser.add_argument("--train", type=int, default=3000)
    parser.add_argument("--test", type=int, default=2000)
    args = parser.parse_args()
    (images, labels), (test_images, truth) = (
        [x[:count] for x in read_split(args.data, name)]
        for name, count in (("train", args.train), ("test", args.test))
    )
    dense_macs, rows = None, []
    for share in (1.0, 0.87, 0.75):
        fields = {"num_classes": 1, "image_size": SIZE}
        if dense_macs:
            every = ("standard",) + ("redundancy",) * 11
            fields |= {"plan": every, "budget": "linear", "budget_gmacs": share * dense_macs / 1e9}
        model = tosa_jax.create_model(NAME, rngs=nnx.Rngs(0), **fields)
        tosa_jax.load_pretrained(model, args.weights, on_message=lambda line: None)
        dense_macs = dense_macs or cost.macs(model)
        graphdef, params = split(model)
        forward = jax.jit(lambda p, x, g=graphdef: set_params(g, p)(x).tokens[:, 0])
        found = accuracy(
            features(forward, params, images), labels, features(forward, params, test_images), truth
        )
        name = "redundancy, linear" if share < 1 else "dense"
        rows.append({"name": name, "share": cost.macs(model) / dense_macs, "accuracy": found})
        print(rows[-1], file=sys.stderr)
    json.dump({
        "command": "python results/knn.py --weights=dinov2_vits14.safetensors --data=/usr/share/datasets/fashion-mnist",
        "data": f"Fashion-MNIST, the first {args.train} training and {args.test} test images, {SIZE} px",
        "device": describe_device(), "versions": versions(), "model": NAME, "results": rows,
    }, sys.stdout, indent=1)  # fmt: skip
    print()


if __name__ == "__main__":
    main()
