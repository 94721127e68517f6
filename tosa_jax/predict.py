"""Classify images or predict their depth with a trained model, and show which tokens it selected.

    python -m tosa_jax.predict --workdir=runs/digits IMAGE ...              the model of a run
    python -m tosa_jax.predict --weights=FOLDER IMAGE ...                   of transformers or timm; a file of --save
    python -m tosa_jax.predict --model=NAME --weights=FILE [--selectors=FILE] IMAGE ...     weights without a statement
    python -m tosa_jax.predict --workdir=runs/rooms --depth_dir=DIR [--truth=DIR] IMAGE ...     a depth model
    python -m tosa_jax.predict --weights=FOLDER --export=DIR [--batch=N] [--platforms=cpu,tpu]  programs for elsewhere

IMAGE is a file, a folder or a glob. `--keep_rate=.3` runs the same weights at another keep rate; with commas, one a
selection (`--keep_rate=.7,.5,.3`). `--show_tokens=DIR` writes one PNG an image. For a classifier it shows the image,
each selection with its bypassed patches faded, and its score map; for a depth model the image, the depth, with
`--truth` also the true depth and the error, and each selection. `--save=FILE` writes the model for `--weights`,
`--export=DIR` programs that run without this package (docs/export.md). Exit status: 0 done, 1 some files could not be
read as images, 2 bad input.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import rich.console
import rich.progress

from tosa_jax.cli import flags
from tosa_jax.cli.command import configure_jax, run_command
from tosa_jax.data import class_names
from tosa_jax.data.decoding import BadImageError
from tosa_jax.data.image_files import find_images, read_ahead
from tosa_jax.distributed.messages import say
from tosa_jax.errors import ConfigError, NonFiniteOutputError
from tosa_jax.inference.export import PLATFORMS, export
from tosa_jax.inference.predictor import Predictor, load
from tosa_jax.tasks import TASKS
from tosa_jax.tasks.prediction_writer import PredictionWriter, Record
from tosa_jax.tasks.predictions import check_finite

READER_GONE = 128 + 13
"""Exit status where nobody reads the results any more, as a shell's for SIGPIPE."""

