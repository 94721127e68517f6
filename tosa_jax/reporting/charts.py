"""Charts of a run as SVG; their colours are custom properties of the page that contains them."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tosa_jax.models.method import DENSE, MAIN, METHODS
from tosa_jax.paths import AnyPath, parse_json
from tosa_jax.reporting.report_form import is_number
from tosa_jax.reporting.series import css_colour, short_label

INK, MUTED, RULE = "#010101", "#020202", "#030303"
"""Placeholders that `_svg` replaces by the page's own colours, as it does those of `_colour`."""
_DASHES = ("-", "--", ":", "-.")  # budgets of one network, in order


class Curve(NamedTuple):
    """One line of a chart.

    label    text of the legend.
    method   name of the method, which decides the colour.
    budget   index of its keep rate among those of the model, which decides the dashes.
    points   pairs (step, value).
    """

    label: str
    method: str
    budget: int
    points: list[tuple[float, float]]


def read_metrics(workdir: AnyPath) -> list[dict[str, Any]]:
    """The records of `metrics.jsonl`, in order, with their numbers; other lines are skipped."""
    try:
        lines = (workdir / "metrics.jsonl").read_bytes().splitlines()
    except FileNotFoundError:
        return []
    records = []
    for line in lines:
        try:
            record = parse_json(line)
            values = {name: x for name, x in record.items() if is_number(x)}
            records.append(values | {"stage": str(record["stage"]), "step": int(values["step"])})
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return records


def stage_groups(stages: Sequence[str]) -> dict[str, list[str]]:
    """Groups stages that share one chart: the fine-tuning stages start from the same model and take as many steps."""
    groups: dict[str, list[str]] = {}
    for stage in dict.fromkeys(stages):
        groups.setdefault(stage.partition("_")[0], []).append(stage)
    return groups


def stage_method(stage: str, facts: Mapping[str, Any] | None = None) -> tuple[str, str]:
    """The method that a stage trains, and its keep rate as text, from the stage's facts in `report.json`.

    Reports of older versions do not say; there it is read from the stage's name.

    >>> stage_method("finetune_0.25", {"row": "tosa", "keep_rate": 0.25})
    ('tosa', '0.25')
    >>> stage_method("finetune_random_0.5"), stage_method("pretrain")
    (('random', '0.5'), ('dense', ''))
    """
    if facts and "row" in facts:
        rate = facts.get("keep_rate")
        # The fine-tune of the main network at its main budget is named by neither.
        return facts["row"], "" if rate is None or stage == "finetune" else str(rate)
    kind, _, rest = stage.partition("_")
    if kind != "finetune":
        return MAIN if kind == "selector" else DENSE, ""
    if rest in METHODS:
        return rest, ""
    name, _, budget = rest.rpartition("_")
    return (name, budget) if name in METHODS else (MAIN, rest)


def curves(
    records: Sequence[Mapping[str, Any]],
    stages: Sequence[str],
    metric: str,
    factor: float = 1.0,
    facts: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Curve]:
    """A metric of each stage over steps, times `factor`; [] if no stage has two points.

    facts  the facts of the stages by name, as in `report.json`.
    """
    found, budgets = [], dict[str, int]()
    for stage in stages:
        method, budget = stage_method(stage, (facts or {}).get(stage))
        number = budgets[method] = budgets.get(method, -1) + 1
        own = [r for r in records if r["stage"] == stage and r.get(metric) is not None]
        points = [(r["step"], r[metric] * factor) for r in own]
        if points:
            label = f"{short_label(method)} {budget}".strip()
            found.append(Curve(label, method, number, points))
    return found if any(len(curve.points) > 1 for curve in found) else []


def line_chart(lines: Sequence[Curve], *, log: bool = False) -> str:
    """Curves over steps as an `<svg>`."""
    from matplotlib.figure import Figure

    with _style():
        figure = Figure(figsize=(3.5, 2.3), layout="constrained")
        axes = figure.subplots()
        for line in lines:
            few = len(line.points) <= 12
            axes.plot(
                *zip(*line.points, strict=True),
                color=_colour(line.method),
                linestyle=_DASHES[line.budget % len(_DASHES)],
                marker="o" if few else None,
                label=line.label,
            )
        if log and all(y > 0 for line in lines for _, y in line.points):
            axes.set_yscale("log")
        axes.set_xlabel("step", loc="right")
        _tidy(axes)
        return _svg(figure)


def scatter_chart(points: Sequence[tuple[float, float, str, str]], *, ylabel: str) -> str:
    """Quality against cost as an `<svg>`. Points are (share of the dense multiply-adds, quality, method, text)."""
    from matplotlib.figure import Figure

    with _style():
        figure = Figure(figsize=(10, 3.1), layout="constrained")
        axes = figure.subplots()
        placed: list[tuple[float, float]] = []
        ys = [y for _, y, _, _ in points]
        height = (max(ys) - min(ys)) or 1.0
        for x, y, method, text in sorted(points, key=lambda p: -p[1]):
            axes.plot([x], [y], "o", color=_colour(method), markersize=8)
            close = sum(abs(x - a) < 0.1 and abs(y - b) < 0.09 * height for a, b in placed)
            placed.append((x, y))
            axes.annotate(
                text, (x, y), xytext=(9, -4 - 11 * close), textcoords="offset points", color=INK
            )
        axes.set_xlim(0, max(x for x, *_ in points) * 1.3)
        axes.margins(y=0.2)
        axes.set_xlabel("multiply-adds, share of the dense network's")
        axes.set_ylabel(ylabel)
        _tidy(axes)
        return _svg(figure)


def _style():
    import matplotlib

    return matplotlib.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "tosa_jax",  # equal ids mean equal shapes, in every chart of a page,
            "font.size": 9.5,
            "text.color": INK,
            "axes.edgecolor": RULE,
            "axes.labelcolor": MUTED,
            "axes.facecolor": "none",
            "figure.facecolor": "none",
            "xtick.color": RULE,
            "ytick.color": RULE,
            "xtick.labelcolor": MUTED,
            "ytick.labelcolor": MUTED,
            "grid.color": RULE,
            "grid.linewidth": 0.6,
            "lines.linewidth": 1.8,
            "lines.markersize": 4.5,
            "axes.formatter.useoffset": False,
        }
    )


def _tidy(axes: Any) -> None:
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)


def _colour(method: str) -> str:
    """A colour that matplotlib accepts and `_svg` replaces by the page's."""
    return f"#f0{list(METHODS).index(method):04x}" if method in METHODS else MUTED


def _svg(figure: Any) -> str:
    """The figure as an `<svg>` element without prologue and metadata, with custom properties as colours."""
    data = io.StringIO()
    figure.savefig(data, format="svg", metadata={"Date": None, "Creator": None})
    text = data.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    for name, value in {"ink": INK, "muted": MUTED, "rule": RULE}.items():
        text = text.replace(value, f"var(--{name})")
    for name in METHODS:
        text = text.replace(_colour(name), css_colour(name))
    return text.strip()
