"""Updates that go wrong are told with their examples or skipped; odd inputs give finite, repeatable numbers."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import forward, random_images, runs_on_one_device, small_model, small_run
from weight_samples import assert_refused, tiny, tiny_weights, write

from tosa_jax.data.pipeline import open_dataset
from tosa_jax.distributed.mesh import to_global
from tosa_jax.distributed.preemption import StopRequest
from tosa_jax.errors import ConfigError, NonFiniteLossError
from tosa_jax.models.params import set_params, split
from tosa_jax.train import loop
from tosa_jax.train.checkpoints import Checkpoints
from tosa_jax.train.metric_writer import MetricWriter
from tosa_jax.train.runner import Runner
from tosa_jax.train.stages import plan_stages

BAD_STEP = 2
"""The update from this step has a loss that goes wrong."""


@pytest.fixture(scope="module")
def broken(digits_dir, tmp_path_factory):
    """A runner, and a stage of four steps whose loss is NaN on one batch."""
    return broken_stage(digits_dir, tmp_path_factory.mktemp("runner"), np.nan)


def broken_stage(digits_dir, folder, factor, **model):
    """A runner, and a stage of four steps whose loss is multiplied on one batch."""
    run = small_run(digits_dir, pretrain={"steps": 4}, log_steps=2, eval={"figure_images": 0})
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, **model))
    with runs_on_one_device():
        runner = Runner(run, folder, StopRequest())
    stage = runner.stage_run(plan_stages(run)[0][0])
    task = stage.setup.task
    batch = to_global(
        next(loop.stage_batches(run, stage.setup, runner.mesh, BAD_STEP)), runner.mesh
    )
    bad = float(task.training_batch(batch, jax.random.key(0))["image"].mean())

    class Breaks(type(task)):
        def training_loss(self, forward, rows, *rest):
            loss = super().training_loss(forward, rows, *rest)
            is_bad = jnp.abs(rows["image"].mean() - bad) < 1e-6
            return loss._replace(values=loss.values * jnp.where(is_bad, factor, 1.0))

    task = Breaks(**{f.name: getattr(task, f.name) for f in dataclasses.fields(task)})
    return runner, dataclasses.replace(stage, setup=dataclasses.replace(stage.setup, task=task))


def train(broken, folder, **fields):
    runner, stage = broken
    run = dataclasses.replace(runner.run, **fields)
    skip = run.on_nonfinite == "skip"
    setup = dataclasses.replace(stage.setup, skip=skip, max_grad_norm=run.max_grad_norm)
    stage = dataclasses.replace(stage, setup=setup)
    with Checkpoints(folder / "stage", "acc1") as checkpoints, MetricWriter(folder) as writer:
        return loop.train_stage(stage, run, runner.mesh, checkpoints, writer, StopRequest())


def test_a_step_that_goes_wrong_is_told_with_its_array_and_examples(broken, tmp_path):
    runner, stage = broken
    with pytest.raises(NonFiniteLossError) as caught:
        train(broken, tmp_path)
    text = str(caught.value)
    assert "the loss of step 3 is nan; the gradient of blocks/0/attn/proj/bias holds NaN" in text
    named = text.partition("its batch holds ")[2].partition(" and 8 more")[0].split(", ")
    split = open_dataset(runner.run.data)._source("train", "train", train=True)
    batch = next(loop.stage_batches(runner.run, stage.setup, runner.mesh, BAD_STEP))
    labels = [int(split[int(name.removeprefix("image "))]["label"]) for name in named]
    assert labels == batch["label"][:8].tolist() and len(named) == 8


def test_a_step_that_goes_wrong_can_be_skipped(broken, tmp_path, capsys):
    state, _ = train(broken, tmp_path, on_nonfinite="skip")
    assert int(state.step) == 4 and all(np.isfinite(x).all() for x in state.params.values())
    counts = optax.tree_utils.tree_get_all_with_path(state.opt, "count")
    assert {int(count) for _, count in counts} == {3}
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(x["train/loss"]) for x in lines if "train/loss" in x)
    assert capsys.readouterr().err.count("The update is skipped") == 1
    with pytest.raises(NonFiniteLossError, match="1 in a row, skip_at_most=0 allows no more"):
        train(broken, tmp_path / "again", on_nonfinite="skip", skip_at_most=0)
    with pytest.raises(ConfigError, match="on_nonfinite='go on' is unknown"):
        dataclasses.replace(broken[0].run, on_nonfinite="go on")


def test_a_spike_stops_the_run_or_is_skipped_where_the_norm_is_limited(
    digits_dir, tmp_path, capsys
):
    spike = broken_stage(digits_dir, tmp_path / "runner", 1e6)
    with pytest.raises(NonFiniteLossError) as caught:
        train(spike, tmp_path, max_grad_norm=1e3)
    text = str(caught.value)
    assert (
        "the gradient's norm is" in text and "above max_grad_norm=1000, and head/kernel has" in text
    )
    assert "the loss of step 3 is" in text and "its batch holds image " in text
    state, _ = train(spike, tmp_path / "skip", max_grad_norm=1e3, on_nonfinite="skip")
    counts = optax.tree_utils.tree_get_all_with_path(state.opt, "count")
    assert {int(count) for _, count in counts} == {3}
    assert capsys.readouterr().err.count("The update is skipped") == 1
    assert int(train(spike, tmp_path / "no limit")[0].step) == 4
    with pytest.raises(ConfigError, match=r"max_grad_norm=-1.0 must be 0 or more"):
        dataclasses.replace(spike[0].run, max_grad_norm=-1.0)


def test_an_overflow_in_bfloat16_is_told_at_its_step(digits_dir, tmp_path):
    overflow = broken_stage(
        digits_dir, tmp_path / "runner", 3e38, dtype="bfloat16", param_dtype="bfloat16"
    )
    with pytest.raises(
        NonFiniteLossError, match=r"loss of step 3 is inf; the gradient of \S+ holds"
    ):
        train(overflow, tmp_path)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e39])
def test_weights_that_are_not_finite_are_refused_by_name(value, tmp_path):
    arrays = {name: x.astype(np.float64) for name, x in tiny_weights().items()}
    arrays["blocks.1.attn.qkv.bias"][3] = value
    name = "blocks/1/attn/qkv/bias"
    says = {1e39: f"{name} holds numbers too large for float32"}
    says = says.get(value, f"holds 1 values that are not finite, in {name}")
    path = write(tmp_path / "a.safetensors", arrays)
    assert_refused(tiny(), path, says)


@pytest.mark.parametrize("case", ["constant images", "equal scores", "one token"])
def test_odd_inputs_give_finite_and_repeatable_numbers(case):
    fields = {
        "plan": ("standard", "selective") * 2,
        "keep_rate": 0.01 if case == "one token" else 0.5,
    }
    model = small_model(**fields)
    images = jnp.full((2, 8, 8, 1), 0.7) if case == "constant images" else random_images(2)
    graphdef, params = split(model)
    if case == "equal scores":
        params = {name: jnp.zeros_like(x) if "qkv" in name else x for name, x in params.items()}

    def loss(params):
        out = set_params(graphdef, params)(images)
        return jnp.square(out.logits).sum(), out

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (first, out), grads = run(params)
    (again, out_again), _ = run(params)
    assert np.isfinite(first) and first == again
    assert all(np.isfinite(x).all() for x in grads.values())
    for chosen, chosen_again in zip(out.selected, out_again.selected, strict=True):
        assert (
            np.array_equal(chosen, chosen_again) and len(set(chosen[0].tolist())) == chosen.shape[1]
        )
    if case == "one token":
        assert out.selected[0].shape[1] == 2  # the class token, and one patch
    assert np.isfinite(forward(model, images).logits).all()
