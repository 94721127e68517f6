"""The progress of a running stage: its clock and its progress line."""

import contextlib
import io
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import TextIO, cast

import rich.console
import rich.progress

from tosa_jax.distributed.messages import Hushed
from tosa_jax.reporting.report import format_seconds

Clock = Callable[[], float]

_WARM_UP_TICKS = 2  # not counted: they include the compilation and the first batch


class Chrono:
    """Measures the time of the steps of one stage.

    The device runs behind the host. Call `tick` only after a value of that step was fetched: then the device has done
    the step.

    Args:
        first_step: the step the run starts or goes on from.
        total_steps: the step at which the stage ends.
        images_per_step: global batch size.
        clock: returns seconds; injected so that tests are exact.
    """

    def __init__(
        self, first_step: int, total_steps: int, images_per_step: int, clock: Clock = time.monotonic
    ) -> None:
        self.total_steps = total_steps
        self.images_per_step = images_per_step
        self.pauses: dict[str, float] = {}  # seconds by name, warm-up included
        self._clock = clock
        self._started = self._last_tick = clock()
        self._step = first_step
        self._ticks = 0
        self._paused_by: str | None = None
        self._interval_pause = self._interval_wait = 0.0  # since the last tick
        self._train_seconds = self._pause_seconds = self._wait_seconds = 0.0  # since the warm-up
        self._steps = 0

    def tick(self, step: int) -> None:
        """Says that `step` steps are done.

        Raises:
            ValueError: the step does not grow, or a pause is still going on.
        """
        if step <= self._step or self._paused_by is not None:
            raise ValueError(f"tick({step}) after step {self._step}, pause {self._paused_by!r}")
        now = self._clock()
        self._ticks += 1
        if self._ticks > _WARM_UP_TICKS:
            self._steps += step - self._step
            self._train_seconds += now - self._last_tick - self._interval_pause
            self._pause_seconds += self._interval_pause
            self._wait_seconds += self._interval_wait
        self._step, self._last_tick = step, now
        self._interval_pause = self._interval_wait = 0.0

    @contextlib.contextmanager
    def pause(self, name: str) -> Iterator[None]:
        """Time that is not training, such as "evaluate" or "checkpoint".

        Raises:
            ValueError: another pause is going on; the time would count twice.
        """
        if self._paused_by is not None:
            raise ValueError(f"pause {name!r} inside the pause {self._paused_by!r}")
        self._paused_by = name
        start = self._clock()
        try:
            yield
        finally:
            self._paused_by = None
            seconds = self._clock() - start
            self._interval_pause += seconds
            self.pauses[name] = self.pauses.get(name, 0.0) + seconds

    @contextlib.contextmanager
    def data_wait(self) -> Iterator[None]:
        """Time in which the loop waits for a batch; inside a pause it belongs to the pause."""
        start = self._clock()
        yield
        if self._paused_by is None:
            self._interval_wait += self._clock() - start

    @property
    def images_per_second(self) -> float:
        """Global images a second, pauses and warm-up left out; NaN before that is known."""
        images = self._steps * self.images_per_step
        return images / self._train_seconds if self._train_seconds > 0 else math.nan

    @property
    def data_wait_fraction(self) -> float:
        """Share of that time spent waiting for data, 0 to 1; NaN before that is known."""
        return self._wait_seconds / self._train_seconds if self._train_seconds > 0 else math.nan

    @property
    def eta_seconds(self) -> float:
        """Seconds to `total_steps`, pauses as frequent as so far; NaN before that is known."""
        seconds = self._train_seconds + self._pause_seconds
        left = max(self.total_steps - self._step, 0)
        return left * seconds / self._steps if self._steps else math.nan

    @property
    def elapsed_seconds(self) -> float:
        """Seconds since this object was made, everything included."""
        return self._clock() - self._started


class Progress(contextlib.AbstractContextManager):
    """A progress bar on a terminal, plain lines elsewhere. A stream that takes nothing more is let go without a word.

    Args:
        stage: name of the stage.
        first_step: the step the run starts or goes on from.
        total_steps: the step at which the stage ends.
        stream: where to write; standard error if None, so that standard output holds results only.
        main_process: False makes every method do nothing, so that callers need not ask.
    """

    def __init__(
        self,
        stage: str,
        first_step: int,
        total_steps: int,
        stream: io.TextIOBase | None = None,
        main_process: bool = True,
    ) -> None:
        self._stage = stage
        self._total_steps = total_steps
        # To type checkers no class of `io` is a TextIO, which is what others ask for.
        self._stream = cast(TextIO, Hushed(sys.stderr if stream is None else stream))
        self._main_process = main_process
        self._bar: rich.progress.Progress | None = None
        console = rich.console.Console(file=self._stream)
        if main_process and self._stream.isatty() and not console.is_dumb_terminal:
            numbers = "{task.completed}/{task.total} {task.fields[text]}"
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("{task.description}", markup=False),
                rich.progress.BarColumn(bar_width=None),
                rich.progress.TextColumn(numbers, markup=False),
                console=console,
                expand=True,
            )
            self._task = self._bar.add_task(stage, total=total_steps, completed=first_step, text="")
            self._bar.start()

    def update(self, step: int, loss: float, chrono: Chrono, mfu: float | None = None) -> None:
        """Shows the state after `step`; off a terminal every call prints a line.

        `mfu` is the share of the devices' peak that is used; NaN where that is unknown, None to say nothing of it.
        """
        speed = chrono.images_per_second
        share = "n/a" if mfu is None or math.isnan(mfu) else f"{mfu:.0%}"
        utilisation = "" if mfu is None or math.isnan(speed) else f" | MFU {share}"
        text = (
            f"| loss {f'{loss:#.3g}'.rstrip('.')}"
            f" | {f'{speed:.0f}' if speed >= 10 else f'{speed:.2g}'} img/s"
            f" | data {chrono.data_wait_fraction:.0%}"
            f"{utilisation}"
            f" | ETA {format_seconds(chrono.eta_seconds)}"
        ).replace("| nan img/s | data nan%", "| -- img/s | data --")
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
        else:
            percent = 100 * step / max(self._total_steps, 1)
            self.message(f"{self._stage} step {step}/{self._total_steps} {percent:.1f}% {text}")

    def message(self, text: str) -> None:
        """Prints one line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif self._main_process:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Ends the bar and leaves its last state on the screen."""
        if self._bar is not None:
            self._bar.stop()

    def __exit__(self, *_: object) -> None:
        self.close()
