"""The task protocol holds for tasks that are nothing like classification: each is one class, here in the test."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from small import SIZES, die_after_saving, trace_steps_once

from tosa_jax.config import default_config, make_run_config
from tosa_jax.distributed.mesh import MeshConfig, make_mesh, to_global, tree_shardings
from tosa_jax.distributed.preemption import StopRequest
from tosa_jax.models.factory import MODEL_CLASSES, structure
from tosa_jax.models.layers import linear
from tosa_jax.models.params import set_params
from tosa_jax.models.vit import Output, VisionTransformer
from tosa_jax.models.vit_config import ViTConfig
from tosa_jax.tasks import TASKS, model_config, register
from tosa_jax.tasks.depth.task import Depth
from tosa_jax.tasks.losses import soft_cross_entropy
from tosa_jax.tasks.task import AverageTeacher, Loss, Task, input_fields
from tosa_jax.train.checkpoints import Checkpoints
from tosa_jax.train.loop import jit_step, restore_or_init, train_stage
from tosa_jax.train.metric_writer import MetricWriter
from tosa_jax.train.runner import Runner, run_stages
from tosa_jax.train.stages import Stage, plan_stages
from tosa_jax.train.step import StepSetup, init_state, train_step

STEPS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoCrops(Task):
    """Self-distillation as in DINO (Caron et al. 2021): no labels, a moving average as the teacher, a centre."""

    best_metric = "knn"
    num_prototypes: int

    @classmethod
    def from_run(cls, run, stage):
        return cls(num_prototypes=run.model.num_classes, **input_fields(run))

    @classmethod
    def plan(cls, run, stages, rows):
        last = dataclasses.replace(run.pretrain, learning_rate=1e-5)
        stages = [*stages, Stage("anneal", "anneal", stages[0].model, "pretrain", last)]
        return stages, [dataclasses.replace(row, stage="anneal") for row in rows]

    @property
    def teacher(self):
        return AverageTeacher(decay)

    def init_state(self):
        return {"centre": jnp.zeros(self.num_prototypes)}

    def update_state(self, state, statistics):
        return {"centre": 0.9 * state["centre"] + 0.1 * statistics}

    def training_batch(self, batch, key):
        image = self.inputs(batch["image"])
        return {"crops": (jnp.roll(image, 1, axis=1), jnp.roll(image, -1, axis=2))}

    def training_loss(self, forward, batch, keys, teacher, state):
        guides = [teacher(crop).logits for crop in batch["crops"]]
        students = [forward(crop, key=keys).logits / 0.1 for crop in batch["crops"]]
        targets = [jax.nn.softmax((x - state["centre"][None]) / 0.04) for x in guides]
        values = soft_cross_entropy(students[0], targets[1])
        values += soft_cross_entropy(students[1], targets[0])
        return Loss(values, jnp.concatenate(guides).mean(axis=0))

    def metrics(self, out, batch):
        return {"confidence": jax.nn.softmax(out.logits).max(axis=-1)}

    def split_metrics(self, outputs):
        (train, known), (test, wanted) = (
            [
                np.concatenate(parts)
                for parts in zip(
                    *(
                        (out.tokens.reshape(len(out.tokens), -1), batch["label"])
                        for batch, out in outputs(split)
                    ),
                    strict=True,
                )
            ]
            for split in ("train", "eval")
        )
        assert (len(train), len(test)) == (1437, 360)  # without padding
        distance = (train**2).sum(axis=1)[None] - 2 * test @ train.T  # but for a constant
        return {"knn": float((known[distance.argmin(axis=1)] == wanted).mean())}


def decay(step, total):
    """Rises from .8 to 1 along a cosine, as the teacher's momentum does in DINO."""
    return 1 - 0.1 * (1 + jnp.cos(jnp.pi * step / total))


WORDS = np.random.default_rng(0).integers(2, 7, (10, 3)).astype(np.int32)
START, VOCABULARY = 1, 7


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionConfig(ViTConfig):
    """A ViT whose head writes text."""

    task = "caption"


