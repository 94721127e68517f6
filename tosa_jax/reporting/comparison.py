"""A comparison of methods at equal multiply-adds for people, untrained or trained: a table a target, a Pareto plot."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tosa_jax.reporting import series
from tosa_jax.reporting.intervals import difference, interval, is_level, over_seeds

PARTS = {"class": "class token", "patches": "patches"}
"""Field of a row -> what its cosines are of. A network without a class token has no "class"."""

_MARKERS = "osD^vP*X"


def row_name(row: Mapping[str, Any]) -> str:
    """A row's name for people: the method's, and in parentheses what was set differently."""
    _, _, fields = row["name"].partition(":")
    label = series.short_label(row["method"])
    return f"{label} ({fields.replace(',', ', ')})" if fields else label


def markdown(name: str, record: Mapping[str, Any]) -> str:
    """The command, what was compared, and for each target its rows, the best first.

    record  as `python -m tosa_jax.compare` writes it.
    """
    targets = sorted({row["target"] for row in record["rows"]}, reverse=True)
    about = {"device": record["device"], **record["versions"]}
    about |= {"seed": record["seed"]} if "seed" in record else {}
    trained = "metric" in record
    lines = [
        f"# {name}",
        "",
        _about_trained(record) if trained else _about_untrained(record),
        "",
        f"    {record['command']}",
        "",
        ", ".join(f"{key} {value}" for key, value in about.items()) + ".",
    ]
    if trained and "dense" in record:
        lines += ["", *_dense_table(record)]
    table = _trained_table if trained else _table
    for target in targets:
        lines += ["", f"## {target:g} of the dense multiply-adds", "", *table(record, target)]
    if record["left_out"]:
        lines += ["", "## Left out", ""]
        lines += [f"- {x['name']} at {x['target']:g}: {x['why']}" for x in record["left_out"]]
    return "\n".join(lines) + "\n"


def _about_untrained(record: Mapping[str, Any]) -> str:
    return (
        f"{record['model']} with released weights, nothing trained: cosine of the final tokens to the dense network's, "
        f"{record['count']} crops of {record['image_size']} px of {len(record['pictures'])} pictures. In brackets are "
        "95 % intervals, by resampling pictures. Beside them stands the difference to the best row of the column, "
        'picture by picture; "level" where its interval has 0 in it.'
    )


def _about_trained(record: Mapping[str, Any]) -> str:
    better = "lower is better" if record["lower_is_better"] else "higher is better"
    trainable = record.get("trainable")
    only = f" Only parameters that match `{trainable}` are trained." if trainable else ""
    return (
        f"{record['metric']} ({better}). For each seed every method is fine-tuned from the same dense network, as long "
        f"as that network itself.{only} In brackets are 95 % intervals over seeds (Student's t). Beside them stand the "
        "differences to the best row of the table and to the dense network that was fine-tuned as long, seed by seed; "
        '"level" where the interval has 0 in it.'
    )


def _dense_table(record: Mapping[str, Any]) -> list[str]:
    """What is scored, and the dense network before and after fine-tuning."""
    names = {"pretrained": "dense, as pretrained", "finetuned": "dense, fine-tuned as long"}
    dense = record["dense"]
    lines = [f"{dense['count']} examples of the split {dense['split']}.", ""]
    lines += [_line(["network", record["metric"]]), _line([":--", "--:"])]
    return lines + [
        _line([title, _over_seeds(scores(dense[name], record))])
        for name, title in names.items()
        if dense[name]
    ]


def scores(metrics: Sequence[Mapping[str, float]], record: Mapping[str, Any]) -> list[float]:
    """The score of each seed, by the metric of the record."""
    return [float(x[record["metric"]]) for x in metrics]


def _trained_table(record: Mapping[str, Any], target: float) -> list[str]:
    sign = -1 if record["lower_is_better"] else 1
    rows = [row for row in record["rows"] if row["target"] == target]
    rows.sort(key=lambda row: -sign * float(np.mean(scores(row["metrics"], record))))
    best = scores(rows[0]["metrics"], record)
    dense = scores(record["dense"]["finetuned"], record)
    extra = _extra(record)
    head = ["method", "share", record["metric"], "to the best", "to dense", *extra]
    lines = [_line(head), _line([":--", *["--:"] * (len(head) - 1)])]
    for row in rows:
        own = scores(row["metrics"], record)
        cells = [row_name(row), f"{row['share']:.3f}", _over_seeds(own)]
        cells += ["best" if row is rows[0] else _paired(own, best), _paired(own, dense)]
        cells += [values.get(f"{row['name']} {row['target']}", "–") for values in extra.values()]
        lines.append(_line(cells))
    return lines


def _over_seeds(values: Sequence[float]) -> str:
    mean, bounds = over_seeds(values)
    return f"{mean:.4f} [{bounds[0]:.4f}, {bounds[1]:.4f}]" if bounds else f"{mean:.4f}"


def _paired(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """The mean difference, seed by seed, with its interval; "level" where that has 0 in it."""
    # A row whose training failed at a later seed has fewer.
    pairs = [a - b for a, b in zip(ours, theirs, strict=False)]
    mean, bounds = over_seeds(pairs)
    if bounds is None:
        return f"{mean:+.4f}"
    return "level" if is_level(bounds) else f"{mean:+.4f} [{bounds[0]:+.4f}, {bounds[1]:+.4f}]"


def _extra(record: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Columns of times and cycles, where the record has them: title -> network -> text."""
    columns = {"ms": _milliseconds(record), "M cycles": _cycles(record)}
    return {title: values for title, values in columns.items() if values}


