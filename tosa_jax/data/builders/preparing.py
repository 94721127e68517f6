"""Prepares any data set, by its name: one of this project's, TFDS's own, or a TFRecord copy that is converted."""

import difflib
import functools
import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path

import tensorflow_datasets as tfds
from tensorflow_datasets.core.download.util import DownloadError
from tensorflow_datasets.core.file_adapters import FileFormat

from tosa_jax.data.builders import (
    cluttered_fashion,
    depth_folder,
    folders,
    image_folder,
    imagenet,
    nyu,
    several_items,
    tfrecord,
)
from tosa_jax.data.builders.digits import Digits
from tosa_jax.data.builders.idx import Idx, config_name, idx_config
from tosa_jax.data.builders.prepared import (
    file_formats,
    has_random_access,
    is_prepared,
    newest,
    open_prepared,
    prepared_dir,
    prepares_alone,
)
from tosa_jax.data.builders.rooms import Rooms, rooms_config
from tosa_jax.data.builders.shards import Say
from tosa_jax.distributed import messages
from tosa_jax.errors import ConfigError, DataError
from tosa_jax.paths import as_path, is_remote

# Sets that need no files.
_GENERATED = {"digits": Digits, "rooms": Rooms, several_items.DIGITS: several_items.SeveralDigits}
# Sets drawn from the items of Fashion-MNIST's files: (builder, name of a set's folder, its config).
_OF_FASHION = {
    cluttered_fashion.NAME: (
        cluttered_fashion.ClutteredFashionMnist,
        cluttered_fashion.config_name,
        cluttered_fashion.cluttered_config,
    ),
    several_items.FASHION: (
        several_items.SeveralFashionMnist,
        several_items.fashion_name,
        several_items.fashion_config,
    ),
}
# Sets of a folder of a person's own.
_FOLDERS = {
    image_folder.NAME: image_folder.prepare_image_folder,
    depth_folder.NAME: depth_folder.prepare_depth_folder,
}
# Sets of TFDS that are made here, and what their `source_dir` holds. They take hours, so they are
# never prepared on the way to training.
_STOCK = {
    imagenet.NAME: (imagenet.prepare_imagenet, imagenet.CONTENT),
    nyu.NAME: (nyu.prepare_nyu, nyu.CONTENT),
}


# Cached: a run stays with the files that it began with, and they are hashed only once.
@functools.lru_cache(maxsize=16)
def open_builder(name: str, data_dir: str, source_dir: str = "") -> tfds.core.DatasetBuilder:
    """The builder of a prepared set; one of this project's own is prepared first.

    A folder is prepared here only up to `folders.AUTOMATIC_BYTES`.

    Raises:
      ConfigError: as `prepare_own`.
      DataError: as `prepare_own` and `prepared_dir`.
    """
    if is_own(name, source_dir) and not is_remote(data_dir):
        path = prepare_own(
            name, data_dir, source_dir, max_bytes=folders.AUTOMATIC_BYTES, say=messages.say
        )
    else:
        path = prepared_dir(name, data_dir)
    return open_prepared(as_path(path))