_BAR_FROM = 20
"""From this number of images on, a progress bar is shown."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (without the program's name); returns the exit status."""
    return run_command(lambda: _predict(parse_arguments(argv)))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses and checks the arguments. Raises ConfigError."""
    parser = flags.ArgumentParser(
        prog="python -m tosa_jax.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("images", nargs="*", metavar="IMAGE", help="files, folders or globs")
    add("--workdir", type=Path, help="work directory of a run")
    add("--model", help="name of a variant, as in timm, where --weights state no network")
    add("--weights", help="a file or folder of weights, hf:owner/name, or a file of --save")
    add("--task", choices=list(TASKS), help="task of --model (default classification)")
    add("--selectors", help="file of selectors, for --weights")
    add("--classes", type=Path, help="text file with one class name a line, for --weights")
    add(
        "--keep_rate",
        type=shares,
        help="share of patches to select, in (0, 1]: one, or one a selection",
    )
    add("--plan", metavar="FILE.json", help="tokens of each layer, as tosa_jax.budget found them")
    add("--top", type=int, help="number of classes to print (default 5)")
    add("--json", action="store_true", help="JSON Lines instead of text")
    add("--show_tokens", type=Path, metavar="DIR", help="write figures of the selections here")
    add(
        "--depth_dir",
        type=Path,
        metavar="DIR",
        help="write depth maps here: 16-bit PNG in mm, and colours",
    )
    add(
        "--truth",
        type=Path,
        metavar="DIR",
        help="true depth: 16-bit PNG files named like the images",
    )
    add("--depth_scale", type=float, help="units of --truth in one metre (default 1000)")
    add(
        "--image_size",
        type=sides,
        help="pixels, where not the model's own: one side, or height and width with a comma",
    )
    add(
        "--program_sizes",
        type=program_sizes,
        metavar="HxW,...",
        help="a depth model's pictures run at the one of these sizes that suits each best",
    )
    _add_writing(parser)
    add("--exif", action="store_true", help="turn images upright as their EXIF orientation says")
    add("--batch_size", type=int, default=16)
    add("--threads", type=int, default=2, help="threads that decode images")
    args, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        raise ConfigError(f"command line: unexpected argument {unknown[0]!r}; see --help")
    _check(args)
    return args


def _add_writing(parser: argparse.ArgumentParser) -> None:
    """The arguments by which the model is written for later or for elsewhere."""
    add = parser.add_argument
    add(
        "--save",
        type=Path,
        metavar="FILE",
        help="write the model and its preprocessing to one file, for --weights",
    )
    add(
        "--export",
        type=Path,
        metavar="DIR",
        help="write programs (StableHLO) that run without this package to a new folder; "
        "DIR.safetensors means --save",
    )
    add("--batch", type=int, help="images that a program of --export takes (default: any number)")
    add("--platforms", type=words, help="of --export (default cpu,cuda,tpu)")
    add("--tokens", action="store_true", help="programs of --export return all tokens too")


def shares(text: str) -> float | tuple[float, ...]:
    """Parses "0.5", or "0.7,0.5" with one keep rate a selection."""
    values = tuple(map(float, text.split(",")))
    return values[0] if len(values) == 1 else values


def sides(text: str) -> int | tuple[int, int]:
    """Parses "224", or "480,640" of height and width."""
    return flags.image_size([int(side) for side in text.split(",")])


def program_sizes(text: str) -> list[int | tuple[int, ...]]:
    """Parses "480x640,518": heights and widths, or the side of a square."""
    sizes = [tuple(int(side) for side in size.split("x")) for size in text.split(",")]
    return [size[0] if len(size) == 1 else size for size in sizes]


def words(text: str) -> tuple[str, ...]:
    """Parses "cpu,tpu"."""
    return tuple(text.split(","))


def _check(args: argparse.Namespace) -> None:
    if args.export and args.export.suffix == ".safetensors":  # as it was before there was --save
        args.save, args.export = args.export, None
    if (args.workdir is None) == (args.weights is None):
        raise ConfigError(
            "command line: give --workdir=DIR of a run, or --weights=FILE with --model=NAME"
        )
    for flag in ("model", "selectors", "classes"):
        if getattr(args, flag) and not args.weights:
            raise ConfigError(f"command line: --{flag} goes with --weights=FILE")
    if args.task and not args.model:
        raise ConfigError("command line: --task goes with --model=NAME")
    for flag in ("batch", "platforms", "tokens"):
        if getattr(args, flag) and not args.export:
            raise ConfigError(f"command line: --{flag} goes with --export=DIR")
    for flag in ("top", "batch", "batch_size", "threads"):
        if (value := getattr(args, flag)) is not None and value < 1:
            raise ConfigError(f"command line: --{flag}={value} must be at least 1")
    if args.depth_scale is not None and not args.truth:
        raise ConfigError("command line: --depth_scale goes with --truth=DIR")
    if args.depth_scale is not None and not 0 < args.depth_scale < float("inf"):
        raise ConfigError(f"command line: --depth_scale={args.depth_scale} must be above 0")
    if args.program_sizes and args.show_tokens:
        raise ConfigError(
            "command line: --show_tokens shows the tokens of pictures at their own size: leave out --program_sizes"
        )
    if args.plan and args.keep_rate is not None:
        raise ConfigError("command line: --plan has the keep rates: leave out --keep_rate")
    if not args.images and not args.export and not args.save:
        raise ConfigError("command line: name at least one image, folder or glob")


def make_predictor(args: argparse.Namespace, num_images: int) -> Predictor:
    """Loads the model that the arguments name. Its batch size is `--batch_size`, or the number of images if less."""
    common: dict[str, Any] = {
        "keep_rate": args.keep_rate,
        "batch_sizes": (min(args.batch_size, max(num_images, 1)),),
        "on_message": _say,
    }
    if args.plan:
        common["plan"] = args.plan
    for name in ("image_size", "program_sizes"):
        if value := getattr(args, name):
            common[name] = value
    if args.workdir:
        return Predictor.from_workdir(args.workdir, **common)
    names = class_names.read_names(args.classes) if args.classes else None
    if not args.model:
        return load(args.weights, selectors=args.selectors, class_names=names, **common)
    return Predictor.from_pretrained(
        args.model,
        args.weights,
        selectors=args.selectors,
        class_names=names,
        task=args.task or "classification",
        **common,
    )


def _predict(args: argparse.Namespace) -> int:
    paths = find_images(args.images, on_message=_say)
    configure_jax()
    predictor = make_predictor(args, len(paths))
    if args.exif:
        predictor.form = dataclasses.replace(predictor.form, exif_rotate=True)
    writer = predictor.task.prediction_writer(predictor, args, paths)
    _write(predictor, args)
    failed = 0
    with _bar(len(paths)) as advance:
        ahead = 2 * predictor.batch_sizes[-1]
        images = read_ahead(paths, predictor.form.decode, threads=args.threads, ahead=ahead)
        while chunk := list(islice(images, predictor.batch_sizes[-1])):
            for record in _records(predictor, chunk, writer):
                failed += "error" in record
                if not show(record, args.json, writer):
                    return READER_GONE
                advance()
    return 1 if failed else 0


def _write(predictor: Predictor, args: argparse.Namespace) -> None:
    """What `--save` and `--export` ask for."""
    if args.save:
        predictor.save(args.save)
        _say(f"written: {args.save}")
    if args.export:
        platforms = args.platforms or PLATFORMS
        fields: dict[str, Any] = {"batch": args.batch, "tokens": args.tokens}
        export(predictor, args.export, platforms=platforms, **fields)
        _say(f"written: {args.export}, for {', '.join(platforms)}")


def _say(line: str) -> None:
    say(line)


def _records(predictor: Predictor, chunk: list, writer: PredictionWriter) -> Iterator[Record]:
    """Yields one record for each file of a batch, in order, after its output files are written."""
    rows = iter(predictor.each([image for _, image in chunk if isinstance(image, np.ndarray)]))
    for path, image in chunk:
        if not isinstance(image, np.ndarray):
            yield {"image": str(path), "error": f"cannot be read as an image ({image})"}
            continue
        try:
            prediction = next(rows)
            check_finite(prediction)
            yield writer.record(path, image, prediction)
        except (BadImageError, NonFiniteOutputError) as error:
            yield {"image": str(path), "error": str(error)}


def show(record: Record, as_json: bool, writer: PredictionWriter) -> bool:
    """Prints one image's result to standard output, and errors to standard error.

    Returns whether standard output still takes something: `predict ... | head` closes it.
    """
    if "error" in record:
        _say(f"{record['image']}: {record['error']}")
    if as_json:
        return say(json.dumps(_as_json(record), allow_nan=False), sys.stdout)
    if "error" not in record:
        return say("\n".join([record["image"], *writer.lines(record)]), sys.stdout)
    return True


def _as_json(value: Any) -> Any:
    """JSON's values: it has no NaN and no infinity, for which null stands."""
    if isinstance(value, dict):
        return {name: _as_json(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def _bar(total: int) -> Iterator[Any]:
    """Shows a progress bar for many images on a terminal; yields the function that advances it by one image."""
    console = rich.console.Console(stderr=True)
    hidden = total < _BAR_FROM or not console.is_terminal or console.is_dumb_terminal
    with rich.progress.Progress(
        console=console, disable=hidden, transient=True, redirect_stdout=sys.stdout.isatty()
    ) as bar:
        task = bar.add_task("predict", total=total)
        yield lambda: bar.advance(task)


if __name__ == "__main__":
    sys.exit(main())
