"""What `python -m tosa_jax.predict` prints and writes for depth."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from tosa_jax.data.decoding import BadImageError
from tosa_jax.errors import ConfigError, DataError
from tosa_jax.reporting.figures import colour_map, save_depth_png, write_png
from tosa_jax.reporting.token_pictures import draw_depth
from tosa_jax.tasks.depth.config import DepthConfig
from tosa_jax.tasks.prediction_writer import PredictionWriter, Record, RunningModel
from tosa_jax.tasks.predictions import Prediction


class DepthWriter(PredictionWriter):
    """Writes the range of depth, its error if there is truth, depth maps as 16-bit PNG and in colours, and figures.

    Relative inverse depth has no unit, so its PNG has 65535 at the largest value of the image.
    """

    foreign = ("top",)

    def __init__(
        self, predictor: RunningModel, args: argparse.Namespace, paths: Sequence[Path]
    ) -> None:
        super().__init__(predictor, args, paths)
        self._errors = jax.jit(predictor.task.errors)

    @property
    def _metric(self) -> bool:
        config = self.predictor.config
        return isinstance(config, DepthConfig) and config.depth_estimation_type == "metric"

    def check(self, paths: Sequence[Path]) -> None:
        if self.args.truth and not self._metric:
            raise ConfigError(
                "command line: --truth is in metres, and this model predicts relative inverse depth: leave it out"
            )
        missing = [path for path in paths if self.args.truth and not self._truth_of(path).is_file()]
        if missing:
            raise DataError(
                f"--truth={self.args.truth} has no {missing[0].stem}.png for {missing[0]} ({len(missing)} of "
                f"{len(paths)} images have none): name the images that have one"
            )

    def record(self, path: Path, image: np.ndarray, prediction: Prediction) -> Record:
        depth, truth = prediction.predictions["depth"], self._read_truth(path, image)
        spread = {name: float(getattr(np, name)(depth)) for name in ("min", "median", "max")}
        record: Record = {"image": str(path), "depth": spread}
        if truth is not None:
            record["abs_rel"] = float(self._errors(depth, truth)["abs_rel"][0])
        if folder := self.args.depth_dir:
            target = self._free(folder / f"{path.stem}.png")
            save_depth_png(
                target, depth[0], 1000 if self._metric else 65535 / max(spread["max"], 1e-9)
            )
            coloured = self._free(folder / f"{path.stem}-colours.png")
            write_png(coloured, colour_map(depth[0], spread["min"], spread["max"]))
            record |= {"depth_png": str(target), "colours": str(coloured)}
        if self.args.show_tokens:
            target = self._free(self.args.show_tokens / f"{path.stem}.png")
            config = dataclasses.replace(self.predictor.config, image_size=image.shape[:2])
            unit = " m" if self._metric else ""
            figure = draw_depth(
                config, image[None], depth, prediction.selected, truth=truth, unit=unit
            )
            write_png(target, figure)
            record["tokens"] = str(target)
        return record

    def lines(self, record: Record) -> list[str]:
        spread = record["depth"]
        what, unit = ("", " m") if self._metric else ("relative inverse depth ", "")
        line = f"  {what}{spread['min']:.2f} to {spread['max']:.2f}{unit}, median {spread['median']:.2f}{unit}"
        line += f", abs_rel {record['abs_rel']:.4f}" if "abs_rel" in record else ""
        written = [record[key] for key in ("depth_png", "colours", "tokens") if key in record]
        return [line, *(f"  {name}" for name in written)]

    def _truth_of(self, path: Path) -> Path:
        return self.args.truth / f"{path.stem}.png"

    def _read_truth(self, path: Path, image: np.ndarray) -> np.ndarray | None:
        """The true depth in metres, float32 [1, height, width]; None without --truth."""
        # Here, not above: it brings the data libraries, which the benchmark does without.
        from tosa_jax.data.depth.maps import depth_of_png

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
