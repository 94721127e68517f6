"""Errors that a user can fix. The message is one line: what is wrong, where, and what to do.

Commands print this line and exit with status 2. Other exceptions are defects of this project and keep their traceback.
"""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Base class of the errors that a user can fix. The message becomes one line (`one_line`)."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class ConfigError(UserError):
    """A field of the configuration or an argument of `create_model` is wrong."""


class DataError(UserError):
    """A data set or one of its files is missing or broken."""


class WorkdirError(UserError):
    """A work directory holds something else, is in use, or has no checkpoint that can be read."""


class DeviceError(UserError):
    """There is no device of the kind asked for, or a program does not fit it."""


class NonFiniteLossError(UserError):
    """Training produced a loss that is not finite."""


class NonFiniteOutputError(UserError):
    """A model predicts values that are not finite."""


class WeightsError(UserError):
    """A file of weights cannot be read, or does not fit the model."""


class ProcessError(UserError):
    """The processes of a run cannot join, differ, or one of them failed."""


MOST_CHARACTERS = 2000
"""A longer message is shortened: it quotes a file that somebody else wrote."""


def one_line(text: str) -> str:
    """A text that is safe to print on one line: white space becomes blanks, what cannot be printed becomes escapes.

    >>> one_line("a\\n b\\x1b[31m")
    'a b\\\\x1b[31m'
    """
    text = " ".join(text.split())
    if len(text) > MOST_CHARACTERS:
        text = f"{text[: MOST_CHARACTERS // 2]} ... {text[-MOST_CHARACTERS // 3 :]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def nearest(value: str, known: Iterable[str]) -> str:
    """The end of an error text: the known value most like `value`, or all known values if none is alike."""
    known = list(known)
    close = difflib.get_close_matches(value, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"
