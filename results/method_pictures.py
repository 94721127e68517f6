"""Draws docs/method_pictures.png: which tokens each method has before the last layer, on one photograph.

    python results/method_pictures.py --weights=dinov2_vits14.safetensors --out=docs/method_pictures.png flower.jpg

DINOv2-S/14 at 224 pixels, nothing trained, each method at --target of the dense multiply-adds where it can have that.
A patch that is a token of its own is as in the photograph. Patches of one token have one colour, their mean. Patches
that no token stands for there (bypassed or dropped) are faded. Methods whose choice has to be trained are left out.
"""

import argparse
import dataclasses

import jax
import numpy as np
from PIL import Image, ImageDraw

from tosa_jax.data.decoding import Preprocess
from tosa_jax.errors import ConfigError
from tosa_jax.inference import loading
from tosa_jax.models.encoder import run_layers
from tosa_jax.models.method import METHODS
from tosa_jax.models.params import set_params, split
from tosa_jax.models.token_state import TokenState
from tosa_jax.models.variants import variant_config
from tosa_jax.ops.token_selection import Selection
from tosa_jax.performance.comparison import contender, solved

NAME = "vit_small_patch14_dinov2"
SHOWN = (
    "redundancy", "previous", "class_attention", "random", "tome", "evit", "diffrate", "ppt", "mctf", "ats",
    "expedit:layers=2-11", "ailurus", "psvit",
)  # fmt: skip
SIDE, COLUMNS, LABEL = 150, 7, 16  # pixels of a cell, cells a row, pixels of its label


def groups(state: TokenState, number: int) -> tuple[np.ndarray, np.ndarray]:
    """For each of `number` tokens the one that stands for it, and whether any does; of the first image."""
    group, there = np.arange(number), np.ones(number, bool)
    for reduction in (*state.persisting, *state.open):
        source = reduction.source
        if isinstance(source, Selection):
            into, stays = np.asarray(source.slot[0]), np.asarray(source.mask[0])
            if reduction.before is not None and reduction.entered is None:
                kept = stays
            elif reduction.weights is not None:
                kept = stays | (np.asarray(reduction.weights[0]) > 0)
            else:
                kept = np.ones_like(stays)
        else:
            into = np.asarray(reduction.spread(np.eye(source.weights.shape[1])[None])[0]).argmax(axis=1)  # fmt: skip
            kept = np.ones(len(into), bool)
        there &= kept[group]
        group = into[group]
    return group, there


def tokens_of(args: argparse.Namespace, text: str, image: np.ndarray):
    """The groups of the patches before the last layer; of methods that choose in single layers, the last choice."""
    dense = variant_config(NAME, image_size=224, num_classes=0)
    row = contender(text)
    try:
        config = solved(dense, row, args.target)
    except ConfigError:
        method = METHODS[row.method]
        plan = variant_config(NAME, image_size=224, plan=method.plan).plan
        config = dataclasses.replace(dense, plan=plan, keep_rate=0.8, **method.fields)
    fields = config.to_fields()
    rate = fields.pop("keep_rate")
    loaded = loading.from_pretrained(
        NAME, args.weights, None, rate, None, lambda line: None, **fields
    )
    graphdef, params = split(loaded["model"])
    mean, std = (np.asarray(loaded[name], np.float32) for name in ("mean", "std"))

    @jax.jit
    def before_the_last(params, images):
        model = set_params(graphdef, params)
        state = TokenState(model.embed(images))
        return run_layers(
            config, model.blocks[:-1], model.kinds[:-1], state, key=jax.random.key(0), train=False
        )

    state = before_the_last(params, ((image[None] / 255 - mean) / std).astype(np.float32))
    number, prefix = config.num_tokens, config.num_prefix_tokens
    if state.persisting or state.open:
        group, there = groups(state, number)
    else:
        group, there = np.arange(number), np.isin(np.arange(number), np.asarray(state.selected[-1][0]))  # fmt: skip
    return group[prefix:], there[prefix:], config.grid


def drawn(
    image: np.ndarray, group: np.ndarray, there: np.ndarray, grid: tuple[int, int]
) -> np.ndarray:
    """The photograph, with patches of one token in their mean colour, and patches without one faded."""
    rows, columns = grid
    patch = image.shape[0] // rows
    cells = image.reshape(rows, patch, columns, patch, 3).transpose(0, 2, 1, 3, 4)
    cells = cells.reshape(rows * columns, patch, patch, 3).astype(np.float32)
    for number in np.unique(group):
        members = (group == number) & there
        if members.sum() > 1:
            cells[members] = cells[members].mean(axis=(0, 1, 2))
    cells[~there] = 0.15 * cells[~there] + 0.85 * 255
    cells = cells.reshape(rows, columns, patch, patch, 3).transpose(0, 2, 1, 3, 4)
    return cells.reshape(image.shape).round().astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", required=True)
    parser.add_argument("--target", type=float, default=0.65)
    parser.add_argument("--out", required=True)
    parser.add_argument("picture")
    args = parser.parse_args()
    with open(args.picture, "rb") as file:
        image = Preprocess(image_size=224, channels=3, resize="crop", crop_pct=1.0).decode(file.read())  # fmt: skip
    cells = [("the photograph", image)]
    for text in SHOWN:
        group, there, grid = tokens_of(args, text, image)
        label = METHODS[text.partition(":")[0]].short_label
        count = len(np.unique(group[there]))
        print(f"{label}: {count} tokens for {there.sum()} of {len(there)} patches", flush=True)
        cells.append((f"{label}: {count}", drawn(image, group, there, grid)))
    down = -(-len(cells) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (SIDE + 4), down * (SIDE + LABEL + 4)), "white")
    write = ImageDraw.Draw(sheet)
    for i, (label, picture) in enumerate(cells):
        x, y = i % COLUMNS * (SIDE + 4) + 2, i // COLUMNS * (SIDE + LABEL + 4)
        write.text((x, y + 2), label, fill="black")
        small = Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        sheet.paste(small, (x, y + LABEL))
    sheet.quantize(96, dither=Image.Dither.NONE).save(args.out, optimize=True)


if __name__ == "__main__":
    main()
