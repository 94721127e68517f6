"""Clock, metric records and progress line."""

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from tosa_jax.paths import write_atomically
from tosa_jax.reporting.report import format_seconds
from tosa_jax.train.metric_writer import MetricWriter
from tosa_jax.train.progress import Chrono, Progress


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def spend(clock: Clock, seconds: float) -> None:
    clock.now += seconds


def warm_chrono(first_step: int = 0, total_steps: int = 100) -> tuple[Chrono, Clock]:
    """Two slow ticks of ten steps, with a pause and a wait that must not count."""
    clock = Clock()
    chrono = Chrono(first_step, total_steps, images_per_step=32, clock=clock)
    for i in (1, 2):
        spend(clock, 500)
        with chrono.data_wait():
            spend(clock, 70)
        with chrono.pause("evaluate"):
            spend(clock, 3)
        chrono.tick(first_step + 10 * i)
    return chrono, clock


def test_nothing_is_known_during_the_warm_up() -> None:
    chrono, _ = warm_chrono()
    assert math.isnan(chrono.images_per_second)
    assert math.isnan(chrono.data_wait_fraction)
    assert math.isnan(chrono.eta_seconds)


def test_speed_leaves_pauses_and_warm_up_out_and_eta_keeps_pauses() -> None:
    chrono, clock = warm_chrono(first_step=40)
    with chrono.data_wait():
        spend(clock, 1)
    spend(clock, 3)
    with chrono.pause("evaluate"):
        spend(clock, 6)
        with chrono.data_wait():
            spend(clock, 2)
    with chrono.pause("checkpoint"):
        spend(clock, 8)
    chrono.tick(80)  # 20 steps: 4 s of training, 16 s of pauses
    assert chrono.images_per_second == 20 * 32 / 4
    assert chrono.data_wait_fraction == 0.25
    assert chrono.eta_seconds == 20 * (4 + 16) / 20
    assert chrono.pauses == {"evaluate": 3 + 3 + 8, "checkpoint": 8}
    assert chrono.elapsed_seconds == 2 * 573 + 20


def test_a_pause_counts_when_it_is_left_by_an_exception() -> None:
    chrono, clock = warm_chrono()
    with pytest.raises(KeyError), chrono.pause("evaluate"):
        spend(clock, 5)
        raise KeyError
    spend(clock, 2)
    chrono.tick(30)
    assert chrono.images_per_second == 10 * 32 / 2


def test_wrong_use_of_the_clock_is_refused() -> None:
    chrono, _ = warm_chrono()
    with pytest.raises(ValueError, match="after step 20"):
        chrono.tick(20)
    with pytest.raises(ValueError, match="inside the pause 'a'"):
        with chrono.pause("a"), chrono.pause("b"):
            pass
    with pytest.raises(ValueError, match="pause 'a'"), chrono.pause("a"):
        chrono.tick(30)


def records(workdir: Path) -> list[dict]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def events(workdir: Path, stage: str) -> list[Event]:
    """TFRecord frames: length, checksum, payload, checksum."""
    found = []
    for path in sorted((workdir / "tensorboard" / stage).iterdir()):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            found.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


def test_a_record_is_one_json_line_at_once(tmp_path: Path) -> None:
    with MetricWriter(tmp_path / "new") as writer:
        writer.write("finetune", 3, {"train/loss": np.float32(0.5)}, split="val")
        expected = {"stage": "finetune", "step": 3, "train/loss": 0.5, "split": "val"}
        assert records(tmp_path / "new") == [expected]
    values = [
        value for event in events(tmp_path / "new", "finetune") for value in event.summary.value
    ]
    assert [(value.tag, value.simple_value) for value in values] == [("train/loss", 0.5)]


def test_what_is_not_finite_becomes_null(tmp_path: Path) -> None:
    with MetricWriter(tmp_path) as writer:
        writer.write("a", 1, {"loss": math.nan, "norm": math.inf, "lr": 0.5})
    assert records(tmp_path) == [{"stage": "a", "step": 1, "loss": None, "norm": None, "lr": 0.5}]


