"""Digests of what the project writes: of the files of a checkpoint, and of arrays. They show damage."""

import concurrent.futures
import hashlib
import json
from collections.abc import Iterator, Mapping

import numpy as np

from tosa_jax.paths import AnyPath, parse_json, write_atomically

DIGESTS = "digests.json"
"""The file of a folder that holds the digest of each other file: {path below the folder: SHA-256}."""

READERS = 8
"""Files that are read at the same time."""

_MARKER = (
    "commit_success.txt"  # Orbax writes it last, after the digests; only that it exists counts
)
_METADATA = "_CHECKPOINT_METADATA"  # Orbax adds the time of the commit, after the digests


def write_digests(folder: AnyPath) -> None:
    """Writes the digests of all files below a folder. Raises OSError: one cannot be read, or the file not written."""
    text = json.dumps(_digests(folder, list(_names(folder))), indent=1, sort_keys=True)
    write_atomically(folder / DIGESTS, text.encode())


def find_damage(folder: AnyPath) -> str:
    """The first file below a folder that is not as `write_digests` found it, and how it differs; "" if there is none.

    Hidden files are passed over: file managers and network file systems leave them.
    """
    try:
        written = parse_json((folder / DIGESTS).read_bytes())
        names = [name for name in _names(folder) if not name.rpartition("/")[2].startswith(".")]
    except FileNotFoundError:
        return f"{DIGESTS} is missing"
    except OSError as error:
        return f"it cannot be read: {error.strerror or error}"
    except ValueError:
        return f"{DIGESTS} is damaged"
    if not isinstance(written, dict) or not written:
        return f"{DIGESTS} is damaged"
    if missing := sorted(written.keys() - set(names)):
        return f"{missing[0]} is missing"
    if foreign := sorted(set(names) - written.keys()):
        return f"{foreign[0]} was not saved with it"
    try:
        found = _digests(folder, names)
    except OSError as error:
        return f"a file cannot be read: {error.strerror or error}"
    changed = [name for name in names if found[name] != written[name]]
    return f"{changed[0]} is damaged" if changed else ""


def digest_arrays(arrays: Mapping[str, np.ndarray], texts: Mapping[str, str]) -> str:
    """The SHA-256 of arrays, with their names, types and shapes, and of texts by name."""
    digest = hashlib.sha256(json.dumps(sorted(texts.items())).encode())
    for name in sorted(arrays):
        x = np.ascontiguousarray(arrays[name])
        digest.update(json.dumps([name, str(x.dtype), arrays[name].shape]).encode())
        digest.update(x.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _names(folder: AnyPath, under: str = "") -> Iterator[str]:
    """The paths of the files below a folder, but for those that change after the digests are written."""
    for item in folder.iterdir():
        name = f"{under}{item.name}"
        if item.is_dir():
            yield from _names(item, f"{name}/")
        elif name not in (DIGESTS, _MARKER):
            yield name


def _digests(folder: AnyPath, names: list[str]) -> dict[str, str]:
    with concurrent.futures.ThreadPoolExecutor(READERS) as readers:
        return dict(zip(names, readers.map(lambda name: _digest(folder, name), names), strict=True))


def _digest(folder: AnyPath, name: str) -> str:
    path = folder / name
    if name == _METADATA:
        return hashlib.sha256(_without_commit(path.read_bytes())).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]


def _without_commit(text: bytes) -> bytes:
    """Orbax's metadata of a checkpoint without the time of its commit; damaged JSON as it is."""
    try:
        values = parse_json(text)
        values.pop("commit_timestamp_nsecs", None)
    except (ValueError, AttributeError):
        return text
    return json.dumps(values, sort_keys=True).encode()
