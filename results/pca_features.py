"""Draws the patch features of DINOv2 as colours: by the dense network, and with fewer tokens.

    python results/pca_features.py --weights=dinov2_vits14.safetensors --plan=FILE.json --out=features.png PICTURE ...

The colours are the first three principal components of the dense network's patches of all pictures. Both networks'
features are projected on the same components, so that equal colours are equal features. Nothing is trained.
"""

import argparse

import jax
import matplotlib
import numpy as np
from flax import nnx

import tosa_jax
from tosa_jax.data.decoding import Preprocess
from tosa_jax.models import cost
from tosa_jax.models.params import set_params, split

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

NAME = "vit_small_patch14_dinov2"
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def features(weights: str, size: int, inputs: np.ndarray, **fields) -> tuple[np.ndarray, float]:
    """Patch features [pictures rows columns d], and GMACs of a picture."""
    model = tosa_jax.create_model(NAME, num_classes=0, image_size=size, rngs=nnx.Rngs(0), **fields)
    tosa_jax.load_pretrained(model, weights, on_message=lambda line: None)
    graphdef, params = split(model)
    forward = jax.jit(lambda p, x: set_params(graphdef, p)(x).tokens)
    tokens = np.concatenate([np.asarray(forward(params, x[None])) for x in inputs])
    patches = tokens[:, model.config.num_prefix_tokens :]
    return patches.reshape(len(inputs), *model.config.grid, -1), cost.gmacs(model.config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", required=True)
    parser.add_argument("--plan", required=True, help="a file of python -m tosa_jax.budget")
    parser.add_argument("--image_size", type=int, default=518)
    parser.add_argument("--out", required=True)
    parser.add_argument("pictures", nargs="+")
    args = parser.parse_args()
    form = Preprocess(image_size=args.image_size, channels=3, resize="crop", crop_pct=1.0)
    images = np.stack([form.decode(open(path, "rb").read()) for path in args.pictures])
    inputs = ((images / 255 - MEAN) / STD).astype(np.float32)
    dense, whole = features(args.weights, args.image_size, inputs)
    fewer, part = features(args.weights, args.image_size, inputs, plan=args.plan)
    flat = dense.reshape(-1, dense.shape[-1])
    _, _, axes = np.linalg.svd(flat - flat.mean(axis=0), full_matrices=False)
    colours = [(x - flat.mean(axis=0)) @ axes[:3].T for x in (dense, fewer)]
    low, high = np.percentile(colours[0].reshape(-1, 3), [1, 99], axis=0)
    columns = [images, *(np.clip((x - low) / (high - low), 0, 1) for x in colours)]
    titles = [
        "input",
        f"DINOv2-S/14: {whole:.0f} GMACs",
        f"{part / whole:.2f} of them, not fine-tuned",
    ]
    figure, axes = plt.subplots(
        len(images), 3, figsize=(7.2, 2.45 * len(images) + 0.2), squeeze=False, layout="constrained"
    )
    for column, (pictures, title) in enumerate(zip(columns, titles, strict=True)):
        axes[0, column].set_title(title, fontsize=10)
        for row, picture in enumerate(pictures):
            axes[row, column].imshow(picture, interpolation="nearest")
            axes[row, column].axis("off")
    figure.savefig(args.out, dpi=100)


if __name__ == "__main__":
    main()
