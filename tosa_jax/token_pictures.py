"""The figure of what a network selected: its selections named by layer, drawn by `figures`."""

from collections.abc import Sequence

import numpy as np

from tosa_jax import figures
from tosa_jax.models.plan import places
from tosa_jax.models.vit_config import ViTConfig


def draw_tokens(
    config: ViTConfig,
    images: np.ndarray,
    selected: Sequence[np.ndarray],
    *,
    scores: Sequence[np.ndarray] | None = None,
    labels: Sequence[str] | None = None,
) -> np.ndarray:
    """A row an image: the picture, then each selection with bypassed tokens dimmed; below them the score maps.

    images    uint8 [b height width 1 or 3], as the network took them.
    selected  one int [b s] a selection, `scores` one float [b n]: the fields of a model's `Output`.
    labels    one text an image.

    Returns uint8 [rows columns 3].
    """
    return figures.selected_tokens_figure(
        np.asarray(images),
        tuple(map(np.asarray, selected)),
        grid=config.grid,
        num_prefix_tokens=config.num_prefix_tokens,
        titles=["input", *selection_titles(config, selected)],
        labels=labels,
        scores=None if scores is None else tuple(np.asarray(x, np.float32) for x in scores),
    )


def selection_titles(config: ViTConfig, selected: Sequence[np.ndarray]) -> list[str]:
    """The layer that opens each selection, counted from 1, and how many patches it takes."""
    opens = [place.layer for place in places(config) if place.opens]
    if len(opens) != len(selected):  # a plan in which not all that select report it
        return [f"selection {i + 1}" for i in range(len(selected))]
    counts = [x.shape[1] - config.num_prefix_tokens for x in selected]
    return [
        f"layer {i + 1}: {k} of {config.num_patches}" for i, k in zip(opens, counts, strict=True)
    ]
