"""What released weights expect of images: by family as published, and as a file states itself."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from trained import make_workdir
from weight_samples import tiny_weights, write

from tosa_jax.cli.flags import parse
from tosa_jax.config import default_config, make_run_config
from tosa_jax.inference.predictor import Predictor
from tosa_jax.models.weights.preprocessing import preprocessing_of
from tosa_jax.models.weights.readers import WeightFile, read_weights

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALVES = ((0.5,), (0.5,))
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
BARE = {"cls_token": np.zeros(1), "pos_embed": np.zeros(1), "norm.weight": np.zeros(1)}
HEAD = BARE | {"head.weight": np.zeros(1)}
SMALL = {"embed_dim": 16, "depth": 2, "num_heads": 2, "image_size": 32, "patch_size": 8}


def of(name, size=224, arrays=HEAD, **file):
    return preprocessing_of(name, size, WeightFile("w", arrays, **file))


@pytest.mark.parametrize(
    ("name", "size", "pixels", "short"),
    [
        ("deit_small_patch16_224", 224, IMAGENET, 256),
        ("deit_base_patch16_384", 384, IMAGENET, 438),  # DeiT's own evaluation
        ("deit_base_distilled_patch16_384", 384, IMAGENET, 438),
        ("deit3_base_patch16_224", 224, IMAGENET, 224),  # --eval-crop-ratio 1.0
        ("vit_base_patch16_224", 224, HALVES, 248),
        ("vit_base_patch16_224", 384, HALVES, 384),
        ("vit_small_patch14_dinov2", 224, IMAGENET, 256),
        ("vit_small_patch14_reg4_dinov2", 518, IMAGENET, 518),
        ("eva02_base_patch14_224", 224, OPENAI, 248),
        ("eva02_base_patch16_clip_224", 224, OPENAI, 224),  # CLIP's own, not timm's .9
        ("eva02_large_patch14_clip_336", 336, OPENAI, 336),
        ("vit", 224, IMAGENET, 256),
    ],
)
def test_each_family_is_prepared_as_published(name, size, pixels, short):
    for found in (preprocessing_of(name, size), of(name, size)):
        assert (found.mean, found.std) == pixels
        assert (int(size / found.crop_pct), found.interpolation) == (short, "bicubic")


@pytest.mark.parametrize(
    "file",
    [
        {"arrays": HEAD | {"fc_norm.weight": np.zeros(1)}},  # fine-tuned
        {"arrays": BARE},  # pretrained, the encoder alone
        {"arrays": BARE | {"mask_token": np.zeros(1), "decoder_pred.weight": np.zeros(1)}},
        {"config": {"model_type": "vit_mae"}},
    ],
)
def test_maes_files_under_augregs_names_keep_maes_preprocessing(file):
    found = of("vit_base_patch16_224", **file)
    assert (found.mean, found.std) == IMAGENET and int(224 / found.crop_pct) == 256
    assert of("vit_base_patch16_224", 256, **file).crop_pct == 1.0


def test_weights_of_this_project_without_a_head_are_not_maes():
    arrays = {
        "cls_token": np.zeros(1),
        "blocks/0/norm1/scale": np.zeros(1),
        "decoder/x": np.zeros(1),
    }
    assert of("vit_base_patch16_224", arrays=arrays).mean == (0.5,)


def test_timms_config_beside_a_file_comes_before_the_table(tmp_path: Path):
    write(tmp_path / "model.safetensors", tiny_weights())
    said = {
        "mean": [0.1, 0.2, 0.3],
        "std": [1, 1, 1],
        "crop_pct": 0.95,
        "interpolation": "bilinear",
    }
    for config in ({"pretrained_cfg": said}, said):
        (tmp_path / "config.json").write_text(json.dumps(config))
        found = preprocessing_of("vit_base_patch16_224", 224, read_weights(tmp_path))
        assert found == ((0.1, 0.2, 0.3), (1, 1, 1), 0.95, "bilinear", "crop")


def test_recipe_prediction_evaluation_and_fitting_read_the_same(tmp_path: Path):
    """Of an AugReg file, and of the same file after a config.json beside it says otherwise."""
    model, weights = "vit_tiny_patch16_224", tmp_path / "w.safetensors"
    write(weights, tiny_weights())
    for state in ({}, {"mean": [0.1, 0.2, 0.3], "crop_pct": 0.8, "interpolation": "bilinear"}):
        (tmp_path / "config.json").write_text(json.dumps(state))
        predictor = Predictor.from_pretrained(
            model, weights, num_classes=5, on_message=lambda line: None, **SMALL
        )
        recipe = f"configs/fit_selectors.py:model={model},weights={weights},images={tmp_path}"
        config, _ = parse("", [f"--config={recipe}", "--config.model.image_size=32"])
        run = make_run_config(config)
        assert run.init_from == str(weights)
        assert (predictor.form, set(predictor.task.mean)) == (
            run.data.preprocess, set(run.inputs.mean)
        )  # fmt: skip
        expected = (0.8, "bilinear") if state else (0.9, "bicubic")
        assert (predictor.form.crop_pct, predictor.form.interpolation) == expected
    assert default_config(model).inputs.mean == (0.5,)


def test_a_predictors_file_and_a_runs_folder_state_their_own(tmp_path: Path):
    make_workdir(tmp_path / "run", num_classes=10)
    quiet = {"on_message": lambda line: None}
    run = Predictor.from_workdir(tmp_path / "run", **quiet)
    run.form = dataclasses.replace(run.form, resize="crop", crop_pct=0.7)
    run.save(tmp_path / "all.safetensors")
    stated = preprocessing_of("vit_x", 224, read_weights(tmp_path / "all.safetensors"))
    assert (stated.mean, stated.std, stated.crop_pct) == (run.task.mean, run.task.std, 0.7)
    stated = preprocessing_of("vit_x", 224, read_weights(tmp_path / "run"))
    assert (stated.mean, stated.std, stated.crop_pct) == (run.task.mean, run.task.std, 0.9)


def test_the_resize_is_the_one_that_was_asked_for():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 48, 3), np.uint8))
    form = make_run_config(default_config()).data
    form = dataclasses.replace(form, image_size=24, eval_resize="crop", eval_crop_pct=1.0)
    bilinear = dataclasses.replace(form, eval_interpolation="bilinear").preprocess.fit(picture)
    expected = picture.resize((24, 32), Image.Resampling.BILINEAR).crop((0, 4, 24, 28))
    np.testing.assert_array_equal(bilinear, np.asarray(expected))
    assert (form.preprocess.fit(picture) != bilinear).any()
