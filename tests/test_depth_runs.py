"""Depth recipes cut down: rendered rooms through every stage, and NYU Depth V2's own files at 480x640."""

import json

import numpy as np
import pytest
from depth_files import write_nyu_files
from flax import nnx
from PIL import Image
from small import runs_on_one_device

import tosa_jax
from tosa_jax import main as entry
from tosa_jax.cli.flags import parse
from tosa_jax.config import default_config, make_run_config
from tosa_jax.data import builders
from tosa_jax.errors import ConfigError
from tosa_jax.models.weights.load import save_weights
from tosa_jax.reporting.report import format_table
from tosa_jax.train import runner
from tosa_jax.train.checkpoints import Checkpoints
from tosa_jax.train.stages import plan_stages

pytestmark = pytest.mark.usefixtures("one_device")

SMALL = ["--config.model.embed_dim=16", "--config.model.num_heads=2", "--config.model.depth=2",
         "--config.model.decoder_dim=4", "--config.batch_size=8", "--config.eval.batch_size=8",
         "--config.data.workers=threads:2", "--config.log_steps=1"]  # fmt: skip


def steps(stage, number, warmup=0):
    return [f"--config.{stage}.epochs=0.0", f"--config.{stage}.steps={number}", f"--config.{stage}.eval_epochs=0.0",
            f"--config.{stage}.warmup_steps={warmup}", f"--config.{stage}.checkpoint_epochs=0.0"]  # fmt: skip


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def rooms_run(tmp_path_factory):
    """`configs/rooms.py` with two layers and little training: its work directory and its command line."""
    folder = tmp_path_factory.mktemp("rooms")
    argv = ["--config=configs/rooms.py", f"--workdir={folder}/run", *SMALL,
            f"--config.data.data_dir={folder}/tfds", "--config.data.name=rooms/32x48-64-16",
            "--config.model.image_size=(32,48)", "--config.model.patch_size=8",
            *steps("pretrain", 40), *steps("selector", 2), *steps("finetune", 3),
            "--config.pretrain.learning_rate=4e-3", "--config.eval.controls=()"]  # fmt: skip
    with runs_on_one_device():
        assert entry.main(argv) == 0
    return folder, argv


def test_rooms_go_through_all_stages(rooms_run, capsys):
    folder, argv = rooms_run
    report = report_of(folder / "run")
    assert list(report["stages"]) == ["pretrain", "selector", "finetune"]
    assert [row["name"] for row in report["results"]] == ["dense_pretrained", "tosa"]
    for row in report["results"]:
        assert row["count"] == 16 and 0 < row["metrics"]["abs_rel"] < 1
        assert row["metrics"]["delta1"] <= row["metrics"]["delta2"] <= row["metrics"]["delta3"]
    records = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    losses = [r["train/loss"] for r in records if r["stage"] == "pretrain" and "train/loss" in r]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    assert entry.main(argv) == 0
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[:5] == ["model", "keep", "rate", "abs_rel", "delta1"]
    assert "ToSA" in "".join(rows)


def test_the_figure_shows_truth_depth_error_and_selected_tokens(rooms_run):
    folder, _ = rooms_run
    with Image.open(folder / "run/selected_tokens.png") as image:
        width, height = image.size
    # input, truth, depth, error and one selection; four rows of 32x48 pixels enlarged to 6 patches of 56.
    assert width >= 5 * 336 and height >= 4 * 224


def test_a_run_goes_on_from_its_own_weights_as_a_trained_network(rooms_run, tmp_path):
    folder, argv = rooms_run
    more = [f"--workdir={tmp_path}/again", f"--config.init_from={folder}/run/checkpoints/pretrain",
            *steps("pretrain", 0), *steps("selector", 0), *steps("finetune", 0)]  # fmt: skip
    assert entry.main([*argv, *more]) == 0
    (row,) = report_of(tmp_path / "again")["results"]
    before = report_of(folder / "run")["results"][0]
    assert row["metrics"]["abs_rel"] == pytest.approx(before["metrics"]["abs_rel"], rel=1e-5)
    assert (tmp_path / "again/depth.png").exists()


