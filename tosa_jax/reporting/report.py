"""The report of a run: writing and reading `report.json`, and its text table."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from tosa_jax.errors import WorkdirError
from tosa_jax.models.method import DENSE
from tosa_jax.models.optim import start_share
from tosa_jax.paths import as_path, parse_json, write_atomically
from tosa_jax.reporting.report_form import find_fault
from tosa_jax.reporting.series import PRETRAINED, row_label, row_order

FILE = "report.json"

_TABLE_WIDTH = 100
_GAP = "  "


def write_report(workdir: str | os.PathLike, report: Mapping[str, Any]) -> None:
    """Writes `report.json` atomically.

    Args:
        workdir: the work directory; it must exist.
        report: "config", "device", "versions", "stages" and "results"; array scalars become numbers.

    Raises:
        ValueError: a number is not finite, which JSON cannot store.
    """
    text = json.dumps(report, indent=2, allow_nan=False, default=lambda scalar: scalar.item())
    write_atomically(as_path(workdir) / FILE, (text + "\n").encode())


def read_report(workdir: str | os.PathLike) -> dict[str, Any] | None:
    """Reads `report.json`; None if there is none.

    Raises:
        WorkdirError: the file is not a report.
    """
    path = as_path(workdir) / FILE
    try:
        report = parse_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise WorkdirError(f"{path} is not JSON ({error}): remove it and run again") from error
    if fault := find_fault(report):
        raise WorkdirError(f"{path} is not a report ({fault}): remove it and run again")
    return report


def format_table(report: Mapping[str, Any]) -> str:
    """The results as a plain text table at most 100 characters wide.

    Both ratios are relative to the dense model, the fine-tuned one if the report has it. `acc1` is shown in per cent.
    Without `acc1`, other metrics are shown in their own units, as many as fit.
    """
    rows = sorted(report["results"], key=_order)
    if not rows:
        return "no results"
    columns, left_out = _columns(rows)
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for cells in zip(*columns, strict=True):
        first, *others = zip(cells, widths, strict=True)
        line = first[0].ljust(first[1]) + "".join(_GAP + cell.rjust(w) for cell, w in others)
        lines.append(line.rstrip())
    lines.insert(1, "-" * (sum(widths) + len(_GAP) * (len(widths) - 1)))
    splits = dict.fromkeys((row.get("split"), row.get("count")) for row in rows)
    lines += [f"split {split}, {count} examples" for split, count in splits if split is not None]
    lines += averages(report)
    if left_out:
        lines.append(f"report.json has also: {', '.join(left_out)}"[:_TABLE_WIDTH])
    return "\n".join(lines)


def averages(report: Mapping[str, Any]) -> list[str]:
    """One line for each stage whose networks are scored with averaged weights: how much those before it still count."""
    config, stages = report.get("config"), report.get("stages") or {}
    lines = []
    for name in ("pretrain", "finetune"):
        section = config.get(name) or {} if isinstance(config, Mapping) else {}
        decay, steps = section.get("ema_decay"), stages.get(name, {}).get("steps")
        if decay and steps:
            share = f"{100 * start_share(decay, steps):.2g} %"
            lines.append(f"{name}: averaged weights are scored; {share} are those it began with")
    return lines


def table_columns(
    report: Mapping[str, Any],
) -> tuple[list[Mapping[str, Any]], list[list[str]]]:
    """The rows in the order of the table, and all columns of cells, each with its title first."""
    rows = sorted(report["results"], key=_order)
    return rows, _columns(rows, width=10**6)[0] if rows else []


def _order(row: Mapping[str, Any]) -> tuple:
    """Sort key: dense first, then by falling keep rate; within a keep rate ToSA and its controls."""
    place = row_order(row["name"])
    if place[0] == 0:
        return 0, 0.0, place
    rate = row.get("keep_rate")
    if isinstance(rate, Sequence):
        rate = sum(rate) / max(len(rate), 1)
    return 1, math.inf if rate is None else -rate, place


def _columns(
    rows: Sequence[Mapping[str, Any]], width: int = _TABLE_WIDTH
) -> tuple[list[list[str]], list[str]]:
    """The columns of cells, each with its title first, and the names of the metrics that do not fit into `width`."""
    splits = {row.get("split") for row in rows}
    names = [row_label(row["name"]) for row in rows]
    if len(splits) > 1:
        names = [f"{name} ({row.get('split')})" for name, row in zip(names, rows, strict=True)]
    gmacs = [row.get("gmacs") for row in rows]
    speeds = [row.get("img_per_sec") for row in rows]
    small = max((value for value in gmacs if value is not None), default=1.0) < 0.1
    before = [
        ["model", *names],
        ["keep rate", *(_keep_rate(row.get("keep_rate")) for row in rows)],
    ]
    after = [
        ["MMACs", *_numbers([None if value is None else value * 1e3 for value in gmacs])]
        if small
        else ["GMACs", *_numbers(gmacs)],
        ["MACs ratio", *_ratios(rows, "gmacs", ".3f")],
        ["img/s", *_numbers(speeds)],
        ["speed-up", *_ratios(rows, "img_per_sec", ".2f", "x")],
    ]
    metrics, left_out = _metric_columns(rows), []
    fixed = sum(max(map(len, column)) + len(_GAP) for column in before + after) - len(_GAP)
    while len(metrics) and fixed + _width(metrics) > width:
        left_out.insert(0, metrics.pop()[0])
    return before + metrics + after, left_out


def _width(columns: list[list[str]]) -> int:
    return sum(max(map(len, column)) + len(_GAP) for column in columns)


def _metric_columns(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    metrics = [row.get("metrics") or {} for row in rows]
    names = dict.fromkeys(name for values in metrics for name in values)
    if "acc1" in names:
        return [["top-1 %", *(_number(values.get("acc1"), ".2f", 100.0) for values in metrics)]]
    return [[name, *(_number(values.get(name), ".4g") for values in metrics)] for name in names]


def _keep_rate(rate: float | Sequence[float] | None) -> str:
    if not isinstance(rate, Sequence):
        return _number(rate, ".4g")
    ends = [_number(rate[0], ".4g"), _number(rate[-1], ".4g")] if rate else ["-"]
    return " to ".join(dict.fromkeys(ends))


def _ratios(rows: Sequence[Mapping[str, Any]], key: str, spec: str, unit: str = "") -> list[str]:
    """Each row's value divided by the dense model's; "-" if one of them is unknown."""
    dense = {row["name"]: row[key] for row in rows if row.get(key)}
    reference = dense.get(DENSE, dense.get(f"{DENSE}{PRETRAINED}"))
    if reference is None:
        return ["-"] * len(rows)
    cells = [_number(row.get(key), spec, 1 / reference) for row in rows]
    return [cell if cell == "-" else cell + unit for cell in cells]


def _numbers(values: Sequence[float | None]) -> list[str]:
    """The cells of a column, all with as many decimals as the largest value needs for four digits."""
    largest = max((value for value in values if value is not None), default=0.0)
    decimals = 3 if largest < 10 else 2 if largest < 100 else 1 if largest < 1000 else 0
    return [_number(value, f".{decimals}f") for value in values]


def _number(value: float | None, spec: str, factor: float = 1.0) -> str:
    return "-" if value is None else format(value * factor, spec)


def format_seconds(seconds: float) -> str:
    """A duration as text: "4.2s", "37s", "3m12s", "3h12m", "2d04h"; "--" if not finite."""
    if not math.isfinite(seconds):
        return "--"
    if round(seconds, 1) < 10:
        return f"{max(seconds, 0):.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"
