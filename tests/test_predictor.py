"""A predictor computes what its network computes, whatever the batch, the thread or the file it came from."""

import json
import threading

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from small import SIZES, forward, small_model
from trained import CLASSES, make_pictures, make_workdir

from tosa_jax.data.decoding import BadImageError, Preprocess
from tosa_jax.distributed import memory
from tosa_jax.errors import ConfigError, DeviceError, WeightsError, WorkdirError
from tosa_jax.inference.batches import split_batch
from tosa_jax.inference.predictor import Predictor
from tosa_jax.models.params import get_params, set_params, split
from tosa_jax.models.weights.load import save_selectors, save_weights
from tosa_jax.tasks.predictions import Prediction

MEAN, STD = 0.3, 0.4


def pixels(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 1), np.uint8)


def normalised(images: np.ndarray):
    return (jnp.asarray(images, jnp.float32) / 255 - MEAN) / STD


@pytest.fixture(scope="module")
def model():
    return small_model(keep_rate=0.5)


@pytest.fixture(scope="module")
def predictor(model):
    return Predictor(model, mean=(MEAN,), std=(STD,), class_names=CLASSES, batch_sizes=(4, 1))


@pytest.mark.parametrize("count", [1, 3, 6])
def test_any_number_of_images_gives_what_the_network_gives(model, predictor, count):
    images = pixels(count)
    out, expected = predictor(images), forward(model, normalised(images))
    np.testing.assert_allclose(out.logits, expected.logits, atol=1e-5)
    assert out.logits.dtype == np.float32 and len(out.selected) == len(out.scores) == 2
    for ours, theirs in zip(out.selected, expected.selected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for scores, selected in zip(out.scores, out.selected, strict=True):
        assert scores.shape == (count, 17)
        lowest = np.take_along_axis(scores, selected[:, 1:], 1).min(axis=1)
        assert (np.sort(scores[:, 1:], axis=1)[:, -8] == lowest).all()


def test_no_image_is_no_row(predictor):
    assert predictor(pixels(0)).logits.shape == (0, 10)


def test_only_the_given_sizes_are_compiled_once(model, monkeypatch):
    own = Predictor(model, mean=(MEAN,), std=(STD,), batch_sizes=(2, 4))
    own.warm_up()
    assert sorted(own._programs) == [(2, 8, 8), (4, 8, 8)]
    monkeypatch.setattr(own, "_run", None)  # compiling again would need it
    assert own(pixels(7)).logits.shape == (7, 10)


@pytest.mark.parametrize(
    ("count", "sizes", "expected"),
    [
        (0, (1, 8), []),
        (1, (8,), [8]),
        (3, (1, 8), [1, 1, 1]),
        (4, (1, 8), [8]),
        (130, (1, 8, 64), [64, 64, 1, 1]),
    ],
)
def test_batches_are_split_with_at_most_half_padding(count, sizes, expected):
    assert split_batch(count, sizes) == expected


def test_threads_share_it(model):
    own = Predictor(model, mean=(MEAN,), std=(STD,), batch_sizes=(2,))
    alone = [own(pixels(3, seed)).logits for seed in range(6)]
    fresh = Predictor(model, mean=(MEAN,), std=(STD,), batch_sizes=(2,))
    found: dict[int, np.ndarray] = {}

    def work(seed):
        found[seed] = fresh(pixels(3, seed)).logits

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(6):
        np.testing.assert_array_equal(found[seed], alone[seed])


def test_top_names_the_likeliest_first():
    logits = np.log(np.array([[0.1, 0.6, 0.3], [0.25, 0.25, 0.5]], np.float32))
    own = Predictor(
        small_model(num_classes=3), mean=(MEAN,), std=(STD,), class_names=("a", "b", "c")
    )
    rows = own.top(Prediction({"logits": logits}, (), ()), 2)
    assert [[g.name for g in row] for row in rows] == [["b", "c"], ["c", "a"]]
    assert [g.probability for g in rows[0]] == pytest.approx([0.6, 0.3])
    assert rows[0][0].label == 1


def test_pictures_of_any_kind_are_prepared_alike(predictor, tmp_path):
    path = make_pictures(tmp_path, 1)[0]
    expected = predictor.prepare(path)
    assert expected.shape == (8, 8, 1) and expected.dtype == np.uint8
    with Image.open(path) as image:
        for other in (str(path), path.read_bytes(), image, np.asarray(image)[:, :, None]):
            np.testing.assert_array_equal(predictor.prepare(other), expected)
        np.testing.assert_array_equal(predictor.prepare(image.convert("RGB")), expected)
    with pytest.raises(BadImageError, match="not the bytes of an image"):
        predictor.prepare(b"no picture")
    assert predictor.classify([path], k=3)[0] == predictor.top(predictor(expected[None]), 3)[0]


def test_a_work_directory_gives_its_network_preprocessing_and_names(tmp_path):
    model = make_workdir(tmp_path)
    own = Predictor.from_workdir(tmp_path, batch_sizes=(2,), on_message=lambda line: None)
    assert own.class_names == CLASSES
    assert own.form == Preprocess(image_size=8, channels=1, resize="squeeze")
    out = own(pixels(2))
    np.testing.assert_allclose(out.logits, forward(model, normalised(pixels(2))).logits, atol=1e-5)


def test_another_budget_has_the_same_weights(tmp_path):
    model = make_workdir(tmp_path)
    own = Predictor.from_workdir(
        tmp_path, keep_rate=(0.25, 0.75), batch_sizes=(2,), on_message=lambda line: None
    )
    assert [x.shape for x in own(pixels(2)).selected] == [(2, 5), (2, 13)]
    whole = Predictor.from_workdir(
        tmp_path, keep_rate=1.0, batch_sizes=(2,), on_message=lambda line: None
    )
    dense = small_model(plan="standard")
    graphdef, names = split(dense)
    dense = set_params(graphdef, {name: get_params(model)[name] for name in names})
    expected = forward(dense, normalised(pixels(2))).logits
    np.testing.assert_allclose(whole(pixels(2)).logits, expected, atol=1e-5)


def test_one_file_says_all(predictor, tmp_path):
    predictor.save(tmp_path / "all.safetensors")
    again = Predictor.from_weights(tmp_path / "all.safetensors", batch_sizes=(4,))
    assert (again.form, again.class_names) == (predictor.form, CLASSES)
    np.testing.assert_array_equal(again(pixels(4)).logits, predictor(pixels(4)).logits)
    other = Predictor.from_weights(tmp_path / "all.safetensors", keep_rate=0.25, batch_sizes=(1,))
    assert other(pixels(1)).selected[0].shape == (1, 5)


def test_released_weights_with_and_without_selectors(model, tmp_path):
    save_weights(model, tmp_path / "w.safetensors")
    save_selectors(model, tmp_path / "s.safetensors")
    fields = SIZES | {"batch_sizes": (2,), "mean": (MEAN,), "std": (STD,)}
    said: list[str] = []
    dense = Predictor.from_pretrained(
        "vit", tmp_path / "w.safetensors", on_message=said.append, **fields
    )
    assert dense.num_selections == 0 and dense.form.resize == "crop"
    assert said and "selectors are not used" in said[0]
    own = Predictor.from_pretrained(
        "vit", tmp_path / "w.safetensors", selectors=tmp_path / "s.safetensors",
        on_message=said.append, **fields,
    )  # fmt: skip
    expected = forward(model, normalised(pixels(2)))
    np.testing.assert_allclose(own(pixels(2)).logits, expected.logits, atol=1e-5)
    said.clear()
    Predictor.from_pretrained(
        "vit", tmp_path / "w.safetensors", keep_rate=0.25, on_message=said.append, **fields
    )
    assert not any("no selectors" in line for line in said)  # the file has some


def test_what_cannot_be_is_said_in_one_line(predictor, model, tmp_path):
    with pytest.raises(ConfigError, match=r"must be uint8 \[b, 8, 8, 1\]"):
        predictor(np.zeros((1, 8, 8, 1), np.float32))
    with pytest.raises(ConfigError, match="9 class names, but the model has 10"):
        Predictor(model, mean=(MEAN,), std=(STD,), class_names=CLASSES[:9])
    with pytest.raises(ConfigError, match="batch_sizes"):
        Predictor(model, mean=(MEAN,), std=(STD,), batch_sizes=(0, 4))
    with pytest.raises(WorkdirError, match=r"no config\.json.*tosa_jax\.main makes one"):
        Predictor.from_workdir(tmp_path / "nowhere")
    save_weights(model, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match="--model=NAME"):
        Predictor.from_weights(tmp_path / "w.safetensors")
    make_workdir(tmp_path / "dense", plan="standard")
    with pytest.raises(ConfigError, match="no layer of this model selects"):
        Predictor.from_workdir(tmp_path / "dense", keep_rate=0.5, on_message=lambda line: None)
    (tmp_path / "new").mkdir()
    (tmp_path / "new/config.json").write_text((tmp_path / "dense/config.json").read_text())
    with pytest.raises(WeightsError, match="holds no checkpoint yet"):
        Predictor.from_workdir(tmp_path / "new")
    values = json.loads((tmp_path / "new/config.json").read_text()) | {"colour": 1}
    (tmp_path / "new/config.json").write_text(json.dumps(values))
    with pytest.raises(WorkdirError, match="another version"):
        Predictor.from_workdir(tmp_path / "new")


def test_a_batch_that_does_not_fit_is_told_before_it_runs(model, monkeypatch):
    monkeypatch.setattr(memory, "device_bytes", lambda device: 2**10)
    own = Predictor(model, mean=(MEAN,), std=(STD,), batch_sizes=(4,))
    with pytest.raises(
        DeviceError, match=r"a batch of 4 images of 8x8 pixels needs .* GiB .*--batch_size"
    ):
        own(pixels(1))
