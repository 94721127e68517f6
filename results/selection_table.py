"""The tables of results/selection.md from results/choices_dinov2.json.

python results/selection_table.py
"""

import json
from pathlib import Path

FOLDER = Path(__file__).parent
NAMES = {
    "random": "random",
    "previous": "`previous`: the map of the layer before",
    "class_attention": "class token's attention in the layer before (EViT's choice)",
    "selective": "ToSA: the selector's prediction of the next map",
    "true_map": "oracle: the true next map",
    "worst_bypass": "oracle: the largest updates",
    "previous 0.75": "redundancy, weight .75 (the rest: `previous`)",
    "previous 1.0": "redundancy alone",
}


def cell(row: dict, what: str) -> str:
    """A mean and its 95 % interval."""
    low, high = row[f"{what}_interval"]
    return f"{row[f'{what}_cosine']:.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    rows = {}
    for row in json.loads((FOLDER / "choices_dinov2.json").read_text())["results"]:
        kind, *rest = row["name"].split(", ")
        if len(rest) > 1:
            bypass, keep = rest[0], rest[-1].removeprefix("keep ")
            weight = f" {rest[1].split()[1]}" if len(rest) == 3 else ""
            rows[bypass, keep, kind + weight] = row
    for bypass in ("identity", "shared"):
        for keep in ("0.5", "0.3", "0.15"):
            print(
                f"\nbypass `{bypass}`, keep {keep}\n\n| choice | GMACs | class token | patches |\n|---|---|---|---|"
            )
            for kind, name in NAMES.items():
                if row := rows.get((bypass, keep, kind)):
                    print(
                        f"| {name} | {row['share']:.3f} | {cell(row, 'class')} | {cell(row, 'patch')} |"
                    )


if __name__ == "__main__":
    main()
