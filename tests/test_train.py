"""A run: stages in order, resumed bit for bit, stopped by signals and by losses that are not finite."""

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest
from small import die_after_saving, small_run

from tosa_jax.data.pipeline import Dataset
from tosa_jax.distributed import memory
from tosa_jax.distributed.preemption import Stopped, StopRequest
from tosa_jax.errors import ConfigError, DataError, DeviceError, NonFiniteLossError
from tosa_jax.models import cost
from tosa_jax.models.factory import abstract_model, structure
from tosa_jax.models.weights.run_checkpoints import saved_steps
from tosa_jax.train import runner
from tosa_jax.train.checkpoints import Checkpoints
from tosa_jax.train.loop import train_stage
from tosa_jax.train.metric_writer import MetricWriter
from tosa_jax.train.runner import Runner, run_stages
from tosa_jax.train.stages import plan_stages
from tosa_jax.train.step import saved_tree

TRAIN_BATCHES = Dataset.train_batches

STEPS = {"steps": 20, "ema_decay": 0.9, "warmup_steps": 2, "checkpoint_steps": 10}


def run_of(data_dir, **sections):
    stage = {"pretrain": STEPS | {"drop_path_rate": 0.2}, "selector": STEPS, "finetune": STEPS}
    mesh = {"data": 2, "fsdp": 2, "model": 2}
    return small_run(data_dir, **({"mesh": mesh} | stage | sections))


def make_start(runner, stage):
    """Parameters to start from, without training: the random ones of a dense and of a ToSA model."""
    if stage.start not in runner.params:
        before = next(s for s in plan_stages(runner.run)[0] if s.name == stage.start)
        make_start(runner, before)
        before_run = runner.stage_run(before)
        state = before_run.init(*before_run.init_args)
        start = runner.params[before.start]
        runner.params[stage.start] = start | jax.tree.map(np.asarray, state.frozen | state.params)


def train_one(runner, stage, workdir, stop_at=None, monkeypatch=None):
    """Trains a stage, or is killed right after the checkpoint of step `stop_at`."""
    stage_run = runner.stage_run(stage)
    checkpoints = Checkpoints(workdir / stage.name, stage_run.setup.task.best_metric)
    if stop_at is not None:
        die_after_saving(checkpoints, stop_at, monkeypatch)
    seen = []

    def recorded(*args, **kwargs):
        for batch in TRAIN_BATCHES(*args, **kwargs):
            seen.append(batch["image"].sum())
            yield batch

    monkeypatch.setattr(Dataset, "train_batches", recorded)
    with MetricWriter(workdir) as writer:
        try:
            state, _ = train_stage(
                stage_run, runner.run, runner.mesh, checkpoints, writer, StopRequest()
            )
        except KeyboardInterrupt:
            state = None
    checkpoints.close()
    return state, seen


