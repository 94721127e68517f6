"""Files of this machine and of buckets (`gs://`) alike."""

import os
import tempfile
import time
from pathlib import Path

import fsspec
from etils import epath

from tosa_jax.errors import ConfigError

AnyPath = Path | epath.Path
"""A `pathlib.Path`, or etils' path of a bucket: both have what this project calls of them."""

UPLOAD_SECONDS = 60.0
"""How often a file that grows is copied to a bucket."""


def as_path(path: str | os.PathLike) -> AnyPath:
    """The path of a file here, with `~` expanded, or in a bucket.

    Raises ConfigError where buckets of that kind, or the package for them, are missing.
    """
    text = os.fspath(path)
    if "://" not in text:
        return Path(text).expanduser()
    if not text.startswith("gs://"):
        # etils could, but Orbax writes no checkpoints to S3 and ArrayRecord reads no data from there.
        raise ConfigError(
            f"{text}: only gs:// is read and written directly; mount other buckets as a folder"
        )
    try:
        fsspec.get_filesystem_class("gs")
    except ImportError as error:
        raise ConfigError(f'{text}: {error}; pip install "tosa-jax[gcs]"') from error
    return epath.Path(text)


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is in a bucket: files there are written whole, and there are no links and no locks."""
    return "://" in os.fspath(path)


def write_atomically(path: str | os.PathLike, data: bytes) -> None:
    """Writes a whole file: a reader finds the old bytes or the new ones, never a part."""
    if is_remote(path):
        epath.Path(path).write_bytes(data)  # an object appears when it is complete
        return
    path = Path(path)
    # tempfile would make the file private to its owner, and runs are shared.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Mirror:
    """A local folder whose files are copied to a bucket, where nothing can be appended to.

    folder   where to write; for a local `target` this is the target itself, and nothing is copied.
    """

    def __init__(self, target: AnyPath, seconds: float = UPLOAD_SECONDS) -> None:
        self.target, self.seconds = target, seconds
        self._temporary = None
        self._sizes: dict[Path, tuple[int, int]] = {}  # as uploaded: size and time
        self._next = time.monotonic() + seconds
        if is_remote(target):
            self._temporary = tempfile.TemporaryDirectory(prefix="tosa_jax_")
        self.folder = Path(self._temporary.name if self._temporary else target)
        self.folder.mkdir(parents=True, exist_ok=True)

    def fetch(self, name: str) -> None:
        """Gets a file that an earlier run left, if there is one."""
        if self._temporary and (self.target / name).exists():
            (self.folder / name).write_bytes((self.target / name).read_bytes())

    def push(self, *, now: bool = True) -> None:
        """Copies files that have changed; with `now=False` only if the last time was `seconds` ago."""
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
        """Copies what is left; a second call does nothing."""
        self.push()
        if self._temporary:
            self._temporary.cleanup()
            self._temporary = None
