"""Draws the README's picture: the tokens that a network with real weights selects of photographs.

    python results/selected_tokens.py --weights=dinov2_vits14.safetensors --out=docs/selected_tokens.png PICTURE ...

DINOv2-S/14 at 224 pixels without fine-tuning; --plan and --keep_rate as in `create_model`. Without --selectors those
of the plan "selective" are untrained, and choose by the map of the layer before.
"""

import argparse

import jax
import numpy as np
from flax import nnx

import tosa_jax
from tosa_jax.data.decoding import Preprocess
from tosa_jax.models.params import set_params, split
from tosa_jax.reporting.figures import selected_tokens_figure, write_png

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", required=True)
    parser.add_argument("--selectors")
    parser.add_argument("--plan", default="selective")
    parser.add_argument("--keep_rate", type=float, default=0.5)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 3, 5], help="selections drawn")
    parser.add_argument("--out", required=True)
    parser.add_argument("pictures", nargs="+")
    args = parser.parse_args()
    model = tosa_jax.create_model(
        "vit_small_patch14_dinov2", num_classes=1, image_size=224, plan=args.plan,
        keep_rate=args.keep_rate, rngs=nnx.Rngs(0),
    )  # fmt: skip
    tosa_jax.load_pretrained(model, args.weights, selectors=args.selectors)
    form = Preprocess(image_size=224, channels=3, resize="crop", crop_pct=1.0)
    images = np.stack([form.decode(open(path, "rb").read()) for path in args.pictures])
    graphdef, params = split(model)
    inputs = ((images / 255 - MEAN) / STD).astype(np.float32)
    out = jax.jit(lambda p, x: set_params(graphdef, p)(x))(params, inputs)
    figure = selected_tokens_figure(
        images,
        [np.asarray(out.selected[i]) for i in args.layers],
        grid=model.config.grid,
        num_prefix_tokens=model.config.num_prefix_tokens,
        titles=["input", *(f"layer {2 * i + 2}" for i in args.layers)],
    )
    write_png(args.out, figure)


if __name__ == "__main__":
    main()