@pytest.mark.parametrize("kind", ["pretrain", "selector", "finetune"])
def test_killed_and_resumed_is_bit_identical_to_straight(
    kind, digits_dir, tmp_path, monkeypatch, request
):
    mesh = {"data": 2, "fsdp": 2, "model": 2}
    if kind != "finetune":  # eight devices once
        request.getfixturevalue("one_device")
        mesh = {"data": -1, "fsdp": 1, "model": 1}
    runner = Runner(run_of(digits_dir, mesh=mesh), tmp_path, StopRequest())
    stage = next(s for s in plan_stages(runner.run)[0] if s.kind == kind)
    make_start(runner, stage)
    straight, all_seen = train_one(runner, stage, tmp_path / "a", monkeypatch=monkeypatch)
    _, first = train_one(runner, stage, tmp_path / "b", stop_at=10, monkeypatch=monkeypatch)
    resumed, rest = train_one(runner, stage, tmp_path / "b", monkeypatch=monkeypatch)
    assert len(first) == len(rest) == 10 and first + rest == all_seen
    assert int(straight.step) == 20 and straight.ema
    stage_run = runner.stage_run(stage)
    start = stage_run.init(*stage_run.init_args)
    assert any((np.asarray(straight.params[k]) != start.params[k]).any() for k in start.params)
    jax.tree.map(np.testing.assert_array_equal, straight, resumed)
    records = [
        [json.loads(x) for x in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in "ab"
    ]
    losses = [[(r["step"], r["train/loss"]) for r in rs if "train/loss" in r] for rs in records]
    assert losses[0][-1] == losses[1][-1]


def test_stages_freeze_what_they_must(digits_dir, tmp_path):
    runner = Runner(run_of(digits_dir), tmp_path, StopRequest())
    trained = {}
    for stage in plan_stages(runner.run)[0]:
        make_start(runner, stage)
        stage_run = runner.stage_run(stage)
        state = stage_run.init(*stage_run.init_args)
        trained[stage.name] = set(state.params)
        assert set(state.opt[1][0].mu) == set(state.params)
        assert not set(state.params) & set(state.frozen)
    assert trained.keys() == {"pretrain", "selector", "finetune"}
    assert all("/selector/" in name for name in trained["selector"])
    assert trained["pretrain"] == trained["finetune"]

    def only(trainable):
        config = dataclasses.replace(stage.config, trainable=trainable)
        return runner.stage_run(dataclasses.replace(stage, config=config))

    head = only("^head/")
    state = head.init(*head.init_args)
    assert set(state.params) == set(state.opt[1][0].mu) == {"head/bias", "head/kernel"}
    assert set(state.frozen) | set(state.params) == set(structure(stage.model).shapes)
    macs = cost.training_macs(abstract_model(stage.model), "head")
    assert head.flops_per_image == 2 * macs < stage_run.flops_per_image
    kernels = only("kernel$")
    assert set(kernels.init(*kernels.init_args).params) == {
        x for x in trained["finetune"] if x.endswith("kernel")
    }
    said = r"config.finetune.trainable='\^hed/' matches no parameter .* begin with blocks, cls_token, .*head"
    with pytest.raises(ConfigError, match=said):
        only("^hed/")


def test_a_whole_run_with_controls_reports_and_then_only_prints(
    digits_dir, tmp_path, one_device, monkeypatch
):
    short = {"steps": 4}
    run = run_of(
        digits_dir,
        mesh={"data": -1, "fsdp": 1, "model": 1},
        pretrain=short,
        selector=short,
        finetune=short | {"distill_weight": 0.5},
        eval={"controls": ("random", "skip"), "keep_rates": (0.5, 0.25)},
    )
    pictures = []
    monkeypatch.setattr(MetricWriter, "image", lambda self, *shown: pictures.append(shown[:3]))
    report = run_stages(run, tmp_path)
    drawn = ("selector", "finetune", "finetune_0.25", "finetune_random_0.5", "finetune_random_0.25")
    expected = [(stage, step, "selected_tokens") for stage in drawn for step in (0, 4)]
    assert pictures == [*expected, ("eval", 0, "selected_tokens")]
    assert "<svg" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "classes.txt").read_text().split() == list("0123456789")
    rows = [(row["name"], row["keep_rate"]) for row in report["results"]]
    assert rows == [
        ("dense_pretrained", None), ("tosa", 0.5), ("tosa", 0.25), ("random", 0.5), ("random", 0.25),
        ("skip", None),
    ]  # fmt: skip
    assert {row["count"] for row in report["results"]} == {360}
    gmacs = {(row["name"], row["keep_rate"]): row["gmacs"] for row in report["results"]}
    assert gmacs["skip", None] < gmacs["random", 0.25] < gmacs["tosa", 0.25] < gmacs["tosa", 0.5]
    assert gmacs["tosa", 0.5] < gmacs["dense_pretrained", None]
    assert (tmp_path / "selected_tokens.png").read_bytes().startswith(b"\x89PNG")
    names = {p.name for p in (tmp_path / "checkpoints").iterdir()}
    assert {"pretrain", "selector", "finetune", "finetune_skip", "finetune_random_0.25"} <= names
    assert "selector/kl" in report["stages"]["selector"]["before"]

    monkeypatch.setattr(runner, "Runner", None)  # a finished run trains nothing
    assert run_stages(run, tmp_path) == json.loads(json.dumps(report))


def test_a_step_that_does_not_fit_the_device_is_told_before_it_runs(
    digits_dir, tmp_path, monkeypatch
):
    run = run_of(digits_dir, selector={"steps": 0}, finetune={"steps": 0})
    monkeypatch.setattr(memory, "device_bytes", lambda device: 2**10)
    with pytest.raises(
        DeviceError, match=r"a training step of batch_size=16 .*--config\.batch_size"
    ):
        run_stages(run, tmp_path)
    assert not list((tmp_path / "checkpoints/pretrain").glob("*/state"))


