"""Figures of selected tokens and of depth, drawn with Pillow. They need no display and no plotting backend."""

import os
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Integer, UInt8
from PIL import Image, ImageDraw, ImageFont

from tosa_jax.paths import png_bytes, write_atomically

_SMALL_SIDE = 112  # pixels; smaller images are enlarged to about this
_LARGE_SIDE = 336  # pixels; larger images are reduced to about this
_GRID_FROM = 6  # pixels; narrower patches get no grid lines, which would hide them
_KEPT_LIGHT = 0.25  # share of its own colour that a bypassed patch keeps
_GAP = 10
_FONT_SIZE = 13
_TEXT_HEIGHT = 20
_PAPER, _INK, _OUTLINE = (255, 255, 255), (40, 40, 40), (200, 60, 30)
_NOT_MEASURED = np.uint8(128)
_LANCZOS = Image.Resampling.LANCZOS
_SCORE_COLOURS = (
    (16, 14, 54),
    (38, 56, 112),
    (32, 108, 126),
    (48, 160, 112),
    (160, 202, 70),
    (250, 232, 80),
)
_BAR_HEIGHT = 12
_FADE_TO, _GRID_DEPTH = (
    225.0,
    20.0,
)  # grey levels; paler than most images, darker than the white background


def selected_tokens_figure(
    images: UInt8[np.ndarray, "b height width c"],
    selections: Sequence[Integer[np.ndarray, "b _"]],
    *,
    grid: tuple[int, int],
    num_prefix_tokens: int,
    titles: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    scores: Sequence[Float[np.ndarray, "b _"]] | None = None,
) -> UInt8[np.ndarray, "rows columns 3"]:
    """One row an image: the image, then one panel a selection in which bypassed patches are faded.

    Args:
        images: uint8 [b, height, width, 1 or 3].
        selections: one int [b, s] a selection: indices into the tokens, prefix included.
        grid: rows and columns of patches; they must divide the image size.
        num_prefix_tokens: number of prefix tokens, which come first and have no place in the image.
        titles: one text a column, the input's first; None: "input", "selection 1", ...
        labels: one text an image, written below it.
        scores: one float [b, tokens] a selection, drawn in a second row an image, from dark (low) to light (high).

    Returns:
        The figure, uint8 RGB.

    Raises:
        ValueError: shapes, indices or texts do not fit together.
    """
    titles = titles or ["input", *(f"selection {i + 1}" for i in range(len(selections)))]
    _check(images, selections, grid, num_prefix_tokens, titles, labels)
    rows = []
    for row, image in enumerate(images):
        picture = _resize(image, grid)
        panels = [picture]
        for selection in selections:
            panels.append(_fade(picture, _patch_mask(selection[row], grid, num_prefix_tokens)))
        rows.append(panels)
        if scores is not None:
            key = _colour_key(picture.shape)
            maps = [_score_map(x[row, num_prefix_tokens:].reshape(grid), key.shape) for x in scores]
            rows.append([key, *maps])
    if labels is not None and scores is not None:
        labels = [text for label in labels for text in ("", label)]
    return _assemble(rows, titles, labels)