@pytest.fixture
def untimed(monkeypatch):
    """Large images, and no test of speed: they are not timed."""
    monkeypatch.setattr(runner, "throughput", lambda candidates: [1.0] * len(candidates))


@pytest.fixture(scope="module")
def nyu(tmp_path_factory):
    """NYU's files with rendered rooms in them, prepared; and weights of a classifier for each backbone."""
    root = tmp_path_factory.mktemp("nyu")
    source = write_nyu_files(root / "source", train=2, validation=2)
    builders.prepare("nyu_depth_v2", root / "tfds", source, say=lambda line: None)
    for name in ("deit_small_patch16_224", "vit_small_patch14_dinov2"):
        model = tosa_jax.create_model(
            name, depth=2, embed_dim=16, num_heads=2, image_size=56 if "14" in name else 64,
            num_classes=3, rngs=nnx.Rngs(0),
        )  # fmt: skip
        save_weights(model, root / f"{name}.safetensors")
    return root


def nyu_argv(root, tmp_path, variant, backbone):
    return [f"--config=configs/nyu_deit_s.py{variant}", f"--workdir={tmp_path}/run", *SMALL,
            "--config.batch_size=2", "--config.eval.batch_size=2", "--config.eval.figure_images=1",
            f"--config.data.data_dir={root}/tfds", f"--config.init_from={root}/{backbone}.safetensors"]  # fmt: skip


def test_nyu_runs_from_released_weights_at_full_size(nyu, tmp_path, capsys, untimed):
    argv = nyu_argv(nyu, tmp_path, ":dinov2_s", "vit_small_patch14_dinov2")
    argv += [*steps("selector", 1), *steps("finetune", 1), "--config.eval.controls=()"]
    assert entry.main(argv) == 0
    said = capsys.readouterr().err
    assert "the decoder stays as the model has it" in said and "from 4x4 to 35x46" in said
    report = report_of(tmp_path / "run")
    rows = {row["name"]: row for row in report["results"]}
    assert rows.keys() == {"dense_pretrained", "tosa"}
    assert rows["dense_pretrained"]["metrics"] == {} and rows["dense_pretrained"]["gmacs"] > 0
    assert rows["tosa"]["count"] == 2 and rows["tosa"]["metrics"]["abs_rel"] > 0
    config = report["config"]
    assert config["model"]["image_size"] == [480, 640] and config["options"]["crop"] == "eigen"
    assert config["data"]["depth_box"] == [45, 472, 43, 608]
    assert config["finetune"]["schedule"] == "polynomial"


def test_nyu_trains_the_dense_network_alone_on_crops_and_scores_whole_images(
    nyu, tmp_path, untimed
):
    argv = nyu_argv(nyu, tmp_path, ":dense", "deit_small_patch16_224")
    argv += [*steps("pretrain", 1), "--config.model.image_size=(96,128)"]
    assert entry.main(argv) == 0
    report = report_of(tmp_path / "run")
    assert list(report["stages"]) == ["pretrain"]
    (row,) = report["results"]
    assert row["name"] == "dense_pretrained" and row["metrics"]["abs_rel"] > 0
    with Image.open(tmp_path / "run/depth.png") as image:
        assert image.size[0] >= 4 * 320  # input, truth, depth, error of 30x40 patches of 8 pixels


