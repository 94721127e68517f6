"""Several processes on loopback: one network, one report; they start, stop and fail together."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import ClassVar

import jax
import pytest
from small import SIZES

from tests import forks
from tests.forks import Fork
from tosa_jax.cli.command import run_command
from tosa_jax.cli.flags import parse, parse_cluster
from tosa_jax.config import make_run_config
from tosa_jax.distributed import coordination
from tosa_jax.distributed.coordination import end_all
from tosa_jax.distributed.initialisation import Cluster, join
from tosa_jax.distributed.preemption import Stopped, StopRequest
from tosa_jax.errors import ConfigError
from tosa_jax.models.weights.run_checkpoints import saved_steps
from tosa_jax.tasks import TASKS
from tosa_jax.train.runner import run_stages
from tosa_jax.train.workdir import open_workdir

ROOT = Path(__file__).parents[1]
RECIPE = f"""
from dataclasses import dataclass
from tosa_jax.config import default_config
from tosa_jax.tasks import register
from tosa_jax.tasks.classification import Classification
from tosa_jax.tasks.losses import batch_weights

@register("some_count")
@dataclass(frozen=True, kw_only=True)
class SomeCount(Classification):
    # Half of the images count for nothing, as images without a true depth do.
    def training_batch(self, batch, key):
        return super().training_batch(batch, key) | {{"weight": batch_weights(batch["label"] > 4)}}

    def loss(self, out, batch):
        return batch["weight"] * super().loss(out, batch)

def get_config():
    config = default_config(task="some_count")
    config.batch_size = 16
    config.log_steps = 1
    config.model.update({SIZES | {"depth": 2}})
    config.data.update(name="digits", in_memory=True, augment="shift")
    config.inputs.update(mean=(.3,), std=(.4,))
    config.eval.batch_size = 360
    return config
"""
PATIENCE = 400  # seconds; none of the tests waits for it unless it fails


class Run:
    """Two processes of one run, a CPU device each: with more, the threads of a small machine starve each other.

    trees  the checkout that each one runs, in a Python of its own; where none is given, both are forks.
    """

    started: ClassVar[list[list[Fork | subprocess.Popen]]] = []

    def __init__(
        self, folder: Path, *args: str, each: tuple[tuple[str, ...], ...] = ((), ()), trees=()
    ):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        folder.mkdir(exist_ok=True)
        (folder / "tiny.py").write_text(RECIPE)
        self.outputs = [(folder / f"out{i}", folder / f"err{i}") for i in range(2)]
        self.children: list[Fork | subprocess.Popen] = []
        self.started.append(self.children)
        for i, (out, err) in enumerate(self.outputs):
            argv = [
                f"--config={folder}/tiny.py", f"--workdir={folder}/run", "--multihost",
                f"--coordinator=localhost:{port}", "--num_processes=2", f"--process_id={i}",
                *args, *each[i],
            ]  # fmt: skip
            if not trees:
                self.children.append(Fork(forks.main, argv, out=out, err=err))
                continue
            command = [sys.executable, "-m", "tosa_jax.main", *argv]
            env = os.environ | forks.ENVIRONMENT | {"PYTHONPATH": str(trees[i])}
            with out.open("w") as stdout, err.open("w") as stderr:
                self.children.append(
                    subprocess.Popen(command, cwd=trees[i], env=env, stdout=stdout, stderr=stderr)
                )

    def wait_for(self, pattern: str) -> None:
        """Until process 0 has printed it."""
        end = time.monotonic() + PATIENCE
        while not re.search(pattern, self.said(0)):
            assert time.monotonic() < end and self.children[0].poll() is None, self.said(0)
            time.sleep(0.05)

    def said(self, i: int) -> str:
        return self.outputs[i][1].read_text()

    def statuses(self) -> list[int]:
        return [child.wait(PATIENCE) for child in self.children]


@pytest.fixture(autouse=True)
def no_orphans():
    yield
    while Run.started:
        for child in Run.started.pop():
            child.kill()
            child.wait()


def own_lines(text: str) -> list[str]:
    """What this project said, without Gloo's greeting and the notes of the preemption service."""
    return [x for x in text.splitlines() if not re.match(r"\[Gloo\]|[WEI]\d{4} ", x)]


def steps_of(folder: Path) -> list[int]:
    return saved_steps(folder / "run/checkpoints/pretrain")


