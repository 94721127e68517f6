"""The tables of results/selection.md, from the records that it names.

    python results/selection_table.py                      every table
    python results/selection_table.py cluttered_fashion    those of results/cluttered_fashion.json

Cosines have 95 % intervals from resampling crops. Accuracies are means over seeds; differences to ToSA are paired by
seed and have the half-width of a 95 % interval by Student's t, which three seeds make wide.
"""

import json
import statistics
import sys
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
                    _difference(end, _accuracies(ours[keep]["metrics"])) if name != "tosa" else "–",
                ])  # fmt: skip
        columns = ["network", "GMACs", "before", "fine-tuned", "to ToSA"]
        table(f"{title}, keep {keep}", columns, rows)


def _accuracies(metrics: dict) -> list[float]:
    """Top-1 of each seed in per cent."""
    return [100 * value for value in metrics.get("acc1", {}).get("seeds", [])]


def _difference(values: list[float], reference: list[float]) -> str:
    """Mean of the paired differences, and the half-width of its interval."""
    pairs = [a - b for a, b in zip(values, reference, strict=True)]
    text = f"{statistics.fmean(pairs):+.1f}"
    if len(pairs) < 2:
        return text
    return f"{text} ± {T_95[len(pairs)] * statistics.stdev(pairs) / len(pairs) ** 0.5:.1f}"


def main() -> None:
    wanted = sys.argv[1:]
    if not wanted or "choices_dinov2" in wanted:
        cosines()
    for path in sorted(FOLDER.glob("cluttered_fashion*.json")) + sorted(
        FOLDER.glob("fashion_bypass*.json")
    ):
        if not wanted or path.stem in wanted:
            accuracies(json.loads(path.read_text()), path.stem)


if __name__ == "__main__":
    main()
