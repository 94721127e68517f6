"""Several labels an image: the canvases, the data kind, and the plain head that predicts them."""

import argparse
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from flax import nnx

from tests.test_data_builders import write_idx
from tosa_jax.data.builders import prepare_own
from tosa_jax.data.builders.digits import load_digits_split
from tosa_jax.data.pipeline import DataConfig, open_dataset
from tosa_jax.data.synthetic.several import draw_several
from tosa_jax.errors import ConfigError, DataError
from tosa_jax.inference.predictor import Predictor
from tosa_jax.models.vit import Output
from tosa_jax.tasks import Classification, MultiLabel, create_model
from tosa_jax.tasks.multi_label import MultiLabelOptions

CLASSES = 5
DIGITS = "several_digits/16-4-7-3"


def flat_items():
    """Two squares of 8 pixels of each class; class c is grey 40 (c + 1) everywhere, and class 3 has none."""
    groups = [np.full((2, 8, 8), 40 * (c + 1), np.uint8) for c in range(CLASSES)]
    groups[3] = groups[3][:0]
    return groups


def test_items_are_of_different_classes_each_whole_in_its_cell():
    counts, seen, sizes, places = [], set(), set(), set()
    for seed in range(200):
        image, labels, boxes = draw_several((0, seed), flat_items(), 20, 4)
        wanted = np.zeros((20, 20), np.uint8)
        for label, (top, left, bottom, right) in zip(labels, boxes, strict=True):
            assert bottom - top == right - left and top // 10 == (bottom - 1) // 10
            assert left // 10 == (right - 1) // 10
            wanted[top:bottom, left:right] = 40 * (label + 1)
            sizes.add(int(bottom - top))
            places.add((int(top), int(left)))
        np.testing.assert_array_equal(image, wanted)  # also: no item covers another
        assert (np.diff(labels) > 0).all()
        counts.append(len(labels))
        seen |= set(labels.tolist())
    assert set(counts) == {1, 2, 3, 4} and min(np.bincount(counts)[1:]) > 25
    assert seen == {0, 1, 2, 4}
    assert sizes == {8, 9, 10} and len(places) > 20


def test_a_seed_decides_and_another_one_differs():
    items, classes = load_digits_split("train")
    groups = [items[classes == c] for c in range(10)]
    one, again, other = (draw_several((0, i), groups, 16, 4) for i in (3, 3, 4))
    np.testing.assert_array_equal(one.image, again.image)
    assert (one.image != other.image).any()
    # What every machine has to draw.
    assert (one.labels.tolist(), int(one.image.sum())) == ([7, 8, 9], 10511)


def test_the_set_holds_each_canvas_and_batches_its_labels(tmp_path):
    config = DataConfig(name=DIGITS, data_dir=str(tmp_path), image_size=16, channels=1)
    dataset = open_dataset(config)
    assert dataset.facts.kind == "label_sets" and dataset.facts.class_names[7] == "seven"
    items, classes = load_digits_split("test")
    groups = [items[classes == c] for c in range(10)]
    wanted = {}
    for i in range(3):
        canvas = draw_several((1, i), groups, 16, 4)
        wanted[canvas.image.tobytes()] = canvas.labels.tolist()
    (batch,) = dataset.eval_batches(batch_size=4)
    assert batch["labels"].dtype == np.uint8 and batch["mask"].tolist() == [1, 1, 1, 0]
    found = {
        image.tobytes(): np.flatnonzero(row).tolist()
        for image, row in zip(batch["image"][:3], batch["labels"], strict=False)
    }
    assert found == wanted and not batch["labels"][3].any()
    moved = DataConfig(**vars(config) | {"augment": "shift", "in_memory": True})
    rows = next(iter(open_dataset(moved).train_batches(batch_size=4, seed=0)))
    assert rows.keys() == {"image", "labels"} and rows["labels"].shape == (4, 10)


def test_items_of_fashion_mnist_need_its_files(tmp_path):
    images = np.full((6, 28, 28), 99, np.uint8)
    for part in ("train", "t10k"):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte", images)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte", np.arange(6, dtype=np.uint8) % 3)
    path = prepare_own("several_fashion_mnist/32-2-4-2", tmp_path / "tfds", tmp_path)
    builder = tfds.builder_from_directory(str(path))
    assert builder.info.features["labels"].feature.names[9] == "Ankle boot"
    for example in builder.as_data_source("train"):
        cells = example["image"].reshape(2, 16, 2, 16).max(axis=(1, 3))
        assert set(np.unique(cells)) <= {0, 99} and (cells > 0).sum() == len(example["labels"])
    with pytest.raises(DataError, match="train has 3 classes, but .* puts up to 4 on a canvas"):
        prepare_own("several_fashion_mnist/32-4-4-2", tmp_path / "tfds", tmp_path)
    with pytest.raises(DataError, match="set source_dir to the folder with the four IDX files"):
        prepare_own("several_fashion_mnist/32-2-4-2", tmp_path / "tfds", tmp_path / "nowhere")