class CaptionModel(VisionTransformer):
    """The image's tokens are the prefix of a sequence of text, on which one causal attention layer runs."""

    config_class = CaptionConfig

    def add_head(self, rngs):
        width = self.config.embed_dim
        self.embedding = nnx.Param(
            0.1 * jax.random.normal(rngs.params(), (VOCABULARY + WORDS.shape[1], width))
        )
        self.qkv = linear(self.config, width, 3 * width, rngs)
        self.head = linear(self.config, width, VOCABULARY, rngs)

    def head_macs(self):
        return (1 + 3 * WORDS.shape[1]) * self.config.embed_dim**2

    def __call__(self, images, text, *, key=None, train=False):
        state = self.layers(self.embed(images), key=key, train=train)
        tokens = self.norm(state.tokens)
        n, t = tokens.shape[1], text.shape[1]
        words = self.embedding[...][text] + self.embedding[...][None, VOCABULARY:]
        q, k, v = jnp.split(self.qkv(jnp.concatenate([tokens, words], axis=1)), 3, axis=2)
        sees = jnp.arange(n + t)[None] <= n + jnp.arange(t)[:, None]
        scores = jnp.where(sees[None], jnp.einsum("bqd,bkd->bqk", q[:, n:], k), -1e9)
        read = words + jnp.einsum("bqk,bkd->bqd", jax.nn.softmax(scores), v)
        return Output({"text": self.head(read)}, tokens, state.selected, state.aux)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Caption(Task):
    """Next-token prediction with teacher forcing: each token is predicted from the true ones before it."""

    model_class = CaptionModel
    best_metric = "token_accuracy"

    @classmethod
    def from_run(cls, run, stage):
        return cls(**input_fields(run))

    @classmethod
    def of_model(cls, config, options, *, mean, std):
        return cls(mean=mean, std=std)

    def text(self, batch):
        return batch["text"] if "text" in batch else jnp.asarray(WORDS)[batch["label"]]

    def shifted(self, batch):
        return jnp.pad(self.text(batch)[:, :-1], ((0, 0), (1, 0)), constant_values=START)

    def training_batch(self, batch, key):
        image = self.inputs(batch["image"])
        return {"image": image, "read": self.shifted(batch), "write": self.text(batch)}

    def training_loss(self, forward, batch, keys, teacher, state):
        assert teacher is None
        return Loss(self.values(forward(batch["image"], batch["read"], key=keys), batch["write"]))

    def values(self, out, text):
        logits = out.predictions["text"]
        hot = jax.nn.one_hot(text, VOCABULARY)
        return (
            soft_cross_entropy(logits.reshape(-1, VOCABULARY), hot.reshape(-1, VOCABULARY))
            .reshape(text.shape)
            .mean(axis=1)
        )

    def predict(self, model, batch, key):
        return model(self.inputs(batch["image"]), self.shifted(batch), key=key)

    def metrics(self, out, batch):
        text = self.text(batch)
        right = out.predictions["text"].argmax(axis=2) == text
        return {"loss": self.values(out, text), "token_accuracy": right.mean(axis=1)}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr("tosa_jax.tasks.registry.TASKS", TASKS)
    before, models = dict(TASKS), dict(MODEL_CLASSES)
    register("two_crops")(TwoCrops)
    register("caption")(Caption)
    yield
    TASKS.clear()
    TASKS.update(before)
    MODEL_CLASSES.clear()
    MODEL_CLASSES.update(models)


def run_of(task, data_dir, divided=False, **fields):
    """`divided`: over eight devices, which takes twice as long to compile."""
    config = default_config(task=task)
    config.update(batch_size=16, log_steps=1, **fields)
    config.model.update(SIZES | {"depth": 1 if task == "two_crops" else 2})
    config.data.update(name="digits", data_dir=data_dir, in_memory=True)
    config.inputs.update(mean=(0.3,), std=(0.4,))
    if divided:
        config.mesh.update(data=2, fsdp=2, model=2)
    config.eval.update(batch_size=240, figure_images=0)
    config.pretrain.update(steps=STEPS, checkpoint_steps=2, learning_rate=3e-3)
    return make_run_config(config)


def first_stage(run, workdir):
    runner = Runner(run, workdir, StopRequest())
    return runner, runner.stage_run(plan_stages(run)[0][0])


def images_of(seed):
    return np.random.default_rng(seed).integers(0, 256, (16, 8, 8, 1), np.uint8)


