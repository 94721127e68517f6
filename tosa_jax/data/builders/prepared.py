"""Where prepared sets lie: data_dir/<name>/<version> or data_dir/<name>/<config>/<version>, as TFDS has it."""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core.file_adapters import FileFormat
from tensorflow_datasets.core.utils.version import list_all_versions

from tosa_jax.errors import DataError
from tosa_jax.paths import AnyPath, as_path, parse_json

_AGAIN = "delete the folder and prepare the set again"
_PREPARE = "run `python -m tosa_jax.prepare --config=...`"


def open_prepared(path: AnyPath) -> tfds.core.DatasetBuilder:
    """TFDS's description of the set in a version folder.

    Raises DataError: a file of the description is damaged, or names features that are not TFDS's own. TFDS would import
    any module that is named there.
    """
    try:
        return _opened(path)
    except FileNotFoundError as error:
        raise DataError(f"{path}: {error.filename or error} is missing; {_AGAIN}") from error
    except Exception as error:  # TFDS and protobuf stumble over a damaged file in any way
        raise DataError(
            f"{path}: its description cannot be read ({type(error).__name__}: {str(error)[:300]}); {_AGAIN}"
        ) from error


def _opened(path: AnyPath) -> tfds.core.DatasetBuilder:
    for name in _class_names(parse_json((path / "features.json").read_bytes())):
        if not name.startswith("tensorflow_datasets."):
            raise ValueError(f"features.json names {name}, which is not TFDS's")
    builder = tfds.builder_from_directory(str(path))
    splits = builder.info.splits
    lengths = [n for split in splits.values() for n in split.shard_lengths]
    if not splits or min(lengths, default=0) < 0:
        raise ValueError("dataset_info.json has no split, or one of a negative length")
    return builder


def _class_names(features: Any) -> Iterator[str]:
    """Every class that the text of features names, at any depth."""
    if isinstance(features, dict):
        for key, value in features.items():
            if key in ("pythonClassName", "python_class_name"):
                yield str(value)
            yield from _class_names(value)
    elif isinstance(features, list):
        for value in features:
            yield from _class_names(value)


@contextlib.contextmanager
def prepares_alone(folder: Path, say: Callable[[str], object]) -> Iterator[None]:
    """In this context no other process prepares below the same folder; one that does is waited for, with a line.

    Where the file system has no locks this does nothing. Raises OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".preparing", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"{folder}: another process is preparing this set; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass
        yield


def is_prepared(path: AnyPath) -> bool:
    """Whether a version folder has at least one complete split."""
    return (path / "dataset_info.json").exists()


def newest(name: str, data_dir: str | os.PathLike) -> AnyPath | None:
    """The newest version folder of "name" or "name/config", in any file format; None: there is none."""
    folder = as_path(data_dir) / name
    prepared = [p for p in (folder / str(v) for v in list_all_versions(folder)) if is_prepared(p)]
    return prepared[-1] if prepared else None


def file_formats(path: AnyPath) -> set[FileFormat]:
    """The file formats in which a version folder holds its set."""
    return open_prepared(path).info.available_file_formats()


def has_random_access(path: AnyPath) -> bool:
    """Whether records of a version folder can be read in any order."""
    return bool(file_formats(path) & FileFormat.with_random_access())


def prepared_dir(name: str, data_dir: str | os.PathLike) -> AnyPath:
    """The newest version folder of a prepared set ("name" or "name/config") under `data_dir`.

    Raises:
      DataError: the set is not prepared there, or its records cannot be read in any order.
    """
    folder = as_path(data_dir) / name
    path = newest(name, data_dir)
    if path is None:
        inner = sorted(path.parents[1].name for path in folder.glob("*/*/dataset_info.json"))
        advice = (
            f"it has configs: set name to one of {', '.join(f'{name}/{c}' for c in inner)}"
            if inner
            else f"{_PREPARE} (for IDX files, set source_dir to their folder)"
        )
        raise DataError(f"data set {name!r} is not prepared in {folder}: {advice}")
    if not has_random_access(path):
        found = ", ".join(sorted(f.value for f in file_formats(path))) or "no known format"
        raise DataError(
            f"data set {name!r} in {path} exists only as {found}, which cannot be read in "
            f"random order: {_PREPARE} to have it as array_record too"
        )
    return path