@pytest.mark.subprocess
def test_signals_stop_all_at_one_step_and_a_death_ends_all(digits_dir, tmp_path):
    args = (f"--config.data.data_dir={digits_dir}", "--config.pretrain.steps=100000")
    run = Run(tmp_path, *args)
    run.wait_for(r"step 3/")
    run.children[1].send_signal(signal.SIGTERM)
    assert run.statuses() == [143, 143], run.said(0) + run.said(1)
    (first,) = steps_of(tmp_path)
    assert "stopped by SIGTERM" in run.said(0) and "stopped by SIGTERM" in run.said(1)
    records = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(x)["step"] for x in records] == list(range(1, first + 1))

    run = Run(tmp_path, *args)
    run.wait_for(rf"step {first + 3}/")
    assert f"step {first}/" not in run.said(0)
    run.children[1].send_signal(signal.SIGINT)
    assert run.statuses() == [130, 130], run.said(0) + run.said(1)
    kept, second = steps_of(tmp_path)
    assert second > kept == first

    run = Run(tmp_path, *args)
    run.wait_for(rf"step {second + 3}/")
    run.children[1].kill()
    killed = time.monotonic()
    assert run.statuses() == [1, -signal.SIGKILL], run.said(0)
    assert time.monotonic() - killed < 60  # a promise, of which 25 s are used
    (line,) = [x for x in own_lines(run.said(0)) if not x.startswith("pretrain step")]
    # By the broken connection; where that hangs, as with accelerators, by the silence.
    assert line.startswith("error: another process of this run has stopped")


@pytest.mark.subprocess
def test_what_differs_is_told_before_anything_is_trained(digits_dir, tmp_path):
    args = (f"--config.data.data_dir={digits_dir}", "--config.pretrain.steps=5")
    run = Run(tmp_path, *args, each=((), ("--config.seed=5", "--config.data.workers=threads:1")))
    assert run.statuses() == [2, 2], run.said(0) + run.said(1)
    for i in range(2):
        (line,) = own_lines(run.said(i))
        assert line.startswith("error: process 1 differs from process 0 (seed: 0 -> 5);")
    assert not (tmp_path / "run").exists()

    tree = tmp_path / "tree"
    shutil.copytree(
        ROOT / "tosa_jax", tree / "tosa_jax", ignore=shutil.ignore_patterns("__pycache__")
    )
    with (tree / "tosa_jax/tasks/losses.py").open("a") as file:
        file.write("# another version\n")
    run = Run(tmp_path, *args, trees=(ROOT, tree))
    assert run.statuses() == [2, 2], run.said(0) + run.said(1)
    assert "process 1 differs from process 0 (code);" in run.said(0)


@pytest.mark.subprocess
def test_who_cannot_join_stops_with_one_line(tmp_path):
    (tmp_path / "tiny.py").write_text(RECIPE)
    argv = [f"--config={tmp_path}/tiny.py", "--multihost", f"--workdir={tmp_path}/run"]
    alone = ["--coordinator=localhost:1", "--num_processes=2", "--process_id=1", "--join_timeout=3"]
    said = []
    for more in (alone, []):
        err = tmp_path / "err"
        child = Fork(forks.main, [*argv, *more], out=tmp_path / "out", err=err)
        assert child.wait(PATIENCE) == 2, err.read_text()
        said.append(own_lines(err.read_text()))
    assert said[0] == ["error: the processes did not join at localhost:1 in 3 s; start all of them"]
    (line,) = said[1]
    assert line.startswith("error: --multihost: this process cannot join others")
    assert not (tmp_path / "run").exists()


def join_then(way: str, address: str, own: int, folder: Path) -> int:
    """A process that joins another, then waits; number 0 ends in this way when `folder/go` is there."""
    join(Cluster(multihost=True, coordinator=address, num_processes=2, process_id=own))
    (folder / f"joined{own}").touch()
    while own or not (folder / "go").exists():
        time.sleep(0.02)
    if way == "abort":
        os.abort()
    threading.Timer(0.5, os.abort).start()  # as JAX does when it notices that another one has died
    return end_all(3, "an error")