def depth_panel(
    images: UInt8[np.ndarray, "b height width c"],
    depth: Float[np.ndarray, "b height width"],
    *,
    truth: Float[np.ndarray, "b height width"] | None = None,
    selections: Sequence[Integer[np.ndarray, "b _"]] = (),
    grid: tuple[int, int],
    num_prefix_tokens: int,
    titles: Sequence[str] = (),
    labels: Sequence[str] | None = None,
    unit: str = " m",
) -> UInt8[np.ndarray, "rows columns 3"]:
    """One row an image: the image, the depth (with truth also the true depth and the error), each selection.

    Args:
        images: uint8 [b, height, width, 1 or 3].
        depth: the prediction in metres, at the images' size.
        truth: metres, 0 where nothing was measured; these pixels are grey. Truth and prediction of a row have the
            same colour scale: near is blue, far is red.
        selections: one int [b, s] a selection: indices into the tokens, prefix included.
        grid: rows and columns of patches.
        num_prefix_tokens: number of prefix tokens, which come first and have no place in the image.
        titles: one text a selection; empty: "selection 1", ...
        labels: one text a row, written below it; None: the range of depth and the mean relative error.
        unit: of that range, "" for relative depth.

    Returns:
        The figure, uint8 RGB.

    Raises:
        ValueError: shapes, indices or texts do not fit together.
    """
    titles = list(titles) or [f"selection {i + 1}" for i in range(len(selections))]
    columns = ["input", "true depth", "depth", "error"] if truth is not None else ["input", "depth"]
    patch = max(1, _LARGE_SIDE // max(grid))
    size = (grid[1] * patch, grid[0] * patch)
    fitted = [np.asarray(Image.fromarray(_rgb(x)).resize(size, _LANCZOS)) for x in images]
    _check(np.stack(fitted), selections, grid, num_prefix_tokens, ["", *titles], labels)
    rows, notes = [], []
    for row, picture in enumerate(fitted):
        seen = depth[row] if truth is None else truth[row][truth[row] > 0]
        near, far = (float(seen.min()), float(seen.max())) if seen.size else (0.0, 1.0)
        shown = [colour_map(depth[row], near, far)]
        note = f"{near:.2f} to {far:.2f}{unit}"
        if truth is not None:
            measured = truth[row] > 0
            error = np.abs(depth[row] - truth[row]) / np.where(measured, truth[row], 1)
            grey = ~measured[..., None]
            true_map = np.where(grey, _NOT_MEASURED, colour_map(truth[row], near, far))
            shown = [true_map, *shown, np.where(grey, _NOT_MEASURED, colour_map(error, 0, 0.5))]
            note += f", mean error {100 * error[measured].mean():.1f} %" if measured.any() else ""
        nearest = [Image.fromarray(x).resize(size, Image.Resampling.NEAREST) for x in shown]
        masks = [_patch_mask(x[row], grid, num_prefix_tokens) for x in selections]
        rows.append([picture, *map(np.asarray, nearest), *(_fade(picture, m) for m in masks)])
        notes.append(note)
    return _assemble(rows, columns + titles, labels or notes)


def colour_map(
    values: Float[np.ndarray, "height width"], low: float, high: float
) -> UInt8[np.ndarray, "height width 3"]:
    """Values as colours of matplotlib's map "turbo": blue at `low` or below, red at `high` or above."""
    import matplotlib

    share = (values - low) / max(high - low, 1e-9)
    return matplotlib.colormaps["turbo"](share.clip(0, 1), bytes=True)[..., :3]


def save_depth_png(
    path: str | os.PathLike, depth: Float[np.ndarray, "height width"], scale: float = 1000
) -> None:
    """Writes depth as a 16-bit PNG: by default metres in millimetres, or with `scale` values for 1.

    Values that are not finite or not above 0 become 0; those above the largest, 65.535 m, become that.
    """
    known = np.where(np.isfinite(depth) & (depth > 0), depth, 0)
    values = (known * scale).round().clip(0, 2**16 - 1).astype(np.uint16)
    write_atomically(path, png_bytes(values))


def write_png(path: str | os.PathLike, array: UInt8[np.ndarray, "rows columns 3"]) -> None:
    """Writes a uint8 RGB image as a PNG, atomically."""
    write_atomically(path, png_bytes(array))


def _check(
    images: np.ndarray,
    selections: Sequence[np.ndarray],
    grid: tuple[int, int],
    num_prefix_tokens: int,
    titles: Sequence[str],
    labels: Sequence[str] | None,
) -> None:
    size = images.shape[1:3]
    if size[0] % grid[0] or size[1] % grid[1]:
        raise ValueError(f"a grid of {grid} patches does not divide images of {size} pixels")
    if len(titles) != 1 + len(selections):
        raise ValueError(f"{len(titles)} titles for {1 + len(selections)} columns")
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"{len(labels)} labels for {len(images)} images")
    tokens = num_prefix_tokens + grid[0] * grid[1]
    for selection in selections:
        if len(selection) != len(images):
            raise ValueError(f"a selection of {len(selection)} rows for {len(images)} images")
        if selection.size and not 0 <= selection.min() <= selection.max() < tokens:
            raise ValueError(f"a selection has indices outside the {tokens} tokens")


def _patch_mask(indices: np.ndarray, grid: tuple[int, int], num_prefix_tokens: int) -> np.ndarray:
    """Whether each patch of the grid is selected, bool [rows, columns]."""
    selected = np.zeros(grid[0] * grid[1], bool)
    selected[indices[indices >= num_prefix_tokens] - num_prefix_tokens] = True
    return selected.reshape(grid)


def _rgb(image: np.ndarray) -> np.ndarray:
    return np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image


