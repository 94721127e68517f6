"""What lies between a TFDS split and batches of examples, as Grain data sets.

In order: records (`Encoded` or `Cached`), decoding (`Opened`), copies (`Repeated`), augmentation with a replacement for
bad images (`Following`, `TrainExample`), and the rows of one process (`ProcessRows`). Evaluation uses `EvalExamples`.
In a record or example whose image cannot be decoded, "image" is the BadImageError.
"""

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any

import grain
import numpy as np
import tensorflow_datasets as tfds

from tosa_jax.data.decoding import BadImageError
from tosa_jax.data.examples import Augmentation, Example, ExampleKind, Record
from tosa_jax.errors import DataError

_log = logging.getLogger(__name__)


_AGAIN = "a file of the set is damaged or was changed: prepare it again with --overwrite"


class Records:
    """A TFDS split as a sequence of features by name. Those named in `encoded` stay the bytes of their files.

    Raises DataError, also from an index: a file is missing or damaged, or holds other examples than are described.
    """

    def __init__(
        self, builder: tfds.core.DatasetBuilder, split: str, encoded: Iterable[str]
    ) -> None:
        self._where = f"{builder.data_path}, split {split}"
        open_split: Any = builder.as_data_source  # Any: pyright misreads TFDS's decorator
        with self._damage("it"):
            self._source = open_split(
                split, decoders=dict.fromkeys(encoded, tfds.decode.SkipDecoding())
            )
            self._length = len(self._source)
        if self._length != (told := builder.info.splits[split].num_examples):
            raise DataError(f"{self._where}: {self._length} examples, not {told}; {_AGAIN}")

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Record:
        with self._damage(f"example {index}"):
            return self._source[index]

    @contextlib.contextmanager
    def _damage(self, what: str) -> Iterator[None]:
        """Turns whatever TFDS and ArrayRecord raise for a damaged file into DataError."""
        try:
            yield
        except DataError:
            raise
        except Exception as error:
            why = f"{type(error).__name__}: {str(error)[:200]}"
            raise DataError(f"{self._where}: {what} cannot be read ({why}); {_AGAIN}") from error


class Encoded:
    """A TFDS split as a source of encoded records: an image is decoded when an example is made."""

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str, kind: ExampleKind) -> None:
        self.kind, self.name = kind, f"{builder.data_path}, split {split}"
        self._records = Records(builder, split, kind.encoded)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        features = self._records[index]
        name = features.get("file_name", b"")
        name = name.decode(errors="replace") if isinstance(name, bytes) else str(name)
        return {**self.kind.fields(features), "index": index, "name": name}


class Cached:
    """A whole split in memory, decoded once."""

    def __init__(self, source: Encoded) -> None:
        self.kind, self.name = source.kind, source.name
        self._records = [self._cached(source[i]) for i in range(len(source))]

    def _cached(self, record: Record) -> Record:
        try:
            return self.kind.cached(record)
        except BadImageError as error:
            return {**record, "image": error}

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        return self._records[index]


# Four: training and evaluation of two sets. An evaluation each epoch must not decode again.
@functools.lru_cache(maxsize=4)
def cached(builder: tfds.core.DatasetBuilder, split: str, kind: ExampleKind) -> Cached:
    """`Cached`, made once in this process for the same arguments."""
    return Cached(Encoded(builder, split, kind))