def _table(record: Mapping[str, Any], target: float) -> list[str]:
    rows = [row for row in record["rows"] if row["target"] == target]
    parts = [part for part in PARTS if part in rows[0]]
    best = {part: max(rows, key=lambda row: float(np.mean(row[part]))) for part in parts}
    rows.sort(key=lambda row: -float(np.mean(row[parts[-1]])))
    extra = _extra(record)
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
    """A PNG: what rows score against their share of the multiply-adds; a line a row.

    Without training 1 - cosine on a logarithmic scale, a panel for each part; trained, the metric with the range of
    the seeds, and the dense network as a band.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, trained = record["rows"], "metric" in record
    parts = ["metrics"] if trained else [part for part in PARTS if rows and part in rows[0]]
    figure = Figure(figsize=(5 * max(len(parts), 1) + 2.6, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, max(len(parts), 1), squeeze=False)[0]
    names = sorted(dict.fromkeys(r["name"] for r in rows), key=lambda n: _order(rows, n))
    for axes, part in zip(panels, parts, strict=False):
        for name in names:
            own = sorted((r for r in rows if r["name"] == name), key=lambda r: r["share"])
            colour = (series.colours(own[0]["method"]) or ("#909090",))[0]
            variant = [n for n in names if n.partition(":")[0] == own[0]["method"]].index(name)
            values = [_plotted(row, part, record) for row in own]
            axes.errorbar(
                [r["share"] for r in own],
                [float(np.mean(x)) for x in values],
                [[np.mean(x) - min(x) for x in values], [max(x) - np.mean(x) for x in values]],
                marker=_MARKERS[variant % len(_MARKERS)],
                linestyle="-" if variant == 0 else "--",
                markersize=4.5,
                linewidth=1.3,
                elinewidth=0.8,
                color=colour,
                label=row_name(own[0]),
            )
        axes.set_xlabel("multiply-adds, share of the dense network's")
        axes.grid(alpha=0.3)
        if not trained:
            axes.set_yscale("log")
            axes.set_title(PARTS[part], fontsize=10)
    if trained and "dense" in record:
        dense = scores(record["dense"]["finetuned"], record)
        panels[0].axhspan(min(dense), max(dense), color="#909090", alpha=0.3, label="dense")
    better = "lower is better" if record.get("lower_is_better", True) else "higher is better"
    what = record["metric"] if trained else "1 - cosine to the dense network"
    panels[0].set_ylabel(f"{what} ({better})")
    if rows:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    figure.suptitle(title(record), fontsize=10)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=100)
    return data.getvalue()


def title(record: Mapping[str, Any]) -> str:
    """What the plot is of: the recipe's file or the network. Other flags of a recipe are in the table."""
    if "recipe" not in record:
        return f"{record['model']}, nothing trained"
    recipe = record["recipe"][0].removeprefix("--config=")
    seeds = max((len(row["metrics"]) for row in record["rows"]), default=0)
    return f"{recipe}, {seeds} seed{'s' * (seeds != 1)}"


def _plotted(row: Mapping[str, Any], part: str, record: Mapping[str, Any]) -> list[float]:
    """What the plot shows of a row: the score of each seed, or one value."""
    if part == "metrics":
        return scores(row["metrics"], record)
    return [max(1 - float(np.mean(row[part])), 1e-7)]


def _order(rows: Sequence[Mapping[str, Any]], name: str) -> tuple:
    method = next(r["method"] for r in rows if r["name"] == name)
    return (*series.row_order(method), name)
