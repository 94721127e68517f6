"""`report.html`: the report of a run as one self-contained page, with a light and a dark colour scheme."""

import base64
import importlib.resources
import os
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from tosa_jax.models.method import DENSE, MAIN
from tosa_jax.paths import AnyPath, as_path, write_atomically
from tosa_jax.reporting import charts, series
from tosa_jax.reporting.report import averages, format_seconds, table_columns
from tosa_jax.reporting.report_form import is_number

FILE = "report.html"

_GROUPS = {
    "pretrain": ("Pretraining", "The dense network, from random weights."),
    "selector": (
        "Selectors",
        "The network is frozen; each selector learns to predict the next layer's attention map.",
    ),
    "finetune": (
        "Fine-tuning",
        "Every candidate starts from the same network and takes as many steps.",
    ),
}
_METRIC_NAMES = {
    "selector/recall": "Share of the true top tokens found",
    "selector/kl": "Divergence from the true map, nats",
}


def write_page(workdir: str | os.PathLike, report: Mapping[str, Any]) -> None:
    """Writes `report.html` to the work directory.

    report  the content of `report.json`. Curves are read from `metrics.jsonl`, the figure of selected tokens from
            `selected_tokens.png`; a section without its file is left out.
    """
    workdir = as_path(workdir)
    page = make_page(
        os.path.basename(os.path.abspath(workdir)),
        report,
        charts.read_metrics(workdir),
        _picture(workdir),
    )
    write_atomically(workdir / FILE, page.encode())


def make_page(
    name: str,
    report: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    picture: bytes | None,
) -> str:
    """The page as HTML.

    name     name of the run.
    report   the content of `report.json`.
    records  the records of `metrics.jsonl`.
    picture  the PNG of selected tokens; None: no such section.
    """
    css = (
        importlib.resources.files("tosa_jax.reporting").joinpath("page.css").read_text()
        + series.css()
    )
    parts = [
        _head(name, report),
        _results(report),
        _tokens(picture),
        _curves(records, report.get("stages") or {}),
        _stages(report),
    ]
    body = "\n".join(filter(None, [*parts, _settings(report)]))
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(name)} – tosa_jax</title>\n<style>\n{css}</style>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _picture(workdir: AnyPath) -> bytes | None:
    path = workdir / "selected_tokens.png"
    return path.read_bytes() if path.exists() else None


def _head(name: str, report: Mapping[str, Any]) -> str:
    stages = report.get("stages", {})
    seconds = sum(stage.get("seconds") or 0.0 for stage in stages.values())
    data = (
        report.get("config", {}).get("data", {})
        if isinstance(report.get("config"), Mapping)
        else {}
    )
    facts = {
        "data": data.get("name"),
        "device": report.get("device"),
        "training": format_seconds(seconds) if seconds else None,
        **report.get("versions", {}),
    }
    items = "".join(
        f"<span>{escape(k)} <b>{escape(str(v))}</b></span>" for k, v in facts.items() if v
    )
    return f'<header><h1>{escape(name)}</h1>\n<div class="facts">{items}</div></header>'


def _results(report: Mapping[str, Any]) -> str:
    rows, columns = table_columns(report)
    if not rows:
        return ""
    titles, *cells = zip(*columns, strict=True)
    lines = [_row("th", titles)]
    for row, values in zip(rows, cells, strict=True):
        lines.append(_row("td", values, ' class="tosa"' if row["name"] == MAIN else ""))
    splits = dict.fromkeys((row.get("split"), row.get("count")) for row in rows)
    notes = [f"split {split}, {count} examples" for split, count in splits] + averages(report)
    note = f"{'; '.join(notes)}. "
    note += "Ratios and speed-ups are to the dense network, fine-tuned as long where there is one."
    return (
        f'<h2>Results</h2>\n<div class="two"><div class="card scroll"><table>{"".join(lines)}</table></div>\n'
        f'{_cost_chart(rows)}</div>\n<p class="muted">{escape(note)}</p>'
    )


def _row(tag: str, cells: Sequence[str], attributes: str = "") -> str:
    return f"<tr{attributes}>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"


def _cost_chart(rows: Sequence[Mapping[str, Any]]) -> str:
    """A chart of quality against cost, if both are known for at least two models."""
    pretrained = f"{DENSE}{series.PRETRAINED}"
    dense = next((r.get("gmacs") for r in rows if r["name"] == DENSE), None)
    dense = dense or next((r.get("gmacs") for r in rows if r["name"] == pretrained), None)
    metric = headline([f"val/{name}" for row in rows for name in row.get("metrics") or {}])
    if not dense or metric is None:
        return ""
    key, factor = metric.removeprefix("val/"), 100.0 if metric == "val/acc1" else 1.0
    points = []
    for row in rows:
        value = (row.get("metrics") or {}).get(key)
        if row["name"] == pretrained and any(r["name"] == "dense" for r in rows):
            continue
        if value is not None and row.get("gmacs"):
            text = series.short_label(row["name"])
            rate = row.get("keep_rate")
            text += f" {rate:g}" if is_number(rate) else ""
            method = series.method_name(row["name"])
            points.append((row["gmacs"] / dense, value * factor, method, text))
    if len(points) < 2:
        return ""
    label = metric_title(metric)
    chart = charts.scatter_chart(points, ylabel=label)
    return f'<figure class="card"><h3>{escape(label)} against cost</h3><div class="scroll wide">{chart}</div></figure>'


