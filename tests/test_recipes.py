"""The recipes for pretrained networks, cut down to two layers and two steps a stage."""

import json

import numpy as np
import pytest
from flax import nnx
from PIL import Image

import tosa_jax
from tosa_jax import main as entry
from tosa_jax.models.params import get_params
from tosa_jax.models.weights.load import load_pretrained, save_weights

pytestmark = pytest.mark.usefixtures("one_device")

TINY = ["--config.model.depth=2", "--config.model.image_size=32", "--config.batch_size=8",
        "--config.data.workers=threads:2", "--config.eval.batch_size=8",
        "--config.eval.figure_images=0"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of JPEGs, dark and bright, and weights of a network with another head."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("validation", 5)):
        for label, name in enumerate(("dark", "bright")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 100, (40, 48, 3)) + 120 * label
                path = root / split / name / f"{i}.jpg"
                Image.fromarray(pixels.astype(np.uint8)).save(path, quality=95)
    model = tosa_jax.create_model(
        "deit_tiny_patch16_224", depth=2, image_size=64, num_classes=5, rngs=nnx.Rngs(0)
    )
    save_weights(model, root / "weights.safetensors")
    return root


def run(recipe, folder, tmp_path, *more):
    return entry.main(
        [f"--config=configs/{recipe}", f"--workdir={tmp_path}/run", *TINY,
         f"--config.data.data_dir={tmp_path}/tfds", f"--config.init_from={folder}/weights.safetensors",
         "--config.data.name=image_folder", f"--config.data.source_dir={folder}", *more]
    )  # fmt: skip


def test_deit_goes_from_weights_through_all_stages(folder, tmp_path, capsys):
    steps = [f"--config.{stage}.steps=2" for stage in ("selector", "finetune")]
    steps += ["--config.selector.warmup_steps=0", "--config.finetune.epochs=0.0"]
    assert run("deit_ti.py", folder, tmp_path, *steps, "--config.model.num_classes=2") == 0
    said = capsys.readouterr()
    assert "head" in said.err and "ToSA" in said.out
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert [row["name"] for row in report["results"]] == ["dense_pretrained", "tosa"]
    assert {row["count"] for row in report["results"]} == {10}
    assert report["config"]["finetune"]["mixup"] == 0.8
    assert report["config"]["data"]["augment"] == "deit"


def test_eval_scores_weights_and_trains_nothing(folder, tmp_path):
    assert run("deit_ti.py:eval", folder, tmp_path, "--config.model.num_classes=2") == 0
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["stages"] == {} and len(report["results"]) == 1


def test_selectors_are_fitted_without_labels_and_load_again(folder, tmp_path):
    recipe = f"fit_selectors.py:model=deit_tiny_patch16_224,images={folder}"
    assert run(recipe, folder, tmp_path, "--config.selector.steps=8", "--config.model.num_classes=5",
               "--config.selector.warmup_steps=0") == 0  # fmt: skip
    facts = json.loads((tmp_path / "run/report.json").read_text())["stages"]["selector"]
    assert facts["after"]["selector/kl"] < facts["before"]["selector/kl"]
    model = tosa_jax.create_model(
        "deit_tiny_patch16_224", depth=2, image_size=48, keep_rate=0.5, rngs=nnx.Rngs(0)
    )
    name = "kinds/1/selector/conv1/kernel"
    before = np.asarray(get_params(model)[name])
    load_pretrained(model, selectors=tmp_path / "run/selectors.safetensors")
    assert (np.asarray(get_params(model)[name]) != before).any()


def test_a_fine_tune_from_nothing_is_refused(folder, tmp_path, capsys):
    argv = ["--config=configs/deit_s.py", f"--workdir={tmp_path}/run", *TINY]
    assert entry.main(argv) == 2
    assert "set --config.init_from=FILE" in capsys.readouterr().err
