"""Between a TFDS split and batches: encoded or cached records, bad ones, repeats, a process's rows.

A record holds what its `ExampleKind` takes from the set, "image" among it (bytes, or an array where it is cached, or
the BadImageError that decoding met), and "index", its place in the split, and "name", that of its file, or "".
"""

import functools
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np
import tensorflow_datasets as tfds

from tosa_jax.data.decoding import BadImageError
from tosa_jax.errors import DataError

_log = logging.getLogger(__name__)


@runtime_checkable
class ExampleKind(Protocol):
    """What the examples of a set are, and how its records become them: hashable, and sent to workers.

    Where an example cannot be made of a record, its methods raise BadImageError.
    """

    name: str
    encoded: tuple[str, ...]  # features that TFDS must not decode

    def fields(self, features: dict) -> dict:
        """What a record keeps of a set's features."""

    def cached(self, record: dict) -> dict:
        """The record with arrays that cannot be written, for the memory."""

    def training_example(self, record: dict) -> dict:
        """The example, checked, before its augmentation."""

    def evaluation_example(self, record: dict) -> dict:
        """The example as it is scored, all of one size."""

    def blank(self) -> dict:
        """Zeros in the form of `evaluation_example`."""


class Encoded:
    """A TFDS split as a source of records that are not decoded."""

    def __init__(self, path: str, split: str, kind: ExampleKind) -> None:
        self.kind, self.name = kind, f"{path}, split {split}"
        # Skipped: TFDS would decode every image, grey ones too, to its own form.
        decoders = {key: tfds.decode.SkipDecoding() for key in kind.encoded}
        self._records = tfds.builder_from_directory(path).as_data_source(split, decoders=decoders)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict:
        features = self._records[index]
        name = features.get("file_name", b"")
        name = name.decode(errors="replace") if isinstance(name, bytes) else str(name)
        return {**self.kind.fields(features), "index": index, "name": name}


class Cached:
    """A whole split in memory, decoded once."""

    def __init__(self, source: Encoded) -> None:
        self.kind, self.name = source.kind, source.name
        self._records = [self._cached(source[i]) for i in range(len(source))]

    def _cached(self, record: dict) -> dict:
        try:
            return self.kind.cached(record)
        except BadImageError as error:
            return {**record, "image": error}

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict:
        return self._records[index]


# Four: train and eval of two sets, or two forms. An evaluation each epoch must not decode again.
@functools.lru_cache(maxsize=4)
def cached(path: str, split: str, kind: ExampleKind) -> Cached:
    """The one `Cached` of its arguments in this process."""
    return Cached(Encoded(path, split, kind))


