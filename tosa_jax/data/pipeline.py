"""TFDS sets to batches: TFDS holds the examples; Grain orders, augments, batches and prefetches.

Training data is a function of (seed, step) only, whatever the number of threads, workers and
processes: every draw belongs to an index of the global, infinite stream of examples.
"""

import atexit
import dataclasses
import functools
import weakref
from collections.abc import Iterator
from typing import ClassVar

import grain
import numpy as np
import tensorflow_datasets as tfds
from absl import flags

from tosa_jax.data.builders import nearest, num_examples, open_builder
from tosa_jax.data.transforms import AUGMENTATIONS, decode_image
from tosa_jax.errors import ConfigError, DataError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, in which form, read how. Wrong values raise ConfigError when it is made."""

    name: str  # TFDS name ("imagenet2012", "set/config"), "digits", or an IDX set with source_dir
    data_dir: str = "~/tensorflow_datasets"
    source_dir: str = ""  # raw files that the set is prepared from, when it is one of ours
    train_split: str = "train"
    eval_split: str = "test"
    image_size: int  # square, pixels; images of another size are resized (bilinear, antialiased)
    channels: int  # 1 or 3; grey is repeated, colour becomes luma
    augment: str = "none"  # a key of transforms.AUGMENTATIONS
    in_memory: bool = False  # decode the set once and keep it as uint8 (small sets)
    num_threads: int = 2  # reader threads a process
    num_workers: int = 0  # worker processes (0: threads only)
    prefetch_batches: int = 4

    def __post_init__(self) -> None:
        if self.augment not in AUGMENTATIONS:
            raise ConfigError(
                f"augment={self.augment!r} is unknown{nearest(self.augment, AUGMENTATIONS)}"
            )
        if self.channels not in (1, 3):
            use = 1 if self.channels < 2 else 3
            raise ConfigError(f"channels={self.channels} must be 1 or 3: use {use}")
        lowest_values = {"image_size": 1, "num_threads": 0, "num_workers": 0, "prefetch_batches": 0}
        for field, lowest in lowest_values.items():
            if getattr(self, field) < lowest:
                raise ConfigError(f"{field}={getattr(self, field)} must be at least {lowest}")


@dataclasses.dataclass(frozen=True)
class DatasetFacts:
    """What the model and the schedule need to know of a data set."""

    num_train: int
    num_eval: int
    num_classes: int
    class_names: tuple[str, ...]


class BatchStream(Iterator[dict[str, np.ndarray]]):
    """An iterator of batches. `close()` ends its threads and workers; so does dropping it."""

    open_streams: ClassVar[weakref.WeakSet] = weakref.WeakSet()

    def __init__(self, iterator: grain.DatasetIterator) -> None:
        self._iterator: grain.DatasetIterator | None = iterator
        # Grain's clean-up is loud once Python is being taken down: it must have happened before.
        self.open_streams.add(self)

    def __next__(self) -> dict[str, np.ndarray]:
        if self._iterator is None:
            raise ValueError("this stream of batches is closed")
        return next(self._iterator)

    def close(self) -> None:
        """Ends the stream; a second call does nothing."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


def open_dataset(config: DataConfig) -> DatasetFacts:
    """Prepares the set if it is one of the project's own cheap ones, and says what is in it.

    Raises:
      ConfigError: a split does not exist.
      DataError: the set is not prepared, is only there as tfrecord, has no "image" and "label", or
        one of its files is missing or broken.
    """
    builder = open_builder(config.name, config.data_dir, config.source_dir)
    return DatasetFacts(
        num_train=num_examples(builder, config.train_split, "train_split"),
        num_eval=num_examples(builder, config.eval_split, "eval_split"),
        num_classes=builder.info.features["label"].num_classes,
        class_names=tuple(builder.info.features["label"].names),
    )