def states_after(runner, stage_run, batches):
    """The state at the start and after each batch, on the host; the shardings of the last."""
    abstract = jax.eval_shape(stage_run.init, *stage_run.init_args)
    shardings = tree_shardings(abstract, runner.mesh)
    state = jax.jit(stage_run.init, out_shardings=shardings)(*stage_run.init_args)
    step = jit_step(stage_run.setup, shardings, runner.mesh)
    states, losses = [jax.device_get(state)], []
    for batch in batches:
        state, metrics = step(state, to_global(batch, runner.mesh))
        states.append(jax.device_get(state))
        losses.append(float(metrics["loss"]))
    return states, losses, state


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_teacher_is_the_average_and_the_centre_the_mean_of_its_outputs(
    accumulate, digits_dir, tmp_path, request
):
    """On one device, and in parts that are divided over eight."""
    divided = accumulate == 2
    if not divided:
        request.getfixturevalue("one_device")
    run = run_of("two_crops", digits_dir, divided, accumulate=accumulate)
    runner, stage_run = first_stage(run, tmp_path)
    batches = [{"image": images_of(i)} for i in range(3)]
    states, _, last = states_after(runner, stage_run, batches)
    setup = stage_run.setup
    look = jax.jit(lambda p, x: set_params(setup.graphdef, p)(x).logits)
    teacher, centre = states[0].params, np.zeros(10)
    for i, batch in enumerate(batches):
        image = (batch["image"] / np.float32(255) - 0.3) / 0.4
        crops = (np.roll(image, 1, axis=1), np.roll(image, -1, axis=2))
        guides = np.concatenate([look(teacher, crop.astype(np.float32)) for crop in crops])
        centre = 0.9 * centre + 0.1 * guides.mean(axis=0)
        np.testing.assert_allclose(states[i + 1].task["centre"], centre, atol=1e-6)
        share = 1 - 0.1 * (1 + np.cos(np.pi * i / STEPS))
        after = states[i + 1].params
        teacher = {k: share * teacher[k] + (1 - share) * after[k] for k in after}
        for name, x in teacher.items():
            np.testing.assert_allclose(states[i + 1].teacher[name], x, atol=1e-6)
    assert np.abs(centre).max() > 1e-3
    assert last.task["centre"].sharding.is_fully_replicated
    kernel = "blocks/0/attn/qkv/kernel"
    assert last.teacher[kernel].sharding == last.params[kernel].sharding
    if divided:
        assert last.teacher[kernel].sharding.shard_shape((16, 48)) == (8, 24)


def test_the_state_of_a_task_survives_a_restart_bit_for_bit(
    digits_dir, tmp_path, monkeypatch, one_device
):
    runner, stage_run = first_stage(run_of("two_crops", digits_dir), tmp_path)

    def train(folder, die=False):
        with Checkpoints(folder, "knn") as checkpoints, MetricWriter(folder) as writer:
            if die:
                die_after_saving(checkpoints, 2, monkeypatch)
            go = functools.partial(train_stage, stage_run, runner.run, runner.mesh)
            return go(checkpoints, writer, StopRequest())[0]

    trace_steps_once(monkeypatch)
    straight = train(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "b", die=True)
    with Checkpoints(tmp_path / "b", "knn") as checkpoints:
        _, middle, _, restored = restore_or_init(stage_run, runner.mesh, checkpoints)
    assert restored and int(middle.step) == 2 and np.abs(middle.task["centre"]).max() > 0
    resumed = train(tmp_path / "b")
    assert (np.asarray(resumed.task["centre"]) != middle.task["centre"]).any()
    jax.tree.map(np.testing.assert_array_equal, straight, resumed)


def test_a_run_without_labels_trains_its_own_stages_and_reports_neighbours(
    digits_dir, tmp_path, one_device
):
    run = run_of("two_crops", digits_dir)
    report = run_stages(run, tmp_path)
    assert list(report["stages"]) == ["pretrain", "anneal"]
    (row,) = report["results"]
    assert row["count"] == 360 and set(row["metrics"]) == {"confidence", "knn"}
    assert row["metrics"]["knn"] > 0.5  # chance is .1
    assert json.loads((tmp_path / "report.json").read_text())["results"] == [row]
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"pretrain", "anneal"}


