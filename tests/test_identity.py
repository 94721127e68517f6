"""A run goes on from its own checkpoints and data alone; a deleted lock and a lease of garbage let nobody in."""

import dataclasses
import json
import shutil
import time

import pytest
from small import runs_on_one_device, small_run

from tosa_jax.cli import flags
from tosa_jax.config import to_json
from tosa_jax.data.pipeline import Dataset
from tosa_jax.errors import ConfigError, WorkdirError
from tosa_jax.train import workdir as workdirs
from tosa_jax.train.runner import run_stages
from tosa_jax.train.workdir import lease, lock, open_workdir

BEAT = 0.05


def run_of(digits_dir, steps=2, **sections):
    stage = {"steps": steps, "checkpoint_steps": 2}
    return small_run(digits_dir, pretrain=stage, eval={"figure_images": 0}, **sections)


def start(run, folder, **options):
    with runs_on_one_device(), open_workdir(folder, run, **options):
        return run_stages(run, folder)


@pytest.fixture(scope="module")
def finished(digits_dir, tmp_path_factory):
    """A finished run of two steps."""
    folder = tmp_path_factory.mktemp("run")
    start(run_of(digits_dir), folder)
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of it."""
    return shutil.copytree(finished, tmp_path / "run")


def test_without_its_configuration_another_run_does_not_go_on(digits_dir, folder):
    (folder / "config.json").unlink()
    (folder / "report.json").unlink()
    with pytest.raises(WorkdirError, match="seed: 0 -> 1"):
        start(run_of(digits_dir, seed=1), folder)
    assert not (folder / "config.json").exists()
    start(run_of(digits_dir), folder)
    assert json.loads((folder / "config.json").read_text())["seed"] == 0


def test_a_cut_configuration_says_what_goes_on_exactly(digits_dir, folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(WorkdirError, match="Delete that file alone"):
        start(run_of(digits_dir), folder)


def test_other_data_are_refused_and_both_named(digits_dir, folder, monkeypatch):
    (folder / "report.json").unlink()
    fingerprint = Dataset.fingerprint
    before = fingerprint(dataset_of(digits_dir))
    monkeypatch.setattr(Dataset, "fingerprint", lambda self: "0123456789ab")
    with pytest.raises(WorkdirError) as caught:
        start(run_of(digits_dir), folder)
    text = str(caught.value)
    assert f"1437 training and 360 evaluation examples, fingerprint {before}" in text
    assert "fingerprint 0123456789ab" in text


def dataset_of(digits_dir):
    return Dataset(run_of(digits_dir).data)


def test_the_fingerprint_sees_the_examples_and_not_where_they_lie(digits_dir, tmp_path):
    shutil.copytree(f"{digits_dir}/digits", tmp_path / "digits")
    first = dataset_of(digits_dir)
    moved = dataset_of(str(tmp_path))
    assert moved.fingerprint() == first.fingerprint() and len(first.fingerprint()) == 12
    fewer = Dataset(dataclasses.replace(first.config, train_split="train[:1436]"))
    assert fewer.fingerprint() != first.fingerprint()


def test_a_finished_run_is_extended_by_its_last_stage_alone(digits_dir, folder, capsys):
    longer = run_of(digits_dir, steps=4)
    with pytest.raises(WorkdirError, match="--extend lets the last stage be longer"):
        start(longer, folder)
    with pytest.raises(WorkdirError, match="changes the length of pretrain alone, not seed"):
        start(dataclasses.replace(longer, seed=3), folder, extend=True)
    with pytest.raises(WorkdirError, match="--extend makes a run longer"):
        start(run_of(digits_dir, steps=1), folder, extend=True)
    report = start(longer, folder, extend=True)
    assert report["stages"]["pretrain"]["steps"] == 4
    assert "the schedule of that length" in capsys.readouterr().err
    assert (folder / "report.before.json").exists()
    records = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    assert max(x["step"] for x in records if x["stage"] == "pretrain") == 4
    again = start(longer, folder)  # from now on it is the longer run
    assert again["results"] == report["results"]


def test_a_deleted_lock_lets_no_second_run_in(tmp_path):
    with lock(tmp_path):
        (tmp_path / ".lock").unlink()
        with pytest.raises(WorkdirError, match="in use by another process"), lock(tmp_path):
            pass
    with lock(tmp_path):
        pass


def test_files_that_a_kill_left_half_written_are_removed(digits_dir, folder):
    stage = folder / "checkpoints/pretrain"
    left = [folder / ".metrics.jsonl.123.tmp", stage / ".scores.json.7.tmp"]
    others = [folder / ".notes.tmp", folder / "metrics.jsonl", stage / "scores.json"]
    for path in (*left, others[0]):
        path.write_text("{")
    with open_workdir(folder, run_of(digits_dir)):
        assert not any(path.exists() for path in left) and all(path.exists() for path in others)


def test_a_finished_run_of_another_user_prints_its_report(digits_dir, folder, monkeypatch):
    def refuse(path, *rest, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(workdirs, "lock", refuse)
    assert start(run_of(digits_dir), folder)["results"]
    (folder / "report.json").unlink()
    with pytest.raises(WorkdirError, match="cannot be written .Permission denied."):
        start(run_of(digits_dir), folder)


def test_a_lease_of_garbage_is_taken_over_and_one_that_cannot_be_renewed_stops(
    tmp_path, monkeypatch, capsys
):
    raised = []
    monkeypatch.setattr(workdirs.signal, "raise_signal", raised.append)
    (tmp_path / ".lease").write_text("\x00 no JSON")
    with lease(tmp_path, beat=BEAT):
        (tmp_path / ".lease").write_text("garbage")
        until(lambda: raised)
    raised.clear()
    (tmp_path / ".lease").unlink()
    with lease(tmp_path, beat=BEAT):
        file_system = type(workdirs.fsspec.url_to_fs(str(tmp_path))[0])

        def fail(self, *args, **options):
            raise OSError("503 try again")

        with monkeypatch.context() as patch:
            patch.setattr(file_system, "pipe_file", fail)
            until(lambda: raised)
    said = capsys.readouterr().err
    assert "the lease cannot be renewed (503 try again)" in said
    assert "the lease runs out; stopping" in said and len(raised) == 1


def until(condition):
    end = time.monotonic() + 20
    while not condition() and time.monotonic() < end:
        time.sleep(BEAT)
    assert condition()


def test_a_checkpoint_of_an_earlier_version_goes_on(digits_dir):
    from tosa_jax.train.identity import Identity

    run = run_of(digits_dir)
    own = Identity(run, dataset_of(digits_dir).facts)
    assert own.to_json()["data"]["num_eval"] == 360
    own.check({}, "checkpoint")
    own.check(json.loads(json.dumps(own.to_json())), "checkpoint")
    with pytest.raises(WorkdirError, match="batch_size: 8 -> 16"):
        own.check({"config": to_json(run) | {"batch_size": 8}}, "checkpoint")


def test_a_run_branches_from_a_checkpoint_with_its_optimizer(
    digits_dir, finished, tmp_path, capsys
):
    source = finished / "checkpoints/pretrain/2"
    other = run_of(digits_dir, steps=4, seed=5)
    with pytest.raises(WorkdirError, match="is no checkpoint: give the folder of a step"):
        start(other, tmp_path / "bad", branch_from=str(finished))
    report = start(other, tmp_path / "branch", branch_from=str(source))
    assert "pretrain goes on from step 2 of" in capsys.readouterr().err
    assert report["stages"]["pretrain"]["steps"] == 4 and report["config"]["seed"] == 5
    records = [json.loads(x) for x in (tmp_path / "branch/metrics.jsonl").read_text().splitlines()]
    assert min(x["step"] for x in records if "train/loss" in x) > 2
    with pytest.raises(WorkdirError, match="seed: 5 -> 0"):
        start(run_of(digits_dir, steps=4), tmp_path / "branch")


def test_flags_of_how_a_run_begins():
    assert flags.parse_begin(["--extend", "--config=a"]) == ((True, ""), ["--config=a"])
    assert flags.parse_begin(["--branch_from=x", "b"])[0] == (False, "x")
    with pytest.raises(ConfigError, match="not both"):
        flags.parse_begin(["--branch_from=x", "--extend"])