class EvalExamples:
    """The examples of a split, then blank ones until the last batch is full.

    "mask", float32, is 1 for an example of the split and 0 for a blank one. A bad image raises
    DataError: a score that leaves it out would be that of another set.
    """

    def __init__(self, source: Encoded | Cached, batch_size: int) -> None:
        self._source = source
        self._length = -(-len(source) // batch_size) * batch_size

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Example:
        kind = self._source.kind
        if index >= len(self._source):
            return {**kind.blank(), "mask": np.float32(0)}
        record = self._source[index]
        try:
            _check_cached(record)
            return {**kind.evaluation_example(record), "mask": np.float32(1)}
        except BadImageError as error:
            raise DataError(
                f"{self._source.name}: {called(record)} cannot be decoded ({error}): evaluation "
                "leaves nothing out; mend or remove it and prepare the set again"
            ) from None


class Opened(grain.transforms.Map):
    """Decodes and checks a record: the result is its training example, not augmented, with "index" and "name"."""

    def __init__(self, kind: ExampleKind) -> None:
        self._kind = kind

    def map(self, element: Record) -> Any:
        record = element
        known = {"index": record["index"], "name": record["name"]}
        try:
            _check_cached(record)
            return {**self._kind.training_example(record), **known}
        except BadImageError as error:
            return {"image": error, **known}


class _Copies:
    """Makes a value once for its `count` copies, which threads ask for soon after one another.

    A value is dropped after its last copy. If some copies go to other processes, that never comes:
    only the latest eight values are kept.
    """

    _MOST_KEPT = 8

    def __init__(self, count: int) -> None:
        self._count = count
        self._lock = threading.Lock()
        self._made: dict[int, tuple[Future, int]] = {}  # value, and how many copies were asked for

    def __reduce__(self) -> tuple:
        return _Copies, (self._count,)  # a worker process starts with none

    def get(self, key: int, make: Callable[[], Any]) -> Any:
        """What `make` returns. A thread that asks while another one is making it waits."""
        with self._lock:
            mine = key not in self._made
            future, asked = self._made.pop(key, (Future(), 0))
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
    """Repeated augmentation: each example `repeats` times in a row; an epoch keeps its length.

    An epoch therefore has only the first 1 / repeats of the examples of the parent's epoch, as with
    DeiT's RASampler. `parent` is an endless stream of shuffled epochs of `epoch_size` examples. It
    makes an example once for all copies that this process uses.
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
    """Element `index` is (parent, index), so that the next map can skip bad records.

    The draws of that map depend on `index` alone, whichever record it then uses.
    """

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        return self._parent, index


class BadImages:
    """Bad images that one process or worker has met. Each is counted and logged once."""

    def __init__(self, set_name: str, num_examples: int, max_fraction: float) -> None:
        self._set_name, self._num_examples = set_name, num_examples
        self._max_fraction = max_fraction
        self._seen: set[int] = set()  # adding to a set is safe between threads

    def __len__(self) -> int:
        return len(self._seen)

    def add(self, record: Record, error: BadImageError) -> None:
        """Counts and logs one. Raises DataError if there are now more than may be skipped."""
        if record["index"] in self._seen:
            return
        self._seen.add(record["index"])
        what = f"{self._set_name}: {called(record)} cannot be decoded ({error})"
        count = f"{len(self._seen)} of {self._num_examples} images"
        if len(self._seen) > self._max_fraction * self._num_examples:
            raise DataError(
                f"{what}; {count} are bad, max_bad_fraction={self._max_fraction} allows no more: "
                "mend or remove it and prepare the set again, or raise data.max_bad_fraction"
            )
        _log.warning("%s: skipped, the next in the order takes its place; so far %s", what, count)


class TrainExample(Augmentation):
    """Augments an element of `Following`; in place of a bad image it takes the next one of the stream."""

    def __init__(self, augment: Augmentation | None, bad: BadImages) -> None:
        self._augment, self._bad = augment, bad

    def random_map(
        self, element: tuple[grain.MapDataset, int], rng: np.random.Generator
    ) -> Example:
        stream, index = element
        while True:
            record: Any = stream[index]
            try:
                _check_cached(record)
                example = {k: value for k, value in record.items() if k not in ("index", "name")}
                return self._augment.random_map(example, rng) if self._augment else example
            except BadImageError as error:
                self._bad.add(record, error)
                index += 1


class ProcessRows(grain.MapDataset):
    """The contiguous rows of each global batch that belong to one process.

    It asks its parent for global indices, so the draws of a random_map before it do not depend on
    the number of processes.
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


def _check_cached(record: Record) -> None:
    if isinstance(record["image"], BadImageError):
        # A new error: one that is raised again and again collects tracebacks without end.
        raise BadImageError(*record["image"].args)


def called(record: Record) -> str:
    """An example by its index in the split and, if the set has one, its name."""
    name = f" ({record['name']})" if record["name"] else ""
    return f"image {record['index']}{name}"
