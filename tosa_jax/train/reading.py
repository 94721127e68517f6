"""Waits for batches: says when input stalls, and stops waiting when the run is asked to stop."""

import contextlib
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import jax

from tosa_jax.distributed.coordination import are_several
from tosa_jax.distributed.messages import say
from tosa_jax.distributed.preemption import stop_if_asked
from tosa_jax.tasks.task import HostBatch

STALL_SECONDS = 30.0
"""After so many seconds without a batch a line says so; then at twice the time, and so on."""

ASK_SECONDS = 0.1
"""How often a run that waits for a batch asks whether it shall stop."""

CLOSE_SECONDS = 2.0
"""How long closing waits for a batch that is being read."""


@runtime_checkable
class Batches(Protocol):
    """An iterator of batches, to be closed when no more are wanted."""

    def __next__(self) -> HostBatch: ...

    def close(self) -> None:
        """Ends the threads and workers that read ahead."""


class Reader(Iterator[HostBatch]):
    """Asks for batches in a thread of its own, one at a time, so that no wait for one is without end.

    batches  where they come from; `close` closes them.
    what     is read, for the line that tells that nothing comes.
    """

    def __init__(
        self, batches: Batches, what: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.batches, self.what, self.clock = batches, what, clock
        self._asked: queue.SimpleQueue[bool] = queue.SimpleQueue()
        # No SimpleQueue: where a signal comes just as its time to wait is over, it waits for ever (Python 3.11).
        self._read: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue()
        self._waits = False
        self._thread = threading.Thread(target=self._serve, name="reader", daemon=True)
        self._thread.start()

    def __next__(self) -> HostBatch:
        """The next batch. Raises Stopped: a signal came; what the batches raise."""
        stop_if_asked()
        if not self._waits:
            self._waits = True
            self._asked.put(True)
        began, told = self.clock(), 0.0
        while True:
            try:
                batch, error = self._read.get(timeout=ASK_SECONDS)
                break
            except queue.Empty:
                stop_if_asked()
            if (waited := self.clock() - began) >= max(STALL_SECONDS, 2 * told):
                told = waited
                say(f"{self._where()}no batch for {waited:.0f} s. {_WHERE_TO_LOOK}")
        self._waits = False
        if told:
            say(f"{self._where()}goes on, {self.clock() - began:.0f} s after the batch before")
        if error is not None:
            raise error
        return batch

    def close(self) -> None:
        """Closes the batches. If one is being read and does not come, they are left alone: that might wait for ever."""
        self._asked.put(False)
        self._thread.join(CLOSE_SECONDS)
        if not self._thread.is_alive():
            self.batches.close()

    def _where(self) -> str:
        process = f"process {jax.process_index()}: " if are_several() else ""
        return f"{process}{self.what}: "

    def _serve(self) -> None:
        # Worker processes take over what a thread does not want: Ctrl-C is for the process that trains.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
        while self._asked.get():
            try:
                self._read.put((next(self.batches), None))
            except BaseException as error:
                self._read.put((None, error))


_WHERE_TO_LOOK = (
    "Look at the disk or the network under config.data.data_dir, and at the processes that read (config.data.workers). "
    "A signal still saves and stops"
)


@contextlib.contextmanager
def reading(batches: Batches, what: str) -> Iterator[Reader]:
    """A `Reader` that is closed at the end of the context."""
    with contextlib.closing(Reader(batches, what)) as reader:
        yield reader
