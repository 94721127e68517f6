"""Which images, in which form, read how: `DataConfig`, and what it makes of a set's examples."""

import dataclasses
import math

import grain
import tensorflow_datasets as tfds

from tosa_jax.data import sources
from tosa_jax.data.builders import kind_of, nearest, picture_size
from tosa_jax.data.decoding import RESIZES, Preprocess
from tosa_jax.data.depth_maps import DepthMaps
from tosa_jax.data.depth_transforms import DEPTH_AUGMENTATIONS, DepthAugment
from tosa_jax.data.labelled import LabelledImages
from tosa_jax.data.transforms import AUGMENTATIONS, CROPS
from tosa_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, in which form, read how. Wrong values raise ConfigError when it is made."""

    name: str  # TFDS's ("imagenet2012", "set/config"), one of ours, or an IDX set with source_dir
    data_dir: str = "~/tensorflow_datasets"
    source_dir: str = ""  # raw files that the set is prepared from, when it is one of ours
    train_split: str = "train"
    eval_split: str = "test"
    # Pixels: a square's side, or height and width. Of a depth set this is the training crop; its
    # evaluation images keep their own size.
    image_size: int | tuple[int, int]
    channels: int  # 1 or 3; grey is repeated, colour becomes luma
    augment: str = "none"  # a key of AUGMENTATIONS, for a depth set of DEPTH_AUGMENTATIONS
    depth_scale: float = 0.0  # units of a depth PNG in a metre, for a set of such files
    depth_box: tuple[int, ...] = ()  # (top, bottom, left, right) that training trusts: DepthAugment
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
        augmentations = AUGMENTATIONS | DEPTH_AUGMENTATIONS
        choices = {"augment": augmentations, "eval_resize": RESIZES}
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
        if min(self.size) < 1:
            raise ConfigError(f"image_size={self.image_size} must be at least 1")
        if not (math.isfinite(self.depth_scale) and self.depth_scale >= 0):
            raise ConfigError(f"depth_scale={self.depth_scale} must be 0 or more")
        if self.depth_box:
            _check_box(self.depth_box)
        lowest_values = {"repeats": 1, "prefetch_mib": 1}
        lowest_values |= {"prefetch_batches": 0}
        for field, lowest in lowest_values.items():
            if getattr(self, field) < lowest:
                raise ConfigError(f"{field}={getattr(self, field)} must be at least {lowest}")
        self.readers  # noqa: B018  # its own check

    @property
    def readers(self) -> tuple[str, int]:
        """`workers` as ("threads" or "processes", how many). Raises ConfigError: it is of another form."""
        kind, _, count = self.workers.partition(":")
        lowest = {"threads": 0, "processes": 1}
        if kind in lowest and count.isdecimal() and int(count) >= lowest[kind]:
            return kind, int(count)
        raise ConfigError(
            f"workers={self.workers!r} must be 'threads:N', N from 0, or 'processes:N', N from 1: "
            "for example 'threads:8'"
        )

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of training images."""
        square = isinstance(self.image_size, int)
        return (self.image_size, self.image_size) if square else self.image_size

    @property
    def form(self) -> Preprocess:
        """The form of a classification set's images that are not cropped by an augmentation.

        Raises:
          ConfigError: `image_size` is no square.
        """
        height, width = self.size
        if height != width:
            raise ConfigError(
                f"image_size={self.image_size}: images of a classification set become squares, "
                f"for example {min(height, width)}"
            )
        return Preprocess(
            image_size=height,
            channels=self.channels,
            resize=self.eval_resize,
            crop_pct=self.eval_crop_pct,
            exif_rotate=self.exif_rotate,
        )


def _check_box(box: tuple[int, ...]) -> None:
    if len(box) != 4 or not (0 <= box[0] < box[1] and 0 <= box[2] < box[3]):
        raise ConfigError(
            f"depth_box={box} must be four pixel positions, top < bottom and left < right, for "
            "example (45, 472, 43, 608)"
        )


def example_kind(
    config: DataConfig, builder: tfds.core.DatasetBuilder, split: str, *, train: bool
) -> sources.ExampleKind:
    """How the records of a split become examples: `LabelledImages` or `DepthMaps`, as the set has it.

    Raises:
      ConfigError: the augmentation is for sets of the other kind; `image_size` does not suit the
        set; its depth maps are PNG files and `depth_scale` is missing, or the reverse.
    """
    depth = kind_of(builder) == "depth"
    known = DEPTH_AUGMENTATIONS if depth else AUGMENTATIONS
    if config.augment not in known:
        raise ConfigError(
            f"config.data.augment={config.augment!r} is not for a {kind_of(builder)} set such as "
            f"{config.name!r}{nearest(config.augment, known)}"
        )
    if not depth:
        return LabelledImages(config.form, train and config.augment in CROPS)
    files = isinstance(builder.info.features["depth"], tfds.features.Image)
    if files and not config.depth_scale:
        raise ConfigError(
            f"config.data.depth_scale is missing: the depth maps of {config.name!r} are 16-bit PNG "
            "files; set it to their units in a metre (NYU Depth V2 1000, KITTI 256)"
        )
    if config.depth_scale and not files:
        raise ConfigError(
            f"config.data.depth_scale={config.depth_scale}, but {config.name!r} has its depth in "
            "metres: set it to 0"
        )
    size = picture_size(builder, split)
    top, bottom, left, right = config.depth_box or (0, size[0], 0, size[1])
    largest = size if config.size == size else (bottom - top, right - left)
    if any(have < want for have, want in zip(largest, config.size, strict=True)):
        raise ConfigError(
            f"config.model.image_size={config.size}: the images of {config.name!r} have only "
            f"{largest[0]}x{largest[1]} pixels"
            f"{' within config.data.depth_box' if largest != size else ''}; set it to at most {largest}"
        )
    return DepthMaps(config.channels, config.depth_scale, size)


def augmentation(
    config: DataConfig, kind: sources.ExampleKind
) -> grain.transforms.RandomMap | None:
    """What `config.augment` makes of training examples of a kind; None: nothing."""
    if kind.name == "depth":
        return DepthAugment(config.size, config.augment, config.depth_box)
    make = AUGMENTATIONS[config.augment]
    if config.augment in CROPS:
        return make(config.form.image_size)
    return make and make()