@pytest.mark.parametrize("name", ["step", "split"])
def test_a_name_twice_is_refused(tmp_path: Path, name: str) -> None:
    with MetricWriter(tmp_path) as writer, pytest.raises(ValueError, match=f"'{name}'.* twice"):
        writer.write("a", 1, {name: 2.0}, split="val")
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_half_written_line_is_dropped_on_opening(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stage": "a", "step": 1}\n{"stage": "a", "st')
    with MetricWriter(tmp_path) as writer:
        writer.write("a", 2, {})
    assert records(tmp_path) == [{"stage": "a", "step": 1}, {"stage": "a", "step": 2}]


def test_truncate_removes_only_later_records_of_its_stage(tmp_path: Path) -> None:
    with MetricWriter(tmp_path) as writer:
        for stage in ("selector", "finetune"):
            for step in (10, 20, 30):
                writer.write(stage, step, {"loss": float(step)})
    with MetricWriter(tmp_path) as writer:
        writer.truncate("finetune", 20)
        writer.write("finetune", 30, {"loss": 0.5})
    steps = [(record["stage"], record["step"]) for record in records(tmp_path)]
    assert steps == [("selector", s) for s in (10, 20, 30)] + [
        ("finetune", s) for s in (10, 20, 30)
    ]
    assert records(tmp_path)[-1]["loss"] == 0.5
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")] == []
    purges = [event.step for event in events(tmp_path, "finetune") if event.session_log.status == 1]
    assert purges == [21]


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    with MetricWriter(tmp_path / "run", main_process=False) as writer:
        writer.write("a", 1, {"loss": 1.0})
        writer.image("a", 1, "x", np.zeros((4, 4, 3), np.uint8))
        writer.truncate("a", 0)
    assert not (tmp_path / "run").exists()


def test_an_image_reaches_tensorboard(tmp_path: Path) -> None:
    with MetricWriter(tmp_path) as writer:
        writer.image("a", 7, "tokens", np.zeros((4, 6, 3), np.uint8))
    (event,) = (event for event in events(tmp_path, "a") if event.summary.value)
    image = event.summary.value[0].image
    assert (event.step, image.height, image.width) == (7, 4, 6)


def test_a_killed_run_has_shown_tensorboard_everything(tmp_path: Path) -> None:
    with MetricWriter(tmp_path) as killed, MetricWriter(tmp_path) as resumed:
        for step in range(1, 8):
            killed.write("a", step, {"train/loss": step, "perf/img_per_sec": 9.0})
        killed.image("a", 7, "tokens", np.zeros((4, 6, 3), np.uint8))
        before = [(event.step, len(event.summary.value)) for event in events(tmp_path, "a")]
        assert before == [(0, 0), *((step, 2) for step in range(1, 8)), (7, 1)]
        resumed.truncate("a", 5)
        resumed.write("a", 6, {"train/loss": 0.5})
        after = [(event.step, event.session_log.status) for event in events(tmp_path, "a")]
        assert after == [*((step, 0) for step in range(6)), (0, 0), (6, 1), (6, 0)]


@pytest.mark.parametrize("with_scores", [False, True])
def test_tensorboard_has_an_evaluation_once_wherever_the_run_was_killed(
    tmp_path: Path, with_scores: bool
) -> None:
    def go_on(scored: bool) -> None:
        with MetricWriter(tmp_path) as writer:
            writer.truncate("a", 4, with_scores=scored)
            if not scored:
                writer.write("a", 4, {"val/acc1": 0.5})
                writer.image("a", 4, "tokens", np.zeros((4, 6, 3), np.uint8))
            writer.write("a", 5, {"train/loss": 0.5})

    with MetricWriter(tmp_path) as writer:
        writer.write("a", 4, {"train/loss": 0.5})
    for scored in (False, with_scores, with_scores):
        go_on(scored)
    (first, *_) = sorted((tmp_path / "tensorboard/a").iterdir())
    with first.open("ab") as file:
        file.write(b"half")  # of an event
    with MetricWriter(tmp_path) as writer:
        writer.truncate("a", 4)
    tags = [(x.step, value.tag) for x in events(tmp_path, "a") for value in x.summary.value]
    assert tags == [(4, "train/loss"), (4, "val/acc1"), (4, "tokens")]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    with pytest.raises(TypeError):
        write_atomically(path, "no bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "0.0s"),
        (4.24, "4.2s"),
        (9.96, "10s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (192, "3m12s"),
        (3599.7, "1h00m"),
        (3 * 3600 + 12 * 60 + 5, "3h12m"),
        (2 * 86400 + 4 * 3600, "2d04h"),
        (math.nan, "--"),
        (math.inf, "--"),
    ],
)
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def known_chrono() -> Chrono:
    chrono, clock = warm_chrono(first_step=90, total_steps=400)
    with chrono.data_wait():
        spend(clock, 0.01)
    spend(clock, 0.99)
    chrono.tick(120)
    return chrono


def test_plain_lines(tmp_path: Path) -> None:
    stream = io.StringIO()
    with Progress("finetune", 90, 400, stream) as progress:
        progress.update(110, 2.5, warm_chrono()[0], mfu=math.nan)
        progress.message("saved [step 110]")
        progress.update(120, 0.2708, known_chrono(), mfu=0.406)
        progress.update(120, math.nan, known_chrono(), mfu=math.nan)
    assert stream.getvalue().splitlines() == [
        "finetune step 110/400 27.5% | loss 2.50 | -- img/s | data -- | ETA --",
        "saved [step 110]",
        "finetune step 120/400 30.0% | loss 0.271 | 320 img/s | data 1% | MFU 41% | ETA 28s",
        "finetune step 120/400 30.0% | loss nan | 320 img/s | data 1% | MFU n/a | ETA 28s",
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    stream = Terminal()
    with Progress("finetune", 90, 400, stream) as progress:
        progress.message("saved [step 90]")
        progress.update(120, math.nan, known_chrono())
    text = stream.getvalue()
    assert "\x1b[" in text and "saved [step 90]" in text
    assert "120/400 | loss nan | 320 img/s | data 1% | ETA 28s" in text


def test_no_bar_on_a_dumb_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with Progress("finetune", 0, 400, stream) as progress:
        progress.update(120, 0.5, known_chrono())
    assert stream.getvalue().startswith("finetune step 120/400")
    assert "\x1b" not in stream.getvalue()
