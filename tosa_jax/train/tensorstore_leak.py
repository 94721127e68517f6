"""TensorStore keeps for ever what it makes of JSON for Python; Orbax asks for that at every array of every checkpoint.

Seen in TensorStore 0.1.69 to 0.1.86: each text, list and mapping of such an answer has one reference too many
(`results/tensorstore_memory.json`). A long run that saves often grows by it without end.
"""

import ast
import functools
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

    `KvStore.Spec.to_json` answers as before. The counters of key-value stores are an empty list from now on.
    """
    if leaks():
        spec = tensorstore.KvStore.Spec
        spec.to_json = read_from_text(spec.to_json)
        collect = tensorstore.experimental_collect_matching_metrics
        tensorstore.experimental_collect_matching_metrics = without_kvstores(collect)


def leaks() -> bool:
    """Whether calls of `KvStore.Spec.to_json` leave objects behind."""
    spec = tensorstore.KvStore.Spec({"driver": "memory"})
    before = sys.getallocatedblocks()
    for _ in range(PROBE_CALLS):
        spec.to_json()
    # The answers hold no cycles: what is left of them without a collection is left for ever.
    return sys.getallocatedblocks() - before >= PROBE_CALLS


def read_from_text(to_json: Callable[..., Any]) -> Callable[..., Any]:
    """`to_json`, whose answer is read from what is printed of a specification: that leaves nothing behind.

    With defaults, which are not printed, it asks as before; also where another version prints something else.
    """

    @functools.wraps(to_json)
    def answer(self, include_defaults: bool = False):
        if include_defaults:
            return to_json(self, include_defaults=True)
        text = repr(self).removeprefix("KvStore.Spec(").removesuffix(")")
        try:
            return _decoded(ast.literal_eval(text))
        except (SyntaxError, ValueError):
            return to_json(self)

    return answer


def _decoded(value: Any) -> Any:
    """JSON values, in whose texts each byte of UTF-8 is a character: so TensorStore prints them."""
    if isinstance(value, dict):
        return {_decoded(key): _decoded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    return value.encode("latin-1").decode() if isinstance(value, str) else value


def without_kvstores(collect: Callable[..., Any]) -> Callable[..., Any]:
    """`collect`, which answers an empty list where the counters of key-value stores are asked for."""

    @functools.wraps(collect)
    def answer(metric_prefix: str = "", *args, **options):
        if metric_prefix == KVSTORE_METRICS:
            return []
        return collect(metric_prefix, *args, **options)

    return answer
