"""What a run tells people. A closed pipe, a lost terminal or a full disk stop no run."""

import contextlib
import os
import sys
from typing import TextIO


def say(text: str, stream: TextIO | None = None) -> bool:
    """Prints a line to a stream, standard error if None. Returns whether that was possible."""
    stream = sys.stderr if stream is None else stream
    try:
        print(text, file=stream, flush=True)
    except (
        OSError,
        ValueError,
        AttributeError,
    ):  # ValueError: closed; AttributeError: there is none
        return False
    return True


def let_go_of_broken_streams() -> None:
    """Points a standard stream that takes nothing more to the null device, so that Python can end without an error."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
