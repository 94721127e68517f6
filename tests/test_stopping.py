"""Stopping by signals: input that stalls, a second signal, a run that hangs; kills at random moments."""

import gc
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tosa_jax.distributed import preemption
from tosa_jax.distributed.preemption import (
    SIGNALS,
    Stopped,
    catch_signals,
    signals_stop_at_once,
    stop_if_asked,
)
from tosa_jax.errors import ConfigError
from tosa_jax.train import reading

ROOT = Path(__file__).parents[1]


class Slow:
    """Batches 0, 1, 2, ..., each of which comes when it is let."""

    def __init__(self):
        self.let, self.closed, self.next = queue.SimpleQueue(), False, 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.let.get() == "end":
            raise StopIteration
        self.next += 1
        return {"number": self.next - 1}

    def close(self):
        self.closed = True


def test_batches_come_in_order_to_their_end_and_errors_come_through():
    slow = Slow()
    for _ in range(3):
        slow.let.put("go")
    slow.let.put("end")
    with reading.reading(slow, "x") as reader:
        assert [batch["number"] for batch in reader] == [0, 1, 2]
    assert slow.closed
    broken = iter_of(lambda: 1 / 0)
    with reading.reading(broken, "x") as reader, pytest.raises(ZeroDivisionError):
        next(reader)


@pytest.fixture(autouse=True)
def nothing_is_ignored():
    """Who starts the tests may ignore some signals, as a shell does for what runs in the background."""
    before = {signum: signal.signal(signum, signal.SIG_DFL) for signum in SIGNALS}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


def iter_of(make):
    return (make() for _ in range(1))


def test_input_that_stalls_is_told_and_told_when_it_goes_on(monkeypatch, capsys):
    now, slow = [0.0], Slow()
    monkeypatch.setattr(reading, "ASK_SECONDS", 0.001)
    asked = []

    def pass_time():
        asked.append(now[0])
        now[0] += 10.0
        if len(asked) == 13:
            slow.let.put("go")
            threading.Event().wait(0.05)

    monkeypatch.setattr(reading, "stop_if_asked", pass_time)
    with reading.reading(slow, "pretrain") as reader:
        reader.clock = lambda: now[0]
        assert next(reader)["number"] == 0
    first, second, third, last = capsys.readouterr().err.splitlines()
    assert first.startswith("pretrain: no batch for 30 s. Look at the disk or the network under")
    assert "no batch for 60 s" in second and "no batch for 120 s" in third
    assert last.startswith("pretrain: goes on, 1")


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_ends_the_wait_for_a_batch_that_does_not_come(signum, monkeypatch):
    slow = Slow()
    monkeypatch.setattr(reading, "CLOSE_SECONDS", 0.01)
    with catch_signals(), reading.reading(slow, "x") as reader:
        timer = threading.Timer(0.2, os.kill, (os.getpid(), signum))
        timer.start()
        with pytest.raises(Stopped) as stopped:
            next(reader)
        timer.join()
    assert stopped.value.signum == signum
    assert not slow.closed  # closing might wait for ever
    stop_if_asked()  # outside of the context nothing asks
    slow.let.put("end")


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with catch_signals() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.signum is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_counts_where_python_drops_errors_and_where_others_translate_them():
    def collected(phase, info):
        gc.callbacks.remove(collected)
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Stopped) as stopped, signals_stop_at_once():
        gc.callbacks.append(collected)
        gc.collect()
        time.sleep(10)  # interrupted
    assert stopped.value.signum == signal.SIGTERM
    with pytest.raises(Stopped), signals_stop_at_once():
        try:
            signal.raise_signal(signal.SIGINT)
        except Exception as error:
            raise ConfigError(f"command line: {error}") from error


@pytest.fixture
def ended(monkeypatch):
    """The statuses with which the process would have been ended."""
    found = queue.SimpleQueue()

    def end_all(status, why):
        found.put(status)
        return status

    monkeypatch.setattr(preemption, "end_all", end_all)
    monkeypatch.setattr(preemption.os, "_exit", lambda status: None)
    return found


def test_a_second_signal_ends_the_process_at_once(ended, capsys):
    with catch_signals() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.signum == signal.SIGTERM and ended.empty()
        signal.raise_signal(signal.SIGINT)
        assert ended.get(timeout=10) == 143
    assert "stopped by SIGTERM; SIGINT came again: ending at once" in capsys.readouterr().err


def test_a_run_that_hangs_ends_when_its_grace_is_over(ended, capsys):
    with catch_signals(grace_seconds=0.05):
        signal.raise_signal(signal.SIGTERM)
        assert ended.get(timeout=60) == 143  # though nobody asks
    assert "grace_seconds=0.05" in capsys.readouterr().err
    with catch_signals(grace_seconds=60):
        signal.raise_signal(signal.SIGTERM)
    for timer in (x for x in threading.enumerate() if isinstance(x, threading.Timer)):
        timer.join(10)  # cancelled, it ends
    assert ended.empty()


PARENT = """
import multiprocessing, os, time
from tosa_jax.data.workers import follow_parent

def work():
    follow_parent(0, 1)
    print(os.getpid(), flush=True)
    time.sleep(600)

multiprocessing.get_context("fork").Process(target=work).start()
time.sleep(600)
"""


@pytest.mark.subprocess
def test_a_worker_ends_when_the_process_that_started_it_is_killed():
    command = [sys.executable, "-c", PARENT]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        stat = Path(f"/proc/{int(parent.stdout.readline())}/stat")
        for signum in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            os.kill(int(stat.parent.name), signum)  # not for a worker
        assert is_alive(stat)
        parent.kill()
    end = time.monotonic() + 60
    while is_alive(stat) and time.monotonic() < end:
        time.sleep(0.01)
    assert not is_alive(stat)


def is_alive(stat: Path) -> bool:
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX"


@pytest.mark.subprocess
def test_a_run_that_is_killed_ends_as_one_that_is_left_alone():
    command = [sys.executable, "-m", "tests.kill", "--stages=one", "--kills=1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '"kills": 1' in done.stdout and '"faults": 0' in done.stdout
