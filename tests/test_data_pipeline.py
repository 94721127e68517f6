"""Batches: a function of (seed, step) alone, and an evaluation that sees each example once."""

import dataclasses
import itertools
import threading
from collections import Counter

import numpy as np
import pytest

from tosa_jax.data import streams
from tosa_jax.data.builders import prepare_own
from tosa_jax.data.builders.digits import load_digits_split
from tosa_jax.data.pipeline import (
    DataConfig,
    DatasetFacts,
    open_dataset,
)
from tosa_jax.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    prepare_own("digits", folder)
    return DataConfig(
        name="digits",
        data_dir=str(folder),
        image_size=8,
        channels=1,
        augment="shift_rotate",
        in_memory=True,
    )


def take(config, count, **kwargs):
    stream = open_dataset(config).train_batches(**({"batch_size": 32, "seed": 3} | kwargs))
    batches = list(itertools.islice(stream, count))
    stream.close()
    return batches


def assert_same(got, wanted):
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].dtype == b[key].dtype
            np.testing.assert_array_equal(a[key], b[key])


def test_facts(config):
    names = tuple(str(i) for i in range(10))
    assert open_dataset(config).facts == DatasetFacts(1437, 360, 10, names, "classification")
    part = dataclasses.replace(config, train_split="train[:100]", eval_split="train[100:]")
    assert open_dataset(part).facts == DatasetFacts(100, 1337, 10, names, "classification")


def test_train_batches_have_the_declared_form(config):
    (batch,) = take(config, 1)
    assert batch["image"].shape == (32, 8, 8, 1) and batch["image"].dtype == np.uint8
    assert batch["label"].shape == (32,) and batch["label"].dtype == np.int32


def test_start_step_gives_the_tail(config):
    # 47 steps: past the end of the first epoch (44.9 batches).
    assert_same(take(config, 4, start_step=43), take(config, 47)[43:])


@pytest.mark.parametrize("count", [2, 4])
def test_processes_hold_contiguous_rows_of_the_same_batches(config, count):
    whole = take(config, 3, start_step=44)
    parts = [
        take(config, 3, start_step=44, process_index=i, process_count=count) for i in range(count)
    ]
    joined = [
        {k: np.concatenate([p[k] for p in step]) for k in step[0]}
        for step in zip(*parts, strict=True)
    ]
    assert_same(joined, whole)


@pytest.mark.parametrize(
    "change",
    [
        {"workers": "threads:0"},
        {"workers": "threads:5", "prefetch_batches": 6},
        {"prefetch_batches": 0},
        {"in_memory": False},
        {"workers": "processes:1", "in_memory": False},
    ],
    ids=str,
)
def test_batches_do_not_depend_on_how_they_are_read(config, change):
    """Nor does it matter where reading begins."""
    assert_same(take(dataclasses.replace(config, **change), 2, start_step=2), take(config, 4)[2:])


def test_seeds_and_steps_differ_and_augmentation_keeps_the_order(config):
    first, second = take(config, 2)
    (other,) = take(config, 1, seed=4)
    (plain,) = take(dataclasses.replace(config, augment="none"), 1)
    assert (first["label"] != second["label"]).any() and (first["label"] != other["label"]).any()
    np.testing.assert_array_equal(first["label"], plain["label"])
    assert (first["image"] != plain["image"]).any()


