"""The output of the predict command: one writer class a task, which prints results and writes files."""

import argparse
import dataclasses
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from tosa_jax.data.decoding import BadImageError
from tosa_jax.data.depth.maps import depth_of_png
from tosa_jax.errors import ConfigError, DataError
from tosa_jax.inference.predictor import Prediction, Predictor
from tosa_jax.reporting.figures import colour_map, save_depth_png, write_png
from tosa_jax.reporting.token_pictures import draw_depth, draw_tokens

Record = dict[str, Any]
"""The result of one image, as JSON values."""


class PredictionWriter:
    """Writes the results of one call of the predict command.

    predictor  the model.
    args       the parsed command line.
    paths      the image files.
    foreign    flags that only other tasks have.

    Raises ConfigError for flags that the model does not support, DataError if an output folder cannot be made.
    """

    foreign: ClassVar[tuple[str, ...]]

    def __init__(
        self, predictor: Predictor, args: argparse.Namespace, paths: Sequence[Path]
    ) -> None:
        self.predictor, self.args = predictor, args
        self._taken: set[Path] = set()
        task = predictor.task
        for flag in self.foreign:
            if getattr(args, flag) is not None:
                raise ConfigError(
                    f"--{flag} is not for this model, whose task is {predictor.config.task}: leave it out"
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
        raise NotImplementedError

    def lines(self, record: Record) -> list[str]:
        """The lines to print for a record, without the image's name."""
        raise NotImplementedError

    def _free(self, path: Path) -> Path:
        """`path`, with a number appended to its stem if another image of this command already has it."""
        numbered = (path.with_stem(f"{path.stem}-{i}") for i in count(2))
        while path in self._taken:
            path = next(numbered)
        self._taken.add(path)
        return path


class ClassWriter(PredictionWriter):
    """Writes the classes of highest probability, and figures of the selections with their scores."""

    foreign = ("depth_dir", "truth", "depth_scale")

    def record(self, path: Path, image: np.ndarray, prediction: Prediction) -> Record:
        guesses = self.predictor.top(prediction, self.args.top or 5)[0]
        top = [{"class": g.label, "name": g.name, "probability": g.probability} for g in guesses]
        record = {"image": str(path), "top": top}
        if self.args.show_tokens:
            target = self._free(self.args.show_tokens / f"{path.stem}.png")
            figure = draw_tokens(
                self.predictor.config,
                image[None],
                prediction.selected,
                scores=prediction.scores,
                labels=[f"{guesses[0].name}, {guesses[0].probability:.1%}"],
            )
            write_png(target, figure)
            record["tokens"] = str(target)
        return record

    def lines(self, record: Record) -> list[str]:
        width = max(len(guess["name"]) for guess in record["top"])
        return [f"  {g['name']:{width}}  {g['probability']:6.1%}" for g in record["top"]]


class DepthWriter(PredictionWriter):
    """Writes the range of depth, its error if there is truth, depth maps as 16-bit PNG and in colours, and figures."""

    foreign = ("top",)

    def __init__(
        self, predictor: Predictor, args: argparse.Namespace, paths: Sequence[Path]
    ) -> None:
        super().__init__(predictor, args, paths)
        self._errors = jax.jit(predictor.task.errors)

    def check(self, paths: Sequence[Path]) -> None:
        missing = [path for path in paths if self.args.truth and not self._truth_of(path).is_file()]
        if missing:
            raise DataError(
                f"--truth={self.args.truth} has no {missing[0].stem}.png for {missing[0]} ({len(missing)} of "
                f"{len(paths)} images have none): name the images that have one"
            )

    def record(self, path: Path, image: np.ndarray, prediction: Prediction) -> Record:
        depth, truth = prediction.depth, self._read_truth(path, image)
        spread = {name: float(getattr(np, name)(depth)) for name in ("min", "median", "max")}
        record: Record = {"image": str(path), "depth": spread}
        if truth is not None:
            record["abs_rel"] = float(self._errors(depth, truth)["abs_rel"][0])
        if folder := self.args.depth_dir:
            target = self._free(folder / f"{path.stem}.png")
            save_depth_png(target, depth[0])
            coloured = self._free(folder / f"{path.stem}-colours.png")
            write_png(coloured, colour_map(depth[0], spread["min"], spread["max"]))
            record |= {"depth_png": str(target), "colours": str(coloured)}
        if self.args.show_tokens:
            target = self._free(self.args.show_tokens / f"{path.stem}.png")
            config = dataclasses.replace(self.predictor.config, image_size=image.shape[:2])
            figure = draw_depth(config, image[None], depth, prediction.selected, truth=truth)
            write_png(target, figure)
            record["tokens"] = str(target)
        return record

    def lines(self, record: Record) -> list[str]:
        spread = record["depth"]
        line = f"  {spread['min']:.2f} to {spread['max']:.2f} m, median {spread['median']:.2f} m"
        line += f", abs_rel {record['abs_rel']:.4f}" if "abs_rel" in record else ""
        written = [record[key] for key in ("depth_png", "colours", "tokens") if key in record]
        return [line, *(f"  {name}" for name in written)]

    def _truth_of(self, path: Path) -> Path:
        return self.args.truth / f"{path.stem}.png"

    def _read_truth(self, path: Path, image: np.ndarray) -> np.ndarray | None:
        """The true depth in metres, float32 [1, height, width]; None without --truth."""
        if not self.args.truth:
            return None
        file = self._truth_of(path)
        truth = depth_of_png(file.read_bytes(), self.args.depth_scale or 1000.0)
        if truth.shape != image.shape[:2]:
            (rows, columns), (height, width) = truth.shape, image.shape[:2]
            raise BadImageError(f"{file} is {rows}x{columns}, the image {height}x{width}")
        if not self.predictor.task.scored(truth[None]).any():
            raise BadImageError(f"no pixel of {file} has a depth that is scored")
        return truth[None]


PREDICTION_WRITERS: dict[str, type[PredictionWriter]] = {
    "classification": ClassWriter,
    "depth": DepthWriter,
}
"""Writer class of each task."""


def _make_folder(flag: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"--{flag}={folder} cannot be made ({error.strerror})") from error
