"""What classes are called: ImageNet's 1000 from WordNet, a run's own from its work directory."""

import functools
import importlib.resources
import os
from collections.abc import Sequence
from pathlib import Path

from tosa_jax.errors import DataError
from tosa_jax.paths import as_path, write_atomically

FILE = "classes.txt"
"""In a work directory: the name of each class on a line, in the order of the logits."""


@functools.cache
def imagenet_classes() -> dict[str, str]:
    """WordNet id -> words of the 1000 classes of ImageNet (ILSVRC 2012), in the order of the logits.

    >>> list(imagenet_classes().items())[0]
    ('n01440764', 'tench, Tinca tinca')
    """
    text = importlib.resources.files("tosa_jax.data").joinpath("imagenet_classes.txt").read_text()
    lines = (line for line in text.splitlines() if not line.startswith("#"))
    return dict(line.split("\t") for line in lines)


def readable(names: Sequence[str]) -> tuple[str, ...]:
    """Names for people: WordNet ids of ImageNet's classes become the first of their words.

    >>> readable(["n01440764", "zebra"])
    ('tench', 'zebra')
    """
    known = imagenet_classes()
    return tuple(known[name].split(", ")[0] if name in known else name for name in names)


def default_names(num_classes: int) -> tuple[str, ...]:
    """ImageNet's names for a head of 1000 classes, numbers for any other."""
    if num_classes == len(known := imagenet_classes()):
        return readable(tuple(known))
    return tuple(f"class {i}" for i in range(num_classes))


def write_names(workdir: str | os.PathLike, names: Sequence[str]) -> None:
    """Writes the names, one a line, to `classes.txt` of a work directory."""
    write_atomically(as_path(workdir) / FILE, "".join(f"{name}\n" for name in names).encode())


def read_names(path: Path) -> tuple[str, ...]:
    """The names in a text file, one a line; empty lines at its end do not count.

    Raises DataError if it cannot be read, or has an empty line before the last name.
    """
    try:
        names = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} cannot be read as class names ({error}); write one name a line"
        ) from error
    if empty := [i for i, name in enumerate(names, 1) if not name.strip()]:
        raise DataError(f"{path}: line {empty[0]} is empty; write one name a line")
    return tuple(names)
