"""What libraries print: a few lines where they would print hundreds of an error that they raise as well."""

import functools
import logging
import sys
from typing import Any

MOST_CHARACTERS = 300


class OneLine(logging.Filter):
    """Cuts an error that Orbax logs to a line, said once: each of its threads logs it, with a traceback."""

    def __init__(self) -> None:
        super().__init__()
        self.said: set[tuple[str, int]] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is shown."""
        if "orbax" not in record.pathname or record.levelno < logging.ERROR:
            return True
        place = (record.pathname, record.lineno)
        is_new = place not in self.said
        self.said.add(place)
        record.msg, record.args = " ".join(record.getMessage().split())[:MOST_CHARACTERS], ()
        record.exc_info = record.exc_text = record.stack_info = None
        return is_new


def was_asked_for(record: logging.LogRecord) -> bool:
    """Whether a record of asyncio is about something else than an error that nobody asked for.

    Orbax starts to write all arrays, and asks for the errors until the first one.
    """
    return "exception was never retrieved" not in record.getMessage()


@functools.cache
def shorten_library_messages() -> None:
    """From now on a full disk costs a few lines of libraries before the project's own line, not hundreds.

    For the rest of the process: some come when what failed is collected, which may be at its end.
    """
    logging.getLogger("absl").addFilter(OneLine())
    logging.getLogger("asyncio").addFilter(was_asked_for)
    hook = sys.unraisablehook

    def without_closed_loops(unraisable: Any) -> None:
        # After an error Orbax closes the event loop to which TensorStore reports each array that was written.
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    sys.unraisablehook = without_closed_loops
