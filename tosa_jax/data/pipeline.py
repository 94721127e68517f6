"""TFDS sets to batches: TFDS holds the examples; Grain orders, augments, batches and prefetches.

Training data is a function of (seed, step) only, whatever the number of threads, workers and
processes: every draw belongs to an index of the global, infinite stream of examples.
"""

import atexit
import dataclasses
import math
import weakref
from collections.abc import Iterator
from typing import ClassVar

import grain
import numpy as np
from absl import flags

from tosa_jax.data import sources
from tosa_jax.data.builders import num_examples, open_builder
from tosa_jax.data.settings import DataConfig, augmentation, example_kind
from tosa_jax.errors import ConfigError

_SPLIT_FIELDS = ("train_split", "eval_split")
# Images of at least this many bytes are read one by one by the threads; smaller ones a batch at a
# time, since handing one from thread to thread then costs as much as reading it.
_LARGE_IMAGE = 2**15


@dataclasses.dataclass(frozen=True)
class DatasetFacts:
    """What the model and the schedule need to know of a data set.

    kind       "classification" or "depth", which has no classes.
    eval_size  height and width of evaluation images.
    """

    num_train: int
    num_eval: int
    num_classes: int
    class_names: tuple[str, ...]
    kind: str
    eval_size: tuple[int, int]


class BatchStream(Iterator[dict[str, np.ndarray]]):
    """An iterator of batches. `close()` ends its threads and workers; so does dropping it.

    `bad_images` holds those that its threads have skipped; workers count and log their own.
    """

    open_streams: ClassVar[weakref.WeakSet] = weakref.WeakSet()

    def __init__(
        self, iterator: grain.DatasetIterator, bad_images: sources.BadImages | tuple = ()
    ) -> None:
        self.bad_images = bad_images
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
      ConfigError: a split does not exist, or a setting does not go with a set of this kind.
      DataError: the set is not prepared, is only there as tfrecord, has no "image" and "label" or
        "depth", or one of its files is missing or broken.
    """
    builder = open_builder(config.name, config.data_dir, config.source_dir)
    counts = [num_examples(builder, getattr(config, field), field) for field in _SPLIT_FIELDS]
    kind = example_kind(config, builder, config.eval_split, train=False)
    labels = builder.info.features["label"] if kind.name == "classification" else None
    return DatasetFacts(
        *counts,
        num_classes=labels.num_classes if labels else 0,
        class_names=tuple(labels.names) if labels else (),
        kind=kind.name,
        eval_size=kind.blank()["image"].shape[:2],
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
    The copies of a repeated example stand next to each other, so mostly in one global batch.

    An image that cannot be decoded is named in the log and its place filled by the next example of
    the order; each process or worker stops at more than `max_bad_fraction` of the split.

    Returns:
      An iterator of {"image": uint8 [local_b, height, width, c]} and, by the kind of the set,
      "label": int32 [local_b], or "depth": float32 [local_b, height, width] in metres, 0 where
      nothing was measured (everywhere, in some crops).
    Raises:
      ConfigError: `batch_size` does not divide, a number is negative, the split does not exist, or
        a setting does not go with a set of this kind.
      DataError: see `open_dataset`; from the iterator: too many images cannot be decoded.
    """
    local_size = _local_size(batch_size, process_index, process_count)
    if seed < 0 or start_step < 0:
        raise ConfigError(f"seed={seed} and start_step={start_step} must be 0 or more")
    source = _source(config, "train_split", config.train_split, train=True)
    # Seeds of their own, not Grain's default ones: those change with the place in the pipeline, so
    # that another augmentation would bring another order of the examples.
    order_seed, draw_seed = np.random.SeedSequence(seed).generate_state(2).tolist()
    # repeat() before random_map(): the draws then differ from epoch to epoch.
    dataset = grain.MapDataset.source(source).shuffle(seed=order_seed).repeat(None)
    dataset = dataset.map(sources.Opened(source.kind))
    if config.repeats > 1:
        dataset = sources.Repeated(dataset, config.repeats, len(source))
    bad = sources.BadImages(source.name, len(source), config.max_bad_fraction)
    example = sources.TrainExample(augmentation(config, source.kind), bad)
    dataset = sources.Following(dataset).random_map(example, seed=draw_seed)
    dataset = sources.ProcessRows(dataset, batch_size, local_size, process_index)
    # A slice, not the iterator's state: that is tied to the number of workers.
    values = math.prod(config.size) * (config.channels + (4 if source.kind.name == "depth" else 0))
    dataset = dataset[start_step * local_size :]
    return BatchStream(_iterate(dataset, local_size, values, config), bad)


def eval_batches(
    config: DataConfig,
    *,
    batch_size: int,
    split: str | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> BatchStream:
    """Each example of a split (default: `eval_split`) once, in the set's order, not augmented.

    A depth set's examples keep their size, and their depth maps every value.

    The last global batch is filled up with zeros, so that all batches have one shape and each
    process has as many of them as the others.

    Returns:
      An iterator as `train_batches` gives, finite, with "mask" too: float32 [local_b], 1 for
      examples, 0 for padding.
    Raises:
      ConfigError: `batch_size` does not divide, or the split does not exist.
      DataError: see `open_dataset`; from the iterator: an image cannot be decoded, or has a depth
        map of another size, without a measurement, or with values that are no distance.
    """
    local_size = _local_size(batch_size, process_index, process_count)
    where = ("eval_split", config.eval_split) if split is None else ("split", split)
    source = _source(config, *where, train=False)
    dataset = grain.MapDataset.source(sources.EvalExamples(source, batch_size))
    dataset = sources.ProcessRows(dataset, batch_size, local_size, process_index)
    num_bytes = sum(array.nbytes for array in source.kind.blank().values())
    return BatchStream(_iterate(dataset, local_size, num_bytes, config))


def _iterate(
    examples: grain.MapDataset, local_size: int, image_bytes: int, config: DataConfig
) -> grain.DatasetIterator:
    """Batches of examples, read ahead by as many as `prefetch_batches` and `prefetch_mib` allow."""
    budget = config.prefetch_mib * 2**20 // image_bytes  # images
    waiting = min(config.prefetch_batches, max(1, budget // local_size))
    batches = examples.batch(local_size, drop_remainder=True)
    kind, count = config.readers
    workers = min(count, len(batches))
    if kind == "processes" and workers:
        # Grain hands absl's flags on to its workers, which fails if nothing has parsed them.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        stream = batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        options = grain.MultiprocessingOptions(workers, max(1, waiting // workers))
        return iter(stream.mp_prefetch(options))
    if image_bytes < _LARGE_IMAGE:
        # An element is a batch here, and Grain's default is to read 500 elements ahead.
        return iter(batches.to_iter_dataset(_read_options(count, waiting)))
    waiting = min(config.prefetch_batches * local_size, max(1, budget))
    stream = examples.to_iter_dataset(_read_options(count, waiting))
    return iter(stream.batch(local_size, drop_remainder=True))


def _read_options(num_threads: int, buffer_size: int) -> grain.ReadOptions:
    threads = min(num_threads, buffer_size)  # more could not be busy
    return grain.ReadOptions(
        num_threads=threads, prefetch_buffer_size=buffer_size if threads else 0
    )


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


def _source(
    config: DataConfig, field: str, split: str, *, train: bool
) -> sources.Encoded | sources.Cached:
    builder = open_builder(config.name, config.data_dir, config.source_dir)
    num_examples(builder, split, field)  # checks the split
    kind = example_kind(config, builder, split, train=train)
    make = sources.cached if config.in_memory else sources.Encoded
    return make(str(builder.data_path), split, kind)
