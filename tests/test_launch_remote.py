"""The launch scripts for other machines: what they would run, what they check first, and a preempted TPU.

Representatives for gcloud, xpk, srun and nvidia-smi on the PATH write down how they are called.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.subprocess
sys.path.insert(0, str(ROOT / "tests/golden"))

import make_launch  # noqa: E402

FAKE = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >>"$CALLS"
if [[ $* == *describe* ]]; then
    count=$(grep -c describe "$CALLS")
    state=$(cut -d, -f"$count" <<<"$STATES")
    if [[ -z $state ]]; then exit 1; fi
    echo "$state"
fi
if [[ $* == *tosa_jax.main* ]]; then
    count=$(grep -c tosa_jax.main "$CALLS")
    exit "$(cut -d, -f"$count" <<<"$MAIN_RCS")"
fi
"""


class Machine:
    """A checkout, and the calls that its scripts made."""

    def __init__(self, path: Path) -> None:
        self.root, self.bin, self.calls_file = path / "root", path / "bin", path / "calls"
        shutil.copytree(ROOT / "launch", self.root / "launch")
        subprocess.run(["git", "init", "-q", self.root], check=True)
        subprocess.run(["git", "-C", self.root, "add", "launch"], check=True)
        self.bin.mkdir()
        for name in ("gcloud", "xpk", "srun", "scontrol", "nvidia-smi"):
            (self.bin / name).write_text(FAKE)
            (self.bin / name).chmod(0o755)
        python = self.root / ".venv/bin/python"
        python.parent.mkdir(parents=True)
        shutil.copy(self.bin / "gcloud", python)

    def run(self, script: str, *args: str, **env: str) -> subprocess.CompletedProcess:
        self.calls_file.write_text("")
        env = {
            "PATH": f"{self.bin}:{os.environ['PATH']}", "CALLS": str(self.calls_file), "HOME": "/home/me",
            "STATES": "", "MAIN_RCS": "0", "POLL_SECONDS": "0", **env,
        }  # fmt: skip
        done = subprocess.run(
            [self.root / "launch" / script, *args],
            cwd=self.root,
            env=env,
            capture_output=True,
            text=True,
        )
        self.calls = self.calls_file.read_text().splitlines()
        return done


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_dry_runs_print_what_would_be_done(tmp_path: Path) -> None:
    assert make_launch.dry_runs() == make_launch.GOLDEN.read_text()


def test_scripts_pass_shellcheck() -> None:
    scripts = sorted((ROOT / "launch").iterdir())
    assert len(scripts) >= 9
    done = subprocess.run(
        [Path(sys.executable).with_name("shellcheck"), "-x", "--source-path=SCRIPTDIR/..", *scripts],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    for script in scripts:
        if os.access(script, os.X_OK):
            assert "set -euo pipefail" in script.read_text(), script


TPU, XPK, RUN = make_launch.TPU, make_launch.XPK, make_launch.RUN


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["tpu_vm.sh"], ""),
        (["tpu_vm.sh", "start", *TPU], "unknown action start"),
        (["tpu_vm.sh", "create", "--zone=us-west4-a"], "--name is missing"),
        (["tpu_vm.sh", "create", *TPU, "--version=v"], "--type is missing"),
        (["tpu_vm.sh", "create", *TPU, "--type=v5e", "--version=v"], "--type=v5e is not an accelerator"),
        (["tpu_vm.sh", "create", "--name=a_b", "--zone=us-west4-a"], "--name=a_b is not a name"),
        (["tpu_vm.sh", "create", *TPU, *make_launch.NEW, "--spot=1", "--reserved=1"], "exclude each other"),
        (["tpu_vm.sh", "create", *TPU, *make_launch.NEW, "--sopt=1"], "unknown argument --sopt"),
        (["tpu_vm.sh", "create", *TPU, *make_launch.NEW, "--spot"], "unexpected argument --spot"),
        (["tpu_vm.sh", "up", *TPU, *make_launch.NEW], "at least --config=FILE"),
        (["tpu_vm.sh", "up", *TPU, *make_launch.NEW, "--", "--config=x"], "--workdir=gs://"),
        (["tpu_vm.sh", "run", *TPU, "--", "--config=x", "--workdir=runs/x"], "--workdir=gs://"),
        (["gke_xpk.sh", "run", *XPK, "--type=v5litepod-16", *RUN], "--image is missing"),
        (["gke_xpk.sh", "delete", "--cluster=c", "--zone=us-west4-a", "--project=p"], "--name is missing"),
        (["gke_xpk.sh", "run", *XPK, "--type=v5litepod-16", "--image=i", "--slices=0", *RUN], "positive"),
        (["gpu.sh"], "--config=FILE is missing"),
        (["slurm.sbatch", "--config=x"], "--workdir=DIR is missing"),
        (["slurm.sbatch", "--config=x", "--workdir=y"], "it is for sbatch"),
        (["prepare_data.sh", "--", "--config=x"], "--to is missing"),
        (["prepare_data.sh", "--to=/disk", "--", "--config=x"], "a place in a bucket"),
        (["prepare_data.sh", "--to=gs://b/x"], "--config=FILE is missing"),
    ],
)  # fmt: skip
def test_wrong_arguments_print_usage_before_anything_is_done(machine, command, says) -> None:
    done = machine.run(*command)
    assert done.returncode == 2
    assert not machine.calls and not done.stdout
    said = done.stderr.splitlines()
    assert says in said[0] and f"launch/{command[0]}" in done.stderr
    assert len(said) > 5


