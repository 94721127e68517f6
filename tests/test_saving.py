"""When a stage is saved: before anything that can fail, after so many minutes, and only if its numbers are finite."""

import dataclasses
import errno
import json
import math
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from small import runs_on_one_device, small_run

from tosa_jax import main as entry
from tosa_jax.cli.command import run_command
from tosa_jax.distributed.mesh import MeshConfig, make_mesh
from tosa_jax.distributed.preemption import SIGNALS, Stopped, StopRequest
from tosa_jax.errors import ConfigError, DataError, NonFiniteLossError
from tosa_jax.models.weights.run_checkpoints import saved_steps
from tosa_jax.train import checkpoints as train_checkpoints
from tosa_jax.train import loop
from tosa_jax.train import runner as train_runner
from tosa_jax.train.checkpoints import Checkpoints, Timer
from tosa_jax.train.evaluate import Evaluator, shard
from tosa_jax.train.finite import first_not_finite
from tosa_jax.train.metric_writer import MetricWriter
from tosa_jax.train.runner import Runner
from tosa_jax.train.stages import plan_stages

STEPS = 4


@pytest.fixture(scope="module")
def small(digits_dir, tmp_path_factory):
    """A runner and a stage of four steps."""
    run = small_run(digits_dir, pretrain={"steps": STEPS}, log_steps=1, eval={"figure_images": 0})
    with runs_on_one_device():
        runner = Runner(run, tmp_path_factory.mktemp("runner"), StopRequest())
    return runner, runner.stage_run(plan_stages(run)[0][0])


@pytest.fixture
def train(small, tmp_path):
    """Trains the stage in a folder of this test, from its newest checkpoint."""
    runner, stage = small

    def start(keep=2, stage_fields=(), **run_fields):
        run = dataclasses.replace(runner.run, **run_fields)
        with (
            Checkpoints(tmp_path / "stage", "acc1", keep=keep) as checkpoints,
            MetricWriter(tmp_path) as writer,
        ):
            changed = dataclasses.replace(stage, **dict(stage_fields))
            return loop.train_stage(changed, run, runner.mesh, checkpoints, writer, StopRequest())

    return start


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_an_evaluation_that_fails_costs_no_training(train, tmp_path, monkeypatch):
    def fail(self, params):
        raise DataError("validation image 7 is empty")

    with monkeypatch.context() as patch, pytest.raises(DataError, match="image 7 is empty"):
        patch.setattr(Evaluator, "__call__", fail)
        train()
    assert saved_steps(tmp_path / "stage") == [STEPS]

    with monkeypatch.context() as patch:
        patch.setattr(loop.Updates, "__call__", None)  # nothing is trained again
        state, facts = train()
    assert int(state.step) == facts["steps"] == STEPS and 0 <= facts["after"]["acc1"] <= 1
    assert [r["step"] for r in records(tmp_path) if "val/acc1" in r] == [STEPS]

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "__call__", fail)  # nor evaluated again
        again = train()
    jax.tree.map(np.testing.assert_array_equal, again[0], state)
    assert again[1] == facts


def test_a_kill_after_the_record_of_an_evaluation_leaves_it_there_once(
    train, tmp_path, monkeypatch
):
    def killed(self, step, metrics):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoints, "score", killed)
        train()
    train()
    rows = [(r["step"], "val/acc1" in r) for r in records(tmp_path)]
    assert rows == [*((step, False) for step in range(1, STEPS + 1)), (STEPS, True)]


def test_time_makes_a_checkpoint_due_and_the_newest_are_kept(train, tmp_path):
    train(keep=3, checkpoint_minutes=1e-9)
    assert saved_steps(tmp_path / "stage") == [2, 3, 4]


def test_a_timer_starts_again_and_may_be_off():
    now = [100.0]
    timer = Timer(60, 5, clock=lambda: now[0])
    now[0] = 159.0
    assert not timer.is_over(1)
    now[0] = 160.0
    assert timer.is_over(2) and timer.is_over(3)
    timer.restart()
    assert not timer.is_over(4)
    off = Timer(0, 5, clock=lambda: now[0])
    now[0] = 1e9
    assert not off.is_over(5)


def test_several_processes_ask_the_first_ones_clock_now_and_then(monkeypatch):
    asked = []
    monkeypatch.setattr(train_checkpoints, "are_several", lambda: True)
    monkeypatch.setattr(train_checkpoints, "is_main", lambda: False)
    monkeypatch.setattr(train_checkpoints, "first_said", lambda text: asked.append(text) or "over")
    timer = Timer(60, 5)
    assert [step for step in range(11) if timer.is_over(step)] == [0, 5, 10]
    assert asked == [""] * 3


