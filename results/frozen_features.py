"""Frozen DINOv2-S features on Fashion-MNIST: neighbours and a linear probe, dense and with fewer multiply-adds.

    python results/frozen_features.py --weights=FILE --data=/usr/share/datasets/fashion-mnist > RECORD

Neighbours: the class token after the final norm, 20 of them weighted by exp(cosine / .07), as DINO's evaluation does
(Caron et al. 2021). Probe: logistic regression on the class token and the mean patch, as DINOv2's does (Oquab et al.
2023), standardised. Networks are neither trained nor fitted; both splits go through the same one. Images are enlarged
to `--image_size`; the networks choose by redundancy, with linear budgets. Intervals: 95 %, of the difference to dense,
by resampling test images.
"""

import argparse
import json
import sys
from collections.abc import Iterator

import jax
import numpy as np
from flax import nnx
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import tosa_jax
from tosa_jax.data.builders.idx import read_split
from tosa_jax.distributed.devices import describe_device, versions
from tosa_jax.models import cost
from tosa_jax.models.params import set_params, split

NAME, BATCH = "vit_small_patch14_dinov2", 50
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
NEIGHBOURS, TEMPERATURE = 20, 0.07


def features(forward, params, images: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The class token, and the mean patch, of every image: float32 [images d] each."""
    found = []
    for i in range(0, len(images), BATCH):
        large = [
            np.asarray(Image.fromarray(x).resize((size, size), Image.Resampling.BICUBIC))
            for x in images[i : i + BATCH]
        ]
        grey = np.stack(large)[..., None] / 255
        found.append(jax.device_get(forward(params, ((grey - MEAN) / STD).astype(np.float32))))
    return tuple(np.concatenate(parts) for parts in zip(*found, strict=True))


def neighbours(train: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    """The class that the neighbours of each test image vote for."""
    train, test = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, test))
    cosines = test @ train.T
    nearest = np.argsort(-cosines, axis=1)[:, :NEIGHBOURS]
    weights = np.exp(np.take_along_axis(cosines, nearest, axis=1) / TEMPERATURE)
    votes = np.zeros((len(test), labels.max() + 1))
    np.add.at(votes, (np.arange(len(test))[:, None], labels[nearest]), weights)
    return votes.argmax(axis=1)


def probe(train: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    """The class that a linear probe gives each test image."""
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    return classifier.fit(train, labels).predict(test)


def interval(right: np.ndarray, reference: np.ndarray) -> list[float]:
    """Where the difference of two accuracies on the same images lies in 95 % of their resamples."""
    rows = np.random.default_rng(0).integers(0, len(right), (2000, len(right)))
    difference = right.astype(float) - reference
    return np.percentile(difference[rows].mean(axis=1), [2.5, 97.5]).tolist()


def measure(args: argparse.Namespace) -> Iterator[dict]:
    """A row for the dense network, and one for each share of its multiply-adds."""
    (images, labels), (test_images, truth) = (
        [x[:count] for x in read_split(args.data, name)]
        for name, count in (("train", args.train), ("test", args.test))
    )
    dense_macs, dense_right = 0, {}
    for share in (1.0, *args.shares):
        fields = {"num_classes": 1, "image_size": args.image_size}
        if dense_macs:
            budget = share * dense_macs / 1e9
            fields |= {"plan": "redundancy", "budget": "linear", "budget_gmacs": budget}
        model = tosa_jax.create_model(NAME, rngs=nnx.Rngs(0), **fields)
        tosa_jax.load_pretrained(model, args.weights, on_message=lambda line: None)
        row = {"name": "redundancy, linear" if dense_macs else "dense"}
        dense_macs = dense_macs or cost.macs(model)
        row["share"] = cost.macs(model) / dense_macs
        graphdef, params = split(model)

        def forward(params, images, graphdef=graphdef):
            tokens = set_params(graphdef, params)(images).tokens
            return tokens[:, 0], tokens[:, 1:].mean(axis=1)

        forward = jax.jit(forward)
        train, test = (features(forward, params, x, args.image_size) for x in (images, test_images))
        answers = {
            "neighbours": neighbours(train[0], labels, test[0]),
            "probe": probe(np.hstack(train), labels, np.hstack(test)),
        }
        for how, answer in answers.items():
            right = answer == truth
            row[how] = float(right.mean())
            row[f"{how}_to_dense"] = interval(right, dense_right.setdefault(how, right))
        print(row, file=sys.stderr)
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", required=True)
    parser.add_argument("--data", required=True, help="folder of Fashion-MNIST's IDX files")
    parser.add_argument("--train", type=int, default=3000)
    parser.add_argument("--test", type=int, default=2000)
    parser.add_argument("--image_size", type=int, default=112)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.87, 0.75, 0.65])
    args = parser.parse_args()
    rows = list(measure(args))
    shares = " ".join(map(str, args.shares))
    json.dump({
        "command": "python results/frozen_features.py --weights=dinov2_vits14.safetensors"
        f" --data=/usr/share/datasets/fashion-mnist --image_size={args.image_size} --shares {shares}",
        "data": f"Fashion-MNIST, the first {args.train} training and {args.test} test images, {args.image_size} px",
        "device": describe_device(), "versions": versions(), "model": NAME, "results": rows,
    }, sys.stdout, indent=1)  # fmt: skip
    print()


if __name__ == "__main__":
    main()
