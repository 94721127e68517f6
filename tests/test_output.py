"""Output that a run can do without: a closed pipe, a lost terminal or a full disk stop no run and tear no line."""

import errno
import gc
import io
import json
import os
import resource
import sys

import numpy as np
import pytest

from tosa_jax.cli.command import run_command
from tosa_jax.distributed.messages import Hushed, let_go_of_broken_streams, say
from tosa_jax.train.checkpoints import Checkpoints
from tosa_jax.train.metric_writer import MetricWriter
from tosa_jax.train.progress import Chrono, Progress


class Broken(io.StringIO):
    """A stream that takes `room` texts, then fails as `code` says."""

    def __init__(self, code, room=0, is_terminal=False):
        super().__init__()
        self.code, self.room, self.is_terminal, self.tries = code, room, is_terminal, 0

    def isatty(self):
        return self.is_terminal

    def write(self, text):
        self.tries += 1
        if self.tries > self.room:
            raise OSError(self.code, os.strerror(self.code))
        return super().write(text)

    def flush(self):
        if self.tries > self.room:
            raise OSError(self.code, os.strerror(self.code))


CODES = pytest.mark.parametrize("code", [errno.EPIPE, errno.EIO, errno.ENOSPC])


@CODES
@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_progress_line_that_cannot_be_shown_stops_nothing(code, is_terminal, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = Broken(code, room=1, is_terminal=is_terminal)
    with Progress("finetune", 0, 10, stream) as progress:
        for step in range(1, 4):
            progress.update(step, 0.5, Chrono(0, 10, 8))
            progress.message("saved")
    assert 1 < stream.tries <= 3  # it is let go, not tried for ever


@CODES
def test_a_line_says_whether_it_was_said(code, monkeypatch):
    assert not say("x", Broken(code))
    monkeypatch.setattr(sys, "stderr", Broken(code))
    assert not say("x")
    closed = io.StringIO()
    closed.close()
    assert not say("x", closed)
    heard = io.StringIO()
    assert say("x", heard) and heard.getvalue() == "x\n"
    assert Hushed(None).write("abc") == 3


def test_a_broken_stream_is_let_go_before_the_end(tmp_path, monkeypatch):
    out, into = os.pipe()
    os.close(out)
    stream = os.fdopen(into, "w")
    stream.write("nobody reads this")
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(OSError):
        stream.flush()
    let_go_of_broken_streams()
    stream.flush()  # as Python does at its end
    assert os.fstat(into).st_rdev == os.stat(os.devnull).st_rdev
    stream.close()


def records(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_record_without_room_is_left_out_whole_and_told(tmp_path, capsys):
    path, (soft, hard) = tmp_path / "metrics.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    with MetricWriter(tmp_path) as writer:
        writer.write("a", 1, {})
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, hard))
        try:
            writer.write("a", 2, {})
            torn = path.read_bytes()
            writer.write("a", 3, {})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert len(torn.splitlines()[-1]) == 10  # the case that is to be mended
        writer.write("a", 4, {})
        assert records(path) == [1, 4]
    said = capsys.readouterr().err.splitlines()
    assert (
        said[0] == "metrics.jsonl cannot be written (File too large); training goes on without it"
    )
    assert said[1:] == ["metrics.jsonl is written again; 2 of its records are missing"]


def test_files_that_cannot_be_written_stop_no_metrics(tmp_path, capfd):
    (tmp_path / "metrics.jsonl").mkdir()
    (tmp_path / "tensorboard").write_text("a file where a folder should be")
    with MetricWriter(tmp_path) as writer:
        writer.truncate("a", 3)
        for step in range(3):
            writer.write("a", step, {"loss": 1.0})
            writer.image("a", step, "x", np.zeros((4, 4, 3), np.uint8))
    said = capfd.readouterr().err
    assert (
        said.count("metrics.jsonl cannot be written (Is a directory)") == 3
    )  # opening, dropping, writing
    assert said.count("tensorboard cannot be written") == 1


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
def test_what_the_system_refuses_is_one_line(code, capsys):
    def command():
        raise OSError(code, os.strerror(code), "runs/x/config.json")

    assert run_command(command) == 2
    assert capsys.readouterr().err.startswith(f"error: runs/x/config.json: {os.strerror(code)};")
    with pytest.raises(FileNotFoundError):  # any other error is a defect, and keeps its traceback
        run_command(lambda: open("/nowhere/at/all"))


def test_records_are_dropped_in_place_where_there_is_no_room_for_a_copy(tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    with MetricWriter(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.write("a", step, {})
        monkeypatch.setattr("tosa_jax.train.metric_writer.write_atomically", full)
        writer.truncate("a", 2)
        assert records(tmp_path / "metrics.jsonl") == [1, 2]


@pytest.mark.parametrize(
    ("step", "kept"), [(1, "no checkpoint was written"), (2, "the checkpoint of step 1 is kept")]
)
def test_a_checkpoint_without_room_is_a_few_lines_and_the_reason(
    step, kept, tmp_path, capsys, caplog
):
    """The system refuses larger files, as it does on a full disk; a few hundred lines of libraries would come."""
    state = {f"array {i}": np.random.default_rng(i).random((200, 200)) for i in range(30)}
    checkpoints = Checkpoints(tmp_path, "acc1")
    for before in range(1, step):
        checkpoints.save(before, state, {})
        checkpoints.wait()

    def command():
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
        try:
            checkpoints.save(step, state, {})
            checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        return 0

    assert run_command(command) == 2
    gc.collect()
    lines = caplog.text.splitlines()
    assert len(lines) <= 6 and all(x.startswith("ERROR") and len(x) < 400 for x in lines)
    *_, error = capsys.readouterr().err.splitlines()
    says = f"error: {tmp_path}: step {step} cannot be saved (File too large); {kept}. Mend"
    assert error.startswith(says)
