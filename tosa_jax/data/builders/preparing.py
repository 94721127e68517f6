"""Which set is prepared how: one of the project's own, a copy that is converted, or by TFDS."""

import difflib
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import tensorflow_datasets as tfds
from tensorflow_datasets.core.download.util import DownloadError

from tosa_jax.data.builders import (
    cluttered_fashion,
    depth_folder,
    image_folder,
    imagenet,
    nyu,
    tfrecord,
)
from tosa_jax.data.builders.digits import Digits
from tosa_jax.data.builders.idx import Idx, config_name, idx_config
from tosa_jax.data.builders.rooms import Rooms, rooms_config
from tosa_jax.data.builders.shards import Say
from tosa_jax.errors import ConfigError, DataError
from tosa_jax.paths import AnyPath, as_path, is_remote

GENERATED = {"digits": Digits, "rooms": Rooms}  # sets that need no files
# Files of a person's own, in a folder.
_FOLDERS = {
    image_folder.NAME: image_folder.prepare_image_folder,
    depth_folder.NAME: depth_folder.prepare_depth_folder,
}
# Sets that are never prepared on the way to training: they take hours.
_ONLY_ON_REQUEST = {
    imagenet.NAME: imagenet.prepare_imagenet,
    nyu.NAME: nyu.prepare_nyu,
}
_PREPARE = "run `python -m tosa_jax.prepare --config=...`"


def prepare(
    name: str,
    data_dir: str | Path,
    source_dir: str | Path = "",
    *,
    overwrite: bool = False,
    say: Say = print,
) -> Path:
    """Prepares any set, as array_record, unless it is prepared already.

    The project's own sets, ImageNet and NYU Depth V2 are made from files; a copy that exists only as TFRecord is
    converted beside itself; any other set is made by TFDS, which needs TensorFlow.

    Args:
      overwrite: Make again what is there. TFDS's own work is never deleted.
      say: Gets lines on what is going on.
    Returns:
      The version folder.
    Raises:
      ConfigError: no such set, or `source_dir` does not go with it.
      DataError: a file is missing or broken, counts differ, TensorFlow is missing, or the disk is
        full or cannot be written.
    """
    if not name:
        raise ConfigError("config.data.name is empty: name a set, e.g. digits")
    if is_remote(data_dir):
        raise ConfigError(
            f"data_dir={data_dir} is in a bucket: prepare into a folder and copy that, as "
            "launch/prepare_data.sh does"
        )
    try:
        if is_own(name, str(source_dir)):
            return prepare_own(name, data_dir, source_dir, overwrite=overwrite, say=say)
        root = Path(data_dir).expanduser()
        if name in _ONLY_ON_REQUEST and source_dir:
            source = Path(source_dir).expanduser()
            return _ONLY_ON_REQUEST[name](root, source, overwrite=overwrite, say=say)
        return _prepare_other(name, root, overwrite=overwrite, say=say)
    except OSError as error:
        raise DataError(
            f"{data_dir}: cannot prepare {name} there ({error}); set data_dir"
        ) from None


def is_own(name: str, source_dir: str = "") -> bool:
    """Whether `prepare_own` makes this set: generated, a folder of images or depth, or IDX files."""
    if name in _ONLY_ON_REQUEST:
        return False
    return _base(name) in GENERATED or name in _FOLDERS or bool(source_dir)


def prepare_own(
    name: str,
    data_dir: str | Path,
    source_dir: str | Path = "",
    *,
    max_bytes: int | None = None,
    overwrite: bool = False,
    say: Say = lambda line: None,
) -> Path:
    """Prepares one of the project's own sets under `data_dir`, once, as array_record.

    A set that is prepared already is left as it is, unless `overwrite`; for IDX files and folders
    of images that means prepared from the same files. A split appears when it is complete.

    Args:
      max_bytes: Refuse a folder of images that is larger.
    Returns:
      The version folder, for `tfds.builder_from_directory`.
    Raises:
      ConfigError: the set is not one of ours, or `source_dir` is missing for one that has files, or
        given for one that has none.
      DataError: a source file is missing or broken, or `data_dir` cannot be written.
    """
    if not is_own(name, str(source_dir)):
        raise ConfigError(
            f"data set {name!r} is not one this project prepares: it prepares "
            f"{', '.join(GENERATED)}, and IDX files when source_dir names their folder"
        )
    generated = _base(name) in GENERATED
    if generated and source_dir:
        raise ConfigError(f"source_dir={str(source_dir)!r}: {name} has no files; leave it empty")
    if name in _FOLDERS and not source_dir:
        raise ConfigError("source_dir is empty: set it to the folder of images")
    root = Path(data_dir).expanduser()
    path = None
    try:
        if name in _FOLDERS:
            source = Path(source_dir).expanduser()
            return _FOLDERS[name](root, source, max_bytes=max_bytes, overwrite=overwrite, say=say)
        relative, builder_class, make_config = _small_set(name, source_dir)
        path = root / relative / str(builder_class.VERSION)
        if is_prepared(path) and not overwrite:
            return path
        config = make_config()
        if overwrite:
            shutil.rmtree(path, ignore_errors=True)
        _run_builder(builder_class(data_dir=str(root), config=config))
    except OSError as error:
        # Another process may have finished first: TFDS then fails to rename onto its folder.
        if path is None or not is_prepared(path):
            raise DataError(
                f"{root}: cannot prepare {name} there ({error}); set data_dir"
            ) from None
    return path


