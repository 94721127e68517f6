"""Prepared TFDS sets -> batches. Grain orders, augments, batches and prefetches the examples.

Training data is a function of (seed, step) alone, whatever the number of threads, workers and
processes: random draws are keyed by the index in the global, endless stream of examples.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import re
from typing import Any

import grain
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from tosa_jax.data import sources
from tosa_jax.data.builders import open_builder
from tosa_jax.data.decoding import FORMATS, BadImageError, load, pil_errors
from tosa_jax.data.examples import ExampleKind
from tosa_jax.data.kinds import EXAMPLE_KINDS
from tosa_jax.data.settings import DataConfig
from tosa_jax.data.streams import BatchStream, read_ahead
from tosa_jax.errors import ConfigError, DataError, nearest

SAMPLES = 128
"""Examples of a split that its fingerprint looks at."""


@dataclasses.dataclass(frozen=True)
class DatasetFacts:
    """What the model and the schedule need to know of a data set.

    num_train    examples of the training split.
    num_eval     examples of the evaluation split.
    num_classes  0 for a set without classes.
    class_names  in the order of the labels.
    kind         `ExampleKind.name`: "classification", "label_sets" or "depth".
    fingerprint  of what the two splits hold (`Dataset.fingerprint`), which takes a moment; "": not looked at.
    """

    num_train: int
    num_eval: int
    num_classes: int
    class_names: tuple[str, ...]
    kind: str
    fingerprint: str = ""


class Dataset:
    """A prepared data set, opened with the settings of a `DataConfig`. `open_dataset` makes one.

    config   the settings.
    builder  TFDS's description of the prepared set; by default that which the settings name.
    kind     what its examples are.
    """

    def __init__(self, config: DataConfig, builder: tfds.core.DatasetBuilder | None = None) -> None:
        self.config = config
        self.builder = builder or open_builder(config.name, config.data_dir, config.source_dir)
        self._features: dict[str, Any] = dict(self.builder.info.features.items())  # pyright: ignore
        self.kind = self._kind()

    @functools.cached_property
    def facts(self) -> DatasetFacts:
        """What the model and the schedule need to know.

        Raises:
          ConfigError: `train_split` or `eval_split` does not exist, or a setting does not suit a
            set of this kind.
          DataError: the first image of `eval_split` cannot be read.
        """
        num_train = self.num_examples(self.config.train_split, "train_split")
        num_eval = self.num_examples(self.config.eval_split, "eval_split")
        self.split_kind(self.config.eval_split, train=False)
        names = self.kind.class_names(self._features)
        return DatasetFacts(num_train, num_eval, len(names), names, self.kind.name)

    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that depend on the sizes of both splits and on `SAMPLES` examples of each.

        The examples lie evenly over the split in the set's order, so that one image more or less moves most of them. Of
        a larger split a single image that was exchanged may go unseen. Where the set lies and who prepared it does not
        count; of PNG files the pixels do, because every version of zlib writes other bytes.

        Raises DataError: an example cannot be read.
        """
        digest = hashlib.sha256()
        images = [name for name, x in self._features.items() if isinstance(x, tfds.features.Image)]
        for split in (self.config.train_split, self.config.eval_split):
            records = sources.Records(self.builder, split, images)
            count = len(records)
            digest.update(f"{count},".encode())
            for i in sorted({k * count // SAMPLES for k in range(SAMPLES)}):
                record = records[i]
                for name in ("image", "label", "labels", "depth"):
                    if name in record:
                        digest.update(_content(record[name]))
        return digest.hexdigest()[:12]

    def num_examples(self, split: str, field: str = "split") -> int:
        """Number of examples of a TFDS split, slice or sum of them: "train", "train[:90%]+test".

        Raises:
          ConfigError: there is no such split, or it is empty; the text calls it `field`.
        """
        splits = self.builder.info.splits
        for part in split.split("+"):
            if (base := re.sub(r"\[.*", "", part).strip()) not in splits:
                raise ConfigError(
                    f"{field}={split!r}: {self.builder.info.full_name} has no split {base!r}"
                    f"{nearest(base, splits)}"
                )
        try:
            count = splits[split].num_examples
        except (ValueError, AssertionError) as error:
            raise ConfigError(f"{field}={split!r} is no TFDS split: {error}") from None
        if not count:
            raise ConfigError(f"{field}={split!r}: holds no examples; take a larger part")
        return count

    def image_size(self, split: str) -> tuple[int, int]:
        """Height and width, pixels: of all images if the set fixes them, else of the split's first.

        Raises:
          DataError: the first image cannot be read.
        """
        height, width = self._features["image"].shape[:2]
        if height is not None and width is not None:
            return height, width
        images = {key for key, x in self._features.items() if isinstance(x, tfds.features.Image)}
        try:
            with pil_errors():
                first = sources.Records(self.builder, split, images)[0]
                width, height = Image.open(io.BytesIO(first["image"]), formats=FORMATS).size
        except BadImageError as error:
            raise DataError(
                f"{self.builder.data_path}: the first image of {split} cannot be read: {error}"
            ) from None
        return height, width

    def split_kind(self, split: str, *, train: bool) -> ExampleKind:
        """How records of a split become examples. Raises ConfigError if a setting does not suit the set."""
        if self.config.augment not in self.kind.augmentations:
            raise ConfigError(
                f"config.data.augment={self.config.augment!r} is not for a {self.kind.name} set "
                f"such as {self.config.name!r}"
                f"{nearest(self.config.augment, self.kind.augmentations)}"
            )
        size = self.image_size(split)
        return self.kind.of_split(self.config, self._features, size, train=train)

    def train_batches(
        self,
        *,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        process_index: int = 0,
        process_count: int = 1,
    ) -> BatchStream:
        """The endless stream of this process's rows of each global batch, from step `start_step` on.

        Every epoch has its own order; a batch may reach from one epoch into the next. Process p
        gets rows [p * b, (p + 1) * b) of the `batch_size` rows, where b = batch_size /
        process_count. Copies of a repeated example are neighbours, so most are in one global batch.

        An image that cannot be decoded is logged, and the next example of the order takes its
        place. A process or worker stops when it has met more than `max_bad_fraction` of the split.

        Returns:
          An iterator of {"image": uint8 [b, height, width, c]} and, by the kind of the set,
          "label": int32 [b], or "labels": uint8 [b, classes], 1 for those that an image has, or "depth":
          float32 [b, height, width] in metres, 0 where nothing was measured (in some crops everywhere).
        Raises:
          ConfigError: `batch_size` is no multiple of the processes, a number is negative, the split
            does not exist, or a setting does not suit a set of this kind.
          DataError: from the iterator: too many images cannot be decoded.
        """
        config = self.config
        local_size = _local_size(batch_size, process_index, process_count)
        if seed < 0 or start_step < 0:
            raise ConfigError(f"seed={seed} and start_step={start_step} must be 0 or more")
        source = self._source(config.train_split, "train_split", train=True)
        # repeat() before random_map(), so that the draws differ from epoch to epoch.
        dataset, draw_seed = _endless(source, seed)
        dataset = dataset.map(sources.Opened(source.kind))
        if config.repeats > 1:
            dataset = sources.Repeated(dataset, config.repeats, len(source))
        bad = sources.BadImages(source.name, len(source), config.max_bad_fraction)
        example = sources.TrainExample(self.kind.augmentation(config), bad)
        dataset = sources.Following(dataset).random_map(example, seed=draw_seed)
        dataset = sources.ProcessRows(dataset, batch_size, local_size, process_index)
        # A slice, not a saved state of the iterator: that would fix the number of workers.
        dataset = dataset[start_step * local_size :]
        size = self.kind.example_bytes(config)
        return BatchStream(read_ahead(dataset, local_size, size, config), bad)

    def batch_examples(self, *, batch_size: int, seed: int, step: int) -> list[str]:
        """The examples of a global training batch, by index in the split and name, in the order of the batch.

        A bad image that was skipped is named, not the one that took its place.
        """
        source = self._source(self.config.train_split, "train_split", train=True)
        dataset, _ = _endless(source, seed)
        if self.config.repeats > 1:
            dataset = sources.Repeated(dataset, self.config.repeats, len(source))
        places = range(step * batch_size, (step + 1) * batch_size)
        records: Any = dataset  # pyright takes its elements for None
        return [sources.called(records[i]) for i in places]

    def eval_batches(
        self,
        *,
        batch_size: int,
        split: str | None = None,
        process_index: int = 0,
        process_count: int = 1,
    ) -> BatchStream:
        """Each example of a split (default: `eval_split`) once, in the set's order, not augmented.

        Returns:
          An iterator of batches as of `train_batches`, with "mask": float32 [b], 1 for an example
          and 0 for the blank ones that fill the last batch. Depth sets keep their stored size.
        Raises:
          ConfigError: `batch_size` is no multiple of the processes, the split does not exist, or a
            setting does not suit a set of this kind.
          DataError: from the iterator: an image cannot be decoded.
        """
        local_size = _local_size(batch_size, process_index, process_count)
        field, split = ("eval_split", self.config.eval_split) if split is None else ("split", split)
        source = self._source(split, field, train=False)
        dataset = grain.MapDataset.source(sources.EvalExamples(source, batch_size))
        dataset = sources.ProcessRows(dataset, batch_size, local_size, process_index)
        size = sum(np.asarray(value).nbytes for value in source.kind.blank().values())
        return BatchStream(read_ahead(dataset, local_size, size, self.config))

    def encoded_images(self, split: str, count: int) -> list[bytes]:
        """The first `count` image files of a split, not decoded. Raises ConfigError: there is no such split."""
        self.num_examples(split)
        source = sources.Encoded(self.builder, split, self.split_kind(split, train=True))
        return [source[i]["image"] for i in range(min(count, len(source)))]

    def _kind(self) -> type[ExampleKind]:
        if isinstance(self._features.get("image"), tfds.features.Image):
            for kind in EXAMPLE_KINDS:
                if kind.matches(self._features):
                    return kind
        raise DataError(
            f"{self.builder.data_path}: no feature 'image' with a 'label' of kind ClassLabel, "
            f"'labels' (a Sequence of them) or a 'depth' map beside it (it has {', '.join(sorted(self._features))}); "
            "name a set of classes, of labels or of depth"
        )

    def _source(self, split: str, field: str, *, train: bool) -> sources.Encoded | sources.Cached:
        self.num_examples(split, field)  # checks the split
        make = sources.cached if self.config.in_memory else sources.Encoded
        return make(self.builder, split, self.split_kind(split, train=train))


# Cached: a run stays with the files that it began with.
@functools.lru_cache(maxsize=16)
def open_dataset(config: DataConfig) -> Dataset:
    """Opens a set, once in a process; one that this project makes itself is prepared first.

    Raises:
      ConfigError: there is no such set.
      DataError: the set is not prepared, exists only as TFRecord, is of no known kind, or one of
        its files is missing or broken.
    """
    return Dataset(config)


def _endless(source: Any, seed: int) -> tuple[grain.MapDataset, int]:
    """The endless stream of shuffled epochs of records, and the seed of the draws that follow."""
    # Explicit seeds: Grain's defaults depend on the position in the pipeline, so that another
    # augmentation would change the order of the examples.
    order_seed, draw_seed = np.random.SeedSequence(seed).generate_state(2).tolist()
    return grain.MapDataset.source(source).shuffle(seed=order_seed).repeat(None), draw_seed


def _content(value: Any) -> bytes:
    """What is hashed of a feature: the pixels of a PNG file, other bytes as they are, arrays and numbers."""
    if isinstance(value, bytes) and value.startswith(b"\x89PNG"):
        with contextlib.suppress(BadImageError):
            return np.asarray(load(value)).tobytes()
    return value if isinstance(value, bytes) else np.asarray(value).tobytes()


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
