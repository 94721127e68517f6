"""The tables of results/selection.md, from the records that it names.

    python results/selection_table.py

Cosines have 95 % intervals from resampling crops. Accuracies are means over seeds; differences to ToSA are paired by
seed and have the half-width of a 95 % interval by Student's t, which three seeds make wide.
"""

import json
import statistics
from pathlib import Path

FOLDER = Path(__file__).parent / "selection"
CHOICES = {
    "random": "random",
    "previous": "`previous`: the map of the layer before",
    "class_attention": "class token's attention in the layer before (EViT's choice)",
    "selective": "ToSA: the selector's prediction of the next map",
    "true_map": "oracle: the true next map",
    "worst_bypass": "oracle: the largest updates",
    "predicted_bypass": "the largest updates, predicted by a linear map",
    "previous 0.75": "redundancy, weight .75 (the rest: `previous`)",
    "previous 1.0": "redundancy alone",
}
NETWORKS = {
    "dense_pretrained": "dense, as pretrained",
    "dense": "dense, fine-tuned as long",
    "skip": "selective layers skipped",
    "tosa": CHOICES["selective"],
} | CHOICES
SELECTORS = {
    "cluttered_fashion": "as in the recipe",
    "cluttered_fashion_head_pool_max": '`head_pool="max"`',
    "cluttered_fashion_kernel_size_3": "`kernel_size=3`",
    "cluttered_fashion_selector_hidden_16": "`selector_hidden=16`, four times as wide",
    "cluttered_fashion_long_selector": "trained five times as long",
}
"""What was changed of the selector, by record."""
BYPASSES = {
    "low_rank": "low rank, 16",
    "shared": "shared",
    "redundancy_weight_0.75": "shared, `redundancy_weight=.75`",
    "redundancy_weight_1": "shared, `redundancy_weight=1`",
    "redundancy": '`plan="redundancy"`, `budget="linear"`',
}
"""What becomes of bypassed tokens where they do not stay as they were, by the end of a record's name."""
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Student's t for 95 % by number of seeds."""


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Prints a table of Markdown."""
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def _cosine(row: dict, what: str) -> str:
    """Mean cosine to the dense network's tokens and its interval; `what` is "class" or "patch"."""
    low, high = row[f"{what}_interval"]
    return f"{row[f'{what}_cosine']:.3f} ({low:.3f} to {high:.3f})"


def _cosines(title: str, rows: list[tuple[str, dict | None]]) -> None:
    table(
        title,
        ["choice", "GMACs", "class token", "patches"],
        [
            [name, f"{row['share']:.3f}", _cosine(row, "class"), _cosine(row, "patch")]
            for name, row in rows
            if row
        ],
    )


def choices() -> None:
    """Choices on real weights without fine-tuning, by bypass and keep rate."""
    rows = {}
    for row in read("choices_dinov2")["results"]:
        kind, *rest = row["name"].split(", ")
        if len(rest) > 1:
            bypass, keep = rest[0], rest[-1].removeprefix("keep ")
            weight = f" {rest[1].split()[1]}" if len(rest) == 3 else ""
            rows[bypass, keep, kind + weight] = row
    for bypass in ("identity", "shared"):
        for keep in ("0.5", "0.3", "0.15"):
            found = [(name, rows.get((bypass, keep, kind))) for kind, name in CHOICES.items()]
            _cosines(f"bypass `{bypass}`, keep {keep}", found)


def fitted() -> None:
    """What is fitted in closed form on real weights, without fine-tuning, by keep rate."""
    rows = {
        row["name"]: row
        for name in ("choices_dinov2", "bypass_dinov2")
        for row in read(name)["results"]
    }
    kinds = {kind: CHOICES[kind] for kind in ("previous", "worst_bypass", "predicted_bypass")}
    for keep in ("0.5", "0.3", "0.15"):
        paths = ("identity", "low_rank 16", "low_rank 64", "low_rank 256", "low_rank", "shared")
        found = [
            (f"{name}; bypass `{path}`", rows.get(f"{kind}, {path}, keep {keep}"))
            for kind, name in kinds.items()
            for path in paths
        ]
        _cosines(f"fitted in closed form, keep {keep}", found)


