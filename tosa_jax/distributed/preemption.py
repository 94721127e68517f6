"""Stopping by a signal: the step in progress is finished and saved, on all processes at the same one."""

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field

import jax
from jax.experimental import multihost_utils

from tosa_jax.distributed.coordination import first_said

SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""Those that ask a run to save and stop: a scheduler's, and Ctrl-C."""


class Stopped(Exception):
    """Training was stopped by a signal after a checkpoint was written."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


@dataclass
class StopRequest:
    """The signal that asked this process for the end, if any."""

    signum: int | None = None
    _calls: int = field(default=0, repr=False)

    def agreed(self) -> int | None:
        """The signal to stop by now, or None; every process calls this once a step and gets the same answer.

        With several processes, the first notice anywhere makes JAX's preemption service choose a call that none of
        them has reached yet: in between, nothing is exchanged and nobody waits.
        """
        if not jax.distributed.is_initialized():
            return self.signum
        self._calls += 1  # over all stages: the service compares numbers, which must never fall
        if not multihost_utils.reached_preemption_sync_point(self._calls):
            return None
        # SIGTERM reaches the service and not Python; an interrupt from a keyboard anywhere names the end of all.
        interrupt = first_said(str(self.signum) if self.signum == signal.SIGINT else "")
        self.signum = int(interrupt or signal.SIGTERM)
        return self.signum


@contextlib.contextmanager
def catch_signals() -> Iterator[StopRequest]:
    """SIGTERM and SIGINT ask to stop after the step in progress; a second SIGINT acts as usual.

    So does a second SIGTERM where there is one process. Where there are several it stays with JAX's preemption
    service, which took SIGTERM when they joined and tells the others: on Cloud TPU that is the maintenance notice.
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
