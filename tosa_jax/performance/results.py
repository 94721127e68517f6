"""Results of the benchmark for people: a text table, and files with all records, a table and a plot."""

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from tosa_jax.models.method import DENSE, MAIN
from tosa_jax.paths import AnyPath, write_atomically
from tosa_jax.reporting import series

_LIBRARY_COLOURS = {"timm": "#705030", "transformers": "#303030"}
_MARKERS = "osD^vP*X"


COLUMNS = {
    "name": "name",
    "keep": "keep_rate",
    "batch": "batch_size",
    "GMACs": "gmacs",
    "ms": "ms",
    "iqr": "ms_iqr",
    "img/s": "img_per_sec",
    "M cycles": "mcycles",
    "speed-up": "speedup",
    "GMACs ratio": "gmac_ratio",
    "realised": "realised",
    "overhead": "selector_overhead",
}
"""Title of a table's column -> field of the record."""

_FORMATS = {
    "keep_rate": "{:g}",
    "gmacs": "{:.3f}",
    "ms": "{:.1f}",
    "ms_iqr": "{:.1f}",
    "img_per_sec": "{:.1f}",
    "mcycles": "{:.2f}",
    "speedup": "{:.2f}x",
    "gmac_ratio": "{:.2f}x",
    "realised": "{:.2f}",
    "selector_overhead": "{:.1%}",
}


def table(records: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A row of titles, then one row of texts a record. Columns whose field the records lack are left out."""
    shown = {title: field for title, field in COLUMNS.items() if field in records[0]}
    return [list(shown), *([_text(r, field) for field in shown.values()] for r in records)]


def _text(record: Mapping[str, Any], field: str) -> str:
    value = record[field]
    if field == "name":
        return value + (" (training)" if record["train"] else "")
    return "-" if value is None else _FORMATS.get(field, "{}").format(value)


def format_records(records: Sequence[Mapping[str, Any]]) -> str:
    """The records as an aligned table."""
    rows = table(records)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def write(folder: AnyPath, name: str, result: Mapping[str, Any]) -> list[AnyPath]:
    """Writes `bench_NAME.json`, `.md` and `.png`, each atomically; returns their paths.

    result  `command`, `device`, `versions`, `settings`, `left_out` and `rows` (the records).
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
    """The command, the device, versions and settings, then the records as a Markdown table."""
    head, *rows = table(result["rows"])
    first = result["rows"][0]
    about = {"device": result["device"], "image size": first["image_size"], "dtype": first["dtype"]}
    about |= result["versions"] | result["settings"]
    lines = [
        f"# {name}",
        "",
        "Random weights and images: only time is measured. Medians of interleaved rounds; speed-ups are over `dense`.",
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
    """Two plots as a PNG: speed-up and images a second against GMACs an image; one line a candidate and batch size."""
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
                "color": (series.colours(name) or (_LIBRARY_COLOURS.get(name, "#909090"),))[0],
                "markerfacecolor": None if name in (DENSE, MAIN) else "none",
                "label": f"{name}, batch {batch_size}",
            }
            gmacs = [r["gmacs"] for r in points]
            faster.plot(gmacs, [r["speedup"] for r in points], **style)
            rate.plot(gmacs, [r["img_per_sec"] for r in points], **style)
    costs = sorted({r["gmacs"] for r in rows if r["keep_rate"] is not None or r["name"] == DENSE})
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