def accuracies(record: dict, title: str) -> None:
    """Networks of a record of `collect.py`, budget by budget: before and after fine-tuning."""
    found = {(row["name"], row["keep_rate"]): row for row in record["results"]}
    dense = found["dense_pretrained", None]["gmacs"]
    ours = {keep: row for (name, keep), row in found.items() if name == "tosa"}
    for keep in sorted(ours, reverse=True):
        rows = []
        for name, label in NETWORKS.items():
            row = found.get((name, keep)) or found.get((name, None))
            if row:
                start = _accuracies(row["before_fine_tuning"])
                end = _accuracies(row["metrics"])
                rows.append([
                    label, f"{row['gmacs'] / dense:.3f}",
                    f"{statistics.fmean(start):.1f}" if start else "–",
                    f"{statistics.fmean(end):.1f}",
                    _difference(row, ours[keep]) if name != "tosa" else "–",
                ])  # fmt: skip
        columns = ["network", "GMACs", "before", "fine-tuned", "to ToSA"]
        table(f"{title}, keep {keep}", columns, rows)


def _accuracies(metrics: dict) -> list[float]:
    """Top-1 of each seed in per cent."""
    return [100 * value for value in metrics.get("acc1", {}).get("seeds", [])]


def _difference(row: dict, reference: dict) -> str:
    """Mean of the differences paired by seed, and the half-width of its interval where there are several."""
    values, others = (
        dict(zip(r["seeds"], _accuracies(r["metrics"]), strict=True)) for r in (row, reference)
    )
    return _with_interval([values[seed] - others[seed] for seed in values if seed in others], "+")


def _with_interval(values: list[float], sign: str = "") -> str:
    """Mean, and the half-width of its interval where there are several values."""
    mean = f"{statistics.fmean(values):{sign}.1f}"
    if len(values) < 2:
        return f"{mean} (one seed)"
    return f"{mean} ± {T_95[len(values)] * statistics.stdev(values) / len(values) ** 0.5:.1f}"


def bypasses(title: str, records: dict[str, dict]) -> None:
    """ToSA by what becomes of bypassed tokens, and redundancy, by cost; differences are at equal keep rates."""
    dense = next(iter(records.values()))["results"][0]["gmacs"]
    first = next(iter(records))
    ours = {
        (name, row["keep_rate"]): row
        for name, record in records.items()
        for row in record["results"]
        if row["name"] == "tosa"
    }
    rows = []
    for (name, keep), row in sorted(ours.items(), key=lambda item: -item[1]["gmacs"]):
        reference = ours.get((first, keep)) if name != first else None
        rows.append([f"{row['gmacs'] / dense:.3f}", name, f"{keep:.2g}", *_ends(row, reference)])
    columns = ["GMACs", "bypass or plan", "keep", "before", "fine-tuned", f"to {first}"]
    table(title, columns, rows)


def selectors(keep: float = 0.3) -> None:
    """ToSA by how its selector is made and trained, at one budget."""
    rows, reference = [], None
    for name, label in SELECTORS.items():
        record = read(name)
        (row,) = (r for r in record["results"] if (r["name"], r["keep_rate"]) == ("tosa", keep))
        after = [stage["after"] for stage in record["selector"]]
        kl, recall = (
            statistics.fmean(found[f"selector/{what}"] for found in after)
            for what in ("kl", "recall")
        )
        rows.append([label, f"{kl:.2f}", f"{recall:.3f}", *_ends(row, reference)])
        reference = reference or row
    columns = ["selector", "KL, nats", "recall", "before", "fine-tuned", "to the recipe's"]
    table(f"Cluttered canvases, selectors, keep {keep}", columns, rows)


def _ends(row: dict, reference: dict | None) -> list[str]:
    """Accuracy before and after fine-tuning, and the difference to a reference, if there is one."""
    start, end = (_accuracies(row[k]) for k in ("before_fine_tuning", "metrics"))
    difference = _difference(row, reference) if reference else "–"
    return [f"{statistics.fmean(start):.1f}", _with_interval(end), difference]


def read(name: str) -> dict:
    """A record of the study."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def main() -> None:
    choices()
    fitted()
    accuracies(read("cluttered_fashion"), "Cluttered canvases")
    accuracies(read("cluttered_fashion_shared_controls"), "Cluttered canvases, bypass `shared`")
    accuracies(read("fashion_choices"), "Fashion-MNIST")
    selectors()
    records = {
        "Cluttered canvases": ("cluttered_fashion", "cluttered_fashion"),
        "Fashion-MNIST": ("../fashion_alone", "fashion"),
    }
    for title, (identity, prefix) in records.items():
        others = {
            label: read(f"{prefix}_{end}")
            for end, label in BYPASSES.items()
            if (FOLDER / f"{prefix}_{end}.json").exists()
        }
        bypasses(title, {"identity": read(identity)} | others)


if __name__ == "__main__":
    main()
