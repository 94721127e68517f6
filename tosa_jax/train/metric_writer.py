"""Metric records of a run: JSON lines for scripts, TensorBoard for people."""

import contextlib
import json
import math
import os
import time
from collections.abc import Mapping
from typing import Any, SupportsFloat

import numpy as np
import tensorboardX.summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import summary_pb2

from tosa_jax.distributed.messages import say
from tosa_jax.paths import Mirror, as_path, parse_json, write_atomically
from tosa_jax.train.event_files import EVENT, cut

_SUMMARY: Any = summary_pb2  # made at run time, where type checkers do not see it


class MetricWriter(contextlib.AbstractContextManager):
    """Appends records to `metrics.jsonl` and scalars to `tensorboard/<stage>` of a work directory.

    Each method writes to the disk before it returns: a killed run loses no record, and TensorBoard shows a running
    stage. Training can do without both: what cannot be written is left out, and a line on standard error says so.
    For a work directory in a bucket, files grow in a local folder and are copied every minute and by `flush`.

    Args:
        workdir: the work directory; made if missing.
        main_process: False makes every method do nothing, so that callers need not ask.
    """

    def __init__(self, workdir: str | os.PathLike, main_process: bool = True) -> None:
        self._main_process = main_process
        self._boards: dict[str, EventsWriter] = {}
        self._purge_steps: dict[str, int] = {}
        if main_process:
            self._files = Mirror(as_path(workdir))
            self._files.fetch("metrics.jsonl")
            self._path = self._files.folder / "metrics.jsonl"
            self._missing = 0  # records that could not be written, one after the other
            self._torn_at: int | None = None  # where a line began that was cut
            self._no_board = False
            # A killed process may leave half a line; the next record would be glued to it.
            try:
                with self._path.open("ab+") as file:
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
            except OSError as error:
                _say_left_out(self._path.name, error)

    def write(
        self, stage: str, step: int, metrics: Mapping[str, SupportsFloat], **extra: Any
    ) -> None:
        """Appends one record.

        Args:
            metrics: scalars by name. One that is not finite becomes null in JSON, and TensorBoard does not get it.
            **extra: further JSON values for the record, which TensorBoard does not get.

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
        self._append(line.encode())
        if finite:
            scalars = [
                _SUMMARY.Summary.Value(tag=name, simple_value=value)
                for name, value in finite.items()
            ]
            self._show(stage, step, _SUMMARY.Summary(value=scalars))
        self._push(now=False)

    def image(self, stage: str, step: int, name: str, hwc_uint8: np.ndarray) -> None:
        """Shows a picture, uint8 [height, width, 1 or 3], in TensorBoard."""
        if self._main_process:
            picture = tensorboardX.summary.image(name, hwc_uint8, dataformats="HWC")
            self._show(stage, step, picture)

    def truncate(self, stage: str, step: int, with_scores: bool = True) -> None:
        """Removes the records and events of `stage` after `step`, because a resumed run writes them again.

        with_scores=False removes those of the evaluation at `step` too.

        Lines that are no records are removed too. A TensorBoard that is running hides the events after `step`.
        """
        if not self._main_process:
            return
        if stage in self._boards:
            self._boards.pop(stage).close()
        self._purge_steps[stage] = step + 1
        try:
            lines = self._path.read_bytes().splitlines(keepends=True)
            kept = [line for line in lines if _is_record_until(line, stage, step, with_scores)]
            if kept != lines:
                self._replace(b"".join(kept))
        except OSError as error:
            _say_left_out(self._path.name, error)
        board = f"tensorboard/{stage}"
        try:
            self._files.fetch(board)
            cut(self._files.folder / board, lambda x: _is_event_until(x, step, with_scores))
        except OSError as error:
            _say_left_out(board, error)

    def flush(self) -> None:
        """Copies everything to the bucket. Due before each checkpoint: what came before it is not written again."""
        if self._main_process:
            self._push()

    def close(self) -> None:
        """Flushes and closes everything."""
        while self._boards:
            with contextlib.suppress(OSError, ValueError):
                self._boards.popitem()[1].close()
        if self._main_process:
            self._push()
            with contextlib.suppress(Exception):  # `_push` has told it
                self._files.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, line: bytes) -> None:
        """Writes a whole line, or none."""
        try:
            if self._torn_at is not None:
                os.truncate(self._path, self._torn_at)
                self._torn_at = None
            with self._path.open("ab") as file:  # closing it flushes the line
                self._torn_at = file.tell()
                file.write(line)
            self._torn_at = None
        except OSError as error:
            if not self._missing:
                _say_left_out(self._path.name, error)
            self._missing += 1
            return
        if self._missing:
            say(f"{self._path.name} is written again; {self._missing} of its records are missing")
            self._missing = 0

    def _replace(self, content: bytes) -> None:
        """Writes the file anew with less in it: atomically, or in place where there is no room for another one."""
        try:
            write_atomically(self._path, content)
        except OSError:
            with self._path.open("r+b") as file:
                file.write(content)
                file.truncate()

    def _push(self, *, now: bool = True) -> None:
        try:
            self._files.push(now=now)
        except (
            Exception
        ) as error:  # clients of buckets have errors of their own; the next push tries again
            _say_left_out("the copy of metrics in the bucket", error)

    def _show(self, stage: str, step: int, summary: Any) -> None:
        if self._no_board:
            return
        try:
            board = self._board(stage)
            board.write_event(EVENT.Event(step=int(step), wall_time=time.time(), summary=summary))
            board.flush()
        except (OSError, ValueError) as error:
            self._no_board = True  # until the next start: each try would leave another empty file
            _say_left_out("tensorboard", error)

    def _board(self, stage: str) -> EventsWriter:
        """The event file of a stage. tensorboardX's `SummaryWriter` queues events, and its flush leaves them there."""
        if stage not in self._boards:
            folder = self._files.folder / "tensorboard" / stage
            folder.mkdir(parents=True, exist_ok=True)
            # The name has whole seconds: a second file within one would replace the first.
            board = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
            if (first := self._purge_steps.pop(stage, None)) is not None:
                start = EVENT.SessionLog(status=EVENT.SessionLog.START)
                board.write_event(EVENT.Event(step=first, wall_time=time.time(), session_log=start))
            self._boards[stage] = board
        return self._boards[stage]


def _say_left_out(what: str, error: Exception) -> None:
    why = getattr(error, "strerror", None) or error
    say(f"{what} cannot be written ({why}); training goes on without it")


def _is_record_until(line: bytes, stage: str, step: int, with_scores: bool) -> bool:
    try:
        record = parse_json(line)
        of_evaluation = any(name.startswith("val/") for name in record)
        last = step if with_scores or not of_evaluation else step - 1
        return record["stage"] != stage or record["step"] <= last
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


def _is_event_until(event: Any, step: int, with_scores: bool) -> bool:
    if event.HasField("session_log"):
        return event.step <= step + 1  # after it comes the evaluation at `step`, where it was due
    values = event.summary.value
    # Only evaluations draw.
    of_evaluation = any(x.tag.startswith("val/") or x.HasField("image") for x in values)
    return event.step <= (step if with_scores or not of_evaluation else step - 1)
