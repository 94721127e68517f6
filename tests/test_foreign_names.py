"""Files under timm's and transformers' names: read back here, and by those libraries where they are installed."""

import json
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from weight_samples import same, tiny

import tosa_jax
from tosa_jax.errors import ConfigError, WeightsError
from tosa_jax.models.weights.load import load_pretrained, save_weights
from tosa_jax.models.weights.preprocessing import Preprocessing

NAMES = ("ant", "bee", "cat", "dog", "eel")
SHOWN = Preprocessing((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 0.8, "bilinear", "crop")
DINOV2 = {"layer_scale": 0.5, "global_pool": "token_avg", "pos_resample": "bicubic"}
DINOV3 = {"layer_scale": 0.5, "pos_embed": False, "rope": "dinov3", "key_bias": False, "reg_tokens": 4,
          "norm_eps": 1e-5, "num_classes": 0}  # fmt: skip
EVA02 = {"rope": "eva02", "rope_base": 1e4, "key_bias": False, "mlp": "swiglu", "mlp_ratio": 5.25,
         "global_pool": "avg"}  # fmt: skip
SIGLIP = {
    "mlp": "gelu_tanh",
    "class_token": False,
    "global_pool": "map",
    "num_classes": 0,
    "pos_resample": "bicubic",
}
CLIP = {"pre_norm": True, "patch_bias": False, "norm_eps": 1e-5, "pos_resample": "bicubic"}
GATED = {"mlp": "swiglu", "mlp_ratio": 8.0}
TIMM = {
    "vit": {},
    "deit distilled": {"distilled": True},
    "deit3": {"layer_scale": 0.5, "pos_embed_prefix": False},
    "registers": {"layer_scale": 0.5, "pos_embed_prefix": False, "reg_tokens": 4, "num_classes": 0},
    "siglip": SIGLIP,
    "siglip of 16": SIGLIP | {"patch_size": 16},  # those of timm have another GELU
    "clip": CLIP | {"projection": True},
    "dinov3": DINOV3,
    "dinov3 gated": DINOV3 | GATED | {"rope_base": 30.0},
    "eva02": EVA02 | {"num_classes": 0},
    "eva02 norm": EVA02 | {"mlp_norm": True, "image_size": (32, 48)},
    "eva02 token": EVA02 | {"mlp_norm": True, "global_pool": "token"},
    "eva02 clip": EVA02
    | {"mlp_norm": True, "attn_norm": True, "global_pool": "token", "projection": True},
    "mean": {"global_pool": "avg"},
    "not square": {"image_size": (32, 48)},
}
HF = {
    "vit": {},
    "vit features": {"num_classes": 0},
    "deit": {"distilled": True},
    "dinov2": DINOV2,
    "dinov2 registers": DINOV2 | {"reg_tokens": 4, "pos_embed_prefix": False, "pos_resample": "bicubic_antialias"},
    # Both halves of 48: two thirds of 64, as a multiple of 8.
    "dinov2 gated": DINOV2 | {"mlp": "swiglu", "mlp_ratio": 6.0, "num_classes": 0, "global_pool": "token"},
    "clip": CLIP | {"projection": True},
    "clip quick": CLIP | {"num_classes": 0, "mlp": "quick_gelu"},
    "siglip": SIGLIP,
    "dinov3": DINOV3,
    "dinov3 gated, not square": DINOV3 | GATED | {"image_size": (32, 48), "rope_base": 30.0},
    "dinov3 key biases": DINOV3 | {"key_bias": True},
}  # fmt: skip
CASES = [("timm", case, TIMM[case]) for case in TIMM] + [("hf", case, HF[case]) for case in HF]


def network(fields):
    model = tiny(**fields)
    for name in ("qkv", "proj"):  # biases that are not 0
        bias = getattr(model.blocks[1].attn, name).bias
        bias[...] = np.linspace(-1, 1, bias.shape[0], dtype=np.float32)
    for layer in (model.blocks[1].mlp.fc1, model.blocks[1].mlp.fc2):
        layer.kernel[...] = layer.kernel[...] * 30  # to where the forms of GELU differ
    if not model.config.key_bias:
        bias = model.blocks[1].attn.qkv.bias
        bias[...] = bias[...].at[16:32].set(0.0)
    model.preprocessing = SHOWN
    return model


@pytest.mark.parametrize(("names", "case", "fields"), CASES)
def test_what_is_written_is_read_here(names, case, fields, tmp_path: Path) -> None:
    model, said = network(fields), []
    labels = NAMES if model.config.num_classes else ()
    save_weights(model, tmp_path / "net", names=names, class_names=labels)
    again = tosa_jax.load(tmp_path / "net", batch_sizes=(1,), on_message=said.append)
    expected = load_pretrained(tiny(1, **fields), tmp_path / "net", on_message=said.append)
    assert same(again.model, expected) and again.config.image_size == model.config.image_size
    assert same(again.model, model)
    told_otherwise = (
        "layer_scale",
        "pos_resample",
    )  # an initial value; what the library itself does
    kept = {name: getattr(again.config, name) for name in told_otherwise}
    assert again.config == replace(model.config, **kept)
    assert again.class_names == labels or again.config.projection
    assert (again.task.mean, again.form.crop_pct, again.form.resize) == (
        (0.1, 0.2, 0.3),
        0.8,
        "crop",
    )
    assert not [line for line in said if "guess" in line]


@pytest.mark.parametrize(("names", "case", "fields"), CASES)
def test_timm_and_transformers_compute_the_same(names, case, fields, tmp_path: Path) -> None:
    torch = pytest.importorskip(
        "torch", reason="compares with PyTorch, which the extra `compare` brings"
    )
    pytest.importorskip(
        {"timm": "timm", "hf": "transformers"}[names], reason="the library that reads the file"
    )
    model = network(fields)
    save_weights(model, tmp_path, names=names)
    height, width = model.config.image_shape
    image = np.random.default_rng(0).standard_normal((1, height, width, 3), np.float32)
    out = model(jnp.asarray(image))
    (ours,) = out.predictions.values()
    pixels = torch.from_numpy(image.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        if names == "timm":
            import timm

            theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
            pairs = [(theirs.forward_features(pixels), out.tokens)]
            if model.config.num_classes or "siglip" in case:
                pairs.append((theirs(pixels), ours))
        else:
            import transformers

            kind = getattr(
                transformers, json.loads((tmp_path / "config.json").read_text())["architectures"][0]
            )
            theirs, read = kind.from_pretrained(tmp_path, output_loading_info=True)
            assert not read["unexpected_keys"] and not read["mismatched_keys"]
            answer = theirs.eval()(pixels)
            pairs = []
            if "clip" not in case and not model.config.num_classes:  # CLIP's are not normalised
                pairs.append((answer.last_hidden_state, out.tokens))
            if case != "vit features":  # whose pooler is a layer of its own
                heads = ("logits", "image_embeds", "pooler_output")
                pairs.append((next(answer[head] for head in heads if head in answer), ours))
                assert not read["missing_keys"]
    for found, expected in pairs:
        np.testing.assert_allclose(found.numpy(), expected, atol=2e-5, rtol=0)


def test_what_others_do_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no architecture of timm is this network"):
        save_weights(tiny(norm_eps=1e-3), tmp_path, names="timm")
    for network in (DINOV3, EVA02):
        with pytest.raises(WeightsError, match="no architecture of timm is this network"):
            save_weights(tiny(**network | {"key_bias": True}), tmp_path, names="timm")
    for fields, says in (
        ({"global_pool": "avg"}, "its ViTModel, the nearest, has no global_pool='avg' with num_cl"),
        (TIMM["deit3"], "its Dinov2Model, the nearest, has no global_pool='token' with num_classes=5"),
        (CLIP, "its CLIPVisionModel, the nearest, has no global_pool='token' with num_classes=5"),
        (SIGLIP | {"image_size": (32, 48)}, r"SiglipVisionModel, the nearest, has no image_size=\(32, 48"),
        (DINOV3 | {"reg_tokens": 0}, "its DINOv3ViTModel, the nearest, has no reg_tokens=0"),
        (DINOV2 | {"mlp_ratio": 2.5}, "its Dinov2Model, the nearest, has no mlp_ratio=2.5"),
        (TIMM["registers"] | {"pos_embed_prefix": True}, "has no pos_embed_prefix=True"),
        (GATED | DINOV2 | {"mlp_norm": True}, "its Dinov2Model, the nearest, has no mlp_norm=True"),
        ({"attn_norm": True}, "its ViTModel, the nearest, has no attn_norm=True"),
    ):  # fmt: skip
        with pytest.raises(WeightsError, match=says):
            save_weights(tiny(**fields), tmp_path, names="hf")
    biased = tiny(**CLIP | {"projection": True})
    biased.head.bias[...] = np.ones(5, np.float32)
    with pytest.raises(WeightsError, match="the projection has a bias"):
        save_weights(biased, tmp_path, names="hf")
    with pytest.raises(ConfigError, match="names='jax' is unknown"):
        save_weights(tiny(), tmp_path, names="jax")
    assert not list(tmp_path.iterdir())