def test_the_recipes_are_valid_and_say_what_they_know():
    for variant, plan in (("", 1), (":dense", 0), (":dinov2_s", 1), (":dinov2_s,dense", 0)):
        config, _ = parse("", [f"--config=configs/nyu_deit_s.py{variant}", "--config.init_from=x"])
        run = make_run_config(config)
        assert (run.task, run.model.max_depth, run.model.image_shape) == ("depth", 10, (480, 640))
        assert run.model.patch_size == (14 if "dino" in variant else 16)
        assert ("finetune" in [stage.name for stage in plan_stages(run)[0]]) == bool(plan)
    with pytest.raises(ConfigError, match="no variant 'dinov2_b'; known"):
        parse("", ["--config=configs/nyu_deit_s.py:dinov2_b"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"finetune": {"mixup": 0.8}}, "config.finetune.mixup is for classification"),
        ({"pretrain": {"label_smoothing": 0.1}}, "config.pretrain.label_smoothing is for class"),
        ({"task": {"crop": "egien"}}, "config.task: crop='egien' is unknown; did you mean 'eigen'"),
        ({"task": {"max_depth": 10.0}}, "config has no field task.max_depth"),
        ({"model": {"num_classes": 10}}, "config has no field model.num_classes"),
        ({"pretrain": {"schedule": "polinomial"}}, "did you mean 'polynomial'"),
        ({"pretrain": {"head_lr_scale": 0.0}}, "head_lr_scale=0.0 must be above 0"),
    ],
)
def test_wrong_fields_of_a_depth_recipe_are_named(change, says):
    config = default_config(task="depth")
    config.data.name = "rooms"
    for section, fields in change.items():
        config[section].update(fields)
    with pytest.raises(ConfigError) as error:
        make_run_config(config)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_data_of_the_other_task_are_refused(rooms_run, digits_dir, capsys):
    folder, argv = rooms_run
    digits = [f"--config.data.data_dir={digits_dir}", "--config.data.name=digits",
              "--config.data.eval_split=test", "--config.data.augment=none",
              "--config.model.image_size=(32,32)"]  # fmt: skip
    argv = [arg for arg in argv if "image_size" not in arg]  # given twice, a tuple would be both
    assert entry.main([*argv, f"--workdir={folder}/digits", *digits]) == 2
    assert "'digits' has no depth" in capsys.readouterr().err
    argv = ["--config=configs/digits.py", f"--workdir={folder}/other", "--config.data.augment=none",
            f"--config.data.data_dir={folder}/tfds", "--config.data.name=rooms/32x48-64-16",
            "--config.data.eval_split=validation"]  # fmt: skip
    assert entry.main(argv) == 2
    assert "has no single class an image" in capsys.readouterr().err


def test_distilling_from_a_network_without_a_decoder_is_refused(nyu, tmp_path, capsys):
    argv = nyu_argv(nyu, tmp_path, "", "deit_small_patch16_224")
    argv += [*steps("selector", 0), *steps("finetune", 1), "--config.finetune.distill_weight=1.0"]
    assert entry.main(argv) == 2
    assert "needs a trained dense model" in capsys.readouterr().err


@pytest.mark.parametrize(("lower", "kept"), [(True, [2, 3]), (False, [1, 3])])
def test_the_best_checkpoint_is_that_of_lowest_error(tmp_path, lower, kept):
    checkpoints = Checkpoints(tmp_path, "abs_rel", lower)
    for step, value in ((1, 0.3), (2, 0.1), (3, 0.2)):
        checkpoints.save(step, {"x": np.zeros(1)}, {})
        checkpoints.score(step, {"abs_rel": value})
        checkpoints.wait()
    assert sorted(checkpoints.manager.all_steps()) == kept
    checkpoints.close()


def test_the_table_shows_the_errors_that_count_first():
    metrics = dict.fromkeys(("abs_rel", "delta1", "rms", "log10", "silog", "sq_rel"), 0.1)
    row = {"name": "tosa", "keep_rate": 0.5, "split": "validation", "count": 2, "metrics": metrics,
           "gmacs": 31.5, "img_per_sec": 10.0}  # fmt: skip
    lines = format_table({"results": [row]}).splitlines()
    assert lines[0].split()[3:6] == ["abs_rel", "delta1", "rms"]