def test_an_evaluation_that_does_not_fit_is_told_at_the_first_step(
    digits_dir, tmp_path, monkeypatch
):
    run = run_of(digits_dir, selector={"steps": 0}, finetune={"steps": 0})
    limits = iter([2**40, 2**10])  # what training sees, and what the evaluation does
    monkeypatch.setattr(memory, "device_bytes", lambda device: next(limits))
    with pytest.raises(DeviceError, match=r"an evaluation step of eval\.batch_size=120 needs"):
        run_stages(run, tmp_path)
    assert not (tmp_path / "metrics.jsonl").read_text()  # not one interval of training was over


def test_a_signal_saves_and_stops_and_the_next_start_goes_on(digits_dir, tmp_path, monkeypatch):
    run = run_of(digits_dir, selector={"steps": 0}, finetune={"steps": 0})

    def send_at_step_5(*args, **kwargs):
        for i, batch in enumerate(TRAIN_BATCHES(*args, **kwargs)):
            if i == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(Dataset, "train_batches", send_at_step_5)
    with pytest.raises(Stopped) as stopped:
        run_stages(run, tmp_path)
    assert stopped.value.signum == signal.SIGTERM
    assert saved_steps(tmp_path / "checkpoints/pretrain") == [5]
    monkeypatch.setattr(Dataset, "train_batches", TRAIN_BATCHES)
    assert run_stages(run, tmp_path)["stages"]["pretrain"]["steps"] == 20


def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_checkpoint(digits_dir, tmp_path):
    run = run_of(digits_dir, selector={"steps": 0}, finetune={"steps": 0})
    run = dataclasses.replace(run, log_steps=2)
    runner = Runner(run, tmp_path, StopRequest())
    (stage,) = plan_stages(run)[0]
    stage_run = runner.stage_run(stage)

    class Breaks(type(stage_run.setup.task)):
        def loss(self, out, batch):
            return super().loss(out, batch) * np.nan

    good = Checkpoints(tmp_path / "checkpoints/pretrain", "acc1")
    state = stage_run.init(*stage_run.init_args)
    good.save(3, saved_tree(state._replace(step=state.step + 3)), {"steps": 3})
    good.wait()
    good.close()
    task = stage_run.setup.task
    task = Breaks(**{f.name: getattr(task, f.name) for f in dataclasses.fields(task)})
    broken = dataclasses.replace(stage_run, setup=dataclasses.replace(stage_run.setup, task=task))
    checkpoints = Checkpoints(tmp_path / "checkpoints/pretrain", "acc1")
    with (
        MetricWriter(tmp_path) as writer,
        pytest.raises(NonFiniteLossError, match="loss of step 4"),
    ):
        train_stage(broken, run, runner.mesh, checkpoints, writer, StopRequest())
    assert checkpoints.manager.all_steps() == [3]
    checkpoints.close()


def test_newest_and_best_are_kept_and_a_damaged_one_is_passed_over(tmp_path):
    checkpoints = Checkpoints(tmp_path, "acc1")
    for step, acc1 in ((1, 0.5), (2, 0.9), (3, 0.1), (4, 0.2)):
        checkpoints.save(step, {"x": np.full(3, step)}, {"steps": step})
        checkpoints.score(step, {"acc1": acc1})
    checkpoints.wait()
    assert sorted(checkpoints.manager.all_steps()) == [2, 4]
    checkpoints.close()
    for path in (tmp_path / "4" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    again = Checkpoints(tmp_path, "acc1")
    state, facts = again.restore({"x": jax.ShapeDtypeStruct((3,), np.int64)})
    assert facts == {"steps": 2} and state["x"].tolist() == [2, 2, 2]
    again.close()


def test_what_does_not_fit_is_found_before_anything_is_trained(digits_dir, tmp_path):
    with pytest.raises(ConfigError, match="num_classes=7, but 'digits' has 10"):
        Runner(run_of(digits_dir, model={"num_classes": 7}), tmp_path, StopRequest())
    with pytest.raises(ConfigError, match="batch_size=18 is not divided"):
        Runner(run_of(digits_dir, batch_size=18), tmp_path, StopRequest())
    with pytest.raises(DataError, match="tosa_jax.prepare"):
        Runner(run_of(str(tmp_path), data={"name": "cifar10"}), tmp_path, StopRequest())
