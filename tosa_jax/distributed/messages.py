"""What a run tells people. A closed pipe, a lost terminal or a full disk stop no run."""

import contextlib
import os
import sys
from typing import Any


def say(text: str, stream: Any = None) -> bool:
    """Prints a line to a text stream, standard error if None. Returns whether that was possible."""
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


class Hushed:
    """A text stream that turns silent for good when the stream below takes nothing more.

    stream  None: silent from the start.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Writes, or drops the text. Returns its length."""
        try:
            if self.stream is not None:
                self.stream.write(text)
        except (OSError, ValueError):
            self.stream = None
        return len(text)

    def flush(self) -> None:
        """Flushes the stream below."""
        try:
            if self.stream is not None:
                self.stream.flush()
        except (OSError, ValueError):
            self.stream = None

    def isatty(self) -> bool:
        """Whether the stream below is a terminal."""
        return self.stream is not None and self.stream.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["stream"], name)


def let_go_of_broken_streams() -> None:
    """Points a standard stream that takes nothing more to the null device, so that Python can end without an error."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
