"""Checkpoints leave nothing behind in memory, where TensorStore alone would keep what it makes of JSON."""

import gc
import sys

import jax.numpy as jnp
import tensorstore

from tosa_jax.train import tensorstore_leak
from tosa_jax.train.checkpoints import Checkpoints

ARRAYS = 12

SPECIFICATIONS = [
    {"driver": "memory"},
    {"driver": "file", "path": "/a folder/ü'\"/"},
    {"driver": "file", "path": "/a/", "file_io_locking": {"mode": "non_atomic"}},
    {"driver": "file", "path": "/a/"},
    {"driver": "ocdbt", "base": {"driver": "file", "path": "/a/"}, "path": "b"},
    {"driver": "ocdbt", "base": {"driver": "file", "path": "/a/"}, "path": "c"},
]


def test_answers_are_those_of_tensorstore():
    asked = []

    def original(spec, *args, **options):
        asked.append(spec)
        return to_json(spec, *args, **options)

    to_json = tensorstore.KvStore.Spec.to_json
    remembered = tensorstore_leak.asked_once(original)
    for _ in range(2):
        for json in SPECIFICATIONS:
            for include_defaults in (False, True):
                spec = tensorstore.KvStore.Spec(json)
                right = to_json(spec, include_defaults=include_defaults)
                answer = remembered(spec, include_defaults=include_defaults)
                assert answer == right
                answer["path"] = "the caller may change what it gets"
    assert len(asked) == 2 * len(SPECIFICATIONS)


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
