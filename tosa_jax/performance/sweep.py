"""A benchmark over budgets and batch sizes as files: all records, a table, and a plot of cost against speed."""

import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tosa_jax.errors import DeviceError
from tosa_jax.paths import AnyPath, write_atomically
from tosa_jax.performance.records import Record, table

_COLOURS = {
    "dense": "#303030",
    "tosa": "#d07030",
    "random": "#4878a8",
    "previous": "#70a060",
    "class_attention": "#c050a0",
    "redundancy": "#208080",
    "skip": "#b09020",
    "timm": "#9060a8",
    "transformers": "#c05070",
}
_MARKERS = "osD^vP*X"


def run(
    batch_sizes: Iterable[int], measure: Callable[[int], list[Record]]
) -> tuple[list[Record], dict[str, str]]:
    """The records of every batch size that fits the device, and why others were left out, by batch size.

    Raises the last DeviceError if none fits.
    """
    records, left_out, error = [], {}, None
    for batch_size in dict.fromkeys(batch_sizes):
        try:
            records += measure(batch_size)
        except DeviceError as too_large:
            error = too_large
            left_out[str(batch_size)] = str(too_large)
    if not records and error is not None:
        raise error
    return records, left_out


def write(folder: AnyPath, name: str, result: Mapping[str, Any]) -> list[AnyPath]:
    """Writes `bench_NAME.json`, `.md` and `.png`, each whole or not at all; returns their paths.

    result   `command`, `device`, `versions`, `settings`, `left_out` and `rows` (the records).
    """
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        "json": (json.dumps(result, indent=1) + "\n").encode(),
        "md": markdown(name, result).encode(),
        "png": plot(result),
    }
    paths = {suffix: folder / f"bench_{name}.{suffix}" for suffix in contents}
    for suffix, data in contents.items():
        write_atomically(paths[suffix], data)
    return list(paths.values())


def markdown(name: str, result: Mapping[str, Any]) -> str:
    """The records as a Markdown table, with the device, the versions, the settings and the command above it."""
    head, *rows = table(result["rows"])
    first = result["rows"][0]
    about = {"device": result["device"], "image size": first["image_size"], "dtype": first["dtype"]}
    about |= result["versions"] | result["settings"]
    lines = [
        f"# {name}",
        "",
        "Random weights and images: time alone. Medians of interleaved rounds; speed-ups are over `dense`.",
        "",
        f"    {result['command']}",
        "",
        ", ".join(f"{key} {value}" for key, value in about.items()) + ".",
        "",
        *(_row(cells) for cells in (head, [":--", *["--:"] * (len(head) - 1)], *rows)),
    ]
    for batch_size, why in result["left_out"].items():
        lines += ["", f"Batch size {batch_size} was left out: {why}"]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def plot(result: Mapping[str, Any]) -> bytes:
    """A PNG: speed-up, and images a second, against GMACs an image; a line a candidate and batch size."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    faster, rate = figure.subplots(1, 2)
    rows = result["rows"]
    for i, batch_size in enumerate(dict.fromkeys(r["batch_size"] for r in rows)):
        for name in dict.fromkeys(r["name"] for r in rows):
            of_name = (r for r in rows if (r["name"], r["batch_size"]) == (name, batch_size))
            points = sorted(of_name, key=lambda r: r["gmacs"])
            style = {
                "marker": _MARKERS[i % len(_MARKERS)],
                "color": _COLOURS[name],
                "markerfacecolor": None if name in ("dense", "tosa") else "none",
                "label": f"{name}, batch {batch_size}",
            }
            gmacs = [r["gmacs"] for r in points]
            faster.plot(gmacs, [r["speedup"] for r in points], **style)
            rate.plot(gmacs, [r["img_per_sec"] for r in points], **style)
    costs = sorted({r["gmacs"] for r in rows if r["name"] != "skip"})
    ideal = [rows[0]["gmacs"] / gmacs for gmacs in costs]
    faster.plot(costs, ideal, ":", color="#909090", label="every saved multiply-add")
    faster.set_ylabel("speed-up over dense")
    rate.set_ylabel("images/s")
    rate.set_ylim(bottom=0)
    for axes in (faster, rate):
        axes.set_xlabel("GMACs an image")
        axes.grid(alpha=0.3)
    figure.legend(*faster.get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    figure.suptitle(f"{result['device']}, random weights: time alone", fontsize=10)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    return data.getvalue()
