"""Writes launch.txt, what the launch scripts print with DRY_RUN=1, and holds the commands that it is of.

python tests/golden/make_launch.py
"""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).with_name("launch.txt")

RUN = ["--", "--config=configs/deit_s.py", "--workdir=gs://bucket/run", "--config.model.plan=it's"]
TPU = ["--name=my-tpu", "--zone=us-west4-a"]
NEW = ["--type=v5litepod-16", "--version=v2-alpha-tpuv5-lite"]
XPK = ["--cluster=c", "--zone=us-west4-a", "--project=p", "--name=my-run"]
COMMANDS = [
    ["tpu_vm.sh", "up", *TPU, *NEW, "--spot=1", *RUN],
    ["tpu_vm.sh", "up", *TPU, *NEW, "--slices=2", "--reserved=1", "--project=p", *RUN],
    ["tpu_vm.sh", "create", *TPU, *NEW],
    ["tpu_vm.sh", "wait", *TPU],
    ["tpu_vm.sh", "install", *TPU],
    ["tpu_vm.sh", "run", *TPU, *RUN],
    ["tpu_vm.sh", "status", *TPU],
    ["tpu_vm.sh", "delete", *TPU],
    ["gke_xpk.sh", "run", *XPK, "--type=v5litepod-16", "--image=gcr.io/p/image", "--slices=2", *RUN],
    ["gke_xpk.sh", "status", *XPK],
    ["gke_xpk.sh", "delete", *XPK],
    ["gpu.sh", "--config=configs/deit_s.py", "--workdir=runs/a b"],
    ["slurm.sbatch", "--config=configs/deit_s.py", "--workdir=/shared/run"],
    ["prepare_data.sh", "--to=gs://bucket/data", "--staging=/disk", "--", "--config=configs/deit_s.py"],
]  # fmt: skip


def dry_runs(folder: Path = ROOT / "launch") -> str:
    """Each command with what it prints."""
    text = ""
    for script, *args in COMMANDS:
        done = subprocess.run(
            [folder / script, *args], env=os.environ | {"DRY_RUN": "1"}, cwd=folder.parent,
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        text += f"$ {script} {' '.join(args)}\n{done.stdout}{done.stderr}\n"
    return text


if __name__ == "__main__":
    GOLDEN.write_text(dry_runs())