def train_batches(
    config: DataConfig,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> BatchStream:
    """The endless stream of this process's rows of each global batch, from step `start_step` on.

    Each epoch has its own order and batches cross from one into the next. Process p gets rows
    [p * local_b, (p + 1) * local_b) of the `batch_size` rows, local_b = batch_size / process_count.

    Returns:
      An iterator of {"image": uint8 [local_b, s, s, c], "label": int32 [local_b]}.
    Raises:
      ConfigError: `batch_size` does not divide, a number is negative, or the split does not exist.
      DataError: see `open_dataset`.
    """
    local_size = _local_size(batch_size, process_index, process_count)
    if seed < 0 or start_step < 0:
        raise ConfigError(f"seed={seed} and start_step={start_step} must be 0 or more")
    source = _source(config, "train_split", config.train_split)
    # Seeds of their own, not Grain's default ones: those change with the place in the pipeline, so
    # that another augmentation would bring another order of the examples.
    order_seed, draw_seed = np.random.SeedSequence(seed).generate_state(2).tolist()
    # repeat() before random_map(): the draws then differ from epoch to epoch.
    dataset = grain.MapDataset.source(source).shuffle(seed=order_seed).repeat(None)
    if (augmentation := AUGMENTATIONS[config.augment]) is not None:
        dataset = dataset.random_map(augmentation(), seed=draw_seed)
    dataset = _ProcessRows(dataset, batch_size, local_size, process_index)
    dataset = dataset.batch(local_size, drop_remainder=True)
    # A slice, not the iterator's state: that is tied to the number of workers.
    return _iterate(dataset[start_step:], config)


def eval_batches(
    config: DataConfig,
    *,
    batch_size: int,
    split: str | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> BatchStream:
    """Each example of a split (default: `eval_split`) once, in the set's order, not augmented.

    The last global batch is filled up with zeros, so that all batches have one shape and each
    process has as many of them as the others.

    Returns:
      An iterator as `train_batches` gives, finite, with "mask" too: float32 [local_b], 1 for
      examples, 0 for padding.
    Raises:
      ConfigError: `batch_size` does not divide, or the split does not exist.
      DataError: see `open_dataset`.
    """
    local_size = _local_size(batch_size, process_index, process_count)
    where = ("eval_split", config.eval_split) if split is None else ("split", split)
    source = _source(config, *where)
    dataset = grain.MapDataset.source(_Padded(source, batch_size))
    dataset = _ProcessRows(dataset, batch_size, local_size, process_index)
    return _iterate(dataset.batch(local_size, drop_remainder=True), config)


class _Encoded:
    """A TFDS split as a source that decodes: {"image": uint8 [s, s, c], "label": int32 []}."""

    def __init__(self, path: str, split: str, image_size: int, channels: int) -> None:
        # Skipped: TFDS would decode every image, grey ones too, to its own form.
        decoders = {"image": tfds.decode.SkipDecoding()}
        builder = tfds.builder_from_directory(path)
        self._records = builder.as_data_source(split, decoders=decoders)
        self._name = f"{path}, split {split}"
        self._form = {"image_size": image_size, "channels": channels}

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict:
        record = self._records[index]
        try:
            image = decode_image(record["image"], **self._form)
        except (OSError, ValueError) as error:
            raise DataError(
                f"{self._name}: image {index} cannot be decoded ({error}); prepare the set again"
            ) from None
        return {"image": image, "label": np.int32(record["label"])}


class _Decoded:
    """A whole split as arrays; elements as `_Encoded`'s, the images read-only views."""

    def __init__(self, source: _Encoded) -> None:
        self._images = np.empty((len(source), *source[0]["image"].shape), np.uint8)
        self._labels = np.empty(len(source), np.int32)
        for i in range(len(source)):
            element = source[i]
            self._images[i], self._labels[i] = element["image"], element["label"]
        # Shared by every stream of this process: a transform that wrote into it would spoil them.
        self._images.flags.writeable = False

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict:
        return {"image": self._images[index], "label": self._labels[index]}


class _Padded:
    """A source with a "mask", and zeros behind its end up to a whole number of batches."""

    def __init__(self, source: _Encoded | _Decoded, batch_size: int) -> None:
        self._source = source
        self._length = -(-len(source) // batch_size) * batch_size

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict:
        if index < len(self._source):
            return {**self._source[index], "mask": np.float32(1)}
        blank = np.zeros_like(self._source[0]["image"])
        return {"image": blank, "label": np.int32(0), "mask": np.float32(0)}


class _ProcessRows(grain.MapDataset):
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

    def __getitem__(self, index: int) -> dict:
        if isinstance(index, slice):
            return self.slice(index)
        batch, row = divmod(index, self._local_size)
        return self._parent[batch * self._global_size + self._first_row + row]


def _iterate(dataset: grain.MapDataset, config: DataConfig) -> BatchStream:
    # An element is a batch here, and Grain's default is to read 500 elements ahead.
    threads = min(config.num_threads, config.prefetch_batches)  # more could not be busy
    options = grain.ReadOptions(
        num_threads=threads, prefetch_buffer_size=config.prefetch_batches if threads else 0
    )
    stream = dataset.to_iter_dataset(options)
    workers = min(config.num_workers, len(dataset))
    if workers:
        # Grain hands absl's flags on to its workers, which fails if nothing has parsed them.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        per_worker = max(1, config.prefetch_batches // workers)
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(workers, per_worker))
    return BatchStream(iter(stream))


@atexit.register
def _close_streams() -> None:
    for stream in list(BatchStream.open_streams):
        stream.close()


def _local_size(batch_size: int, process_index: int, process_count: int) -> int:
    if batch_size < 1 or batch_size % process_count:
        lower = max(batch_size // process_count, 1) * process_count
        raise ConfigError(
            f"batch_size={batch_size} must be a positive multiple of the {process_count} "
            f"processes, for example {lower}"
        )
    if not 0 <= process_index < process_count:
        raise ConfigError(f"process_index={process_index} must be in [0, {process_count})")
    return batch_size // process_count


def _source(config: DataConfig, field: str, split: str) -> _Encoded | _Decoded:
    builder = open_builder(config.name, config.data_dir, config.source_dir)
    num_examples(builder, split, field)  # checks the split
    form = (str(builder.data_path), split, config.image_size, config.channels)
    return _decoded(*form) if config.in_memory else _Encoded(*form)


# Four: train and eval of two sets, or two forms. An evaluation each epoch must not decode again.
@functools.lru_cache(maxsize=4)
def _decoded(path: str, split: str, image_size: int, channels: int) -> _Decoded:
    return _Decoded(_Encoded(path, split, image_size, channels))
