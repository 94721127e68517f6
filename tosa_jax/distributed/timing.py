"""The timer of benchmarks: programs that take turns on one device, timed by the clock of the host."""

import time
from collections.abc import Callable, Sequence

import numpy as np


def interleaved_seconds(
    runs: Sequence[Callable[[], object]], rounds: int, pauses: Sequence[float] | None = None
) -> np.ndarray:
    """Times every run once a round, one after the other.

    A machine that slows down for a while then slows down all of them. One more round comes first, to warm up; it is not
    in the result.

    runs    each starts its program and returns when the result is there.
    pauses  seconds to sleep after each run, outside the timing; None: no pause.

    Returns seconds, float64 [rounds, runs].
    """
    pauses = [0.0] * len(runs) if pauses is None else pauses
    seconds = np.zeros((rounds + 1, len(runs)))
    for i in range(rounds + 1):
        for j, (run, pause) in enumerate(zip(runs, pauses, strict=True)):
            start = time.perf_counter()
            run()
            seconds[i, j] = time.perf_counter() - start
            time.sleep(pause)
    return seconds[1:]
