"""Evaluation scores each example once, whatever the batch size and the number of devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small import small_model, small_run

from tosa_jax.distributed import memory
from tosa_jax.distributed.mesh import MeshConfig, make_mesh
from tosa_jax.errors import DeviceError
from tosa_jax.models.params import split
from tosa_jax.tasks import create_model, metrics
from tosa_jax.tasks.classification import Classification
from tosa_jax.tasks.task import Task
from tosa_jax.train.evaluate import Evaluator, shard, throughput
from tosa_jax.train.step import eval_step

TASK = Classification(num_classes=10, mean=(0.3,), std=(0.4,))


def test_every_example_counts_once_for_any_batch_size_and_device_count(digits_dir):
    graphdef, params = split(small_model(keep_rate=0.5))
    data = small_run(digits_dir).data
    results = []
    for devices, batch_size in ((1, 7), (1, 400), (8, 64)):
        mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
        values, count = Evaluator(graphdef, TASK, data, mesh, batch_size)(params)
        assert count == 360
        results.append([values["acc1"], values["acc5"], values["loss"]])
    np.testing.assert_allclose(results[1:], results[:1] * 2, atol=1e-6)
    assert 0 < results[0][0] < results[0][1] < 1


def test_padding_may_hold_anything():
    sums = metrics.totals({"x": jnp.array([1.0, 3.0, jnp.nan])}, jnp.array([1.0, 1.0, 0.0]))
    assert metrics.means(metrics.add(sums, sums)) == {"x": 2.0}


def test_top_k_breaks_ties_by_index_and_never_counts_nan():
    logits = jnp.array([[1.0, 1.0, 0.0], [0.0, 2.0, 1.0], [jnp.nan] * 3])
    labels = jnp.array([1, 1, 0])
    assert metrics.top_k_correct(logits, labels, 1).tolist() == [False, True, False]
    assert metrics.top_k_correct(logits, labels, 2).tolist() == [True, True, False]


def test_throughput_is_images_of_the_batch_over_seconds(digits_dir, monkeypatch):
    graphdef, params = split(small_model())
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    evaluator = Evaluator(graphdef, TASK, small_run(digits_dir).data, mesh, 60)
    ticks = iter(np.arange(0, 1000, 0.5))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(ticks)))
    assert throughput([(evaluator, params)], rounds=3) == [pytest.approx(120.0)]


def test_a_step_that_does_not_fit_is_told_before_it_runs(digits_dir, monkeypatch):
    graphdef, params = split(small_model())
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    evaluator = Evaluator(graphdef, TASK, small_run(digits_dir).data, mesh, 60)
    monkeypatch.setattr(memory, "device_bytes", lambda device: 2**10)
    too_large = r"an evaluation step of eval\.batch_size=60 .*--config\.eval\.batch_size lower"
    for work in (lambda: evaluator(params), lambda: throughput([(evaluator, params)])):
        with pytest.raises(DeviceError, match=too_large):
            work()


def test_the_step_whose_size_was_checked_is_not_compiled_again(digits_dir, caplog):
    graphdef, params = split(small_model())
    mesh = make_mesh(MeshConfig(), jax.devices())
    evaluator = Evaluator(graphdef, TASK, small_run(digits_dir).data, mesh, 120)
    with jax.log_compiles():
        evaluator(shard(params, mesh))
    compiled = [r.getMessage() for r in caplog.records if "XLA compilation" in r.getMessage()]
    assert len([text for text in compiled if "eval_step" in text]) == 1


class WhoSelectsWhat(Task):
    """A task whose scores say which example selects which token: the images differ, and so do their means."""

    def metrics(self, out, batch):
        indices, brightness = out.selected[0], batch["image"].mean(axis=(1, 2, 3))
        return {str(i): brightness * (indices == i).any(axis=1) for i in range(17)}


def test_an_example_draws_the_same_tokens_in_any_batch_on_any_devices(digits_dir):
    graphdef, params = split(small_model(plan="random", keep_rate=0.5))
    data = small_run(digits_dir, data={"eval_split": "test[:15]"}).data
    task, scores, selected = WhoSelectsWhat(mean=(0.5,), std=(0.5,)), [], []
    for devices, batch_size in ((1, 5), (1, 3), (8, 16)):
        mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
        evaluator = Evaluator(graphdef, task, data, mesh, batch_size)
        scores.append(evaluator(params)[0])
        parts = [out.selected[0] for _, out in evaluator.outputs(params, "eval")]
        selected.append(np.concatenate(parts))
    assert len({tuple(row) for row in selected[0]}) > 10, "examples draw the same tokens"
    for other_scores, other_selected in zip(scores[1:], selected[1:], strict=True):
        np.testing.assert_array_equal(other_selected, selected[0])
        assert other_scores == pytest.approx(scores[0], rel=1e-5)


class SelectedTokens(Task):
    """A task that counts the tokens of the first selection."""

    def metrics(self, out, batch):
        indices = out.selected[0]
        return {"tokens": jnp.full(len(indices), indices.shape[1], jnp.float32)}


def test_larger_images_keep_their_share_of_tokens():
    model = create_model(
        "vit", task="depth", rngs=nnx.Rngs(0), image_size=(16, 24), patch_size=8, embed_dim=16,
        depth=4, num_heads=2, decoder_dim=8, plan="selective", keep_rate=0.5,
    )  # fmt: skip
    graphdef, params = split(model)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    for size, tokens in (((16, 24), 1 + 3), ((32, 48), 1 + 12)):
        batch = {"image": jnp.ones((2, *size, 3), jnp.uint8), "mask": jnp.ones(2)}
        step = functools.partial(
            eval_step,
            graphdef=graphdef,
            task=SelectedTokens(mean=(0.5,) * 3, std=(0.5,) * 3),
            seed=0,
            mesh=mesh,
        )
        sums = jax.jit(step)(params, batch, jnp.int32(0))
        assert metrics.means(sums) == {"tokens": tokens}