def _resize(image: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The image as RGB, enlarged or reduced to between `_SMALL_SIDE` and `_LARGE_SIDE` pixels or so.

    Every patch gets a whole number of pixels.
    """
    image = _rgb(image)
    side = max(image.shape[:2])
    if side < _SMALL_SIDE:
        factor = round(_SMALL_SIDE / side)
        return image.repeat(factor, axis=0).repeat(factor, axis=1)
    if side > _LARGE_SIDE:
        patch = max(1, _LARGE_SIDE // max(grid))
        size = (grid[1] * patch, grid[0] * patch)
        return np.asarray(Image.fromarray(image).resize(size, _LANCZOS))
    return image


def _fade(picture: np.ndarray, selected: np.ndarray) -> np.ndarray:
    """Fades the patches that are not selected, and outlines the selected regions.

    Fading alone does not show on pale images; the outline alone does not tell which side is selected.
    """
    height, width = (p // g for p, g in zip(picture.shape, selected.shape, strict=False))
    mask = selected.repeat(height, axis=0).repeat(width, axis=1)
    panel = picture.astype(np.float32)
    panel[~mask] = _KEPT_LIGHT * panel[~mask] + (1 - _KEPT_LIGHT) * _FADE_TO
    if min(height, width) >= _GRID_FROM:
        lines = np.zeros_like(mask)
        lines[height::height] = lines[:, width::width] = True
        panel[lines & ~mask] -= _GRID_DEPTH
        # The outline is drawn on bypassed pixels, so that selected patches stay as they are.
        wide = np.pad(mask, 1)
        near = wide[:-2, 1:-1] | wide[2:, 1:-1] | wide[1:-1, :-2] | wide[1:-1, 2:]
        panel[near & ~mask] = _OUTLINE
    return panel.clip(0, 255).round().astype(np.uint8)


def _score_map(scores: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Scores [rows, columns] as colours at the size of an image, scaled from the 2nd to the 98th percentile.

    Scaled to the maximum, one patch of very high score would make all others equally dark.
    """
    low, high = np.percentile(scores, (2, 98))
    level = ((scores - low) / max(high - low, 1e-12)).clip(0, 1)
    height, width = (p // g for p, g in zip(shape, scores.shape, strict=False))
    return _colours(level).repeat(height, axis=0).repeat(width, axis=1)


def _colours(level: np.ndarray) -> np.ndarray:
    """Levels in [0, 1] as uint8 colours, from dark blue over green to yellow."""
    stops = np.linspace(0, 1, len(_SCORE_COLOURS))
    channels = [np.interp(level, stops, channel) for channel in np.transpose(_SCORE_COLOURS)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def _colour_key(shape: tuple[int, ...]) -> np.ndarray:
    """A panel of the size of an image with the colour scale of the score maps."""
    height, width = shape[:2]
    panel = Image.new("RGB", (width, height), _PAPER)
    draw, font = ImageDraw.Draw(panel), ImageFont.load_default(size=_FONT_SIZE)
    bar = _colours(np.linspace(0, 1, width))[None].repeat(_BAR_HEIGHT, axis=0)
    middle = height // 2
    panel.paste(Image.fromarray(bar), (0, middle - _BAR_HEIGHT // 2))
    draw.text((0, middle - _BAR_HEIGHT), "token score", _INK, font, anchor="lb")
    draw.text((0, middle + _BAR_HEIGHT), "low", _INK, font, anchor="lt")
    draw.text((width - 1, middle + _BAR_HEIGHT), "high", _INK, font, anchor="rt")
    return np.asarray(panel)


def _assemble(
    rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str], labels: Sequence[str] | None
) -> np.ndarray:
    font = ImageFont.load_default(size=_FONT_SIZE)
    labels = labels or [""] * len(rows)
    height, width = rows[0][0].shape[:2]
    # A long title or label widens the figure, so that it is not cut.
    across = max([width, *(int(font.getlength(title)) + 2 for title in titles)]) + _GAP
    longest = max([0, *(int(font.getlength(label)) + 2 for label in labels)])
    down = [height + _GAP + (_TEXT_HEIGHT if label else 0) for label in labels]
    size = (
        max(_GAP + across * len(titles), longest + 2 * _GAP),
        _GAP + _TEXT_HEIGHT + sum(down),
    )
    figure = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(figure)
    for column, title in enumerate(titles):
        draw.text((_GAP + column * across, _GAP), title, _INK, font, anchor="lt")
    top = _GAP + _TEXT_HEIGHT
    for panels, label, step in zip(rows, labels, down, strict=True):
        for column, panel in enumerate(panels):
            figure.paste(Image.fromarray(panel), (_GAP + column * across, top))
        draw.text((_GAP, top + height + 4), label, _INK, font, anchor="lt")
        top += step
    return np.asarray(figure)
