"""Self-distillation without labels: crops, reference tokens and loss against the published algorithm in NumPy."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from published import gelu, layers_of, softmax
from small import SIZES, die_after_saving, forward, small_model, trace_steps_once
from test_layer_kinds import noisy

from tosa_jax import predict
from tosa_jax.config import default_config, make_run_config
from tosa_jax.distributed.preemption import StopRequest
from tosa_jax.errors import ConfigError
from tosa_jax.inference.predictor import Predictor
from tosa_jax.models.params import get_params, set_params, split
from tosa_jax.models.weights.load import load_pretrained, save_weights
from tosa_jax.tasks import create_model
from tosa_jax.tasks.dino import crops
from tosa_jax.tasks.dino.network import ProjectionHead
from tosa_jax.tasks.dino.scores import nearest_neighbours, ridge_classes
from tosa_jax.tasks.dino.task import Dino, DinoOptions, momentum_at
from tosa_jax.train.checkpoints import Checkpoints
from tosa_jax.train.loop import train_stage
from tosa_jax.train.metric_writer import MetricWriter
from tosa_jax.train.runner import Runner
from tosa_jax.train.stages import plan_stages

HEAD = {"prototypes": 12, "head_hidden": 10, "head_bottleneck": 6, "reference_points": 3}
MODEL = {k: v for k, v in SIZES.items() if k != "num_classes"} | HEAD | {"depth": 2}
CHOICES = DinoOptions(local_crops=2, local_size=4, teacher_temperature=0.06, warmup_teacher_steps=8)
TASK = Dino(choices=CHOICES, size=(8, 8), points=3, prototypes=12, mean=(0.3,), std=(0.4,))


draw_boxes = jax.jit(crops.draw_boxes, static_argnums=(1, 2, 4))
shared_points = jax.jit(crops.shared_points, static_argnums=1)


@functools.cache
def model(depth=2):
    return noisy(create_model("vit", task="dino", rngs=nnx.Rngs(0), **(MODEL | {"depth": depth})))


@functools.cache
def compiled(depth=2):
    graphdef, _ = split(model(depth))
    return jax.jit(lambda p, x, at: set_params(graphdef, p)(x, at))


def unit(x, axis):
    return x / np.linalg.norm(x, axis=axis, keepdims=True)


def test_a_crop_shows_at_a_point_what_the_image_has_there():
    """Images hold their own coordinates, so that a crop tells what it shows."""
    rows, columns = (np.arange(64) + 0.5) / 64, (np.arange(48) + 0.5) / 48
    image = np.stack(np.broadcast_arrays(rows[:, None], columns[None]), axis=2).astype(np.float32)
    images = jnp.asarray(np.repeat(image[None], 6, axis=0))
    a = draw_boxes(jax.random.key(0), (6,), (0.4, 1.0))
    b = draw_boxes(jax.random.key(1), (6,), (0.1, 0.4), (a,), 0.01)
    flips = jnp.array([0.0, 1, 0, 1, 0, 1])
    points, shared = shared_points(jax.random.key(2), 5, a, b)
    assert (shared == 1).all()
    for box in (a, b):
        crop = np.asarray(jax.jit(crops.cut, static_argnums=2)(images, box, (32, 32), flips))
        at = np.asarray(jax.jit(crops.seen_in)(points, box, flips))
        assert at.min() >= 0 and at.max() <= 1
        for i in range(6):
            for place, want in zip(at[i], np.asarray(points[i]), strict=True):
                row, column = np.clip((place * 32).astype(int), 1, 30)
                near = crop[i, row - 1 : row + 2, column - 1 : column + 2]
                assert np.abs(near - want).max(axis=(0, 1)).min() < 0.1
                assert np.abs(near.mean(axis=(0, 1)) - want).max() < 0.06


def test_boxes_have_their_areas_and_overlap():
    a = draw_boxes(jax.random.key(0), (400,), (0.3, 0.6))
    boxes = np.asarray(a)
    area = boxes[:, 2] * boxes[:, 3]
    assert 0.25 < area.min() < 0.33 and 0.57 < area.max() < 0.61
    assert (boxes[:, :2] >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= 1.00001).all()
    free, tied = (draw_boxes(jax.random.key(1), (400,), (0.05, 0.1), others, 0.02)
                  for others in ((), (a,)))  # fmt: skip
    overlap = jax.jit(crops.overlap)
    shares = [np.asarray(overlap(a, x))[:, 2:].prod(axis=1) for x in (free, tied)]
    assert (shares[0] >= 0.02).mean() < 0.9 and (shares[1] >= 0.02).mean() > 0.99
    nothing = np.array([[0.0, 0, 0.2, 0.2]], np.float32)
    _, shared = shared_points(jax.random.key(0), 2, nothing, nothing + 0.5)
    assert shared.tolist() == [0.0]


def test_head_and_reference_tokens_are_numpys():
    images = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    points = jax.random.uniform(jax.random.key(1), (2, 3, 2))
    found = jax.device_get(compiled()(get_params(model()), images, points))
    params = {k: np.asarray(v, np.float64) for k, v in get_params(model()).items()}
    tokens = np.asarray(jax.jit(lambda m, x: m.embed(x))(model(), images), np.float64)
    layers = layers_of(model())

    def norm(x):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * params["norm/scale"] + params["norm/bias"]

    def head(x, part):
        for name in ("fc1", "fc2", "fc3"):
            x = x @ params[f"{part}/{name}/kernel"] + params[f"{part}/{name}/bias"]
            x = gelu(x) if name != "fc3" else x
        return unit(x, -1) @ unit(params[f"{part}/prototypes"], 0)

    grid = params["pos_embed"][0, -16:].reshape(4, 4, -1)
    for i in range(2):
        x, references = tokens[i], []
        for row, column in np.asarray(points[i], np.float64) * 4 - 0.5:
            row, column = np.clip([row, column], 0, 3)
            r, c = min(int(row), 2), min(int(column), 2)
            v, u = row - r, column - c
            corners = grid[r : r + 2, c : c + 2]
            weights = np.outer([1 - v, v], [1 - u, u])
            references.append((corners * weights[:, :, None]).sum(axis=(0, 1)))
        for layer in layers:
            # Each reference token alone beside the patches, as the published mask leaves them.
            after = []
            for token in references:
                alone = np.concatenate([token[None], x[1:]])
                after.append(layer(alone)[0])
            x, references = layer(x), after
        np.testing.assert_allclose(found.features[i], norm(x)[0], atol=1e-5)
        wanted = head(norm(x), "projection")[0]
        np.testing.assert_allclose(found.predictions["prototypes"][i], wanted, atol=1e-5)
        want = norm(np.stack(references))
        np.testing.assert_allclose(found.predictions["reference_features"][i], want, atol=1e-5)
        np.testing.assert_allclose(
            found.predictions["reference"][i], head(want, "reference_projection"), atol=1e-5
        )


def test_a_narrow_head_starts_with_outputs_as_large_as_its_inputs():
    """Else the first updates of its biases drown what it says of the image."""
    for hidden in (16, 256):
        config = dataclasses.replace(model().config, head_hidden=hidden, head_bottleneck=32)
        head = ProjectionHead(config, rngs=nnx.Rngs(0))
        x, sizes = np.random.default_rng(0).normal(size=(64, config.embed_dim)), []
        for layer in (head.fc1, head.fc2, head.fc3):
            x = x.astype(np.float32) @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...])
            sizes.append(x.std())
            x = gelu(x)
        assert 0.3 < min(sizes) and max(sizes) < 1.3
        lengths = np.linalg.norm(head.prototypes[...], axis=0)
        assert lengths.mean() == pytest.approx(3**-0.5, rel=0.05)


def test_layers_and_positions_start_with_the_deviation_of_the_configuration():
    wide = create_model("vit", task="dino", rngs=nnx.Rngs(0), **MODEL, init_std=0.1)
    published = create_model("vit", task="dino", rngs=nnx.Rngs(0), **MODEL)
    theirs = get_params(published)
    for path, x in get_params(wide).items():
        scaled = path == "pos_embed" or path.startswith("blocks/") and path.endswith("kernel")
        np.testing.assert_allclose(x, theirs[path] * (5 if scaled else 1), rtol=1e-6)
    assert np.std(theirs["blocks/0/attn/qkv/kernel"]) == pytest.approx(0.02, rel=0.1)


@functools.cache
def example():
    images = jax.random.randint(jax.random.key(3), (3, 8, 8, 1), 0, 256).astype(jnp.uint8)
    batch = {"image": images, "label": jnp.zeros(3)}
    return jax.jit(TASK.training_batch)(batch, jax.random.key(4))


def test_the_loss_and_the_centres_are_the_published_ones():
    graphdef, params = split(model(1))
    teacher = {k: x + 0.05 * np.sign(x) for k, x in jax.device_get(params).items()}
    shared = np.array(example()["shared"])
    shared[1, 0, 2] = 0.0
    batch = example() | {"shared": jnp.asarray(shared)}
    state = jax.device_put({
        "centre": np.linspace(-0.1, 0.1, 12, dtype=np.float32),
        "reference_centre": np.linspace(0.2, -0.2, 12, dtype=np.float32),
        "updates": np.asarray(2, np.int32),
    })  # fmt: skip

    def loss(params, teacher):
        models = (set_params(graphdef, x) for x in (params, teacher))
        student, guide = models
        keys = jax.random.split(jax.random.key(0), 3)
        found = TASK.training_loss(student, on_device, keys, guide, state)
        return found.values.mean(), found

    def outputs(params, crop, points):
        out = compiled(1)(params, crop, points).predictions
        return np.asarray(out["prototypes"], np.float64), np.asarray(out["reference"], np.float64)

    on_device, batch = batch, jax.device_get(batch)
    views = [batch["large"][:, 0], batch["large"][:, 1], batch["small"][:, 0], batch["small"][:, 1]]
    temperature = 0.04 + 0.02 * 2 / 8
    total, points_total, centre, reference_centre = np.zeros(3), np.zeros(3), [], []
    for t in range(2):
        for v in range(4):
            guide, guide_at = outputs(teacher, views[t], batch["teacher_points"][:, t, v])
            own, own_at = outputs(params, views[v], batch["student_points"][:, v, t])
            if v == t:
                centre.append(guide)
                continue
            target = softmax((guide - np.asarray(state["centre"])) / temperature)
            total -= (target * np.log(softmax(own / 0.1))).sum(axis=1) / 6
            target = softmax((guide_at - np.asarray(state["reference_centre"])) / temperature)
            apart = -(target * np.log(softmax(own_at / 0.1))).sum(axis=2).mean(axis=1) / 6
            points_total += apart * np.asarray(batch["shared"])[:, t, v]
            if v < 2:
                reference_centre.append(guide_at)
    both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, (values, statistics, *_)), (grads, to_teacher) = jax.device_get(both(params, teacher))
    np.testing.assert_allclose(values, (total + points_total) / 2, rtol=1e-4)
    np.testing.assert_allclose(statistics["centre"], np.mean(centre, axis=(0, 1)), atol=1e-6)
    want = np.mean(reference_centre, axis=(0, 1, 2))
    np.testing.assert_allclose(statistics["reference_centre"], want, atol=1e-6)
    updated = jax.jit(TASK.update_state)
    # The published running mean starts at 0; here the first updates take the mean of all until then.
    for updates, kept in (0, 0.0), (2, 2 / 3), (20, 0.9):
        before = state | {"updates": np.asarray(updates, np.int32)}
        after = updated(before, statistics)
        assert after["updates"] == updates + 1
        centre = kept * np.linspace(0.2, -0.2, 12) + (1 - kept) * want
        np.testing.assert_allclose(after["reference_centre"], centre, atol=1e-6)
    assert all(np.isfinite(x).all() for x in grads.values())
    assert np.abs(grads["projection/prototypes"]).max() > 0
    assert not any(x.any() for x in to_teacher.values())


def test_points_of_pairs_are_the_same_places():
    """Teacher and student see a point of a pair at the place of the image that both crops show."""
    views = jax.jit(TASK.views, static_argnums=0)(3, jax.random.fold_in(jax.random.key(4), 0))
    views, batch = jax.device_get((views, example()))
    for t in range(2):
        for v in range(4):
            seen = []
            pair = (t, batch["teacher_points"][:, t, v]), (v, batch["student_points"][:, v, t])
            for view, points in pair:
                box, flip = np.asarray(views.boxes[:, view]), np.asarray(views.flips[:, view])
                points = np.array(points)
                points[flip > 0, :, 1] = 1 - points[flip > 0, :, 1]
                seen.append(box[:, None, :2] + points * box[:, None, 2:])
            np.testing.assert_allclose(seen[0], seen[1], atol=1e-5)
            assert (np.asarray(batch["shared"])[:, t, v] == (t != v)).all()


def test_schedules_and_scores():
    steps = np.arange(5)
    want = 1 - (1 - 0.9) * (np.cos(np.pi * steps / 4) + 1) / 2
    np.testing.assert_allclose(
        [momentum_at(0.9, jnp.asarray(i), 4) for i in steps], want, atol=1e-6
    )
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, 5)) * 3
    labels = rng.integers(0, 3, 120)
    features = (centres[labels] + rng.normal(size=(120, 5))).astype(np.float32)
    train, known, test, wanted = features[:90], labels[:90], features[90:], labels[90:]
    near = nearest_neighbours(train, known, test, neighbours=4)
    for row, found in zip(test, near, strict=True):
        cosines = unit(train, 1) @ unit(row, 0)
        votes = np.zeros(3)
        for i in np.argsort(-cosines)[:4]:
            votes[known[i]] += np.exp(cosines[i] / 0.07)
        assert found == votes.argmax()
    assert (ridge_classes(train, known, test) == wanted).mean() > 0.9


def run_of(data_dir, **fields):
    config = default_config(task="dino")
    config.update(batch_size=16, log_steps=1)
    config.model.update(MODEL, depth=1)
    config.task.update(local_crops=1, local_size=4, flip=False)
    config.data.update(name="digits", data_dir=data_dir, in_memory=True)
    config.inputs.update(mean=(0.3,), std=(0.4,))
    config.eval.update(batch_size=240, figure_images=0)
    config.pretrain.update(steps=4, checkpoint_steps=2, learning_rate=3e-3)
    for name, value in fields.items():
        config[name].update(value)
    return make_run_config(config)


@pytest.mark.usefixtures("one_device")
def test_a_run_resumes_exactly(digits_dir, tmp_path, monkeypatch):
    runner = Runner(run_of(digits_dir), tmp_path, StopRequest())
    stage_run = runner.stage_run(plan_stages(runner.run)[0][0])

    def train(folder, die=False):
        with Checkpoints(folder, "knn") as checkpoints, MetricWriter(folder) as writer:
            if die:
                die_after_saving(checkpoints, 2, monkeypatch)
            state = train_stage(
                stage_run, runner.run, runner.mesh, checkpoints, writer, StopRequest()
            )[0]
            return jax.device_get(state)

    trace_steps_once(monkeypatch)
    straight = train(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "b", die=True)
    resumed = train(tmp_path / "b")
    assert resumed.task["updates"] == 4 and np.abs(resumed.task["reference_centre"]).max() > 0
    kernel = "blocks/0/attn/qkv/kernel"
    assert (resumed.teacher[kernel] != resumed.params[kernel]).any()
    jax.tree.map(np.testing.assert_array_equal, straight, resumed)


def test_a_backbone_starts_a_classifier_and_a_classifier_a_backbone(tmp_path):
    pretrained, said = model(), []
    save_weights(pretrained, tmp_path / "dino.safetensors")
    classifier = small_model(depth=2, plan="selective", keep_rate=0.5)
    load_pretrained(classifier, tmp_path / "dino.safetensors", on_message=said.append)
    theirs, ours = jax.device_get((get_params(pretrained), get_params(classifier)))
    shared = theirs.keys() & ours.keys()
    assert len(shared) == len([k for k in ours if not k.startswith(("head/", "kinds/"))])
    assert all((theirs[k] == ours[k]).all() for k in shared)
    assert any("its projection and reference_projection are not used" in line for line in said)
    save_weights(classifier, tmp_path / "classes.safetensors")
    again = noisy(pretrained)
    load_pretrained(again, tmp_path / "classes.safetensors", on_message=said.append)
    after = jax.device_get(get_params(again))
    assert all((after[k] == ours[k]).all() for k in shared)
    assert any("the projection stays as the model has it" in line for line in said)


def test_predict_prints_features(tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    predictor = Predictor(model(), mean=0.3, std=0.4, task="dino")
    predictor.save(tmp_path / "a.safetensors")
    arguments = [f"--weights={tmp_path / 'a.safetensors'}", "--json", str(tmp_path / "a.png")]
    assert predict.main(arguments) == 0
    record = json.loads(capsys.readouterr().out)
    out = forward(model(), TASK.inputs(jnp.asarray(predictor.prepare(tmp_path / "a.png"))[None]))
    np.testing.assert_allclose(record["features"], out.features[0], atol=1e-5)
    shares = softmax(np.asarray(out.predictions["prototypes"][0]) / CHOICES.student_temperature)
    assert record["confidence"] == pytest.approx(shares.max(), abs=1e-5)


@pytest.mark.parametrize(
    ("section", "fields", "message"),
    [("task", {"local_size": 5}, "local_size=5 is not a multiple of the patch"),
     ("task", {"global_scale": (0.5, 0.2)}, "must be two shares"),
     ("pretrain", {"cutmix": 1.0}, "config.pretrain.cutmix is for classification"),
     ("model", {"reference_points": -1}, "reference_points=-1 is negative"),
     ("model", {"init_std": 0.0}, "init_std=0.0 must be above 0")],
)  # fmt: skip
def test_bad_fields_are_one_line(section, fields, message):
    with pytest.raises(ConfigError, match=message):
        run_of("unused", **{section: fields})