def test_epochs_reshuffle_cover_everything_and_draw_anew(config):
    small = dataclasses.replace(config, train_split="train[:60]", augment="none")
    epochs = [
        np.concatenate([b["image"] for b in take(small, 3, batch_size=20, start_step=3 * e)])
        for e in range(2)
    ]
    rows = [[image.tobytes() for image in epoch] for epoch in epochs]
    assert rows[0] != rows[1]
    assert sorted(rows[0]) == sorted(rows[1]) and len(set(rows[0])) == 60
    drawn = take(dataclasses.replace(config, train_split="train[:1]"), 8, batch_size=1)
    assert len({b["image"].tobytes() for b in drawn}) > 4


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize(
    ("batch_size", "count"), [(360, 1), (100, 1), (100, 2), (7, 1), (512, 4), (720, 2), (64, 4)]
)
def test_each_eval_example_comes_once(config, batch_size, count, in_memory):
    config = dataclasses.replace(config, in_memory=in_memory)
    found, padding, numbers = [], 0, set()
    sizes = {"batch_size": batch_size, "process_count": count}
    for i in range(count):
        batches = list(open_dataset(config).eval_batches(process_index=i, **sizes))
        numbers.add(len(batches))
        for batch in batches:
            assert batch["image"].shape == (batch_size // count, 8, 8, 1)
            assert batch["mask"].dtype == np.float32 and batch["label"].dtype == np.int32
            real = batch["mask"] == 1
            assert (batch["mask"][~real] == 0).all() and not batch["image"][~real].any()
            padding += (~real).sum()
            found += zip(
                map(np.ndarray.tobytes, batch["image"][real]), batch["label"][real], strict=True
            )
    assert numbers == {-(-360 // batch_size)}
    assert padding == -360 % batch_size
    images, labels = load_digits_split("test")
    assert sorted(found) == sorted(zip(map(np.ndarray.tobytes, images), labels, strict=True))


def test_eval_reads_the_split_it_is_told(config):
    batches = list(open_dataset(config).eval_batches(batch_size=50, split="train[:70]"))
    assert sum(b["mask"].sum() for b in batches) == 70


def test_closing_ends_the_threads(config):
    before = set(threading.enumerate())
    next(stream := open_dataset(config).train_batches(batch_size=8, seed=0))
    started = set(threading.enumerate()) - before
    assert started
    stream.close()
    for thread in started:
        thread.join(timeout=5)
        assert not thread.is_alive()
    with pytest.raises(ValueError, match="closed"):
        next(stream)


def test_the_cache_cannot_be_written(config):
    plain = dataclasses.replace(config, augment="none", train_split="train[:1]")
    for size in (1, 2):  # Grain makes a batch of one as a view, of more as a copy
        (batch,) = take(plain, 1, batch_size=size)
        if batch["image"].flags.writeable:
            batch["image"][:] = 0
        (again,) = take(plain, 1, batch_size=size)
        assert again["image"].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"augment": "shift_rotat"}, "did you mean 'shift_rotate'"),
        ({"augment": "cutmix"}, "known are none, shift"),
        ({"channels": 2}, "must be 1 or 3"),
        ({"image_size": 0}, "image_size=0 must be at least 1"),
        ({"workers": "8"}, "workers='8' must be 'threads:N', N from 0, or 'processes:N', N from 1"),
        ({"workers": "thread:8"}, "workers='thread:8' must be"),
        ({"workers": "processes:0"}, "workers='processes:0' must be"),
        ({"workers": "threads:-1"}, "workers='threads:-1' must be"),
        ({"augment": "deit"}, "augment='deit' is for channels=3"),
        ({"eval_resize": "crp"}, "eval_resize='crp' is unknown; did you mean 'crop'"),
        ({"eval_crop_pct": 0.0}, r"eval_crop_pct=0.0 must be in \(0, 1\]"),
        ({"max_bad_fraction": 1.0}, "max_bad_fraction=1.0"),
        ({"repeats": 0}, "repeats=0 must be at least 1"),
        ({"prefetch_mib": 0}, "prefetch_mib=0 must be at least 1"),
        ({"train_split": "trian"}, "train_split='trian': digits/1.0.0.*did you mean 'train'"),
        ({"eval_split": "test+val"}, "no split 'val'"),
        ({"train_split": "train[:0]"}, "holds no examples"),
        ({"train_split": "train[:x]"}, "no TFDS split"),
    ],
)
def test_bad_configs(config, change, message):
    with pytest.raises(ConfigError, match=message) as caught:
        _ = open_dataset(dataclasses.replace(config, **change)).facts
    assert "\n" not in str(caught.value)


