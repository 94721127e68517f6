"""Images that a person names on a command line: files, folders and globs, read ahead by threads."""

import glob
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from tosa_jax.data.decoding import BadImageError
from tosa_jax.errors import DataError

EXTENSIONS = (
    *(".apng", ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm"),
    *(".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
)
"""Files in folders count as images by these; a file that is named itself is tried whatever it is called."""


def find_images(
    names: Sequence[str], on_message: Callable[[str], None] = lambda line: None
) -> list[Path]:
    """The files that names stand for, each once, in the order of the names and sorted within a folder or glob.

    A folder stands for the images in it and in its folders, hidden ones left out.

    on_message  gets a line for each folder that has other files too: their number, and how they end.

    Raises DataError: a name that is nothing, a folder without images, a glob without a match.
    """
    found: dict[Path, None] = {}
    for name in names:
        path = Path(name).expanduser()
        if path.is_dir():
            inside = sorted(path.rglob("*"))
            shown = [f for f in inside if _visible(f, path)]
            files = [f for f in shown if f.suffix.lower() in EXTENSIONS]
            if others := sorted({f.suffix.lower() or f.name for f in shown} - set(EXTENSIONS)):
                on_message(
                    f"{name}: {len(shown) - len(files)} files are not taken for images ({', '.join(others[:8])}); "
                    "name a file itself to try it"
                )
            if not files:
                raise DataError(
                    f"{name}: no images in this folder (files ending in {', '.join(EXTENSIONS)})"
                )
        elif path.exists():
            files = [path]
        elif glob.has_magic(name):
            files = sorted(
                f for f in map(Path, glob.glob(str(path), recursive=True)) if f.is_file()
            )
            if not files:
                raise DataError(f"{name}: no file matches")
        else:
            raise DataError(f"{name}: no such file or folder")
        found |= dict.fromkeys(files)
    return list(found)


def _visible(file: Path, folder: Path) -> bool:
    inside = file.relative_to(folder).parts
    return file.is_file() and not any(part.startswith(".") for part in inside)


def read_ahead(
    paths: Sequence[Path], decode: Callable[[bytes], np.ndarray], *, threads: int = 2, ahead: int
) -> Iterator[tuple[Path, np.ndarray | BadImageError]]:
    """Each file decoded, in order; of a file that is no image the error, so that the rest can go on.

    At most `ahead` images wait in memory while `threads` work on them.
    """

    def read(path: Path) -> np.ndarray | BadImageError:
        try:
            return decode(path.read_bytes())
        except BadImageError as error:
            return error
        except OSError as error:
            return BadImageError(error.strerror or str(error))

    with ThreadPoolExecutor(threads) as pool:
        waiting = deque(pool.submit(read, path) for path in paths[:ahead])
        for number, path in enumerate(paths):
            result = waiting.popleft().result()
            if number + ahead < len(paths):
                waiting.append(pool.submit(read, paths[number + ahead]))
            yield path, result