@pytest.mark.subprocess
@pytest.mark.parametrize(("way", "status"), [("abort", -signal.SIGABRT), ("error", 3)])
def test_the_end_of_process_0_is_a_line_of_the_others(way, status, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    errors = [tmp_path / f"err{i}" for i in range(2)]
    children = [
        Fork(join_then, way, address, i, tmp_path, out=tmp_path / f"out{i}", err=err)
        for i, err in enumerate(errors)
    ]
    Run.started.append(children)
    end = time.monotonic() + PATIENCE
    while not all((tmp_path / f"joined{i}").exists() for i in range(2)):
        assert time.monotonic() < end and not any(x.poll() for x in children), errors[0].read_text()
        time.sleep(0.02)
    (tmp_path / "go").touch()
    statuses = [child.wait(PATIENCE) for child in children]
    said = errors[1].read_text()
    assert statuses == [status, 1], said
    last = said.rstrip().splitlines()[-1]
    assert last.startswith("error: another process of this run has stopped (process 0: ")


def test_another_process_that_dies_while_all_end_is_a_line(monkeypatch, capsys):
    def finish():
        text = "UNAVAILABLE: Socket closed\nremote target coordination_service while calling GetKeyValue"
        raise jax.errors.JaxRuntimeError(text)

    monkeypatch.setattr(coordination, "finish", finish)
    monkeypatch.setattr(coordination, "are_several", lambda: True)
    monkeypatch.setattr(coordination, "end_all", lambda status, why: status)
    assert run_command(lambda: 0) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: another process of this run has stopped")


def losses_of(workdir: Path) -> dict[tuple[str, int], float]:
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [(r["stage"], r["step"], r["train/loss"]) for r in records if "train/loss" in r]
    assert len({x[:2] for x in losses}) == len(losses), "a step was recorded twice"
    return {(stage, step): loss for stage, step, loss in losses}


@pytest.mark.subprocess
def test_a_run_of_one_process_goes_on_in_two_and_ends_in_one(
    digits_dir, tmp_path, one_device, monkeypatch
):
    args = [
        f"--config.data.data_dir={digits_dir}", "--config.pretrain.steps=8",
        "--config.selector.steps=4", "--config.finetune.steps=4",
    ]  # fmt: skip
    (tmp_path / "tiny.py").write_text(RECIPE)
    monkeypatch.setitem(TASKS, "some_count", None)  # forgotten after the test
    config, _ = parse("", [f"--config={tmp_path}/tiny.py", *args])
    run = make_run_config(config)
    straight = run_stages(run, tmp_path / "straight")

    asked = iter([None] * 4 + [signal.SIGTERM])
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(StopRequest, "agreed", lambda self: next(asked))
        with open_workdir(tmp_path / "run", run):
            run_stages(run, tmp_path / "run")
    assert steps_of(tmp_path) == [4]

    # In parts, and each process has other images that count.
    other = ("--config.mesh.fsdp=2", "--config.accumulate=2", "--config.data.workers=threads:1")
    two = Run(tmp_path, *args, *other)
    assert two.statuses() == [0, 0], two.said(0) + two.said(1)
    assert "ToSA" in two.outputs[0][0].read_text()
    assert "pretrain step 5/8" in two.said(0) and "pretrain step 4/8" not in two.said(0)
    assert own_lines(two.outputs[1][0].read_text() + two.said(1)) == []
    expected, losses = losses_of(tmp_path / "straight"), losses_of(tmp_path / "run")
    assert losses.keys() == expected.keys() and len(losses) == 16
    for key, loss in expected.items():
        assert abs(losses[key] - loss) <= 1e-5, key
    reports = [straight, json.loads((tmp_path / "run/report.json").read_text())]
    (tmp_path / "run/report.json").unlink()
    reports.append(run_stages(run, tmp_path / "run"))
    assert reports[1]["device"].startswith("2 x")
    for report in reports[1:]:
        for row, other in zip(straight["results"], report["results"], strict=True):
            assert row["count"] == other["count"] == 360
            for name, value in row["metrics"].items():
                assert abs(value - other["metrics"][name]) <= 1e-5, (row["name"], name)
    for name in ("selected_tokens.png", "selectors.safetensors"):
        assert (tmp_path / "run" / name).stat().st_size == (
            tmp_path / "straight" / name
        ).stat().st_size


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--coordinator=localhost:1"], "go together, with --multihost"),
        (["--multihost", "--process_id=0"], "go together"),
        (["--multihost", "--coordinator=host", "--num_processes=2", "--process_id=0"], "HOST:PORT"),
        (
            ["--multihost", "--coordinator=h:1", "--num_processes=2", "--process_id=2"],
            "--process_id=2 is not in [0, 2)",
        ),
        (["--num_processes=two"], "num_processes"),
    ],
)
def test_arguments_that_do_not_go_together(arguments, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        parse_cluster(arguments)


@pytest.mark.parametrize(
    ("name", "value"),
    [("SLURM_STEP_NUM_TASKS", "4"), ("TPU_WORKER_HOSTNAMES", "a,b"), ("OMPI_COMM_WORLD_SIZE", "2")],
)
def test_a_launched_process_never_trains_alone_unasked(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(
        ConfigError, match=f"{name}={value}: .*each would train a network of its own"
    ):
        join(parse_cluster([])[0])
    cluster, rest = parse_cluster(["--nomultihost", "--config=x", "--config.seed=1"])
    assert rest == ["--config=x", "--config.seed=1"]
    join(cluster)
    monkeypatch.setenv(name, "1")
    join(parse_cluster([])[0])
