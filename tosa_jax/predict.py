"""Classify images with a trained network, and show which tokens it selected.

    python -m tosa_jax.predict --workdir=runs/digits IMAGE ...              what a run trained
    python -m tosa_jax.predict --weights=FILE IMAGE ...                     one file, from --export
    python -m tosa_jax.predict --model=NAME --weights=FILE [--selectors=FILE] IMAGE ...     released weights

IMAGE is a file, a folder or a glob. `--keep_rate=.3`, or one share a selection (`--keep_rate=.7,.5,.3`), is another
budget for the same weights. `--show_tokens=DIR` writes a PNG an image: the picture, each selection with its bypassed
tokens dimmed, and its score map. Exit status: 0 done, 1 some files were no images, 2 bad input.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import rich.console
import rich.progress

from tosa_jax import command_line
from tosa_jax.data import class_names
from tosa_jax.data.image_files import find_images, read_ahead
from tosa_jax.errors import ConfigError, DataError
from tosa_jax.figures import write_png
from tosa_jax.predictor import Predictor
from tosa_jax.token_pictures import draw_tokens

_BAR_FROM = 20
"""So many images get a progress bar."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (without the program's name); returns the exit status."""
    return command_line.guard(lambda: _predict(parse_arguments(argv)))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments. Raises ConfigError for what is wrong with them."""
    parser = argparse.ArgumentParser(
        prog="python -m tosa_jax.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("images", nargs="*", metavar="IMAGE", help="files, folders or globs")
    add("--workdir", type=Path, help="work directory of a run")
    add("--model", help="variant by timm's name, for --weights")
    add("--weights", help="whatever load_pretrained reads, or one file from --export")
    add("--selectors", help="a file of selectors, for --weights")
    add("--classes", type=Path, help="text file with a class name a line, for --weights")
    add("--keep_rate", type=shares, help="another budget: a share in (0, 1], or one a selection")
    add("--top", type=int, default=5, help="classes to name (default 5)")
    add("--json", action="store_true", help="JSON Lines instead of text")
    add("--show_tokens", type=Path, metavar="DIR", help="write a picture of the selections here")
    add(
        "--export",
        type=Path,
        metavar="FILE",
        help="write network, preprocessing and names to one file",
    )
    add("--batch_size", type=int, default=16)
    add("--threads", type=int, default=2, help="that decode images")
    try:
        args, unknown = parser.parse_known_intermixed_args(argv)
    except argparse.ArgumentError as error:
        raise ConfigError(f"command line: {error}; see --help") from error
    if unknown:
        raise ConfigError(f"command line: unexpected argument {unknown[0]!r}; see --help")
    _check(args)
    return args


def shares(text: str) -> float | tuple[float, ...]:
    """One share, or one a selection with commas between."""
    values = tuple(map(float, text.split(",")))
    return values[0] if len(values) == 1 else values


def _check(args: argparse.Namespace) -> None:
    if (args.workdir is None) == (args.weights is None):
        raise ConfigError(
            "command line: give --workdir=DIR of a run, or --weights=FILE with --model=NAME"
        )
    for flag in ("model", "selectors", "classes"):
        if getattr(args, flag) and not args.weights:
            raise ConfigError(f"command line: --{flag} goes with --weights=FILE")
    for flag in ("selectors", "classes"):
        if getattr(args, flag) and not args.model:
            raise ConfigError(f"command line: --{flag} goes with --model=NAME")
    for flag in ("top", "batch_size", "threads"):
        if getattr(args, flag) < 1:
            raise ConfigError(f"command line: --{flag}={getattr(args, flag)} must be at least 1")
    if not args.images and not args.export:
        raise ConfigError("command line: name at least one image, folder or glob")


def make_predictor(args: argparse.Namespace, num_images: int) -> Predictor:
    """The network that the arguments name, for batches of `--batch_size` or of all the images."""
    common: dict[str, Any] = {
        "keep_rate": args.keep_rate,
        "batch_sizes": (min(args.batch_size, max(num_images, 1)),),
        "on_message": lambda line: print(line, file=sys.stderr),
    }
    if args.workdir:
        return Predictor.from_workdir(args.workdir, **common)
    if not args.model:
        return Predictor.from_weights(args.weights, **common)
    names = class_names.read_names(args.classes) if args.classes else None
    return Predictor.from_pretrained(
        args.model, args.weights, selectors=args.selectors, class_names=names, **common
    )


def _predict(args: argparse.Namespace) -> int:
    paths = find_images(args.images)
    command_line.configure_jax()
    predictor = make_predictor(args, len(paths))
    if args.show_tokens:
        if not predictor.num_selections:
            raise ConfigError(
                "--show_tokens: this network selects no tokens; give --keep_rate (and --selectors)"
            )
        _make_folder(args.show_tokens)
    if args.export:
        predictor.save(args.export)
        print(f"written: {args.export}", file=sys.stderr)
    failed = 0
    with _bar(len(paths)) as advance:
        ahead = 2 * predictor.batch_sizes[-1]
        images = read_ahead(paths, predictor.form.decode, threads=args.threads, ahead=ahead)
        taken: set[Path] = set()
        while chunk := list(islice(images, predictor.batch_sizes[-1])):
            for record in _records(predictor, chunk, args, taken):
                failed += "error" in record
                show(record, args.json)
                advance()
    return 1 if failed else 0


def _records(
    predictor: Predictor, chunk: list, args: argparse.Namespace, taken: set[Path]
) -> Iterator[dict[str, Any]]:
    """A record for each file of a batch, in order; the pictures of its tokens are written on the way."""
    good = [image for _, image in chunk if isinstance(image, np.ndarray)]
    prediction = predictor(np.stack(good)) if good else None
    guesses = iter(predictor.top(prediction, args.top) if good else [])
    row = count()
    for path, image in chunk:
        if not isinstance(image, np.ndarray):
            yield {"image": str(path), "error": f"cannot be read as an image ({image})"}
            continue
        record = {"image": str(path), "top": next(guesses)}
        if args.show_tokens:
            target = _free_name(args.show_tokens / f"{path.stem}.png", taken)
            i = next(row)
            guess = record["top"][0]
            figure = draw_tokens(
                predictor.config,
                image[None],
                [x[i : i + 1] for x in prediction.selected],
                scores=[x[i : i + 1] for x in prediction.scores],
                labels=[f"{guess.name}, {guess.probability:.1%}"],
            )
            write_png(target, figure)
            record["tokens"] = str(target)
        yield record


def show(record: dict[str, Any], as_json: bool) -> None:
    """One image's result on standard output; a failure on standard error too, where JSON would hide it."""
    if "error" in record:
        print(f"{record['image']}: {record['error']}", file=sys.stderr)
    if as_json:
        top = [
            {"class": g.label, "name": g.name, "probability": g.probability}
            for g in record.get("top", ())
        ]
        print(json.dumps(record | ({"top": top} if "top" in record else {})))
    elif "top" in record:
        width = max(len(guess.name) for guess in record["top"])
        lines = [f"  {guess.name:{width}}  {guess.probability:6.1%}" for guess in record["top"]]
        print("\n".join([record["image"], *lines]))


def _free_name(path: Path, taken: set[Path]) -> Path:
    """`path`, or with a number where another image of this command has it."""
    numbered = (path.with_stem(f"{path.stem}-{i}") for i in count(2))
    while path in taken:
        path = next(numbered)
    taken.add(path)
    return path


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"--show_tokens={folder} cannot be made ({error.strerror})") from error


@contextlib.contextmanager
def _bar(total: int) -> Iterator[Any]:
    """A progress bar on a terminal for many images; gives the function that says one more is done."""
    console = rich.console.Console(stderr=True)
    hidden = total < _BAR_FROM or not console.is_terminal or console.is_dumb_terminal
    with rich.progress.Progress(
        console=console, disable=hidden, transient=True, redirect_stdout=sys.stdout.isatty()
    ) as bar:
        task = bar.add_task("predict", total=total)
        yield lambda: bar.advance(task)


if __name__ == "__main__":
    sys.exit(main())
