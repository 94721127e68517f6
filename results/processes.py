"""What a second process costs: the same two CPU devices in one process, and in two that meet on loopback.

    python results/processes.py [--rounds=3] > results/processes.json

Trains the dense network of configs/digits.py for a few hundred steps; the runs take turns. `img_per_sec` is the median
of what the logs say after the first intervals, `seconds` a whole run with start, compilation, evaluation, checkpoint.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tosa_jax.distributed.devices import versions

RECIPE = [
    "--config=configs/digits.py", "--config.pretrain.epochs=0", "--config.pretrain.steps=600",
    "--config.selector.steps=0", "--config.finetune.epochs=0", "--config.finetune.steps=0",
    "--config.eval.controls=()", "--config.log_steps=50", "--config.mesh.data=2",
]  # fmt: skip


def run(processes: int, folder: Path, data_dir: Path) -> dict:
    """Starts the run's processes, two devices in all, and waits for them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={2 // processes}"
    platform = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "JAX_COMPILATION_CACHE_DIR": ""}
    environment = os.environ | platform
    command = [sys.executable, "-m", "tosa_jax.main", *RECIPE, f"--workdir={folder}"]
    command.append(f"--config.data.data_dir={data_dir}")
    together = ["--multihost", f"--coordinator=localhost:{port}", f"--num_processes={processes}"]
    start, children = time.perf_counter(), []
    for i in range(processes):
        own = [*together, f"--process_id={i}"] if processes > 1 else []
        child = subprocess.Popen(
            [*command, *own],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        children.append(child)
    errors = [child.communicate()[1] for child in children]
    if any(child.returncode for child in children):
        raise RuntimeError(f"a process failed: {errors[-1][-2000:]}")
    seconds = time.perf_counter() - start
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    rates = [r["perf/img_per_sec"] for r in records if r.get("perf/img_per_sec")]
    return {"img_per_sec": statistics.median(rates), "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    found: dict[int, list[dict]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(rounds):
            for processes, runs in found.items():
                runs.append(
                    run(processes, Path(folder) / f"{processes}_{i}", Path(folder) / "tfds")
                )
                print(processes, runs[-1], file=sys.stderr)
    rows = [
        {"processes": processes, "devices": 2}
        | {key: statistics.median(r[key] for r in runs) for key in runs[0]} | {"runs": runs}
        for processes, runs in found.items()
    ]  # fmt: skip
    json.dump({
        "command": f"python results/processes.py --rounds={rounds}", "seed": 0,
        "device": "two CPU devices on two cores", "versions": versions(), "rows": rows,
    }, sys.stdout, indent=1)  # fmt: skip
    print()


if __name__ == "__main__":
    main()
