"""Images of several sizes and broken ones: skipped in training, an error in evaluation."""

import dataclasses
import io
import itertools
import logging
import threading
import time

import grain
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from tosa_jax.data import sources, streams
from tosa_jax.data.labelled import LabelledImages
from tosa_jax.data.pipeline import DataConfig, open_dataset
from tosa_jax.errors import DataError


def take(config, count, start_step=0, **kwargs):
    stream = open_dataset(config).train_batches(seed=3, start_step=start_step, **kwargs)
    batches = list(itertools.islice(stream, count))
    stream.close()
    return batches


def assert_same(got, wanted):
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        for key in a.keys() | b.keys():
            np.testing.assert_array_equal(a[key], b[key])


class Pictures(tfds.core.GeneratorBasedBuilder):
    """Encoded bytes that the test gives, in this order: label i is image i."""

    VERSION = tfds.core.Version("1.0.0")
    encoded = []

    def _info(self):
        features = {
            "image": tfds.features.Image(),
            "label": tfds.features.ClassLabel(num_classes=100),
            "file_name": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(), "test": self._generate_examples()}

    def _generate_examples(self):
        for i, data in enumerate(self.encoded):
            yield i, {"image": io.BytesIO(data), "label": i, "file_name": f"file_{i}.jpg"}


def jpeg(seed: int, size=(40, 30)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """20 JPEGs of several sizes; numbers 7 and 11 cannot be decoded."""
    Pictures.encoded = [jpeg(i, (40 + i, 30)) for i in range(20)]
    Pictures.encoded[7] = Pictures.encoded[7][:400]
    Pictures.encoded[11] = b""
    folder = str(tmp_path_factory.mktemp("pictures"))
    logging.getLogger("absl").setLevel(logging.ERROR)
    Pictures(data_dir=folder).download_and_prepare(
        file_format="array_record",
        download_config=tfds.download.DownloadConfig(num_shards=1),
    )
    sizes = {"image_size": 16, "channels": 3}
    return DataConfig(name="pictures", data_dir=folder, max_bad_fraction=0.1, **sizes)


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("augment", ["none", "crop_flip", "deit"])
def test_bad_images_are_named_and_the_next_takes_their_place(pictures, augment, in_memory, caplog):
    config = dataclasses.replace(pictures, augment=augment, in_memory=in_memory)
    with caplog.at_level(logging.WARNING):
        stream = open_dataset(config).train_batches(batch_size=20, seed=3)
        batches = list(itertools.islice(stream, 3))
        assert len(stream.bad_images) == 2
        stream.close()
    named = [record.getMessage() for record in caplog.records]
    assert len(named) == 2
    assert sorted("file_7.jpg" in text for text in named) == [False, True]
    assert any("image 11 (file_11.jpg) cannot be decoded" in text for text in named)
    order_seed = np.random.SeedSequence(3).generate_state(2).tolist()[0]
    order = list(grain.MapDataset.source(range(20)).shuffle(seed=order_seed).repeat(4))
    for i in range(60):
        wanted = next(label for label in order[i:] if label not in (7, 11))
        assert batches[i // 20]["label"][i % 20] == wanted
    assert_same(take(config, 1, batch_size=20, start_step=2), batches[2:])
    if augment == "none":  # never a wrong label
        for image, label in zip(batches[0]["image"], batches[0]["label"], strict=True):
            np.testing.assert_array_equal(image, config.preprocess.decode(Pictures.encoded[label]))
    else:
        assert len({image.tobytes() for image in batches[0]["image"]}) == 20


@pytest.mark.parametrize("in_memory", [False, True])
def test_too_many_bad_images_and_any_in_evaluation_are_errors(pictures, in_memory):
    strict = dataclasses.replace(pictures, max_bad_fraction=0.05, in_memory=in_memory)
    with pytest.raises(DataError, match=r"image (7|11) \(file_.*2 of 20 images are bad, max_bad"):
        take(strict, 2, batch_size=20)
    # Another thread may have met the second one by then.
    with pytest.raises(DataError, match=r"[12] of 20 images are bad"):
        take(dataclasses.replace(strict, max_bad_fraction=0.0), 2, batch_size=20)
    with pytest.raises(DataError, match=r"image 7 \(file_7.jpg\) cannot be decoded .*evaluation"):
        list(open_dataset(strict).eval_batches(batch_size=10))


@pytest.mark.parametrize(
    "change", [{"workers": "threads:0"}, {"in_memory": True}, {"workers": "processes:2"}], ids=str
)
def test_large_images_read_one_by_one_are_the_same_batches(pictures, change, monkeypatch):
    config = dataclasses.replace(pictures, augment="deit", repeats=3)
    wanted = take(config, 3, batch_size=8)
    monkeypatch.setattr(streams, "_LARGE_EXAMPLE_BYTES", 1)
    assert_same(take(config, 3, batch_size=8), wanted)
    assert_same(take(dataclasses.replace(config, **change), 3, batch_size=8), wanted)


@pytest.mark.parametrize("workers", ["threads:0", "threads:6"])
def test_copies_of_an_image_are_decoded_once(pictures, workers, monkeypatch):
    opened = []

    def spy(self, record):
        opened.append(record["index"])
        time.sleep(0.01)  # other threads come for the copies while this one is at it
        return decode(self, record)

    decode = LabelledImages.training_example
    monkeypatch.setattr(LabelledImages, "training_example", spy)
    monkeypatch.setattr(streams, "_LARGE_EXAMPLE_BYTES", 1)
    good = "train[:7]+train[12:]"
    config = dataclasses.replace(pictures, train_split=good, augment="deit", repeats=3)
    config = dataclasses.replace(config, workers=workers, prefetch_batches=1)
    # 15 places an epoch: five images a batch, of the 15; and what is read ahead.
    batches = take(config, 3, batch_size=15)
    assert 15 <= len(opened) <= 15 + 5
    for batch in batches:
        assert (batch["label"].reshape(5, 3) == batch["label"][::3, None]).all()
        assert len({image.tobytes() for image in batch["image"]}) == 15


def test_a_failure_to_read_reaches_every_copy():
    copies, caught = sources._Copies(2), []

    def ask():
        try:
            copies.get(5, lambda: open("/no such file"))
        except OSError as error:
            caught.append(error)

    for _ in range(2):
        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(timeout=5)
    assert len(caught) == 2 and caught[0] is caught[1]


def test_evaluation_crops_as_it_is_told(pictures):
    config = dataclasses.replace(pictures, eval_resize="crop", eval_split="test[:7]")
    (batch,) = open_dataset(config).eval_batches(batch_size=7)
    image = Image.open(io.BytesIO(Pictures.encoded[3]))  # 43 x 30
    short = image.resize((int(18 * 43 / 30), 18), Image.Resampling.BICUBIC)  # 16 / .875 = 18.3
    cut = short.crop((4, 1, 20, 17))  # round(4.5) = 4
    np.testing.assert_array_equal(batch["image"][3], np.asarray(cut))
