"""The tables of results/selection.md, from the records that it names.

    python results/selection_table.py

Cosines have 95 % intervals from resampling crops. Accuracies are means over seeds; differences to ToSA are paired by
seed and have the half-width of a 95 % interval by Student's t, which three seeds make wide.
"""

import json
import statistics
from pathlib import Path

FOLDER = Path(__file__).parent
CHOICES = {
    "random": "random",
    "previous": "`previous`: the map of the layer before",
    "class_attention": "class token's attention in the layer before (EViT's choice)",
    "selective": "ToSA: the selector's prediction of the next map",
    "true_map": "oracle: the true next map",
    "worst_bypass": "oracle: the largest updates",
    "previous 0.75": "redundancy, weight .75 (the rest: `previous`)",
    "previous 1.0": "redundancy alone",
}
NETWORKS = {
    "dense_pretrained": "dense, as pretrained",
    "dense": "dense, fine-tuned as long",
    "skip": "selective layers skipped",
    "tosa": CHOICES["selective"],
} | CHOICES
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Student's t for 95 % by number of seeds."""


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Prints a table of Markdown."""
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def cosines() -> None:
    """Choices on real weights without fine-tuning, by bypass and keep rate."""

    def cell(row: dict, what: str) -> str:
        low, high = row[f"{what}_interval"]
        return f"{row[f'{what}_cosine']:.3f} ({low:.3f} to {high:.3f})"

    rows = {}
    for row in json.loads((FOLDER / "choices_dinov2.json").read_text())["results"]:
        kind, *rest = row["name"].split(", ")
        if len(rest) > 1:
            bypass, keep = rest[0], rest[-1].removeprefix("keep ")
            weight = f" {rest[1].split()[1]}" if len(rest) == 3 else ""
            rows[bypass, keep, kind + weight] = row
    for bypass in ("identity", "shared"):
        for keep in ("0.5", "0.3", "0.15"):
            found = [(name, rows.get((bypass, keep, kind))) for kind, name in CHOICES.items()]
            table(
                f"bypass `{bypass}`, keep {keep}",
                ["choice", "GMACs", "class token", "patches"],
                [
                    [name, f"{row['share']:.3f}", cell(row, "class"), cell(row, "patch")]
                    for name, row in found
                    if row
                ],
            )


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
    pairs = [values[seed] - others[seed] for seed in values if seed in others]
    text = f"{statistics.fmean(pairs):+.1f}"
    if len(pairs) < 2:
        return f"{text} (one seed)"
    return f"{text} ± {T_95[len(pairs)] * statistics.stdev(pairs) / len(pairs) ** 0.5:.1f}"


def bypasses(title: str, records: dict[str, dict]) -> None:
    """ToSA by what becomes of bypassed tokens; the first record is the one that differences are to."""
    found = {
        (name, row["keep_rate"]): row
        for name, record in records.items()
        for row in record["results"]
        if row["name"] == "tosa"
    }
    dense = next(iter(records.values()))["results"][0]["gmacs"]
    first, rows = next(iter(records)), []
    for keep in sorted({keep for _, keep in found}, reverse=True):
        for name in records:
            if (row := found.get((name, keep))) and (reference := found.get((first, keep))):
                end = _accuracies(row["metrics"])
                start = _accuracies(row["before_fine_tuning"])
                rows.append([
                    f"{keep:g}", name, f"{row['gmacs'] / dense:.3f}", f"{statistics.fmean(start):.1f}",
                    f"{statistics.fmean(end):.1f}", _difference(row, reference) if name != first else "–",
                ])  # fmt: skip
    columns = ["keep", "ToSA with", "GMACs", "before", "fine-tuned", f"to {first}"]
    table(title, columns, rows)


def read(name: str) -> dict:
    """A record of `collect.py`."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def main() -> None:
    cosines()
    for title, name in (
        ("Cluttered canvases", "cluttered_fashion"),
        ("Cluttered canvases, bypass `shared`", "cluttered_fashion_shared_controls"),
    ):
        if (FOLDER / f"{name}.json").exists():
            accuracies(read(name), title)
    for title, name, identity in (
        ("Cluttered canvases", "cluttered_fashion", "cluttered_fashion"),
        ("Fashion-MNIST", "fashion", "fashion_alone"),
    ):
        records = {"identity": read(identity)}
        for bypass in ("shared", "low_rank"):
            if (FOLDER / f"{name}_{bypass}.json").exists():
                records[bypass] = read(f"{name}_{bypass}")
        bypasses(title, records)


if __name__ == "__main__":
    main()
