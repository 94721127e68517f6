"""Stopping by a signal: the current step is finished and saved, in all processes at the same step."""

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field

import jax
from jax.experimental import multihost_utils

from tosa_jax.distributed.coordination import first_said

SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""Signals that make a run save and stop: a scheduler's SIGTERM, and SIGINT (Ctrl-C)."""


class Stopped(Exception):
    """Training was stopped by a signal after a checkpoint was written."""

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
        # The service receives SIGTERM, Python does not. A SIGINT in any process is the signal of all of them.
        interrupt = first_said(str(self.signum) if self.signum == signal.SIGINT else "")
        self.signum = int(interrupt or signal.SIGTERM)
        return self.signum


@contextlib.contextmanager
def catch_signals() -> Iterator[StopRequest]:
    """In this context SIGTERM and SIGINT ask to stop after the current step. A second one ends the process as usual.

    With several processes, JAX's preemption service handles SIGTERM from the time they joined, and tells the other
    processes. Cloud TPU sends SIGTERM before maintenance.
    """
    request = StopRequest()
    previous = {}

    def handler(signum, frame):
        request.signum = signum
        for number, old in previous.items():
            signal.signal(number, old)
        if jax.distributed.is_initialized():
            os.kill(os.getpid(), signal.SIGTERM)

    for number in SIGNALS[1:] if jax.distributed.is_initialized() else SIGNALS:
        previous[number] = signal.signal(number, handler)
    try:
        yield request
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