class EvalExamples:
    """A split as examples with "mask", and blank ones behind its end up to whole batches.

    A bad image is a DataError: a score without it would be the score of another set.
    """

    def __init__(self, source: Encoded | Cached, batch_size: int) -> None:
        self._source = source
        self._length = -(-len(source) // batch_size) * batch_size

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict:
        kind = self._source.kind
        if index >= len(self._source):
            return {**kind.blank(), "mask": np.float32(0)}
        record = self._source[index]
        try:
            _check_cached(record)
            return {**kind.evaluation_example(record), "mask": np.float32(1)}
        except BadImageError as error:
            raise DataError(
                f"{self._source.name}: {_called(record)} cannot be decoded ({error}): evaluation "
                "leaves nothing out; mend or remove it and prepare the set again"
            ) from None


class Opened(grain.transforms.Map):
    """A record -> its example, decoded and checked, with "index" and "name"; augmentation comes later.

    In the place of a bad image stands its BadImageError.
    """

    def __init__(self, kind: ExampleKind) -> None:
        self._kind = kind

    def map(self, record: dict) -> dict:
        known = {"index": record["index"], "name": record["name"]}
        try:
            _check_cached(record)
            return {**self._kind.training_example(record), **known}
        except BadImageError as error:
            return {"image": error, **known}


class _Copies:
    """Makes a value once for all copies that are asked for soon after each other, by any threads.

    A value is let go with its last copy; of those whose other copies go to other processes, the
    latest few are kept.
    """

    _MOST_KEPT = 8

    def __init__(self, count: int) -> None:
        self._count = count
        self._lock = threading.Lock()
        self._made: dict[int, tuple[Future, int]] = {}  # and how often it was asked for

    def __reduce__(self) -> tuple:
        return _Copies, (self._count,)  # a worker process makes its own

    def get(self, key: int, make: Callable[[], Any]) -> Any:
        """What `make` returns; a thread that comes while another one makes it waits."""
        with self._lock:
            future, asked = self._made.pop(key, (None, 0))
            mine = future is None
            future = future or Future()
            if asked + 1 < self._count:
                self._made[key] = future, asked + 1
                if len(self._made) > self._MOST_KEPT:
                    del self._made[next(iter(self._made))]
        if mine:
            try:
                future.set_result(make())
            except BaseException as error:
                future.set_exception(error)
        return future.result()


class Repeated(grain.MapDataset):
    """Each example `repeats` times in a row, in epochs as long as without, each shuffled anew.

    An epoch thus has the first 1 / repeats of the parent's order, as DeiT's RASampler does. The
    parent is the endless stream of epochs of `epoch_size`; it is asked once for those copies of an
    example that stand in one process.
    """

    def __init__(self, parent: grain.MapDataset, repeats: int, epoch_size: int) -> None:
        super().__init__(parent)
        self._repeats, self._epoch_size = repeats, epoch_size
        self._copies = _Copies(repeats)

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        epoch, place = divmod(index, self._epoch_size)
        example = epoch * self._epoch_size + place // self._repeats
        return self._copies.get(example, lambda: self._parent[example])


class Following(grain.MapDataset):
    """At each index the stream from there on: (parent, index), for who may have to skip a record.

    The map behind it thus draws by the index of the place, whichever record fills it.
    """

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        return self._parent, index


class BadImages:
    """The bad images that one process (or worker) has met; each is counted and named once."""

    def __init__(self, set_name: str, num_examples: int, max_fraction: float) -> None:
        self._set_name, self._num_examples = set_name, num_examples
        self._max_fraction = max_fraction
        self._seen: set[int] = set()  # adding to a set is safe between threads

    def __len__(self) -> int:
        return len(self._seen)

    def add(self, record: dict, error: BadImageError) -> None:
        """Counts and logs one. Raises DataError when they are more than may be skipped."""
        if record["index"] in self._seen:
            return
        self._seen.add(record["index"])
        what = f"{self._set_name}: {_called(record)} cannot be decoded ({error})"
        count = f"{len(self._seen)} of {self._num_examples} images"
        if len(self._seen) > self._max_fraction * self._num_examples:
            raise DataError(
                f"{what}; {count} are bad, max_bad_fraction={self._max_fraction} allows no more: "
                "mend or remove it and prepare the set again, or raise data.max_bad_fraction"
            )
        _log.warning("%s: skipped, the next in the order takes its place; so far %s", what, count)


class TrainExample(grain.transforms.RandomMap):
    """What `Following` gives of `Opened` records -> an example, augmented.

    A bad image is replaced by the next of the stream, under the draws of the place that it fills.
    """

    def __init__(self, augment: grain.transforms.RandomMap | None, bad: BadImages) -> None:
        self._augment, self._bad = augment, bad

    def random_map(self, element: tuple, rng: np.random.Generator) -> dict:
        stream, index = element
        while True:
            record = stream[index]
            try:
                _check_cached(record)
                example = {k: value for k, value in record.items() if k not in ("index", "name")}
                return self._augment.random_map(example, rng) if self._augment else example
            except BadImageError as error:
                self._bad.add(record, error)
                index += 1


class ProcessRows(grain.MapDataset):
    """One process's contiguous rows of each global batch of a dataset of single examples.

    It stands behind random_map, whose draws are by the index that it asks for: the global one.
    """

    def __init__(
        self, parent: grain.MapDataset, global_size: int, local_size: int, process_index: int
    ) -> None:
        super().__init__(parent)
        self._global_size, self._local_size = global_size, local_size
        self._first_row = process_index * local_size

    def __len__(self) -> int:
        return len(self._parent) // self._global_size * self._local_size

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        batch, row = divmod(index, self._local_size)
        return self._parent[batch * self._global_size + self._first_row + row]


def _check_cached(record: dict) -> None:
    if isinstance(record["image"], BadImageError):
        # A new one: raised again and again, one error would gather tracebacks without end.
        raise BadImageError(*record["image"].args)


def _called(record: dict) -> str:
    name = f" ({record['name']})" if record["name"] else ""
    return f"image {record['index']}{name}"