def test_missing_commands_are_named(machine: Machine) -> None:
    (machine.bin / "xpk").unlink()
    done = machine.run("gke_xpk.sh", "status", *XPK)
    assert (done.returncode, done.stderr) == (2, "gke_xpk.sh: xpk is not installed\n")


def kinds(calls: list[str]) -> list[str]:
    """The calls, each by what it does."""
    marks = ("create", "describe", "scp", "setup.sh", "tosa_jax.main", "delete")
    return [next(mark for mark in marks if mark in call) for call in calls]


def test_a_preempted_tpu_is_asked_for_again_and_the_run_goes_on(machine: Machine) -> None:
    # Nothing there; waiting, there; after the failure suspended; gone; there again.
    states = ",WAITING_FOR_RESOURCES,ACTIVE,SUSPENDED,,ACTIVE"
    done = machine.run(
        "tpu_vm.sh", "up", *TPU, *make_launch.NEW, *RUN, STATES=states, MAIN_RCS="255,0"
    )
    assert done.returncode == 0, done.stderr
    assert "my-tpu was preempted; asking for it again" in done.stderr
    start = ["describe", "create", "describe"]
    work = ["scp", "setup.sh", "tosa_jax.main"]
    assert kinds(machine.calls) == [
        *start, "describe", *work, "describe", "delete", *start, *work,
    ]  # fmt: skip
    assert "--config.model.plan=it" in machine.calls[6] and machine.calls[6].endswith(
        " --multihost"
    )


def test_a_run_that_fails_on_a_tpu_that_is_there_fails(machine: Machine) -> None:
    args = ("tpu_vm.sh", "up", *TPU, *make_launch.NEW, *RUN)
    done = machine.run(*args, STATES="ACTIVE,ACTIVE,ACTIVE", MAIN_RCS="2")
    assert done.returncode == 2
    assert "create" not in kinds(machine.calls) and "delete" not in kinds(machine.calls)


def test_a_tpu_that_will_not_come_is_not_waited_for(machine: Machine) -> None:
    done = machine.run("tpu_vm.sh", "wait", *TPU, STATES="ACCEPTED,FAILED")
    assert done.returncode == 1 and "my-tpu is FAILED" in done.stderr
    done = machine.run("tpu_vm.sh", "wait", *TPU)
    assert done.returncode == 1 and "no queued resource my-tpu" in done.stderr


def test_one_failing_slice_fails_the_run(machine: Machine) -> None:
    done = machine.run("tpu_vm.sh", "run", *TPU, "--slices=2", *RUN, MAIN_RCS="143,143")
    assert done.returncode == 143
    assert sorted(call.split()[5] for call in machine.calls) == ["my-tpu-0", "my-tpu-1"]


@pytest.mark.parametrize("status", [143, 138])
def test_a_job_whose_time_is_up_goes_back_into_the_queue(status: int, machine: Machine) -> None:
    """By SIGTERM, or by the warning that sbatch's --signal=USR1 sends before."""
    args = ("slurm.sbatch", "--config=x", "--workdir=/shared/run")
    done = machine.run(*args, SLURM_JOB_ID="7", MAIN_RCS=str(status))
    assert done.returncode == status
    assert machine.calls[0].startswith("srun --kill-on-bad-exit=1") and machine.calls[0].endswith(
        "--multihost"
    )
    assert machine.calls[1:] == ["scontrol requeue 7"]
    assert machine.run(*args, SLURM_JOB_ID="7", MAIN_RCS="2").returncode == 2
    assert len(machine.calls) == 1
