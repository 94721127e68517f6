"""Paths and files, local or in a bucket (`gs://`)."""

import io
import json
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from etils import epath
from PIL import Image

from tosa_jax.errors import ConfigError

AnyPath = Path | epath.Path
"""A `pathlib.Path`, or etils' path in a bucket, which has the same methods."""

UPLOAD_SECONDS = 60.0
"""Seconds between two copies of a growing file to a bucket."""


def as_path(path: str | os.PathLike) -> AnyPath:
    """Makes a path of text: a local one, with `~` expanded, or one in a bucket.

    Raises ConfigError for buckets other than gs://, and if the package for gs:// is not installed.
    """
    text = os.fspath(path)
    if "://" not in text:
        return Path(text).expanduser()
    if not text.startswith("gs://"):
        # etils supports s3://, but Orbax cannot write checkpoints there, and ArrayRecord cannot read data.
        raise ConfigError(
            f"{text}: only gs:// is read and written directly; mount other buckets as a folder"
        )
    try:
        fsspec.get_filesystem_class("gs")
    except ImportError as error:
        raise ConfigError(f'{text}: {error}; pip install "tosa-jax[gcs]"') from error
    return epath.Path(text)


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is in a bucket. Buckets have no appending, no links and no locks."""
    return "://" in os.fspath(path)


def write_atomically(path: str | os.PathLike, data: bytes) -> None:
    """Writes a file atomically: a reader finds the old content or the new one, never a part."""
    if is_remote(path):
        epath.Path(path).write_bytes(
            data
        )  # objects in a bucket become visible only when they are complete
        return
    path = Path(path)
    # Not `tempfile`: its files are private to their owner, and work directories are shared.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Removes what processes that were killed in `write_atomically` left in a folder. Nobody else may write there."""
    for path in folder.glob(".*.tmp"):
        if re.fullmatch(r"\..+\.\d+\.tmp", path.name):
            path.unlink(missing_ok=True)


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError for anything else, one that is nested too deeply included."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def png_bytes(image: np.ndarray, compress_level: int = 6) -> bytes:
    """Encodes an image as a PNG file.

    image           uint8 [height, width] or [height, width, 3], or uint16 [height, width].
    compress_level  from 0, the fastest, to 9, the smallest file.
    """
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="png", compress_level=compress_level)
    return file.getvalue()


class Mirror:
    """A local folder whose files are copied to a bucket, for files that grow: buckets have no appending.

    folder  where to write. For a local `target` this is the target itself, and nothing is copied.
    """

    def __init__(self, target: AnyPath, seconds: float = UPLOAD_SECONDS) -> None:
        self.target, self.seconds = target, seconds
        self._temporary = None
        self._sizes: dict[
            Path, tuple[int, int]
        ] = {}  # size and time of each file at its last upload
        self._next = time.monotonic() + seconds
        if is_remote(target):
            self._temporary = tempfile.TemporaryDirectory(prefix="tosa_jax_")
        self.folder = Path(self._temporary.name if self._temporary else target)
        self.folder.mkdir(parents=True, exist_ok=True)

    def fetch(self, name: str) -> None:
        """Copies the file `name`, or the files of the folder `name`, from the bucket, if they exist."""
        if self._temporary is None or not (self.target / name).exists():
            return
        if not (self.target / name).is_dir():
            (self.folder / name).write_bytes((self.target / name).read_bytes())
            return
        (self.folder / name).mkdir(parents=True, exist_ok=True)
        for item in (self.target / name).iterdir():
            self.fetch(f"{name}/{item.name}")

    def push(self, *, now: bool = True) -> None:
        """Copies changed files to the bucket; with `now=False` only if the last copy is at least `seconds` ago."""
        if self._temporary is None or not (now or time.monotonic() >= self._next):
            return
        for path in sorted(p for p in self.folder.rglob("*") if p.is_file()):
            stat = path.stat()
            seen = (stat.st_size, stat.st_mtime_ns)
            if self._sizes.get(path) != seen:
                target = self.target / path.relative_to(self.folder).as_posix()
                target.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(target, path.read_bytes())
                self._sizes[path] = seen
        self._next = time.monotonic() + self.seconds

    def close(self) -> None:
        """Copies the remaining files and removes the local folder. A second call does nothing."""
        self.push()
        if self._temporary:
            self._temporary.cleanup()
            self._temporary = None
