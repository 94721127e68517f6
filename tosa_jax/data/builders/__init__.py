"""The project's own TFDS builders, and how sets are prepared and found. No TensorFlow is needed."""

import difflib
import functools
import re
from collections.abc import Iterable
from pathlib import Path

import tensorflow_datasets as tfds

from tosa_jax.data.builders.digits import Digits
from tosa_jax.data.builders.idx import Idx, config_name, idx_config
from tosa_jax.errors import ConfigError, DataError

GENERATED = {"digits": Digits}  # sets that need no files; all others of ours are IDX files
_PREPARE = "run `python -m tosa_jax.prepare --config=...`"


# Cached: a run stays with the files that it began with, and they are hashed only once.
@functools.lru_cache(maxsize=16)
def open_builder(name: str, data_dir: str, source_dir: str = "") -> tfds.core.DatasetBuilder:
    """The builder of a prepared classification set; one of the project's own is prepared first.

    Raises:
      ConfigError, DataError: what `prepare_own` or `prepared_dir` raises; the set has no feature
        "image" (an image) or "label" (a class).
    """
    if is_own(name, source_dir):
        path = prepare_own(name, data_dir, source_dir)
    else:
        path = prepared_dir(name, data_dir)
    builder = tfds.builder_from_directory(str(path))
    features = builder.info.features
    for key, kind in (("image", tfds.features.Image), ("label", tfds.features.ClassLabel)):
        if key not in features or not isinstance(features[key], kind):
            raise DataError(
                f"{path}: no feature {key!r} of kind {kind.__name__} (it has "
                f"{', '.join(sorted(features))}); name a classification set"
            )
    return builder


def is_own(name: str, source_dir: str = "") -> bool:
    """Whether `prepare_own` makes this set: one of `GENERATED`, or IDX files in `source_dir`."""
    return name in GENERATED or bool(source_dir)


def prepare_own(name: str, data_dir: str | Path, source_dir: str | Path = "") -> Path:
    """Prepares one of the project's own sets under `data_dir`, once, as array_record.

    A set that is prepared already is left as it is; for IDX files that means prepared from files
    with the same content. The folder appears under its final name when it is complete.

    Returns:
      The version folder, for `tfds.builder_from_directory`.
    Raises:
      ConfigError: the set is not one of ours, or `source_dir` is given for one that has no files.
      DataError: a source file is missing or broken, or `data_dir` cannot be written.
    """
    if not is_own(name, str(source_dir)):
        raise ConfigError(
            f"data set {name!r} is not one this project prepares: it prepares "
            f"{', '.join(GENERATED)}, and IDX files when source_dir names their folder"
        )
    if name in GENERATED and source_dir:
        raise ConfigError(f"source_dir={str(source_dir)!r}: {name} has no files; leave it empty")
    root = Path(data_dir).expanduser()
    relative = (name,) if name in GENERATED else ("idx", config_name(name, source_dir))
    builder_class = GENERATED.get(name, Idx)
    path = root.joinpath(*relative, str(builder_class.VERSION))
    if _is_prepared(path):
        return path
    config = None if name in GENERATED else idx_config(name, source_dir)
    try:
        _download_and_prepare(builder_class(data_dir=str(root), config=config))
    except OSError as error:
        # Another process may have finished first: TFDS then fails to rename onto its folder.
        if not _is_prepared(path):
            raise DataError(
                f"{root}: cannot prepare {name} there ({error}); set data_dir"
            ) from None
    return path


def prepared_dir(name: str, data_dir: str | Path) -> Path:
    """The newest version folder of a prepared set ("name" or "name/config") under `data_dir`.

    Raises:
      DataError: the set is not prepared there, or not in a format with random access.
    """
    folder = Path(data_dir).expanduser() / name
    versions = tfds.core.utils.version.list_all_versions(folder)
    prepared = [path for path in (folder / str(v) for v in versions) if _is_prepared(path)]
    if not prepared:
        inner = sorted(path.parents[1].name for path in folder.glob("*/*/dataset_info.json"))
        advice = (
            f"it has configs: set name to one of {', '.join(f'{name}/{c}' for c in inner)}"
            if inner
            else f"{_PREPARE} (for IDX files, set source_dir to their folder)"
        )
        raise DataError(f"data set {name!r} is not prepared in {folder}: {advice}")
    builder = tfds.builder_from_directory(str(prepared[-1]))
    formats = builder.info.available_file_formats()
    if not formats & tfds.core.file_adapters.FileFormat.with_random_access():
        found = ", ".join(sorted(f.value for f in formats)) or "no known format"
        raise DataError(
            f"data set {name!r} in {prepared[-1]} exists only as {found}, which cannot be read in "
            f"random order: {_PREPARE} to have it as array_record too"
        )
    return prepared[-1]


def num_examples(builder: tfds.core.DatasetBuilder, split: str, field: str) -> int:
    """How many examples a split, or a TFDS slice or sum of splits ("train[:90%]+test"), has.

    Raises:
      ConfigError: no such split, or it is empty; the text calls the split by `field`, its setting.
    """
    splits = builder.info.splits
    for part in split.split("+"):
        if (base := re.sub(r"\[.*", "", part).strip()) not in splits:
            raise ConfigError(
                f"{field}={split!r}: {builder.info.full_name} has no split {base!r}"
                f"{nearest(base, splits)}"
            )
    try:
        count = splits[split].num_examples
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"{field}={split!r} is no TFDS split: {error}") from None
    if not count:
        raise ConfigError(f"{field}={split!r}: holds no examples; take a larger part")
    return count


def nearest(value: str, known: Iterable[str]) -> str:
    """The end of an error text: the known value that was probably meant, or all that are known."""
    close = difflib.get_close_matches(value, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"


def _is_prepared(path: Path) -> bool:
    return (path / "dataset_info.json").is_file()


def _download_and_prepare(builder: tfds.core.DatasetBuilder) -> None:
    # TFDS's bars are for downloads of hours: here they would be pages of noise for some seconds.
    tfds.disable_progress_bar()
    try:
        builder.download_and_prepare(
            file_format="array_record",
            download_config=tfds.download.DownloadConfig(num_shards=1),
        )
    finally:
        tfds.enable_progress_bar()