def test_parameters_that_are_not_finite_are_not_saved(train, tmp_path, monkeypatch):
    update = loop.Updates.__call__

    def break_the_last(self, step, state, batch):
        state, metrics = update(self, step, state, batch)
        if step == STEPS - 1:
            state.params["head/kernel"] = state.params["head/kernel"].at[0, 0].set(jnp.inf)
        return state, metrics

    monkeypatch.setattr(loop.Updates, "__call__", break_the_last)
    line = (
        "params/head/kernel holds NaN or infinity after step 4.*; the checkpoint of step 2 is kept"
    )
    with pytest.raises(NonFiniteLossError, match=line):
        train(stage_fields={"checkpoint_steps": 2})
    assert saved_steps(tmp_path / "stage") == [2]


def test_an_evaluation_that_is_not_finite_is_told_and_the_checkpoint_is_there(
    train, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        Evaluator, "__call__", lambda self, params: ({"acc1": 0.5, "loss": math.nan}, 360)
    )
    line = r"pretrain step 4: .*loss=nan \(all parameters are finite\); the checkpoint of step 4 is kept"
    for _ in range(2):  # the next start says the same
        with pytest.raises(NonFiniteLossError, match=line):
            train()
    assert saved_steps(tmp_path / "stage") == [4]


def test_the_path_of_an_array_that_is_not_finite():
    tree = {"step": jnp.int32(3), "b": {"c": jnp.ones(3)}, "d": jnp.array([1.0, jnp.nan])}
    assert first_not_finite(tree) == "d"
    assert first_not_finite({**tree, "d": jnp.zeros(2, jnp.bfloat16)}) == ""
    mesh = make_mesh(MeshConfig(fsdp=8, data=1))
    parts = jax.device_put(
        jnp.arange(16.0).at[13].set(jnp.nan), NamedSharding(mesh, PartitionSpec("fsdp"))
    )
    assert first_not_finite({"a": shard({"x": np.ones(3)}, mesh), "b": parts}) == "b"
    assert first_not_finite({"step": 3 * jnp.ones(2, int)}) == ""


def test_fields_of_saving_are_checked(digits_dir):
    for fields, text in (
        ({"checkpoint_minutes": -1.0}, "checkpoint_minutes=-1.0"),
        ({"checkpoint_minutes": math.nan}, "checkpoint_minutes=nan"),
        ({"keep_checkpoints": 0}, "keep_checkpoints=0"),
    ):
        with pytest.raises(ConfigError, match=text):
            small_run(digits_dir, **fields)


def test_output_that_fails_stops_no_training(train, tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    (tmp_path / "metrics.jsonl").mkdir()
    (tmp_path / "tensorboard").write_text("a file where a folder should be")
    with monkeypatch.context() as patch:
        patch.setattr(sys.stderr, "write", broken)
        state, facts = train()
    assert int(state.step) == STEPS and 0 <= facts["after"]["acc1"] <= 1
    assert saved_steps(tmp_path / "stage") == [STEPS]


def test_a_page_that_is_missing_is_made_again_from_the_report(small, tmp_path, monkeypatch):
    monkeypatch.setattr(train_runner, "Runner", None)  # nothing is trained
    report = {"config": {}, "device": "cpu", "versions": {}, "stages": {}, "results": []}
    text = json.dumps(report)
    (tmp_path / "report.json").write_text(text)
    for _ in range(2):
        assert train_runner.run_stages(small[0].run, tmp_path) == report
        assert "</html>" in (tmp_path / "report.html").read_text()
        assert (tmp_path / "report.json").read_text() == text
        (tmp_path / "report.html").unlink()


def test_a_signal_between_the_rows_of_the_report_stops_the_run(small, monkeypatch):
    runner, _ = small
    monkeypatch.setattr(runner, "stop", StopRequest(signal.SIGINT))
    with pytest.raises(Stopped) as stopped:
        runner.compare(plan_stages(runner.run)[1])
    assert stopped.value.signum == signal.SIGINT


def test_a_signal_outside_of_training_is_one_line_and_its_status(tmp_path, monkeypatch, capsys):
    (tmp_path / "digits.py").write_bytes(
        (Path(__file__).parents[1] / "configs/digits.py").read_bytes()
    )
    # Who starts the tests may ignore some of them.
    before = [signal.signal(signum, signal.SIG_DFL) for signum in SIGNALS]
    for signum in SIGNALS:
        monkeypatch.setattr(train_runner, "run_stages", lambda *_, n=signum: signal.raise_signal(n))
        status = entry.main([f"--config={tmp_path}/digits.py", f"--workdir={tmp_path}/run"])
        assert status == 128 + signum
        said = capsys.readouterr().err
        assert said == f"stopped by {signum.name}; start the same command again to go on\n"
    for signum, handler in zip(SIGNALS, before, strict=True):
        assert signal.signal(signum, handler) == signal.SIG_DFL
    # and Ctrl-C in any other command
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    assert run_command(lambda: signal.raise_signal(signal.SIGINT)) == 130  # pyright: ignore
    signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "stopped by SIGINT\n"


def test_a_type_that_a_cpu_does_not_multiply_is_refused(digits_dir, tmp_path):
    run = small_run(digits_dir, pretrain={"steps": 1}, model={"dtype": "float16"})
    with pytest.raises(ConfigError, match="dtype='float16': a CPU does not"):
        Runner(run, tmp_path, StopRequest())
