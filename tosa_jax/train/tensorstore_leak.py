"""TensorStore keeps for ever what it makes of JSON for Python; Orbax asks for that at every array of every checkpoint.

Seen in TensorStore 0.1.69 to 0.1.86: each text, list and mapping of such an answer has one reference too many
(`results/tensorstore_memory.json`). A long run that saves often grows by it without end.
"""

import copy
import functools
import gc
import sys
from collections.abc import Callable
from typing import Any

import tensorstore

PROBE_CALLS = 64

KVSTORE_METRICS = "/tensorstore/kvstore/"
"""Counters that Orbax reads twice a checkpoint, to report what was written. Nothing here reads that report."""


@functools.cache
def mend() -> None:
    """Makes Orbax's two questions leave nothing behind, in this process. Does nothing where TensorStore does not leak.

    `KvStore.Spec.to_json` answers as before, but is asked once for specifications that are alike. The counters of
    key-value stores are an empty list from now on.
    """
    if leaks():
        spec = tensorstore.KvStore.Spec
        spec.to_json = asked_once(spec.to_json)
        collect = tensorstore.experimental_collect_matching_metrics
        tensorstore.experimental_collect_matching_metrics = without_kvstores(collect)


def leaks() -> bool:
    """Whether calls of `KvStore.Spec.to_json` leave objects behind."""
    spec = tensorstore.KvStore.Spec({"driver": "memory"})
    gc.collect()
    before = sys.getallocatedblocks()
    for _ in range(PROBE_CALLS):
        spec.to_json()
    gc.collect()
    return sys.getallocatedblocks() - before >= PROBE_CALLS


def asked_once(to_json: Callable[..., Any]) -> Callable[..., Any]:
    """`to_json`, which keeps its last 16 answers. Several threads may ask."""
    asked = functools.lru_cache(maxsize=16)(lambda question: question.ask())

    @functools.wraps(to_json)
    def answer(self, *args, **options):
        question = _Question(repr((self, args, options)))
        question.ask = functools.partial(to_json, self, *args, **options)
        return copy.deepcopy(asked(question))

    return answer


class _Question(str):
    """What is printed of a specification, which has no hash of its own, and the call that answers."""

    ask: Callable[[], Any]


def without_kvstores(collect: Callable[..., Any]) -> Callable[..., Any]:
    """`collect`, which answers an empty list where the counters of key-value stores are asked for."""

    @functools.wraps(collect)
    def answer(metric_prefix: str = "", *args, **options):
        if metric_prefix == KVSTORE_METRICS:
            return []
        return collect(metric_prefix, *args, **options)

    return answer
