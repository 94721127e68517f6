"""Stopping by a signal: the current step is finished and saved, in all processes at the same step."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.experimental import multihost_utils

from tosa_jax.distributed.coordination import are_several, end_all, first_said
from tosa_jax.distributed.messages import say

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""Signals that make a run save and stop: a scheduler's SIGTERM, Ctrl-C, a terminal that is gone, Slurm's warning."""


class Stopped(BaseException):
    """A signal stops the run; while it trains, after a checkpoint was written.

    Like KeyboardInterrupt no Exception: it may be raised anywhere, and nobody who translates errors means it.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


@dataclass
class StopRequest:
    """The signal that asked this process to stop; None if there was none."""

    signum: int | None = None
    _calls: int = field(default=0, repr=False)

    def agreed(self) -> int | None:
        """The signal to stop by, or None. Every process calls this once a step and gets the same result.

        With several processes, JAX's preemption service reacts to the first signal in any of them: it chooses a later
        call, the same in all processes, that returns the signal. Until then calls return at once.
        """
        if not jax.distributed.is_initialized():
            return self.signum
        self._calls += 1  # counted over all stages: the service expects numbers that only grow
        if not multihost_utils.reached_preemption_sync_point(self._calls):
            return None
        # The service receives SIGTERM, Python does not. Any other signal in a process is the signal of all of them.
        other = first_said(str(self.signum or ""))
        self.signum = int(other or signal.SIGTERM)
        return self.signum


_active: list[StopRequest] = []  # of `catch_signals`; a run has one


def stop_if_asked() -> None:
    """Raises Stopped if a signal came, wherever all that was done so far is saved, or can be saved by who calls.

    Of several processes none stops alone: there it does nothing, and `StopRequest.agreed` decides.
    """
    if _active and _active[-1].signum is not None and not are_several():
        raise Stopped(_active[-1].signum)


@contextlib.contextmanager
def catch_signals(grace_seconds: float = 0.0) -> Iterator[StopRequest]:
    """Where the first of `SIGNALS` asks to stop after the current step; a second one ends the process at once.

    A process that has not left the context so many seconds after the first one is ended, with a line: input or a device
    hangs, or a program takes long to compile. 0: never. What was saved before is whole in any case.

    A signal that was ignored before, as SIGHUP under nohup, stays ignored. With several processes, JAX's preemption
    service handles SIGTERM from the time they joined, and tells the other processes. Cloud TPU sends SIGTERM before
    maintenance.
    """
    request = StopRequest()
    late: list[threading.Timer] = []

    def handler(signum, frame):
        if request.signum is not None:
            _end(request.signum, f"{signal.Signals(signum).name} came again: ending at once")
        request.signum = signum
        if jax.distributed.is_initialized():
            os.kill(os.getpid(), signal.SIGTERM)

    caught = SIGNALS[1:] if jax.distributed.is_initialized() else SIGNALS
    try:
        with (
            _told_at_once(caught, lambda n: late.append(_end_later(grace_seconds, n))),
            _handled(caught, handler),
        ):
            _active.append(request)
            try:
                yield request
            finally:
                _active.pop()
    finally:
        for timer in late:
            timer.cancel()


@contextlib.contextmanager
def signals_stop_at_once() -> Iterator[None]:
    """In this context each of `SIGNALS` raises Stopped, as long as `catch_signals` does not take over.

    For the time before and after training, when there is nothing to save. A signal that was ignored stays ignored. One
    of several processes ends, and the others with it: they do not wait for one that left.
    """

    def handler(signum, frame):
        if are_several():
            _end(signum, "outside of training")
        raise Stopped(signum)

    with _handled(SIGNALS, handler), _never_ignored():
        yield


@contextlib.contextmanager
def _never_ignored() -> Iterator[None]:
    """Where a signal comes again whose Stopped was raised where Python drops errors: in a `__del__`, or while it
    collects garbage."""
    before = sys.unraisablehook

    def hook(unraisable) -> None:
        stopped = unraisable.exc_value
        if not isinstance(stopped, Stopped):
            before(unraisable)
            return
        again = threading.Timer(0.02, os.kill, (os.getpid(), stopped.signum))
        again.daemon = True
        again.start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


@contextlib.contextmanager
def _handled(signals: Collection[int], handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Where these signals call a handler, except those that were ignored before."""
    caught = [n for n in signals if signal.getsignal(n) not in (signal.SIG_IGN, None)]
    previous = {number: signal.signal(number, handler) for number in caught}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


@contextlib.contextmanager
def _told_at_once(signals: Collection[int], tell: Callable[[int], Any]) -> Iterator[None]:
    """Calls `tell(signum)` in a thread at the first of these signals, even if Python's main thread is in a long call.

    Python's own handlers run in the main thread, when it is back in Python.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def listen() -> None:
        while numbers := os.read(reader, 64):
            if found := [n for n in numbers if n in signals]:
                tell(found[0])
                return

    thread = threading.Thread(target=listen, name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)
        thread.join()
        os.close(reader)


def _end_later(seconds: float, signum: int) -> threading.Timer:
    why = f"the run did not come to a point where it can be saved in grace_seconds={seconds:g}"
    timer = threading.Timer(seconds, _end, (signum, why))
    timer.daemon = True
    if seconds:
        timer.start()
    return timer


def _end(signum: int, why: str) -> None:
    """Ends this process without more ado."""
    say(f"{Stopped(signum)}; {why}; start the same command again to go on from the last checkpoint")
    os._exit(end_all(128 + signum, str(Stopped(signum))))