@pytest.mark.parametrize("numbers", ["", "16-4", "16-4-0-3", "16-0-7-3", "16-11-7-3", "15-4-7-3"])
def test_names_that_say_no_set(tmp_path, numbers):
    name = f"several_digits/{numbers}"
    with pytest.raises(ConfigError, match=f"data.name='{name}': write several_digits/SIDE-MOST"):
        prepare_own(name, tmp_path)


def test_the_scores_of_a_plain_head_are_counted_by_hand():
    task = MultiLabel(mean=(0.3,), std=(0.4,))
    logits = jnp.array([[2.0, -1, 1, -3], [-2, -1, -3, -4], [5, 4, 3, -1]])
    labels = jnp.array([[1, 1, 0, 0], [0, 1, 0, 0], [1, 0, 0, 1]], jnp.uint8)
    batch = {"labels": labels}
    out = Output({"logits": logits}, None, (), {})
    found = jax.jit(lambda out: task.metrics(out, batch))(out)
    # Above a half: {0, 2}, none (so the likeliest, 1), {0, 1, 2}.
    wanted = {
        "f1": [0.5, 1, 0.4], "recall": [0.5, 1, 0.5], "precision": [0.5, 1, 1 / 3],
        "r_precision": [0.5, 1, 0.5],
    }  # fmt: skip
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-6, err_msg=name)
    shares = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
    loss = -np.where(np.asarray(labels), np.log(shares), np.log(1 - shares)).mean(axis=1)
    np.testing.assert_allclose(found["loss"], loss, rtol=1e-5)
    assert found.keys() == wanted.keys() | {"loss"}
    # From .8 on: {0}, none, {0, 1, 2}.
    stricter = dataclasses.replace(task, choices=MultiLabelOptions(threshold=0.8))
    np.testing.assert_allclose(stricter.metrics(out, batch)["f1"], [2 / 3, 1, 0.4], rtol=1e-6)
    with pytest.raises(ConfigError, match="threshold=1 is not in"):
        MultiLabelOptions(threshold=1)


def test_predicted_labels_are_those_above_the_threshold_and_at_least_one():
    model = create_model(
        "vit", task="multi_label", num_classes=4, embed_dim=8, depth=1, num_heads=1, image_size=8,
        patch_size=4, in_chans=1, rngs=nnx.Rngs(0),
    )  # fmt: skip
    image = np.zeros((1, 8, 8, 1), np.uint8)
    args = dict.fromkeys(("top", "depth_dir", "truth", "depth_scale", "show_tokens"))
    for bias, top, threshold, names in (
        ([2.0, -2, 4, -3], None, 0.5, ["c", "a"]),
        ([2.0, -2, 4, -3], None, 0.1, ["c", "a", "b"]),
        ([-2.0, -1, -4, -3], None, 0.5, ["b"]),
        ([2.0, -2, 4, -3], 3, 0.5, ["c", "a", "b"]),
    ):
        model.head.bias[...] = jnp.array(bias)
        predictor = Predictor(
            model, class_names=("a", "b", "c", "d"), mean=0.5, std=0.5,
            options=MultiLabelOptions(threshold=threshold),
        )  # fmt: skip
        writer = MultiLabel.prediction_writer(predictor, argparse.Namespace(**args | {"top": top}), [])  # fmt: skip
        record = writer.record(Path("x.png"), image[0], predictor(image))
        assert [guess["name"] for guess in record["top"]] == names
    with pytest.raises(ConfigError, match="is for multi_label and has no depth: call the predictor"):  # fmt: skip
        predictor.depth([])


def test_a_task_refuses_data_of_another_kind(tmp_path):
    from small import small_run

    run = small_run(str(tmp_path), data={"name": DIGITS})
    facts = open_dataset(run.data).facts
    with pytest.raises(ConfigError, match="no single class an image: name .* recipe for label_sets"):  # fmt: skip
        Classification.check_dataset(run, facts)
    assert MultiLabel.check_dataset(run, facts) is None
    fewer = small_run(str(tmp_path), data={"name": DIGITS}, model={"num_classes": 9})
    with pytest.raises(ConfigError, match="num_classes=9, but .* has 10 classes: set it to that"):
        MultiLabel.check_dataset(fewer, facts)