def _tokens(picture: bytes | None) -> str:
    if picture is None:
        return ""
    data = base64.b64encode(picture).decode()
    return (
        f'<h2>Selected tokens</h2>\n<figure class="card"><div class="scroll"><img src="data:image/png;base64,{data}" '
        'alt="Test images, and the patches that each selection took"></div><figcaption>Test images. Bypassed patches '
        "are dimmed; selected ones go through the layer.</figcaption></figure>"
    )


def _curves(records: Sequence[Mapping[str, Any]], facts: Mapping[str, Mapping[str, Any]]) -> str:
    sections = []
    for group, stages in charts.stage_groups([r["stage"] for r in records]).items():
        title, text = _GROUPS.get(group, (group, ""))
        own = [r for r in records if r["stage"] in stages]
        panels = [("train/loss", "Training loss", 1.0, False)]
        if metric := headline([name for record in own for name in record]):
            panels.append(
                (metric, metric_title(metric), 100.0 if metric == "val/acc1" else 1.0, False)
            )
        panels += [
            ("train/learning_rate", "Learning rate", 1.0, False),
            ("perf/img_per_sec", "Images/s", 1.0, False),
        ]
        figures, seen = [], []
        for name, heading, factor, log in panels:
            if lines := charts.curves(own, stages, name, factor, facts):
                chart = charts.line_chart(lines, log=log)
                figures.append(f'<figure class="card"><h3>{escape(heading)}</h3>{chart}</figure>')
                seen += lines
        if figures:
            grid = f'<div class="grid">{"".join(figures)}</div>'
            sections.append(
                f'<h2>{escape(title)}</h2>\n<p class="muted">{escape(text)}</p>\n{_legend(seen)}{grid}'
            )
    return "\n".join(sections)


def headline(names: Sequence[str]) -> str | None:
    """The evaluation metric to draw: accuracy, else the selectors' recall, else the first one, the loss last.

    >>> headline(["val/loss", "val/acc1"]), headline(["train/loss"])
    ('val/acc1', None)
    """
    scored = [name for name in names if name.startswith("val/")]
    for wanted in ("val/acc1", "val/selector/recall"):
        if wanted in scored:
            return wanted
    return next(
        (n for n in scored if n != "val/loss"), "val/loss" if "val/loss" in scored else None
    )


def metric_title(metric: str) -> str:
    """A metric's title on the page."""
    name = metric.removeprefix("val/")
    return "Top-1 %" if name == "acc1" else _METRIC_NAMES.get(name, name)


def _legend(lines: Sequence[charts.Curve]) -> str:
    unique = {line.label: line for line in lines}
    if len(unique) < 2:
        return ""
    dashes = ("", "6 4", "2 3", "7 3 2 3")
    items = "".join(
        f'<span><svg viewBox="0 0 28 10" aria-hidden="true"><path d="M1 5H27" stroke-width="2.5" '
        f'stroke="{series.css_colour(line.method)}" '
        f'stroke-dasharray="{dashes[line.budget % len(dashes)]}"/></svg>{escape(label)}</span>'
        for label, line in unique.items()
    )
    return f'<div class="legend">{items}</div>\n'


def _stages(report: Mapping[str, Any]) -> str:
    stages = report.get("stages") or {}
    if not stages:
        return ""
    lines = [_row("th", ("stage", "steps", "time", "before", "after"))]
    for name, facts in stages.items():
        seconds = facts.get("seconds")
        cells = [name, str(facts.get("steps", "-")), format_seconds(seconds) if seconds else "-"]
        cells += [_summary(facts.get(when)) for when in ("before", "after")]
        lines.append(_row("td", cells))
    return f'<h2>Stages</h2>\n<div class="card scroll"><table>{"".join(lines)}</table></div>'


def _summary(metrics: Mapping[str, float] | None) -> str:
    metric = headline([f"val/{name}" for name in metrics or {}])
    if not metrics or metric is None:
        return "-"
    value = metrics[metric.removeprefix("val/")]
    return (
        f"top-1 {value:.2%}"
        if metric == "val/acc1"
        else f"{metric.removeprefix('val/')} {value:.4g}"
    )


def _settings(report: Mapping[str, Any]) -> str:
    config = report.get("config")
    lines = flat_lines(config) if isinstance(config, Mapping) else [str(config)]
    return (
        f"<h2>Configuration</h2>\n<details><summary>{len(lines)} fields</summary>"
        f"<pre>{escape(chr(10).join(lines))}</pre></details>"
    )


def flat_lines(values: Mapping[str, Any], where: str = "config.") -> list[str]:
    """One line a field, with the name that it has on the command line.

    >>> flat_lines({"seed": 0, "model": {"depth": 6}})
    ['config.seed = 0', 'config.model.depth = 6']
    """
    lines = []
    for name, value in values.items():
        nested = isinstance(value, Mapping)
        lines += flat_lines(value, f"{where}{name}.") if nested else [f"{where}{name} = {value!r}"]
    return lines
