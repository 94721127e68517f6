"""Damaged checkpoints and weight files: found, passed over with a line, and never read as other numbers."""

import json
import shutil
from pathlib import Path

import flips
import numpy as np
import pytest
import safetensors.numpy
from flips import NEW, OLD

from tosa_jax.errors import WeightsError, WorkdirError
from tosa_jax.models.weights import digests, run_checkpoints
from tosa_jax.models.weights.readers import read_weights, write_safetensors
from tosa_jax.train import checkpoints as train_checkpoints
from tosa_jax.train.checkpoints import Checkpoints


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A stage with two whole checkpoints."""
    folder = tmp_path_factory.mktemp("stage") / "pretrain"
    flips.make_stage(folder)
    return folder


@pytest.fixture
def stage(written, tmp_path):
    return shutil.copytree(written, tmp_path / "pretrain")


def largest(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def make_a_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("")


def make_empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


DAMAGES = {
    "an array is cut": lambda step: cut(largest(step / "state")),
    "an array is emptied": lambda step: empty(largest(step / "state")),
    "an array is longer": lambda step: lengthen(largest(step / "state")),
    "an array is gone": lambda step: largest(step / "state").unlink(),
    "the facts are emptied": lambda step: empty(step / "facts/metadata"),
    "the facts are no object": lambda step: (step / "facts/metadata").write_text("[]"),
    "the facts are gone": lambda step: (step / "facts/metadata").unlink(),
    "the metadata are gone": lambda step: (step / "_CHECKPOINT_METADATA").unlink(),
    "the metadata are emptied": lambda step: empty(step / "_CHECKPOINT_METADATA"),
    "the digests are gone": lambda step: (step / "digests.json").unlink(),
    "the digests are no object": lambda step: (step / "digests.json").write_text("[1]"),
    "a foreign file": lambda step: (step / "state/d/foreign").write_text("x"),
    "a foreign folder": lambda step: shutil.copytree(step / "state", step / "other"),
    "a file instead": make_a_file,
    "an empty folder instead": make_empty,
}


@pytest.mark.parametrize("name", DAMAGES)
def test_the_checkpoint_before_a_damaged_one_is_restored_with_a_line(stage, name):
    DAMAGES[name](stage / str(NEW))
    assert flips.opened(stage) == "older"
    assert (stage / f"{NEW}.damaged").exists() and not (stage / str(NEW)).exists()
    assert flips.opened(stage).startswith("older")  # and again, now that it is set aside


def test_flipped_bits_are_found(tmp_path):
    assert flips.try_flips(16, 0, tmp_path).keys() <= {"whole", "older"}


def test_a_flipped_bit_in_the_facts_is_found_wherever_it_is(stage):
    path = stage / str(NEW) / "facts/metadata"
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert run_checkpoints.checkpoint_damage(stage / str(NEW)), place


def test_what_does_no_harm_is_no_damage(stage):
    (stage / str(NEW) / ".nfs0001").write_text("left by a file system")
    (stage / "notes.txt").write_text("mine")
    (stage / "backup").mkdir()
    shutil.copytree(stage / str(OLD), stage / f"{NEW + 1}.orbax-checkpoint-tmp")
    assert flips.opened(stage) == "whole"


def test_a_file_that_may_not_be_read_is_passed_over(stage, monkeypatch):
    def refuse(file, name):
        raise PermissionError(13, "Permission denied")

    real = digests.find_damage
    with monkeypatch.context() as patch:
        patch.setattr(digests.hashlib, "file_digest", refuse)
        assert real(stage / str(NEW)) == "a file cannot be read: Permission denied"
    said = {str(NEW): "a file cannot be read: Permission denied"}
    monkeypatch.setattr(run_checkpoints, "find_damage", lambda path: said.get(path.name, ""))
    assert flips.opened(stage) == "older"


def test_with_no_whole_one_nothing_is_touched_and_one_line_says_so(stage):
    for step in (OLD, NEW):
        cut(largest(stage / str(step) / "state"))
    before = sorted(p for p in stage.rglob("*"))
    with pytest.raises(WorkdirError, match=rf"step {NEW}: state/.* is damaged\); delete"):
        Checkpoints(stage, "acc1")
    assert sorted(p for p in stage.rglob("*")) == before


def test_a_second_damaged_one_gets_another_name(stage):
    (stage / f"{NEW}.damaged").mkdir()
    make_empty(stage / str(NEW))
    assert flips.opened(stage) == "older"
    assert (stage / f"{NEW}.damaged2").is_dir()


def test_damaged_scores_count_as_none(stage):
    (stage / "scores.json").write_text('{"7": ')
    assert flips.opened(stage) == "whole"
    assert train_checkpoints.read_scores(stage) == {}


def as_earlier_versions_did(step: Path) -> None:
    """Takes the digests and the form away."""
    (step / "digests.json").unlink()
    facts = json.loads((step / "facts/metadata").read_text())
    (step / "facts/metadata").write_text(json.dumps({"steps": facts["steps"]}))


def test_one_without_digests_is_restored_and_damage_that_orbax_finds_is_passed_over(stage):
    for step in (OLD, NEW):
        as_earlier_versions_did(stage / str(step))
    assert flips.opened(stage) == "whole"
    for path in (stage / str(NEW) / "state").rglob("*"):
        if path.is_file():
            empty(path)
    assert flips.opened(stage) == "older"


def test_a_checkpoint_of_the_future_is_refused(stage):
    step = stage / str(NEW)
    facts = json.loads((step / "facts/metadata").read_text())
    (step / "facts/metadata").write_text(json.dumps(facts | {"format": 99}))
    digests.write_digests(step)
    with pytest.raises(WeightsError, match="form 99, which a later version"):
        Checkpoints(stage, "acc1")


def test_weights_are_not_read_from_a_damaged_checkpoint(stage):
    cut(largest(stage / str(NEW) / "state"))
    with pytest.raises(WeightsError, match=rf"is damaged \(state/.*give another step: .*/{OLD}$"):
        run_checkpoints.read_params(stage / str(NEW))


def test_a_flipped_bit_in_a_weight_file_is_found(tmp_path):
    arrays = {
        "a": np.arange(12.0).reshape(3, 4),
        "b": np.ones((), np.float32),
        "c": np.zeros((0, 2)),
    }
    path, said = tmp_path / "x.safetensors", {"format": "x", "fields": "{}"}
    write_safetensors(path, arrays, said)
    whole = path.read_bytes()
    read = read_weights(path)
    assert read.metadata == said and all((read.arrays[k] == x).all() for k, x in arrays.items())
    found = 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            again = read_weights(path)
        except WeightsError:
            found += 1
            continue
        for name, x in arrays.items():
            np.testing.assert_array_equal(again.arrays[name], x)
        assert {k: v for k, v in again.metadata.items() if k in said} == said
    assert found > 0.8 * len(whole)


def test_the_same_weights_make_the_same_file(tmp_path):
    """Metadata included: their order in the file is that of their names."""
    said = {f"name {i}": "é" * i for i in range(9)}
    files = set()
    for i in range(6):
        path = tmp_path / f"{i}.safetensors"
        write_safetensors(path, {"b": np.ones((3, 5), np.float32), "a": np.zeros(7, np.int8)}, said)
        files.add(path.read_bytes())
    (data,) = files
    assert int.from_bytes(data[:8], "little") % 8 == 0
    found = read_weights(path)
    np.testing.assert_array_equal(found.arrays["b"], np.ones((3, 5)))
    assert {name: found.metadata[name] for name in said} == said


def test_weight_files_without_a_digest_are_read(tmp_path):
    safetensors.numpy.save_file({"a": np.ones(3)}, tmp_path / "x.safetensors", {"format": "pt"})
    assert read_weights(tmp_path / "x.safetensors").arrays["a"].tolist() == [1, 1, 1]
