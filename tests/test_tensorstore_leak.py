"""Checkpoints leave nothing behind in memory, where TensorStore alone would keep what it makes of JSON."""

import gc
import sys

import jax.numpy as jnp
import pytest
import tensorstore

from tosa_jax.train import tensorstore_leak
from tosa_jax.train.checkpoints import Checkpoints

ARRAYS = 12

SPECIFICATIONS = [
    {"driver": "memory"},
    {"driver": "memory", "path": "one\ntwo\t'\"\\x41\u00fc\u20ac\U0001f600/"},
    {"driver": "file", "path": "/a folder/\u00fc'\"/"},
    {"driver": "file", "path": "/a/", "file_io_locking": {"mode": "non_atomic"}},
    {"driver": "file", "path": "/a/", "file_io_sync": False},
    {
        "driver": "ocdbt",
        "base": {"driver": "file", "path": "/\u00fc/"},
        "path": "b",
        "config": {"max_inline_value_bytes": 10, "compression": None},
    },
]


def test_answers_are_those_of_tensorstore():
    to_json = tensorstore.KvStore.Spec.to_json
    mended = tensorstore_leak.read_from_text(to_json)
    for json in SPECIFICATIONS:
        spec = tensorstore.KvStore.Spec(json)
        assert mended(spec) == to_json(spec)
        assert mended(spec, include_defaults=True) == to_json(spec, include_defaults=True)


@pytest.mark.parametrize("printed", ["<KvStore.Spec at 0x1>", "KvStore.Spec({'path': 'ü'})"])
def test_what_cannot_be_read_is_asked_for(printed):
    class Spec:
        def __repr__(self):
            return printed

        def to_json(self):
            return {"path": "asked"}

    assert tensorstore_leak.read_from_text(Spec.to_json)(Spec()) == {"path": "asked"}


def test_an_answer_leaves_nothing_behind():
    mended = tensorstore_leak.read_from_text(tensorstore.KvStore.Spec.to_json)
    spec = tensorstore.KvStore.Spec(SPECIFICATIONS[-1])
    mended(spec)
    gc.collect()
    before = sys.getallocatedblocks()
    for _ in range(500):
        mended(spec)
    gc.collect()
    assert sys.getallocatedblocks() - before < 50


def test_other_counters_are_still_told():
    answer = tensorstore_leak.without_kvstores(lambda prefix="", **options: [prefix, options])
    assert answer(tensorstore_leak.KVSTORE_METRICS) == []
    assert answer("/tensorstore/cache/", include_zero_metrics=True) == [
        "/tensorstore/cache/",
        {"include_zero_metrics": True},
    ]
    assert answer() == ["", {}]


def test_checkpoints_leave_nothing_behind(tmp_path):
    state = {f"array {number}": jnp.ones(3) for number in range(ARRAYS)}
    with Checkpoints(tmp_path, "accuracy") as checkpoints:
        held = []
        for step in range(10):
            checkpoints.save(step, state, {})
            checkpoints.wait()
            gc.collect()
            held.append(sys.getallocatedblocks())
    # Some 80 objects a save while caches fill. TensorStore's leak adds 4 for each array, and 240.
    assert held[-1] - held[-4] < 3 * 200
