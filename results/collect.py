"""Gathers the reports of runs that differ in their seed, and in budgets, into one result file.

    python results/collect.py --command="launch/local.sh --config=..." RUN_DIR ... > results/NAME.json
    python results/collect.py --command=... --baseline=runs/mean_depth_map.json RUN_DIR ... > results/rooms.json

For each row of the reports: the metric of every seed, mean and standard deviation; the same for the network before it
was fine-tuned, with what the selector stage left. Device, versions and the seconds of each stage are kept, so that a
table can be traced to what made it.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from tosa_jax.config import differences

MAY_DIFFER = (
    "seed: ", "init_from: ", "init_selectors: ", "eval.controls: ", "eval.keep_rates: ", "model.budget_gmacs: ",
    "model.keep_rate: ",
)  # fmt: skip
"""Fields that runs may differ in: a seed may start from what an earlier run with the same seed made; it may have more
rows than others, each of which then has the seeds that have it; and its budgets may be runs of their own."""


def spread(records: list[dict]) -> dict:
    """Each metric, which all seeds have: its values, their mean and standard deviation."""
    found = {}
    for metric in records[0]:
        values = [record[metric] for record in records]
        std = statistics.stdev(values) if len(values) > 1 else None
        found[metric] = {"seeds": values, "mean": statistics.fmean(values), "std": std}
    return found


def before_fine_tuning(report: dict, row: dict) -> dict:
    """The metrics of a row's network at the start of its fine-tuning; {} where it had none."""
    name = "" if row["name"] == "tosa" else f"_{row['name']}"
    for stage in (f"finetune{name}_{row['keep_rate']}", f"finetune{name}"):
        if stage in report["stages"]:
            return report["stages"][stage].get("before", {})
    return {}


def _key(row: dict) -> tuple:
    """What makes rows of several reports one."""
    rate = row["keep_rate"]
    return row["name"], tuple(rate) if isinstance(rate, list) else rate


def collect(reports: list[dict], command: str) -> dict:
    """One record for all reports. Raises ValueError if they differ in more than `MAY_DIFFER`."""
    for report in reports[1:]:
        lines = differences(reports[0]["config"], report["config"])
        if extra := [line for line in lines if not line.startswith(MAY_DIFFER)]:
            raise ValueError(f"the runs differ in more than seed and budget: {extra}")
    rows = []
    for name, keep_rate in dict.fromkeys(_key(row) for r in reports for row in r["results"]):
        by_seed = {
            r["config"]["seed"]: (r, row)
            for r in reports
            for row in r["results"]
            if _key(row) == (name, keep_rate)
        }
        having = list(by_seed.values())
        same = [row for _, row in having]
        row = {key: same[0][key] for key in ("name", "keep_rate", "split", "count", "gmacs")}
        row["seeds"] = list(by_seed)
        row["img_per_sec"] = statistics.median(row["img_per_sec"] for row in same)
        row["metrics"] = spread([r["metrics"] for r in same])
        starts = [before_fine_tuning(*pair) for pair in having]
        row["before_fine_tuning"] = spread(starts)
        rows.append(row)
    return {
        "command": command,
        "seeds": [report["config"]["seed"] for report in reports],
        "device": reports[0]["device"],
        "versions": reports[0]["versions"],
        "seconds": [
            {name: stage.get("seconds") for name, stage in report["stages"].items()}
            for report in reports
        ],
        "selector": list(
            {r["config"]["seed"]: r["stages"].get("selector") for r in reports}.values()
        ),
        "results": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--command", required=True, help="the command that made the runs")
    parser.add_argument(
        "--baseline",
        type=Path,
        action="append",
        default=[],
        help="a record of results/mean_depth_map.py",
    )
    parser.add_argument("runs", nargs="+", type=Path, help="work directories")
    args = parser.parse_args()
    reports = [json.loads((run / "report.json").read_text()) for run in args.runs]
    record = collect(reports, args.command)
    if args.baseline:
        record["baselines"] = [json.loads(path.read_text()) for path in args.baseline]
    json.dump(record, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
