"""A trace of a few training steps, for XProf (`xprof WORKDIR/profile/STAGE`, or TensorBoard's profile plugin)."""

import contextlib
from typing import Any

import jax


class StepTrace(contextlib.AbstractContextManager):
    """Traces the steps of a range, as far as a stage has them, into `folder`; process 0 only."""

    def __init__(self, steps: range, folder: str) -> None:
        self._steps = steps if jax.process_index() == 0 else range(0)
        self._folder = folder
        self._tracing = False

    def at(self, step: int, state: Any) -> None:
        """Says that `step` comes next; `state` is what the steps so far lead to."""
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