def _base(name: str) -> str:
    """The set's name without its config."""
    return name.partition("/")[0]


def _small_set(name: str, source_dir: str | Path) -> tuple[str, type, Callable]:
    """A set that is generated or made of IDX files: folder, builder, and what checks its files and makes its config."""
    if _base(name) in GENERATED:
        config = _generated_config(name)
        return name, GENERATED[_base(name)], lambda: config
    if _base(name) == cluttered_fashion.NAME:
        folder = f"{_base(name)}/{cluttered_fashion.config_name(name, source_dir)}"
        make = cluttered_fashion.cluttered_config
        return folder, cluttered_fashion.ClutteredFashionMnist, lambda: make(name, source_dir)
    folder = f"idx/{config_name(name, source_dir)}"
    return folder, Idx, lambda: idx_config(name, source_dir)


def _generated_config(name: str) -> tfds.core.BuilderConfig | None:
    base, _, config = name.partition("/")
    if base == "rooms":
        return rooms_config(config)
    if config:
        raise ConfigError(f"config.data.name={name!r}: {base} has no configs; set it to {base!r}")
    return None


def is_prepared(path: AnyPath) -> bool:
    """Whether a version folder has at least one complete split."""
    return (path / "dataset_info.json").exists()


def newest(name: str, data_dir: str | os.PathLike) -> AnyPath | None:
    """The newest prepared version folder, in whatever format, of "name" or "name/config"."""
    folder = as_path(data_dir) / name
    versions = tfds.core.utils.version.list_all_versions(folder)
    prepared = [path for path in (folder / str(v) for v in versions) if is_prepared(path)]
    return prepared[-1] if prepared else None


def prepared_dir(name: str, data_dir: str | os.PathLike) -> AnyPath:
    """The newest version folder of a prepared set ("name" or "name/config") under `data_dir`.

    Raises:
      DataError: the set is not prepared there, or not in a format with random access.
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
    if not _has_random_access(path):
        formats = tfds.builder_from_directory(str(path)).info.available_file_formats()
        found = ", ".join(sorted(f.value for f in formats)) or "no known format"
        raise DataError(
            f"data set {name!r} in {path} exists only as {found}, which cannot be read in "
            f"random order: {_PREPARE} to have it as array_record too"
        )
    return path


def _has_random_access(path: AnyPath) -> bool:
    formats = tfds.builder_from_directory(str(path)).info.available_file_formats()
    return bool(formats & tfds.core.file_adapters.FileFormat.with_random_access())


def _prepare_other(name: str, root: Path, *, overwrite: bool, say: Say) -> Path:
    path = newest(name, root)
    if path is None:
        return _prepare_with_tfds(name, root)
    formats = tfds.builder_from_directory(str(path)).info.available_file_formats()
    as_tfrecord = tfds.core.file_adapters.FileFormat.TFRECORD in formats
    if as_tfrecord and (overwrite or not _has_random_access(path)):
        tfrecord.convert(path, overwrite=overwrite, say=say)
    elif overwrite:
        raise DataError(f"{path}: not made here, so not deleted; delete it to have it made again")
    return prepared_dir(name, root)


def _prepare_with_tfds(name: str, root: Path) -> Path:
    if name == imagenet.NAME:
        raise DataError(
            f"{name} is not in {root}: set source_dir to the folder of "
            f"{' and '.join(imagenet.TARS.values())}"
        )
    if name == nyu.NAME:
        raise DataError(f"{name} is not in {root}: set source_dir to the folder of {nyu.CONTENT}")
    if _base(name) == cluttered_fashion.NAME:
        raise DataError(f"{name} is not in {root}: set source_dir to the folder with the IDX files")
    known = tfds.list_builders(with_community_datasets=False)
    if name.partition("/")[0].partition(":")[0] not in known:
        close = difflib.get_close_matches(name, [*GENERATED, *_FOLDERS, *known], n=1)
        hint = f"did you mean {close[0]!r}?" if close else "see tfds.list_builders()"
        raise ConfigError(f"data set {name!r} is neither ours nor known to TFDS; {hint}")
    if importlib.util.find_spec("tensorflow") is None:
        raise DataError(
            f'TFDS needs TensorFlow to prepare {name}: pip install "tosa-jax[prepare]" (or set '
            f"source_dir, if you have {name} as IDX files)"
        )
    try:
        builder = tfds.builder(name, data_dir=str(root))
        builder.download_and_prepare(file_format="array_record")
    # What TFDS raises for a missing manual download, an unknown config, a failed download.
    except (AssertionError, ValueError, DownloadError) as error:
        raise DataError(f"TFDS cannot prepare {name}: {error}") from error
    return Path(builder.data_path)


def nearest(value: str, known: Iterable[str]) -> str:
    """The end of an error text: the known value that was probably meant, or all that are known."""
    close = difflib.get_close_matches(value, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"


def _run_builder(builder: tfds.core.DatasetBuilder) -> None:
    # TFDS's bars are for downloads of hours: here they would be pages of noise for some seconds.
    tfds.disable_progress_bar()
    try:
        builder.download_and_prepare(
            file_format="array_record",
            download_config=tfds.download.DownloadConfig(num_shards=1),
        )
    finally:
        tfds.enable_progress_bar()
