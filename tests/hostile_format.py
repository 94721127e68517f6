"""A format that `tests.hostile` damages, and how a content of it is damaged at random."""

import copy
import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parent / "golden"

Bytes = Callable[[bytes, np.random.Generator], bytes]


@dataclass(frozen=True)
class Format:
    """How files of one format are damaged and read.

    samples  whole files.
    read     reads a content; its folder is empty, or what `start` left there.
    share    of the cases, relative to the other formats.
    bombs    contents that are made to do harm, each tried once.
    mutate   damages a sample, with the general mutation to use; None: that one alone.
    is_json  whether values of a JSON text are changed too.
    start    what a child process does once.
    """

    samples: list[bytes]
    read: Callable[[bytes, Path], Any]
    share: float
    bombs: tuple[bytes, ...] = ()
    mutate: Callable[[bytes, np.random.Generator, Bytes], bytes] | None = None
    is_json: bool = False
    start: Callable[[Path], None] | None = None


def zeros(mebibytes: int, wbits: int) -> bytes:
    """A compressed stream of so many MiB of zeros, without the work of compressing them. Its checksum is wrong."""
    squeeze = zlib.compressobj(9, zlib.DEFLATED, wbits)
    first = squeeze.compress(bytes(2**20)) + squeeze.flush(zlib.Z_FULL_FLUSH)
    again = squeeze.compress(bytes(2**20)) + squeeze.flush(zlib.Z_FULL_FLUSH)
    return first + again * (mebibytes - 1) + squeeze.flush()


DEEP = (b"[" * 100_000, b'{"a":' * 50_000 + b"1" + b"}" * 50_000, b"1" * 10_000, b'"\xff"')
"""JSON texts that a reader may stumble over."""


_LENGTHS = (0, 1, 2, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40)
_LENGTHS += (2**63 - 1, 2**64 - 1)

VALUES = (
    None,
    True,
    False,
    -1,
    0,
    1,
    2**31,
    2**63,
    10**30,
    0.5,
    1e308,
    float("nan"),
    float("inf"),
)
VALUES += (
    "",
    "x",
    "x" * 5000,
    "\x1b[31m\n",
    "../../escape",
    "/dev/zero",
    [],
    {},
    [[]],
    [1, "a"],
    {"a": {}},
)


def flip(data: bytearray, rng: np.random.Generator) -> None:
    """Flips up to eight bits."""
    for _ in range(int(rng.integers(1, 9))):
        data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))


def overwrite(data: bytearray, rng: np.random.Generator) -> None:
    """Writes a number over some bytes, as a length or an offset might be."""
    form = ["<I", ">I", "<Q", ">Q", "<H", ">H", "B"][int(rng.integers(7))]
    number = _LENGTHS[int(rng.integers(len(_LENGTHS)))] % 256 ** struct.calcsize(form)
    at = int(rng.integers(min(len(data), 10 ** int(rng.integers(1, 7)))))
    data[at : at + struct.calcsize(form)] = struct.pack(form, number)


def cut(data: bytearray, rng: np.random.Generator) -> None:
    """Cuts the end off."""
    del data[int(rng.integers(len(data))) :]


def insert(data: bytearray, rng: np.random.Generator) -> None:
    """Puts random bytes in between."""
    at = int(rng.integers(len(data) + 1))
    data[at:at] = rng.bytes(int(rng.integers(1, 40)))


def take_out(data: bytearray, rng: np.random.Generator) -> None:
    """Takes a piece out."""
    at = int(rng.integers(len(data)))
    del data[at : at + int(rng.integers(1, 200))]


def splice(data: bytearray, rng: np.random.Generator) -> None:
    """Copies a piece to another place."""
    start, to = (int(rng.integers(len(data))) for _ in range(2))
    data[to:to] = data[start : start + int(rng.integers(1, 400))]


MUTATIONS = (flip, flip, overwrite, overwrite, cut, insert, take_out, splice)


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """Bytes after one to three mutations."""
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        if changed:
            MUTATIONS[int(rng.integers(len(MUTATIONS)))](changed, rng)
    return bytes(changed)


def mutate_json(data: bytes, rng: np.random.Generator) -> bytes:
    """A JSON text with up to three of its values replaced, removed or added."""
    tree = json.loads(data)
    for _ in range(int(rng.integers(1, 4))):
        places = [(None, None), *_places(tree)]
        holder, key = places[int(rng.integers(len(places)))]
        value = copy.deepcopy(VALUES[int(rng.integers(len(VALUES)))])
        if holder is None:
            if isinstance(tree, dict):
                tree[["a", "", "format", "image_size"][int(rng.integers(4))]] = value
        elif rng.random() < 0.2:
            del holder[key]
        else:
            holder[key] = value
    return json.dumps(tree).encode()


def _places(tree):
    if isinstance(tree, dict | list):
        for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
            yield tree, key
            yield from _places(tree[key])
