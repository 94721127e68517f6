"""What `python -m tosa_jax.predict` prints and writes for an image: the base class of the tasks' writers.

The base class prints the predictions as plain values.
"""

import argparse
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np

from tosa_jax.errors import ConfigError, DataError
from tosa_jax.models.vit_config import ViTConfig
from tosa_jax.tasks.predictions import Guess, Prediction

Record = dict[str, Any]
"""The result of one image, as JSON values."""


@runtime_checkable
class RunningModel(Protocol):
    """The part of `inference.Predictor` that writers use."""

    config: ViTConfig
    task: Any
    task_name: str
    class_names: tuple[str, ...]

    @property
    def num_selections(self) -> int:
        """How many times the model selects tokens."""
        ...

    def top(self, prediction: Prediction, k: int = 5) -> list[list[Guess]]:
        """The likeliest classes of each image."""
        ...


class PredictionWriter:
    """Writes the results of one call of the predict command.

    predictor  the model.
    args       the parsed command line.
    paths      the image files.
    foreign    flags that only other tasks have.

    Raises ConfigError for flags that the model does not support, DataError if an output folder cannot be made.
    """

    foreign: ClassVar[tuple[str, ...]] = ("top", "depth_dir", "truth", "depth_scale")

    def __init__(
        self, predictor: RunningModel, args: argparse.Namespace, paths: Sequence[Path]
    ) -> None:
        self.predictor, self.args = predictor, args
        self._taken: set[Path] = set()
        task = predictor.task
        for flag in self.foreign:
            if getattr(args, flag) is not None:
                raise ConfigError(
                    f"--{flag} is not for this model, whose task is {predictor.task_name}: leave it out"
                )
        if args.show_tokens and not (predictor.num_selections or task.draws_predictions):
            raise ConfigError(
                "--show_tokens: this model selects no tokens; give --keep_rate (and --selectors)"
            )
        self.check(paths)
        for flag in ("show_tokens", "depth_dir"):
            if folder := getattr(args, flag):
                _make_folder(flag, folder)

    def check(self, paths: Sequence[Path]) -> None:
        """Raises UserError if files that belong to the images are missing."""

    def record(self, path: Path, image: np.ndarray, prediction: Prediction) -> Record:
        """Writes the files of one image and returns its record.

        image       uint8 [height, width, c], the model's input.
        prediction  of one row.

        Raises BadImageError if a file that belongs to the image, such as its true depth, cannot be used.
        """
        del image
        return {"image": str(path), **{k: x[0].tolist() for k, x in prediction.predictions.items()}}

    def lines(self, record: Record) -> list[str]:
        """The lines to print for a record, without the image's name."""
        return [f"  {name}: {x}" for name, x in record.items() if name != "image"]

    def _free(self, path: Path) -> Path:
        """`path`, with a number appended to its stem if another image of this command already has it."""
        numbered = (path.with_stem(f"{path.stem}-{i}") for i in count(2))
        while path in self._taken:
            path = next(numbered)
        self._taken.add(path)
        return path


def _make_folder(flag: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"--{flag}={folder} cannot be made ({error.strerror})") from error
