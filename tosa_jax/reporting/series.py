"""How the rows of a report look: their names for people, their place in tables, their colours.

All of it is read from the table of methods. A row that is not in it, of another version or of a method that is not
registered here, keeps its own name and gets a neutral colour.
"""

import colorsys

from tosa_jax.models.method import DENSE, METHODS, table_order

PRETRAINED = "_pretrained"
"""What is added to a method's name for its network before fine-tuning."""


def row_label(row: str) -> str:
    """A row's name in tables."""
    if row == f"{DENSE}{PRETRAINED}":
        return f"{METHODS[DENSE].short_label}, as pretrained"
    return METHODS[row].label if row in METHODS else row


def short_label(row: str) -> str:
    """A row's name in charts and legends."""
    method = method_name(row)
    return METHODS[method].short_label if method in METHODS else row


def method_name(row: str) -> str:
    """The method that a row shows: that of "dense_pretrained" is "dense"."""
    return row.removesuffix(PRETRAINED)


def row_order(row: str) -> tuple[int, int, bool]:
    """Where a row stands in a table: smaller first; a network before fine-tuning right before the one after it."""
    return *table_order(method_name(row)), not row.endswith(PRETRAINED)


def colours(method: str) -> tuple[str, str] | None:
    """A method's colours "#rrggbb" on light and on dark paper; None if it is not registered.

    A row without colours gets a hue of its own by the golden angle, which keeps neighbours apart.
    """
    if method not in METHODS:
        return None
    if METHODS[method].colours:
        light, dark = METHODS[method].colours
        return light, dark
    hue = list(METHODS).index(method) * 0.618034 % 1
    return _hex(hue, 0.38, 0.6), _hex(hue, 0.7, 0.6)


def css() -> str:
    """The colours as custom properties `--series-<method>`, for light and for dark paper."""
    found = {name: colours(name) or ("", "") for name in METHODS}
    light, dark = (
        " ".join(f"--series-{name}: {pair[i]};" for name, pair in found.items()) for i in (0, 1)
    )
    return f":root {{ {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"


def css_colour(method: str) -> str:
    """What a page writes for a method's colour."""
    return f"var(--series-{method})" if method in METHODS else "var(--muted)"


def _hex(hue: float, lightness: float, saturation: float) -> str:
    channels = colorsys.hls_to_rgb(hue, lightness, saturation)
    return "#" + "".join(f"{round(255 * x):02x}" for x in channels)
