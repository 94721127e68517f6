"""What a long run says while it runs: its clock, its metric records and its progress line."""

import contextlib
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, SupportsFloat

import numpy as np
import rich.console
import rich.progress
import tensorboardX

Clock = Callable[[], float]

_WARM_UP_TICKS = 2  # they hold the compilation and the first, cold batch


class Chrono:
    """Clocks the steps of one stage.

    The device runs behind the host, so call `tick` only after a value of that step was fetched:
    only then has the device done the work that is being clocked.

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


def write_atomically(path: str | os.PathLike, data: bytes) -> None:
    """Writes a whole file: a reader finds the old bytes or the new ones, never a part."""
    path = Path(path)
    # tempfile would make the file private to its owner, and runs are shared.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class MetricWriter(contextlib.AbstractContextManager):
    """Appends records to `metrics.jsonl` and scalars to `tensorboard/<stage>` of a work directory.

    Args:
        workdir: the work directory; made if missing.
        main_process: False makes every method do nothing, so that callers need not ask.
    """

    def __init__(self, workdir: str | os.PathLike, main_process: bool = True) -> None:
        self._workdir = Path(workdir)
        self._path = self._workdir / "metrics.jsonl"
        self._main_process = main_process
        self._boards: dict[str, tensorboardX.SummaryWriter] = {}
        self._purge_steps: dict[str, int] = {}
        if main_process:
            self._workdir.mkdir(parents=True, exist_ok=True)
            # A killed process may leave half a line; the next record would be glued to it.
            with self._path.open("ab+") as file:
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)

    def write(
        self, stage: str, step: int, metrics: Mapping[str, SupportsFloat], **extra: Any
    ) -> None:
        """Appends one record.

        Args:
            metrics: scalars by name; a value that is not finite becomes null, which JSON can say.
            **extra: further JSON values of the record, which TensorBoard does not get.

        Raises:
            ValueError: two values of the record have the same name.
        """
        if not self._main_process:
            return
        record = {"stage": stage, "step": int(step)}
        values = {name: float(value) for name, value in metrics.items()}
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        if twice := values.keys() & (record.keys() | extra.keys()):
            raise ValueError(f"the record has {sorted(twice)} twice")
        record |= {name: finite.get(name) for name in values} | extra
        line = json.dumps(record, allow_nan=False) + "\n"
        with self._path.open("a", encoding="utf-8") as file:  # closing it flushes the line
            file.write(line)
        for name, value in finite.items():
            self._board(stage).add_scalar(name, value, step)

    def image(self, stage: str, step: int, name: str, hwc_uint8: np.ndarray) -> None:
        """Shows a picture, uint8 [height, width, 1 or 3], in TensorBoard."""
        if self._main_process:
            self._board(stage).add_image(name, hwc_uint8, step, dataformats="HWC")

    def truncate(self, stage: str, step: int) -> None:
        """Removes the records of `stage` after `step`: a resumed run writes them once more.

        Lines that hold no record go too. TensorBoard hides the events after `step`.
        """
        if not self._main_process:
            return
        if stage in self._boards:
            self._boards.pop(stage).close()
        self._purge_steps[stage] = step + 1
        lines = self._path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if _is_record_until(line, stage, step)]
        write_atomically(self._path, b"".join(kept))

    def close(self) -> None:
        """Flushes and closes everything; a later `write` opens it again."""
        while self._boards:
            self._boards.popitem()[1].close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _board(self, stage: str) -> tensorboardX.SummaryWriter:
        if stage not in self._boards:
            folder = str(self._workdir / "tensorboard" / stage)
            first = self._purge_steps.pop(stage, None)
            self._boards[stage] = tensorboardX.SummaryWriter(folder, purge_step=first)
        return self._boards[stage]


def _is_record_until(line: bytes, stage: str, step: int) -> bool:
    try:
        record = json.loads(line)
        return record["stage"] != stage or record["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False


def format_seconds(seconds: float) -> str:
    """A duration for people: "4.2s", "37s", "3m12s", "3h12m", "2d04h"; "--" if not finite."""
    if not math.isfinite(seconds):
        return "--"
    if round(seconds, 1) < 10:
        return f"{max(seconds, 0):.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


class Progress(contextlib.AbstractContextManager):
    """A progress bar on a terminal, plain lines elsewhere.

    Args:
        stage: name of the stage.
        first_step: the step the run starts or goes on from.
        total_steps: the step at which the stage ends.
        stream: where to write; standard error if None, so that standard output holds results only.
    """

    def __init__(
        self, stage: str, first_step: int, total_steps: int, stream: io.TextIOBase | None = None
    ) -> None:
        self._stage = stage
        self._total_steps = total_steps
        self._stream = sys.stderr if stream is None else stream
        self._bar: rich.progress.Progress | None = None
        console = rich.console.Console(file=self._stream)
        if self._stream.isatty() and not console.is_dumb_terminal:
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
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Ends the bar and leaves its last state on the screen."""
        if self._bar is not None:
            self._bar.stop()

    def __exit__(self, *_: object) -> None:
        self.close()
