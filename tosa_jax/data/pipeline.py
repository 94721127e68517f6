"""TFDS sets to batches: TFDS holds the examples; Grain orders, augments, batches and prefetches.

Training data is a function of (seed, step) only, whatever the number of threads, workers and
processes: every draw belongs to an index of the global, infinite stream of examples.
"""

import atexit
import dataclasses
import weakref
from collections.abc import Iterator
from typing import ClassVar

import grain
import numpy as np
from absl import flags

from tosa_jax.data import sources
from tosa_jax.data.builders import nearest, num_examples, open_builder
from tosa_jax.data.decoding import RESIZES, Form
from tosa_jax.data.transforms import AUGMENTATIONS, CROPS
from tosa_jax.errors import ConfigError

# Images of at least this many bytes are read one by one by the threads; smaller ones a batch at a
# time, since handing one from thread to thread then costs as much as reading it.
_LARGE_IMAGE = 2**15


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, in which form, read how. Wrong values raise ConfigError when it is made."""

    name: str  # TFDS name ("imagenet2012", "set/config"), "digits", or an IDX set with source_dir
    data_dir: str = "~/tensorflow_datasets"
    source_dir: str = ""  # raw files that the set is prepared from, when it is one of ours
    train_split: str = "train"
    eval_split: str = "test"
    image_size: int  # square, pixels
    channels: int  # 1 or 3; grey is repeated, colour becomes luma
    augment: str = "none"  # a key of transforms.AUGMENTATIONS
    repeats: int = 1  # copies of each example in a row, each drawn anew; DeiT's is 3
    # How images that no augmentation crops are brought to size: "squeeze" (bilinear to the square)
    # or "crop" (DeiT's evaluation: short side to image_size / eval_crop_pct, bicubic, centre crop).
    eval_resize: str = "squeeze"
    eval_crop_pct: float = 0.875
    exif_rotate: bool = False  # turn images upright by EXIF; published ImageNet numbers did not
    max_bad_fraction: float = 0.0  # of a split's images that training may skip as not decodable
    in_memory: bool = False  # decode the set once and keep it as uint8 (small sets)
    # Who reads and augments: "threads:8" of this process ("threads:0": the one that takes the batches),
    # or "processes:8", each with one thread. The batches are the same.
    workers: str = "threads:2"
    prefetch_batches: int = 4  # finished batches that wait
    prefetch_mib: int = 512  # and how much memory they may take; a worker always has one

    def __post_init__(self) -> None:
        choices = {"augment": AUGMENTATIONS, "eval_resize": RESIZES}
        for field, known in choices.items():
            if (value := getattr(self, field)) not in known:
                raise ConfigError(f"{field}={value!r} is unknown{nearest(value, known)}")
        if self.channels not in (1, 3):
            use = 1 if self.channels < 2 else 3
            raise ConfigError(f"channels={self.channels} must be 1 or 3: use {use}")
        if self.augment == "deit" and self.channels != 3:
            raise ConfigError("augment='deit' is for channels=3: use 'crop_flip' for grey images")
        if not 0 < self.eval_crop_pct <= 1:
            raise ConfigError(f"eval_crop_pct={self.eval_crop_pct} must be in (0, 1]")
        if not 0 <= self.max_bad_fraction < 1:
            raise ConfigError(f"max_bad_fraction={self.max_bad_fraction} must be in [0, 1)")
        lowest_values = {"image_size": 1, "repeats": 1, "prefetch_mib": 1}
        lowest_values |= {"prefetch_batches": 0}
        for field, lowest in lowest_values.items():
            if getattr(self, field) < lowest:
                raise ConfigError(f"{field}={getattr(self, field)} must be at least {lowest}")
        self.readers  # noqa: B018  # its own check

    @property
    def readers(self) -> tuple[str, int]:
        """`workers` as ("threads" or "processes", how many)."""
        kind, _, count = self.workers.partition(":")
        lowest = {"threads": 0, "processes": 1}
        if kind in lowest and count.isdecimal() and int(count) >= lowest[kind]:
            return kind, int(count)
        raise ConfigError(
            f"workers={self.workers!r} must be 'threads:N', N from 0, or 'processes:N', N from 1: "
            "for example 'threads:8'"
        )

    @property
    def form(self) -> Form:
        """The form of images that are not cropped by an augmentation."""
        return Form(
            image_size=self.image_size,
            channels=self.channels,
            resize=self.eval_resize,
            crop_pct=self.eval_crop_pct,
            exif_rotate=self.exif_rotate,
        )


@dataclasses.dataclass(frozen=True)
class DatasetFacts:
    """What the model and the schedule need to know of a data set."""

    num_train: int
    num_eval: int
    num_classes: int
    class_names: tuple[str, ...]


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
    The copies of a repeated example stand next to each other, so mostly in one global batch.

    An image that cannot be decoded is named in the log and its place filled by the next example of
    the order; each process or worker stops at more than `max_bad_fraction` of the split.

    Returns:
      An iterator of {"image": uint8 [local_b, s, s, c], "label": int32 [local_b]}.
    Raises:
      ConfigError: `batch_size` does not divide, a number is negative, or the split does not exist.
      DataError: see `open_dataset`; from the iterator: too many images cannot be decoded.
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
    dataset = dataset.map(sources.Opened(config.form, whole=config.augment in CROPS))
    if config.repeats > 1:
        dataset = sources.Repeated(dataset, config.repeats, len(source))
    bad = sources.BadImages(source.name, len(source), config.max_bad_fraction)
    example = sources.TrainExample(config.augment, config.image_size, bad)
    dataset = sources.Following(dataset).random_map(example, seed=draw_seed)
    dataset = sources.ProcessRows(dataset, batch_size, local_size, process_index)
    # A slice, not the iterator's state: that is tied to the number of workers.
    return BatchStream(_iterate(dataset[start_step * local_size :], local_size, config), bad)


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
      DataError: see `open_dataset`; from the iterator: an image cannot be decoded.
    """
    local_size = _local_size(batch_size, process_index, process_count)
    where = ("eval_split", config.eval_split) if split is None else ("split", split)
    source = _source(config, *where)
    examples = sources.EvalExamples(source, config.form, batch_size)
    dataset = grain.MapDataset.source(examples)
    dataset = sources.ProcessRows(dataset, batch_size, local_size, process_index)
    return BatchStream(_iterate(dataset, local_size, config))


def _iterate(
    examples: grain.MapDataset, local_size: int, config: DataConfig
) -> grain.DatasetIterator:
    """Batches of examples, read ahead by as many as `prefetch_batches` and `prefetch_mib` allow."""
    image_bytes = config.image_size**2 * config.channels
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


def _source(config: DataConfig, field: str, split: str) -> sources.Encoded | sources.Cached:
    builder = open_builder(config.name, config.data_dir, config.source_dir)
    num_examples(builder, split, field)  # checks the split
    path = str(builder.data_path)
    if not config.in_memory:
        return sources.Encoded(path, split)
    whole = field == "train_split" and config.augment in CROPS
    return sources.cached(path, split, config.form, whole)