def test_bad_arguments(config):
    with pytest.raises(ConfigError, match="batch_size=30 .* 4 processes, for example 28"):
        open_dataset(config).train_batches(batch_size=30, seed=0, process_count=4)
    with pytest.raises(ConfigError, match="batch_size=0"):
        open_dataset(config).eval_batches(batch_size=0)
    with pytest.raises(ConfigError, match="process_index=2"):
        open_dataset(config).eval_batches(batch_size=4, process_index=2, process_count=2)
    with pytest.raises(ConfigError, match="start_step=-1"):
        open_dataset(config).train_batches(batch_size=4, seed=0, start_step=-1)
    with pytest.raises(ConfigError, match="split='tset'.*did you mean 'test'"):
        open_dataset(config).eval_batches(batch_size=4, split="tset")


def test_a_set_that_is_not_prepared(tmp_path):
    config = DataConfig(name="imagenet2012", data_dir=str(tmp_path), image_size=8, channels=3)
    with pytest.raises(DataError, match=r"python -m tosa_jax.prepare --config="):
        open_dataset(config)


def test_other_sizes_and_channels(config):
    (batch,) = take(dataclasses.replace(config, image_size=12, channels=3, augment="none"), 1)
    assert batch["image"].shape == (32, 12, 12, 3)
    assert (batch["image"] == batch["image"][..., :1]).all() and batch["image"].any()


@pytest.mark.parametrize("repeats", [2, 3])
def test_repeats_stand_together_are_drawn_anew_and_reach_their_share(config, repeats):
    plain = dataclasses.replace(config, train_split="train[:60]", augment="none", repeats=repeats)
    (epoch,) = take(plain, 1, batch_size=60)
    rows = [image.tobytes() for image in epoch["image"]]
    assert Counter(rows) == dict.fromkeys(rows[::repeats], repeats)
    assert len(set(rows)) == 60 // repeats  # of 60: DeiT's third, for 3
    later = take(plain, 12, batch_size=60)[1:]
    assert len({i.tobytes() for batch in later for i in batch["image"]}) > 55
    drawn = dataclasses.replace(plain, augment="shift_rotate")
    (epoch,) = take(drawn, 1, batch_size=60)
    assert len({image.tobytes() for image in epoch["image"]}) > 55
    assert_same(take(drawn, 2, start_step=1, batch_size=20), take(drawn, 3, batch_size=20)[1:])


@pytest.mark.parametrize(
    ("change", "batch_size", "threads", "buffer"),
    [
        ({}, 8, 2, 4),  # batches of 1.2 MiB
        ({"prefetch_mib": 3}, 8, 2, 2),
        ({"prefetch_mib": 1}, 8, 1, 1),
        ({"prefetch_batches": 0}, 8, 0, 0),
        ({"workers": "threads:0"}, 8, 0, 0),
        ({"large": True}, 8, 2, 32),  # images
        ({"large": True, "prefetch_mib": 1}, 8, 2, 6),  # 147 KiB each
        ({"large": True, "workers": "threads:16", "prefetch_mib": 1}, 8, 6, 6),
    ],
    ids=str,
)
def test_prefetch_is_bounded_in_bytes(config, monkeypatch, change, batch_size, threads, buffer):
    change, seen = dict(change), []
    monkeypatch.setattr(streams, "_LARGE_EXAMPLE_BYTES", 1 if change.pop("large", False) else 2**40)
    options = streams.grain.ReadOptions
    monkeypatch.setattr(
        streams.grain, "ReadOptions", lambda **kwargs: seen.append(kwargs) or options(**kwargs)
    )
    small = dataclasses.replace(config, image_size=224, channels=3, in_memory=False, **change)
    open_dataset(small).train_batches(batch_size=batch_size, seed=0).close()
    assert seen == [{"num_threads": threads, "prefetch_buffer_size": buffer}]
