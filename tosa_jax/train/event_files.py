"""TensorBoard's event files, cut where a resumed run begins to write again."""

import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from tensorboardX.proto import event_pb2

# Protocol buffers make this class at run time, where type checkers do not see it.
EVENT: Any = event_pb2
_HEADER, _CHECK = 12, 4  # bytes around an event: its size and that number's checksum; its own


def cut(folder: Path, is_kept: Callable[[Any], bool]) -> None:
    """Cuts each event file of a folder before its first event that is not kept, and where a killed process left a part.

    Events are in the order in which they were written. Cutting is one call of the system: a process that is killed
    leaves a file as it was, or cut.

    Raises OSError: a file cannot be read or cut.
    """
    for path in sorted(folder.glob("*tfevents*")):
        end = 0
        for event, after in _events(path.read_bytes()):
            if not is_kept(event):
                break
            end = after
        if end < path.stat().st_size:
            os.truncate(path, end)


def _events(data: bytes) -> Iterator[tuple[Any, int]]:
    """The whole events at the beginning of a file, each with the place where it ends."""
    at = 0
    while at + _HEADER <= len(data):
        (size,) = struct.unpack_from("<Q", data, at)
        at += _HEADER + size + _CHECK
        if at > len(data):
            return
        try:
            event = EVENT.Event.FromString(data[at - _CHECK - size : at - _CHECK])
        except DecodeError:
            return
        yield event, at