def test_the_loss_of_text_is_numpys_cross_entropy_of_the_next_token(
    digits_dir, tmp_path, one_device
):
    runner, stage_run = first_stage(run_of("caption", digits_dir), tmp_path)
    text = np.random.default_rng(5).integers(0, VOCABULARY, (16, 3)).astype(np.int32)
    batch = {"image": images_of(9), "text": text}
    states, (loss,), _ = states_after(runner, stage_run, [batch])
    pixels = ((batch["image"] / np.float32(255) - 0.3) / 0.4).astype(np.float32)
    model = jax.jit(
        lambda p, x, t: set_params(stage_run.setup.graphdef, p)(x, t).predictions["text"]
    )
    read = np.concatenate([np.full((16, 1), START), text[:, :-1]], axis=1).astype(np.int32)
    logits = np.asarray(model(states[0].params, pixels, read), np.float64)
    log_sum = np.log(np.exp(logits).sum(axis=2))
    chosen = np.take_along_axis(logits, text[:, :, None], axis=2)[:, :, 0]
    np.testing.assert_allclose(loss, (log_sum - chosen).mean(), rtol=1e-5)
    # What comes later does not change what is predicted now.
    later = read.copy()
    later[:, 2] = (later[:, 2] + 1) % VOCABULARY
    moved = np.asarray(model(states[0].params, pixels, later))
    np.testing.assert_allclose(moved[:, :2], logits[:, :2], atol=1e-5)
    assert np.abs(moved[:, 2] - logits[:, 2]).max() > 1e-4


def test_a_run_that_writes_text_is_scored(digits_dir, tmp_path, one_device):
    report = run_stages(run_of("caption", digits_dir), tmp_path)
    (row,) = report["results"]
    assert row["count"] == 360 and 0 <= row["metrics"]["token_accuracy"] <= 1
    before = -np.log(1 / VOCABULARY)
    assert 0 < row["metrics"]["loss"] < 2 * before


@functools.cache
def depth_network():
    config = model_config(
        "depth", "vit", image_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=1, decoder_dim=4,
    )  # fmt: skip
    graphdef, shapes = structure(config)
    rng = np.random.default_rng(0)
    return graphdef, {
        path: rng.normal(0, 0.2, x.shape).astype(np.float32) for path, x in shapes.items()
    }


def depth_update(devices, accumulate, images, depth):
    """Loss and gradient norm of a depth step on a batch, its parameters afterwards, and what predicts depth before."""
    graphdef, params = depth_network()
    task = Depth(max_depth=10.0, mean=(0.5,) * 3, std=(0.25,) * 3)
    setup = StepSetup(
        graphdef, task, optax.sgd(10.0), lambda step: 0.0, 0.0, 0, 0, accumulate=accumulate
    )
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    state = init_state(setup, params, {})
    step = jax.jit(functools.partial(train_step, setup=setup, mesh=mesh))
    new, metrics = step(state, to_global({"image": images, "depth": depth}, mesh))
    look = jax.jit(lambda params, images: set_params(graphdef, params)(task.inputs(images)).depth)
    found = jax.device_get((metrics["loss"], metrics["grad_norm"], new.params))
    return found, functools.partial(look, params, images)


def test_images_without_a_pixel_count_for_nothing_in_any_number_of_parts_and_devices():
    rng = np.random.default_rng(3)
    images = rng.integers(0, 256, (8, 16, 16, 3), np.uint8)
    depth = rng.uniform(0.5, 9, (8, 16, 16)).astype(np.float32)
    depth[[0, 2, 4]] = 0
    whole, predict = depth_update(1, 1, images, depth)
    difference = np.log(np.asarray(predict(), np.float64)) - np.log(np.where(depth > 0, depth, 1))
    each = [10 * np.sqrt((d**2).mean() - 0.85 * d.mean() ** 2) for d in difference[[1, 3, 5, 6, 7]]]
    np.testing.assert_allclose(whole[0], np.mean(each), rtol=1e-5)
    found, _ = depth_update(4, 2, images, depth)  # one part of three devices has no pixel
    np.testing.assert_allclose(found[:2], whole[:2], rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), found[2], whole[2])
    moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), whole[2], depth_network()[1])
    assert max(moved.values()) > 1
