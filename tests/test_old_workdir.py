"""A work directory that an earlier version left in the middle of a run: goes on, predicts and reports.

tests/golden/make_old_workdir.py made it, and the results that the earlier version came to at the end.
"""

import json
import shutil
from pathlib import Path

import flips
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from tosa_jax import main, predict
from tosa_jax.train.checkpoints import Checkpoints

GOLDEN = Path(__file__).parent / "golden"
EXPECTED = json.loads((GOLDEN / "old_workdir.json").read_text())


@pytest.fixture
def workdir(tmp_path):
    return shutil.copytree(GOLDEN / "old_workdir", tmp_path / "run")


def stored_arrays(workdir):
    """The arrays in the checkpoints of each stage, as Orbax alone reads them."""
    arrays = {}
    with ocp.PyTreeCheckpointer() as reader:
        for stage in ("pretrain", "selector"):
            (path,) = (workdir / "checkpoints" / stage).glob("*/state")
            tree = reader.metadata(path).item_metadata.tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            arrays[stage] = reader.restore(path, restore_args=as_numpy)
    return arrays


def test_it_goes_on_to_the_end_with_the_parameters_it_had(
    workdir, digits_dir, monkeypatch, one_device
):
    stored = stored_arrays(workdir)
    assert int(stored["selector"]["step"]) == 3
    restored = {}
    restore = Checkpoints.restore

    def recorded(self, abstract):
        found = restore(self, abstract)
        if found is not None:
            # Copied: a training step takes over the arrays that it is given.
            restored[Path(self.manager.directory).name] = jax.tree.map(np.array, found[0])
        return found

    monkeypatch.setattr(Checkpoints, "restore", recorded)
    arguments = [
        f"--config={GOLDEN / 'old_workdir_recipe.py'}",
        f"--config.data.data_dir={digits_dir}",
    ]
    assert main.main([*arguments, f"--workdir={workdir}"]) == 0

    assert restored.keys() == stored.keys()  # and the third stage starts anew
    for stage, state in restored.items():
        for name in ("params", "frozen", "ema"):
            jax.tree.map(np.testing.assert_array_equal, state[name], stored[stage][name])
        moments = jax.tree.leaves(state["opt"]), jax.tree.leaves(stored[stage]["opt"])
        assert len(moments[0]) > 2
        jax.tree.map(np.testing.assert_array_equal, *moments)

    report = json.loads((workdir / "report.json").read_text())
    expected = EXPECTED["results"]
    assert [(row["name"], row["keep_rate"]) for row in report["results"]] == [
        (row["name"], row["keep_rate"]) for row in expected
    ]
    for row, old in zip(report["results"], expected, strict=True):
        assert row["count"] == old["count"] and row["gmacs"] == pytest.approx(old["gmacs"])
        assert row["metrics"]["loss"] == pytest.approx(old["metrics"]["loss"], abs=2e-6)
    assert "<svg" in (workdir / "report.html").read_text()
    steps = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    trained = [(line["stage"], line["step"]) for line in steps if "train/loss" in line]
    assert trained == [
        ("pretrain", 2), ("pretrain", 4), ("selector", 3), ("selector", 4), ("finetune", 2), ("finetune", 4),
    ]  # fmt: skip


def test_it_predicts_what_it_predicted(workdir, tmp_path, capsys):
    picture = tmp_path / "ramp.png"
    Image.fromarray(np.arange(0, 256, 4, np.uint8).reshape(8, 8)).save(picture)
    assert predict.main([f"--workdir={workdir}", "--json", "--top=10", str(picture)]) == 0
    now, then = json.loads(capsys.readouterr().out), EXPECTED["ramp"]
    assert [guess["name"] for guess in now["top"]] == [guess["name"] for guess in then["top"]]
    for guess, old in zip(now["top"], then["top"], strict=True):
        assert guess["probability"] == pytest.approx(old["probability"], abs=1e-6)


def test_checkpoints_of_form_2_are_read(tmp_path):
    """tests/golden/make_stage_form_2.py wrote them, with digests and their form."""
    stage = shutil.copytree(GOLDEN / "stage_form_2", tmp_path / "pretrain")
    for step in (flips.NEW, flips.OLD):
        text = (stage / f"{step}/facts/metadata").read_text()
        assert json.loads(text)["format"] == 2
    assert flips.opened(stage) == "whole"
    flips.flip(stage / str(flips.NEW), np.random.default_rng(0))
    assert flips.opened(stage) == "older"
