"""A trace of a few training steps, for XProf (`xprof WORKDIR/profile/STAGE`, or TensorBoard's profile plugin)."""

import contextlib
from typing import Any

import jax


class StepTrace(contextlib.AbstractContextManager):
    """Traces the steps of a range into `folder`, on process 0 alone. Steps that the stage does not have are ignored."""

    def __init__(self, steps: range, folder: str) -> None:
        self._steps = steps if jax.process_index() == 0 else range(0)
        self._folder = folder
        self._tracing = False

    def at(self, step: int, state: Any) -> None:
        """To be called before each step, with the state that the steps before it lead to."""
        if self._tracing and step not in self._steps:
            jax.block_until_ready(state)
            self._stop()
        elif not self._tracing and step in self._steps:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._folder)
            self._tracing = True

    def _stop(self) -> None:
        self._tracing = False
        jax.profiler.stop_trace()

    def __exit__(self, *_: object) -> None:
        if self._tracing:
            self._stop()
