"""Names and layouts of every release: timm, DINOv2, MAE, transformers, Google's JAX ViT."""

import re
from pathlib import Path

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.pretrained_cases import hf_names
from small import forward
from weight_samples import TINY, assert_refused, same, tiny, tiny_weights, write

from tosa_jax.models.params import get_params
from tosa_jax.models.variants import variant_config
from tosa_jax.models.weights.load import load_pretrained


def test_the_table_of_transposes(tmp_path: Path) -> None:
    weights = tiny_weights()
    params = get_params(load_pretrained(tiny(), write(tmp_path / "w", weights)))
    qkv = weights["blocks.1.attn.qkv.weight"]
    np.testing.assert_array_equal(params["blocks/1/attn/qkv/kernel"], qkv.T)
    np.testing.assert_array_equal(params["blocks/0/norm2/scale"], weights["blocks.0.norm2.weight"])
    patch = weights["patch_embed.proj.weight"]
    np.testing.assert_array_equal(params["patch_embed/proj/kernel"][8 * 3 + 1], patch[:, 1, 1, 0])


def test_dinov2s_original_names_are_timms(tmp_path: Path) -> None:
    fields = {"mlp": "swiglu", "layer_scale": 1.0, "reg_tokens": 4}
    theirs = tiny_weights(**fields)
    timm = dict(theirs)
    positions = theirs["pos_embed"]
    del theirs["reg_token"]
    renamed = {
        re.sub(r"^blocks\.(\d)\.", r"backbone.blocks.0.\1.", name)
        .replace(".fc1.", ".w12.")
        .replace(".fc2.", ".w3."): x
        for name, x in theirs.items()
        if name != "pos_embed"
    }
    renamed |= {"register_tokens": timm["reg_token"], "mask_token": np.ones((1, 16), np.float32)}
    renamed |= {"dino_head.mlp.0.weight": np.ones((3, 3), np.float32)}
    # DINOv2 has a position for the class token and none for the registers.
    renamed["pos_embed"] = np.delete(positions, slice(1, 5), axis=1)
    timm["cls_token"] = timm["cls_token"] + positions[:, :1]
    timm["pos_embed"] = positions[:, 5:]
    fields["pos_embed_prefix"] = False
    a = load_pretrained(tiny(**fields), write(tmp_path / "a", renamed))
    b = load_pretrained(tiny(1, **fields), write(tmp_path / "b", timm))
    assert same(a, b)


@pytest.mark.parametrize(
    ("whose", "registers", "form"),
    [
        ("transformers", 0, "bicubic"),
        ("transformers", 4, "bicubic_antialias"),
        ("Facebook's hub", 0, "bicubic_offset"),
        ("Facebook's hub", 4, "bicubic_antialias"),
        ("timm", 0, None),
    ],
)
def test_whose_positions_another_form_would_give_is_said(whose, registers, form, tmp_path) -> None:
    """Said where a grid is resampled in another form than the code that the names are of has."""
    fields = {"layer_scale": 1.0, "reg_tokens": registers, "pos_embed_prefix": not registers}
    weights = tiny_weights(**fields)
    if whose == "transformers":
        weights = hf_names(variant_config("vit", **(TINY | fields)), weights)
    elif whose == "Facebook's hub":
        weights["mask_token"] = np.ones((1, 16), np.float32)
    path = write(tmp_path / "w", weights)
    for own in ("bicubic_antialias", "bilinear"):
        said: list[str] = []
        model = tiny(**fields, image_size=24, pos_resample=own)
        load_pretrained(model, path, on_message=said.append)
        (line,) = [text for text in said if "resampled from 4x4 to 3x3" in text]
        other = form not in (None, own)
        assert (f"pass pos_resample={form!r}" in line and whose in line) == other
        assert ("pass pos_resample" in line) == other


def test_positions_without_prefix_give_a_model_with_them_zeros(tmp_path: Path) -> None:
    weights = tiny_weights(pos_embed_prefix=False)
    positions = get_params(load_pretrained(tiny(), write(tmp_path / "a", weights)))["pos_embed"]
    assert not positions[:, 0].any()
    np.testing.assert_array_equal(positions[:, 1:], weights["pos_embed"])


def mae_weights(finetuned: bool = False) -> dict[str, np.ndarray]:
    """MAE's names: fine-tuned with a head on the mean, or with the decoder of pretraining."""
    if finetuned:
        return tiny_weights(global_pool="avg")
    weights = {k: x for k, x in tiny_weights().items() if not k.startswith("head")}
    decoder = ("decoder_embed.weight", "decoder_blocks.0.norm1.bias", "decoder_pos_embed")
    return weights | dict.fromkeys(("mask_token", *decoder), np.ones((1, 1, 8), np.float32))


