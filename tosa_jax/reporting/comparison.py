"""A comparison of methods at equal multiply-adds for people: a table a target, and a Pareto plot."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tosa_jax.reporting import series
from tosa_jax.reporting.intervals import difference, interval, is_level

PARTS = {"class": "class token", "patches": "patches"}
"""Field of a row -> what its cosines are of. A network without a class token has no "class"."""

_MARKERS = "osD^vP*X"


def row_name(row: Mapping[str, Any]) -> str:
    """A row's name for people: the method's, and in parentheses what was set differently."""
    _, _, fields = row["name"].partition(":")
    label = series.short_label(row["method"])
    return f"{label} ({fields.replace(',', ', ')})" if fields else label


def markdown(name: str, record: Mapping[str, Any]) -> str:
    """The command, what was compared, and for each target its rows, the nearest to the dense network first.

    record  as `python -m tosa_jax.compare` writes it.
    """
    targets = sorted({row["target"] for row in record["rows"]}, reverse=True)
    about = {"device": record["device"], **record["versions"], "seed": record["seed"]}
    lines = [
        f"# {name}",
        "",
        f"{record['model']} with released weights, nothing trained: cosine of the final tokens to the dense network's, "
        f"{record['count']} crops of {record['image_size']} px of {len(record['pictures'])} pictures. In brackets are "
        "95 % intervals, by resampling pictures. Beside them stands the difference to the best row of the column, "
        'picture by picture; "level" where its interval has 0 in it.',
        "",
        f"    {record['command']}",
        "",
        ", ".join(f"{key} {value}" for key, value in about.items()) + ".",
    ]
    for target in targets:
        lines += ["", f"## {target:g} of the dense multiply-adds", "", *_table(record, target)]
    if record["left_out"]:
        lines += ["", "## Left out", ""]
        lines += [f"- {x['name']} at {x['target']:g}: {x['why']}" for x in record["left_out"]]
    return "\n".join(lines) + "\n"


def _table(record: Mapping[str, Any], target: float) -> list[str]:
    rows = [row for row in record["rows"] if row["target"] == target]
    parts = [part for part in PARTS if part in rows[0]]
    best = {part: max(rows, key=lambda row: float(np.mean(row[part]))) for part in parts}
    rows.sort(key=lambda row: -float(np.mean(row[parts[-1]])))
    extra = {
        title: values
        for title, values in (("ms", _milliseconds(record)), ("M cycles", _cycles(record)))
        if values
    }
    head = ["method", "share"]
    for part in parts:
        head += [PARTS[part], "to the best"]
    head += extra
    lines = [_line(head), _line([":--", *["--:"] * (len(head) - 1)])]
    for row in rows:
        cells = [row_name(row), f"{row['share']:.3f}"]
        for part in parts:
            cells += [_with_interval(row[part]), to_best(row, best[part], part)]
        cells += [values.get(f"{row['name']} {row['target']}", "–") for values in extra.values()]
        lines.append(_line(cells))
    return lines


def to_best(row: Mapping[str, Any], best: Mapping[str, Any], part: str) -> str:
    """How far a row is from the best one: "best", "level", or the difference with its interval."""
    if row is best:
        return "best"
    mean, bounds = difference(row[part], best[part])
    return "level" if is_level(bounds) else f"{mean:.4f} [{bounds[0]:.4f}, {bounds[1]:.4f}]"


def _with_interval(values: Sequence[float]) -> str:
    low, high = interval(values)
    return f"{np.mean(values):.4f} [{low:.4f}, {high:.4f}]"


def _milliseconds(record: Mapping[str, Any]) -> dict[str, str]:
    networks = record.get("time", {}).get("networks", {})
    return {name: f"{x['ms']:.1f} ± {x['ms_iqr'] / 2:.1f}" for name, x in networks.items()}


def _cycles(record: Mapping[str, Any]) -> dict[str, str]:
    found = record.get("estimate", {}).get("mcycles", {})
    return {name: f"{cycles:.2f}" for name, cycles in found.items()}


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def plot(record: Mapping[str, Any]) -> bytes:
    """A PNG: for each part, 1 - cosine on a logarithmic scale against the share of the multiply-adds; a line a row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = record["rows"]
    parts = [part for part in PARTS if rows and part in rows[0]]
    figure = Figure(figsize=(5 * max(len(parts), 1) + 2.6, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, max(len(parts), 1), squeeze=False)[0]
    names = sorted(dict.fromkeys(r["name"] for r in rows), key=lambda n: _order(rows, n))
    for axes, part in zip(panels, parts, strict=False):
        axes.set_yscale("log")
        for name in names:
            own = sorted((r for r in rows if r["name"] == name), key=lambda r: r["share"])
            colour = (series.colours(own[0]["method"]) or ("#909090",))[0]
            variant = [n for n in names if n.partition(":")[0] == own[0]["method"]].index(name)
            axes.plot(
                [r["share"] for r in own],
                [max(1 - float(np.mean(r[part])), 1e-7) for r in own],
                marker=_MARKERS[variant % len(_MARKERS)],
                linestyle="-" if variant == 0 else "--",
                markersize=4.5,
                linewidth=1.3,
                color=colour,
                label=row_name(own[0]),
            )
        axes.set_title(PARTS[part], fontsize=10)
        axes.set_xlabel("multiply-adds, share of the dense network's")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("1 - cosine to the dense network (lower is better)")
    if rows:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    figure.suptitle(f"{record['model']}, nothing trained", fontsize=10)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=100)
    return data.getvalue()


def _order(rows: Sequence[Mapping[str, Any]], name: str) -> tuple:
    method = next(r["method"] for r in rows if r["name"] == name)
    return (*series.row_order(method), name)
