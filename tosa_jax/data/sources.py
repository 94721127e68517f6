"""Between a TFDS split and batches: encoded or cached images, bad ones, repeats, process's rows.

A record is {"image": bytes, or an array where it is cached, or the BadImageError that decoding met;
"label": int32; "index": its place in the split; "name": of its file, or ""}.
"""

import functools
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import grain
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from tosa_jax.data.decoding import BadImageError, Form, to_array
from tosa_jax.data.transforms import AUGMENTATIONS, CROPS
from tosa_jax.errors import DataError

_log = logging.getLogger(__name__)


class Encoded:
    """A TFDS split as a source of records that are not decoded."""

    def __init__(self, path: str, split: str) -> None:
        # Skipped: TFDS would decode every image, grey ones too, to its own form.
        decoders = {"image": tfds.decode.SkipDecoding()}
        builder = tfds.builder_from_directory(path)
        self._records = builder.as_data_source(split, decoders=decoders)
        self.name = f"{path}, split {split}"

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict:
        record = self._records[index]
        name = record.get("file_name", b"")
        name = name.decode(errors="replace") if isinstance(name, bytes) else str(name)
        label = np.int32(record["label"])
        return {"image": record["image"], "label": label, "index": index, "name": name}


class Cached:
    """A whole split in memory, decoded once: in its form, or whole for augmentations that crop."""

    def __init__(self, source: Encoded, form: Form, whole: bool) -> None:
        self.name = source.name
        self._records = [source[i] for i in range(len(source))]
        for record in self._records:
            try:
                encoded = record["image"]
                record["image"] = to_array(form.open(encoded)) if whole else form.decode(encoded)
                # Shared by every stream of this process: a transform that wrote would spoil it.
                record["image"].flags.writeable = False
            except BadImageError as error:
                record["image"] = error

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict:
        return self._records[index]


# Four: train and eval of two sets, or two forms. An evaluation each epoch must not decode again.
@functools.lru_cache(maxsize=4)
def cached(path: str, split: str, form: Form, whole: bool) -> Cached:
    """The one `Cached` of its arguments in this process."""
    return Cached(Encoded(path, split), form, whole)


class EvalExamples:
    """A split as {"image", "label", "mask"}, and zeros behind its end up to whole batches.

    A bad image is a DataError: a score without it would be the score of another set.
    """

    def __init__(self, source: Encoded | Cached, form: Form, batch_size: int) -> None:
        self._source, self._form = source, form
        self._length = -(-len(source) // batch_size) * batch_size

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict:
        size = self._form.image_size
        if index >= len(self._source):
            blank = np.zeros((size, size, self._form.channels), np.uint8)
            return {"image": blank, "label": np.int32(0), "mask": np.float32(0)}
        record = self._source[index]
        try:
            image = _decoded(record["image"], self._form)
        except BadImageError as error:
            raise DataError(
                f"{self._source.name}: {_called(record)} cannot be decoded ({error}): evaluation "
                "leaves nothing out; mend or remove it and prepare the set again"
            ) from None
        return {"image": image, "label": record["label"], "mask": np.float32(1)}


class Opened(grain.transforms.Map):
    """A record with its image decoded: in its form, or whole (as PIL's) for who crops it.

    In the place of a bad image stands its BadImageError.
    """

    def __init__(self, form: Form, whole: bool) -> None:
        self._form, self._whole = form, whole

    def map(self, record: dict) -> dict:
        try:
            return {**record, "image": _decoded(record["image"], self._form, self._whole)}
        except BadImageError as error:
            return {**record, "image": error}


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
    """What `Following` gives of `Opened` records -> {"image": uint8 [s, s, c], "label"}, augmented.

    A bad image is replaced by the next of the stream, under the draws of the place that it fills.
    """

    def __init__(self, augment: str, image_size: int, bad: BadImages) -> None:
        self._bad = bad
        make = AUGMENTATIONS[augment]
        self._augment = make(image_size) if augment in CROPS else make and make()

    def random_map(self, element: tuple, rng: np.random.Generator) -> dict:
        stream, index = element
        while isinstance(error := (record := stream[index])["image"], BadImageError):
            self._bad.add(record, error)
            index += 1
        example = {"image": record["image"], "label": record["label"]}
        return self._augment.random_map(example, rng) if self._augment else example


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


def _decoded(
    image: bytes | np.ndarray | BadImageError, form: Form, whole: bool = False
) -> np.ndarray | Image.Image:
    """A record's image in its form, or the whole as PIL's; raises BadImageError."""
    if isinstance(image, BadImageError):
        # A new one: raised again and again, one error would gather tracebacks without end.
        raise BadImageError(*image.args)
    if whole:
        return form.open(image)
    return image if isinstance(image, np.ndarray) else form.decode(image)


def _called(record: dict) -> str:
    name = f" ({record['name']})" if record["name"] else ""
    return f"image {record['index']}{name}"
