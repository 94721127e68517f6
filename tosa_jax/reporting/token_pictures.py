"""The figures of what a network selected and predicts: its selections named by layer, drawn by `figures`."""

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


def draw_depth(
    config: ViTConfig,
    images: np.ndarray,
    depth: np.ndarray,
    selected: Sequence[np.ndarray],
    *,
    truth: np.ndarray | None = None,
) -> np.ndarray:
    """A row an image: the picture, the true depth and the error where there is truth, the depth, each selection.

    images    uint8 [b height width 1 or 3].
    depth     metres, float [b height width]; `truth` likewise, 0 where nothing was measured.
    selected  one int [b s] a selection.

    Returns uint8 [rows columns 3].
    """
    return figures.depth_panel(
        images,
        depth,
        truth=truth,
        selections=selected,
        grid=config.grid_of(images.shape[1:3]),
        num_prefix_tokens=config.num_prefix_tokens,
        titles=selection_titles(config, selected),
    )


def selection_titles(config: ViTConfig, selected: Sequence[np.ndarray]) -> list[str]:
    """The layer that opens each selection, counted from 1, and how many patches it takes."""
    opens = [spec.layer for spec in layer_specs(config) if spec.opens]
    if len(opens) != len(selected):  # a plan in which not all that select report it
        return [f"selection {i + 1}" for i in range(len(selected))]
    counts = [x.shape[1] - config.num_prefix_tokens for x in selected]
    return [
        f"layer {i + 1}: {k} of {config.num_patches}" for i, k in zip(opens, counts, strict=True)
    ]
