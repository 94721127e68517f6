"""Gathers records of compile_check into results/tpu_fit.json and the table of results/tpu_fit.md.

    python -m tosa_jax.compile_check --config=... --topology=v5e:2x4 --only="train finetune" --json > CELL.json
    python results/tpu_fit.py CELL.json ... > results/tpu_fit.json

The table goes to standard error. `results/tpu_fit.md` names the command of each cell.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

COLUMNS = ("step", "chips", "mesh", "batch a chip", "arguments", "temporaries", "total of memory", "flops a chip",
           "collectives", "compile, CPU s")  # fmt: skip


def row(record: dict) -> str:
    """One line of the table."""
    mesh = " ".join(f"{axis}={size}" for axis, size in record["mesh"].items() if size > 1)
    sent = ", ".join(
        f"{x['count']} {kind} {x['bytes'] / 1e6:.1f} MB"
        for kind, x in (record["collectives"] or {}).items()
    )
    size = {
        key: f"{(record[key] or 0) / 1e9:.2f} GB"
        for key in ("argument_bytes", "temp_bytes", "total_bytes")
    }
    cells = (
        f"{record['network']}, {record['name']}", f"{record['devices']} {record['device']}", mesh,
        record["device_batch_size"], size["argument_bytes"], size["temp_bytes"],
        f"{size['total_bytes']} of {record['memory_bytes'] / 1e9:.1f}{'' if record['fits'] else ': does not fit'}",
        f"{record['flops'] or 0:.3g}", sent,
        round(record["compile_cpu_seconds"]) if record["compile_cpu_seconds"] else "-",
    )  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def main(paths: list[str]) -> None:
    """Reads the cells, named NETWORK-ANYTHING.json, and writes them as one file."""
    records = [
        {"network": Path(path).name.partition("-")[0]} | record
        for path in paths
        for record in json.loads(Path(path).read_text())
    ]
    versions = {name: version(name) for name in ("jax", "jaxlib", "libtpu", "flax")}
    print(json.dumps({"versions": versions, "records": records}, indent=1))
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS), *map(row, records)]
    print("\n".join(lines), file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
