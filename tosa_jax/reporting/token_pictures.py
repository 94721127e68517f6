"""Figures of a model's selections and depth: chooses grid and titles by its configuration; `figures` draws them."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from tosa_jax.models.plan import layer_specs
from tosa_jax.models.vit_config import ViTConfig
from tosa_jax.reporting import figures


def draw_tokens(
    config: ViTConfig,
    images: np.ndarray,
    selected: Sequence[np.ndarray],
    *,
    scores: Sequence[np.ndarray] | None = None,
    labels: Sequence[str] | None = None,
) -> np.ndarray:
    """One row an image: the image, then each selection with bypassed patches faded; below them the score maps.

    images    uint8 [b, height, width, 1 or 3], the model's input.
    selected  one int [b, s] a selection, as in a model's `Output`.
    scores    one float [b, n] a selection, as in a model's `Output`; None: no score maps.
    labels    one text an image.

    Of a model with `max_patches` the images of one call have one size: all have as much padding, which is not drawn.

    Returns uint8 [rows, columns, 3].
    """
    if config.max_patches:
        config = dataclasses.replace(config, image_size=images.shape[1:3], max_patches=0)
        selected = [x[:, np.asarray(x[0]) >= 0] for x in selected]
        scores = None if scores is None else [x[:, : config.num_tokens] for x in scores]
    return figures.selected_tokens_figure(
        np.asarray(images),
        tuple(map(np.asarray, selected)),
        grid=config.grid,
        num_prefix_tokens=config.num_prefix_tokens,
        titles=["input", *selection_titles(config, selected)],
        labels=labels,
        scores=None if scores is None else tuple(np.asarray(x, np.float32) for x in scores),
    )


def draw_depth(
    config: ViTConfig,
    images: np.ndarray,
    depth: np.ndarray,
    selected: Sequence[np.ndarray],
    *,
    truth: np.ndarray | None = None,
    unit: str = " m",
) -> np.ndarray:
    """One row an image: the image, the depth (with truth also the true depth and the error), each selection.

    images    uint8 [b, height, width, 1 or 3].
    depth     float [b, height, width] in metres.
    selected  one int [b, s] a selection.
    truth     float [b, height, width] in metres, 0 where nothing was measured; None: no truth.
    unit      of the range written below; "" for relative depth.

    Returns uint8 [rows, columns, 3].
    """
    return figures.depth_panel(
        images,
        depth,
        truth=truth,
        selections=selected,
        grid=config.grid_of(images.shape[1:3]),
        num_prefix_tokens=config.num_prefix_tokens,
        titles=selection_titles(config, selected),
        unit=unit,
    )


def selection_titles(config: ViTConfig, selected: Sequence[np.ndarray]) -> list[str]:
    """One title a selection: its first layer, counted from 1, and how many patches are selected."""
    opens = [spec.layer for spec in layer_specs(config) if spec.opens]
    if len(opens) != len(selected):  # some layers of this plan select tokens without reporting them
        return [f"selection {i + 1}" for i in range(len(selected))]
    counts = [x.shape[1] - config.num_prefix_tokens for x in selected]
    return [
        f"layer {i + 1}: {k} of {config.num_patches}" for i, k in zip(opens, counts, strict=True)
    ]