@pytest.mark.parametrize("prefix", ["", "decoder."])
def test_parts_that_only_pretraining_uses_are_left_out_and_said(prefix, tmp_path: Path) -> None:
    weights, said = mae_weights(), []
    if prefix:  # transformers' ViTMAE
        own = {k: x for k, x in weights.items() if not k.startswith(("mask", "decoder"))}
        config = variant_config("vit", **TINY)
        weights = hf_names(config, own) | {f"decoder.{k}": weights[k] for k in weights.keys() - own}
    model = load_pretrained(tiny(), write(tmp_path / "a", weights), on_message=said.append)
    straight = load_pretrained(tiny(), write(tmp_path / "b", tiny_weights()))
    straight.head = model.head
    assert same(model, straight)
    parts = "decoder" if prefix else "decoder, mask_token"
    assert [line.split(": ", 1)[1] for line in said] == [
        f"left out, as only pretraining uses them: {parts}",
        "the head stays as the model has it, untrained: the file has none",
    ]


def test_a_head_on_the_mean_needs_a_model_that_has_one(tmp_path: Path) -> None:
    finetuned = write(tmp_path / "a", mae_weights(finetuned=True))
    assert_refused(tiny(), finetuned, "has fc_norm.*pass global_pool='avg' to create_model")
    with_head = write(tmp_path / "b", tiny_weights())
    assert_refused(tiny(global_pool="avg"), with_head, "class token.*pass global_pool='token'")
    model, said = tiny(global_pool="avg"), []
    model.fc_norm.bias[...] = jnp.arange(16.0)
    load_pretrained(model, write(tmp_path / "c", mae_weights()), on_message=said.append)
    np.testing.assert_array_equal(model.fc_norm.bias[...], np.arange(16))
    assert any("fc_norm stays as the model has it" in line for line in said)


# ---- Google's JAX ViT ----


class GoogleViT(flax.linen.Module):
    """google-research/vision_transformer's network on Flax's own attention, at the sizes of TINY."""

    @flax.linen.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        nn = flax.linen
        conv = nn.Conv(16, (8, 8), strides=(8, 8), padding="VALID", name="embedding")
        x = conv(images).reshape(len(images), -1, 16)
        cls = self.param("cls", nn.initializers.zeros, (1, 1, 16))
        x = jnp.concatenate([jnp.tile(cls, (len(x), 1, 1)), x], axis=1)
        x = GoogleEncoder(name="Transformer")(x)
        return nn.Dense(5, name="head")(x[:, 0])


class GoogleEncoder(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = GooglePositions(name="posembed_input")(x)
        for i in range(TINY["depth"]):
            x = GoogleBlock(name=f"encoderblock_{i}")(x)
        return flax.linen.LayerNorm(name="encoder_norm")(x)


class GooglePositions(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (1, *x.shape[1:])
        return x + self.param("pos_embedding", flax.linen.initializers.zeros, shape)


class GoogleBlock(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        nn = flax.linen
        attend = nn.MultiHeadDotProductAttention(2, name="MultiHeadDotProductAttention_1")
        x = x + attend(nn.LayerNorm(name="LayerNorm_0")(x))
        return x + GoogleMlp(name="MlpBlock_3")(nn.LayerNorm(name="LayerNorm_2")(x))


class GoogleMlp(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = flax.linen.gelu(flax.linen.Dense(64, name="Dense_0")(x))
        return flax.linen.Dense(16, name="Dense_1")(x)


def google_weights() -> dict[str, np.ndarray]:
    """Random parameters of `GoogleViT`, by the names that its `.npz` files have."""
    shapes = jax.eval_shape(GoogleViT().init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    flat = flax.traverse_util.flatten_dict(shapes["params"], sep="/")
    rng = np.random.default_rng(0)
    scales = {k: 1.0 if k.endswith("scale") else 0.0 for k in flat}
    return {
        k: (scales[k] + 0.3 * rng.standard_normal(x.shape)).astype("f4") for k, x in flat.items()
    }


def test_googles_vit_computes_what_flax_linen_does(tmp_path: Path) -> None:
    weights, said = google_weights(), []
    np.savez(tmp_path / "Ti_16.npz", **weights)
    images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    model = load_pretrained(tiny(mlp="gelu_tanh"), tmp_path / "Ti_16.npz", on_message=said.append)
    params = flax.traverse_util.unflatten_dict(weights, sep="/")
    expected = jax.jit(GoogleViT().apply)({"params": params}, images)
    np.testing.assert_allclose(forward(model, images).logits, expected, rtol=0, atol=2e-5)
    assert not said
    load_pretrained(tiny(), tmp_path / "Ti_16.npz", on_message=said.append)
    assert len(said) == 1 and "pass mlp='gelu_tanh'" in said[0]


def test_googles_vit_of_another_shape_is_refused(tmp_path: Path) -> None:
    weights = google_weights()
    np.savez(tmp_path / "a.npz", **weights)
    assert_refused(tiny(num_heads=4), tmp_path / "a.npz", "pass num_heads=2 to create_model")
    assert_refused(tiny(depth=1), tmp_path / "a.npz", "left over: blocks/1/attn/proj/bias")
    del weights["Transformer/encoderblock_1/MultiHeadDotProductAttention_1/value/bias"]
    np.savez(tmp_path / "b.npz", **weights)
    assert_refused(
        tiny(), tmp_path / "b.npz", "missing: blocks/1/attn/qkv/bias; left over: blocks/1"
    )