def prepare(
    name: str,
    data_dir: str | Path,
    source_dir: str | Path = "",
    *,
    overwrite: bool = False,
    say: Say = print,
) -> Path:
    """Prepares a set as ArrayRecord files, unless it is prepared already.

    This project makes its own sets, and ImageNet and NYU Depth V2 from their raw files. A set that exists only as
    TFRecord gets a copy beside it. Any other set is made by TFDS, which needs TensorFlow.

    Args:
      overwrite: Also make again what is there, except for what TFDS made.
      say: Gets a line of progress now and then.
    Returns:
      The version folder.
    Raises:
      ConfigError: there is no such set, or `source_dir` does not suit it.
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
    root = Path(data_dir).expanduser()
    try:
        if is_own(name, str(source_dir)):
            return prepare_own(name, data_dir, source_dir, overwrite=overwrite, say=say)
        if name in _STOCK and source_dir:
            make, _ = _STOCK[name]
            return make(root, Path(source_dir).expanduser(), overwrite=overwrite, say=say)
        return _prepare_other(name, root, overwrite=overwrite, say=say)
    except OSError as error:
        raise DataError(
            f"{data_dir}: cannot prepare {name} there ({error}); set data_dir"
        ) from None


def is_own(name: str, source_dir: str = "") -> bool:
    """Whether `prepare_own` makes this set: one that is generated, of a folder, or of IDX files."""
    if name in _STOCK:
        return False
    return _base(name) in _GENERATED or name in _FOLDERS or bool(source_dir)


def prepare_own(
    name: str,
    data_dir: str | Path,
    source_dir: str | Path = "",
    *,
    max_bytes: int | None = None,
    overwrite: bool = False,
    say: Say = lambda line: None,
) -> Path:
    """Prepares one of this project's own sets under `data_dir`, as ArrayRecord files.

    A set that is prepared from the same files stays as it is, unless `overwrite`. A split appears
    when it is complete.

    Args:
      max_bytes: Refuse a larger folder of images; None: any size.
    Returns:
      The version folder, for `open_prepared`.
    Raises:
      ConfigError: the set is none of this project's; `source_dir` is missing, or given for a set
        without files.
      DataError: a source file is missing or broken, or `data_dir` cannot be written.
    """
    if not is_own(name, str(source_dir)):
        raise ConfigError(
            f"data set {name!r} is not one this project prepares: it prepares "
            f"{', '.join(_GENERATED)}, and IDX files when source_dir names their folder"
        )
    generated = _base(name) in _GENERATED
    if generated and source_dir:
        raise ConfigError(f"source_dir={str(source_dir)!r}: {name} has no files; leave it empty")
    if name in _FOLDERS and not source_dir:
        raise ConfigError("source_dir is empty: set it to the folder of images")
    root = Path(data_dir).expanduser()
    try:
        if name in _FOLDERS:
            source = Path(source_dir).expanduser()
            return _FOLDERS[name](root, source, max_bytes=max_bytes, overwrite=overwrite, say=say)
        folder, builder_class, make_config = _generated_set(name, source_dir)
        path = root / folder / str(builder_class.VERSION)
        if is_prepared(path) and not overwrite:
            return path
        config = make_config()
        with prepares_alone(path.parent, say):
            if is_prepared(path) and not overwrite:
                return path
            if overwrite:
                shutil.rmtree(path, ignore_errors=True)
            _run_builder(builder_class(data_dir=str(root), config=config))
    except OSError as error:
        raise DataError(f"{root}: cannot prepare {name} there ({error}); set data_dir") from None
    return path


def _base(name: str) -> str:
    """ "name" of "name/config"."""
    return name.partition("/")[0]


def _generated_set(name: str, source_dir: str | Path) -> tuple[str, type, Callable]:
    """Folder and builder of a `GeneratedSet`, and the function that checks its files and makes its config."""
    base, _, config = name.partition("/")
    if base == "rooms":
        rooms = rooms_config(config)
        return name, Rooms, lambda: rooms
    if base == several_items.DIGITS:
        digits = several_items.digits_config(name)
        return name, _GENERATED[base], lambda: digits
    if base in _GENERATED:
        if config:
            raise ConfigError(
                f"config.data.name={name!r}: {base} has no configs; set it to {base!r}"
            )
        return name, _GENERATED[base], lambda: None
    if base in _OF_FASHION:
        builder, folder_of, make = _OF_FASHION[base]
        return f"{base}/{folder_of(name, source_dir)}", builder, lambda: make(name, source_dir)
    folder = f"idx/{config_name(name, source_dir)}"
    return folder, Idx, lambda: idx_config(name, source_dir)


def _prepare_other(name: str, root: Path, *, overwrite: bool, say: Say) -> Path:
    found = newest(name, root)
    if found is None:
        return _prepare_with_tfds(name, root)
    path = Path(found)
    if FileFormat.TFRECORD in file_formats(path) and (overwrite or not has_random_access(path)):
        with prepares_alone(path.parent, say):
            tfrecord.convert(path, overwrite=overwrite, say=say)
    elif overwrite:
        raise DataError(f"{path}: not made here, so not deleted; delete it to have it made again")
    return Path(prepared_dir(name, root))


def _prepare_with_tfds(name: str, root: Path) -> Path:
    if name in _STOCK:
        raise DataError(
            f"{name} is not in {root}: set source_dir to the folder of {_STOCK[name][1]}"
        )
    if _base(name) in _OF_FASHION:
        raise DataError(f"{name} is not in {root}: set source_dir to the folder with the IDX files")
    known = tfds.list_builders(with_community_datasets=False)
    if _base(name).partition(":")[0] not in known:
        close = difflib.get_close_matches(name, [*_GENERATED, *_FOLDERS, *known], n=1)
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
    # What TFDS raises: a manual download is missing, a config is unknown, a download failed.
    except (AssertionError, ValueError, DownloadError) as error:
        raise DataError(f"TFDS cannot prepare {name}: {error}") from error
    return Path(builder.data_path)


def _run_builder(builder: tfds.core.DatasetBuilder) -> None:
    # TFDS's progress bars suit downloads of hours; for a few seconds of work they are noise.
    tfds.disable_progress_bar()
    try:
        builder.download_and_prepare(
            file_format="array_record",
            download_config=tfds.download.DownloadConfig(num_shards=1),
        )
    finally:
        tfds.enable_progress_bar()
