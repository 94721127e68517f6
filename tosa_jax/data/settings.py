"""`DataConfig`: which data set is read, and how its images become batches."""

import dataclasses
import os

from tosa_jax.data.decoding import INTERPOLATIONS, RESIZES, Preprocess
from tosa_jax.errors import ConfigError, nearest


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which data set is read, and how its images become batches. Wrong values raise ConfigError."""

    name: str  # of TFDS ("imagenet2012", "set/config") or this project, or any name for IDX files
    # Where prepared sets are stored; by default where TFDS looks.
    data_dir: str = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    source_dir: str = ""  # the raw files that this project prepares the set from
    train_split: str = "train"
    eval_split: str = "test"
    # Pixels: the side of a square, or (height, width). For a depth set this is the size of training
    # crops; its evaluation images keep the size they are stored with.
    image_size: int | tuple[int, int]
    channels: int  # 1 or 3: grey images are repeated, colours become luma
    augment: str = "none"  # of `ExampleKind.augmentations`: the choice depends on the kind of set
    depth_scale: float = 0.0  # units in a metre of depth maps stored as PNG files, else 0
    depth_box: tuple[int, ...] = ()  # (top, bottom, left, right), see `DepthAugment`; (): all
    repeats: int = 1  # copies of each example in a row, each augmented anew; DeiT uses 3
    # How whole images get `image_size`: "squeeze" is a bilinear resize that ignores the aspect
    # ratio. "crop" is DeiT's evaluation: resized to a short side of image_size / eval_crop_pct, then
    # the centre. Augmentations that crop do not use it.
    eval_resize: str = "squeeze"
    eval_crop_pct: float = 0.875
    eval_interpolation: str = "bicubic"  # or "bilinear": of "crop"
    exif_rotate: bool = False  # turn images upright by EXIF; published ImageNet results did not
    max_bad_fraction: float = 0.0  # share of a split's images that training may skip as undecodable
    in_memory: bool = False  # decode the set once and keep it as uint8: for small sets
    # Who reads and augments: "threads:N" in this process ("threads:0": the thread that takes the
    # batches), or "processes:N" with one thread each. All give the same batches.
    workers: str = "threads:2"
    prefetch_batches: int = 4  # most batches that wait, finished
    prefetch_mib: int = 512  # most memory that they take; a worker process always has one batch

    def __post_init__(self) -> None:
        # Imported here because example kinds are defined in terms of this class.
        from tosa_jax.data.kinds import EXAMPLE_KINDS

        augmentations = [name for kind in EXAMPLE_KINDS for name in kind.augmentations]
        choices = {
            "augment": dict.fromkeys(augmentations),
            "eval_resize": RESIZES,
            "eval_interpolation": INTERPOLATIONS,
        }
        for field, known in choices.items():
            if (value := getattr(self, field)) not in known:
                raise ConfigError(f"{field}={value!r} is unknown{nearest(value, known)}")
        if self.channels not in (1, 3):
            use = 1 if self.channels < 2 else 3
            raise ConfigError(f"channels={self.channels} must be 1 or 3: use {use}")
        if not 0 < self.eval_crop_pct <= 1:
            raise ConfigError(f"eval_crop_pct={self.eval_crop_pct} must be in (0, 1]")
        if not 0 <= self.max_bad_fraction < 1:
            raise ConfigError(f"max_bad_fraction={self.max_bad_fraction} must be in [0, 1)")
        if min(self.size) < 1:
            raise ConfigError(f"image_size={self.image_size} must be at least 1")
        for field, lowest in {"repeats": 1, "prefetch_mib": 1, "prefetch_batches": 0}.items():
            if getattr(self, field) < lowest:
                raise ConfigError(f"{field}={getattr(self, field)} must be at least {lowest}")
        self.readers  # noqa: B018  # raises if `workers` is wrong
        for kind in EXAMPLE_KINDS:
            kind.check_settings(self)

    @property
    def readers(self) -> tuple[str, int]:
        """`workers` as ("threads" or "processes", their number). Raises ConfigError if it is neither."""
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
        """`image_size` as height and width, pixels."""
        if isinstance(self.image_size, int):
            return self.image_size, self.image_size
        return self.image_size

    @property
    def preprocess(self) -> Preprocess:
        """How whole images of a classification set become `image_size`.

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
            interpolation=self.eval_interpolation,
            exif_rotate=self.exif_rotate,
        )
