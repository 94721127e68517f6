"""CLIP, SigLIP, DINOv3, EVA-02, DINOv2's classifiers compute what transformers or timm does, dense and selective."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import family_cases as cases
from golden.pretrained_cases import quickly_drawn
from small import drawn_model, forward
from weight_samples import GOLDEN, assert_refused, same, write

import tosa_jax
from tosa_jax.errors import ConfigError
from tosa_jax.models.params import get_params, set_params, split
from tosa_jax.models.variants import HUB_NAMES, VARIANTS, variant_config
from tosa_jax.models.weights.load import load_pretrained, save_weights
from tosa_jax.models.weights.preprocessing import preprocessing_of

STORED = np.load(GOLDEN / "families.npz")
SMALL = {"embed_dim": 32, "depth": 3, "num_heads": 2, "image_size": 32, "patch_size": 8}
TOWER = SMALL | {"mlp_ratio": 2.5, "pos_resample": "bicubic"}
DINOV2 = SMALL | {"num_classes": 5, "global_pool": "token_avg"}
EVA02 = SMALL | {"mlp_ratio": 2 * 85 / 32}
MODELS = {
    "CLIPModel": ("vit_base_patch16_clip_quickgelu_224", TOWER | {"num_classes": 12}),
    "CLIPVisionModelWithProjection": ("vit_base_patch16_clip_224", TOWER | {"num_classes": 12}),
    "SiglipModel": ("vit_base_patch16_siglip_224", TOWER),
    "SiglipVisionModel": ("vit_base_patch16_siglip_224", TOWER),
    "DINOv3ViTModel": ("vit_small_patch16_dinov3", SMALL | {"mlp_ratio": 2.5}),
    "DINOv3ViTModel/gated": ("vit_small_plus_patch16_dinov3",
                             SMALL | {"mlp_ratio": 5.0, "rope_base": 30.0}),
    "DINOv3ViTModel/7b": ("vit_7b_patch16_dinov3", SMALL | {"mlp_ratio": 4.0}),
    "Dinov2ForImageClassification": ("vit_small_patch14_dinov2", DINOV2 | {"pos_resample": "bicubic"}),
    "Dinov2WithRegistersForImageClassification": ("vit_small_patch14_reg4_dinov2", DINOV2),
    "eva02_tiny_patch14_224": ("eva02_tiny_patch14_224", EVA02),
    "eva02_base_patch14_224": ("eva02_base_patch14_224", EVA02 | {"num_classes": 5}),
    "eva02_base_patch14_448/token": ("eva02_base_patch14_448",
                                     EVA02 | {"num_classes": 5, "global_pool": "token"}),
    "eva02_base_patch16_clip_224": ("eva02_base_patch16_clip_224", EVA02 | {"num_classes": 12}),
}  # fmt: skip


def released(folder: Path, case: str, **changes) -> Path:
    """The folder that transformers or timm wrote, its config.json with changes."""
    shapes = json.loads(str(STORED[f"{case}:shapes"]))
    write(folder / "model.safetensors", cases.weights_of(shapes), format="pt")
    config = json.loads(str(STORED[f"{case}:config"])) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def model_of(case: str, **fields):
    name, own = MODELS[case]
    return drawn_model(name, **(own | fields))


def blank(case: str, **fields):
    """`model_of`, whose weights are to be loaded."""
    name, own = MODELS[case]
    return quickly_drawn(name, **(own | fields))


def run(model, images) -> dict[str, np.ndarray]:
    """What the head gives, and the tokens."""
    out = forward(model, images)
    (head,) = out.predictions.values()
    return {"head": np.asarray(head), "tokens": np.asarray(out.tokens)}


@pytest.mark.parametrize("case", MODELS)
def test_the_network_is_that_of_transformers_or_timm(case: str, tmp_path: Path) -> None:
    """At the native size and at one that is no square; a selection of every token changes nothing."""
    folder, said = released(tmp_path, case), []
    for size in cases.IMAGES:
        model = load_pretrained(blank(case, image_size=size), folder, on_message=said.append)
        found = run(model, cases.image_of(size))
        key = "x".join(map(str, size))
        for what in ("head", "tokens") if f"{case}:{key}:tokens" in STORED else ("head",):
            assert np.abs(found[what] - STORED[f"{case}:{key}:{what}"]).max() <= 2e-5, (size, what)
    assert not any("stays" in line or "pass" in line for line in said), said
    selective = blank(case, image_size=size, plan="selective", keep_rate=1.0)
    load_pretrained(selective, folder, on_message=said.append)
    np.testing.assert_allclose(
        run(selective, cases.image_of(size))["head"], found["head"], atol=1e-5
    )


@pytest.mark.parametrize("case", ["CLIPModel", "SiglipModel", "DINOv3ViTModel/gated",
                                  "Dinov2ForImageClassification", "eva02_base_patch14_224",
                                  "eva02_base_patch16_clip_224"])  # fmt: skip
def test_gradients_of_a_selective_network_are_finite_and_reach_every_part(case: str) -> None:
    model = model_of(case, depth=2, plan="previous", keep_rate=0.5)
    graphdef, params = split(model)
    images = jnp.asarray(cases.image_of((32, 32)))

    def loss(params):
        (head,) = set_params(graphdef, params)(images).predictions.values()
        return (head**2).sum()

    grads = jax.jit(jax.grad(loss))(params)
    assert all(np.isfinite(x).all() for x in grads.values())
    unused = {name for name, x in grads.items() if not np.any(x)}
    assert not unused, unused


def test_key_biases_of_dinov3_stay_zero() -> None:
    """A key's bias would be turned with the key, so that it is no constant that softmax takes away."""
    model = model_of("DINOv3ViTModel", depth=2, layer_scale=1.0)
    bias = model.blocks[1].attn.qkv.bias
    before = run(model, cases.image_of((32, 32)))["tokens"]
    bias[...] = bias[...].at[32:64].set(1.0)
    np.testing.assert_array_equal(run(model, cases.image_of((32, 32)))["tokens"], before)
    bias[...] = bias[...].at[:32].set(1.0)
    assert np.abs(run(model, cases.image_of((32, 32)))["tokens"] - before).max() > 1e-3


def plain_timm(params: dict) -> dict[str, np.ndarray]:
    """timm's names and layouts of parameters whose patches are 8x8x3."""
    out = {}
    for path, x in params.items():
        name, x = (
            path.replace("/", ".").replace("kernel", "weight").replace("scale", "weight"),
            np.asarray(x),
        )
        if name == "patch_embed.proj.weight":
            out[name] = x.reshape(8, 8, 3, 32).transpose(3, 2, 0, 1)
        else:
            out[name] = x.T if x.ndim == 2 else x
    return out


def as_timm(params: dict, biases: bool) -> dict[str, np.ndarray]:
    """timm's names of a DINOv3: fused kernels, biases of queries and values or none, a gated MLP's halves apart."""
    out = {}
    for name, x in plain_timm(params).items():
        stem = name.rpartition("qkv.")[0] if name.endswith("qkv.bias") else ""
        if stem:
            out |= {f"{stem}q_bias": x[:32], f"{stem}v_bias": x[64:]} if biases else {}
        elif ".mlp.fc1." in name:
            gate, up = np.split(x, 2)
            out |= {name.replace("fc1", "fc1_g"): gate, name.replace("fc1", "fc1_x"): up}
        else:
            out[name.replace(".ls1.gamma", ".gamma_1").replace(".ls2.gamma", ".gamma_2")] = x
    return out


def as_facebook(params: dict) -> dict[str, np.ndarray]:
    out = {}
    for name, x in as_timm(params, False).items():
        name = (
            name.replace("reg_token", "storage_tokens")
            .replace(".fc1_g.", ".w1.")
            .replace(".fc1_x.", ".w2.")
        )
        name = (
            name.replace(".mlp.fc2.", ".mlp.w3.")
            .replace(".gamma_1", ".ls1.gamma")
            .replace(".gamma_2", ".ls2.gamma")
        )
        out[name] = x
    for i in range(3):
        bias = np.asarray(params[f"blocks/{i}/attn/qkv/bias"])
        noise = np.where(np.arange(96) // 32 == 1, np.nan, bias).astype(
            np.float32
        )  # what the mask hides
        out |= {f"blocks.{i}.attn.qkv.bias": noise,
                f"blocks.{i}.attn.qkv.bias_mask": (np.arange(96) // 32 != 1).astype(np.float32)}  # fmt: skip
    return out | {
        "rope_embed.periods": np.ones(4, np.float32),
        "local_cls_norm.weight": np.ones(32, np.float32),  # of the 7B's training
        "mask_token": np.ones((1, 32), np.float32),
    }


def test_the_other_names_of_a_dinov3_are_read(tmp_path) -> None:
    case = "DINOv3ViTModel/gated"
    whole = load_pretrained(model_of(case), released(tmp_path, case), on_message=lambda line: None)
    params = get_params(whole)
    for i, arrays in enumerate((as_timm(params, True), as_facebook(params))):
        path = write(tmp_path / f"{i}", arrays)
        assert same(load_pretrained(model_of(case), path, on_message=lambda line: None), whole)
    bare = load_pretrained(model_of(case), write(tmp_path / "bare", as_timm(params, False)))
    found = get_params(bare)
    assert not any(np.any(x) for name, x in found.items() if name.endswith("qkv/bias"))
    differing = {name for name in params if not np.array_equal(params[name], found[name])}
    assert differing == {f"blocks/{i}/attn/qkv/bias" for i in range(3)}


def as_evas_authors(case: str) -> dict[str, np.ndarray]:
    """timm's weights of a case under the names of EVA's own code."""
    theirs = {
        "rope.freqs_cos": np.ones((16, 16)),
        "blocks.0.attn.rope.freqs_sin": np.ones((16, 16)),
    }
    for name, x in cases.weights_of(json.loads(str(STORED[f"{case}:shapes"]))).items():
        name = name.replace(".fc1_g.", ".w1.").replace(".fc1_x.", ".w2.").replace(".fc2.", ".w3.")
        name = name.replace(".mlp.norm.", ".mlp.ffn_ln.").replace("_proj.bias", "_bias")
        theirs[name.replace(".attn.norm.", ".attn.inner_attn_ln.")] = x
    return theirs


def test_the_other_names_of_an_eva02_are_read(tmp_path) -> None:
    """Those of its authors' code, with three kernels or one."""
    case, said = "eva02_base_patch14_224", []
    whole = load_pretrained(model_of(case), released(tmp_path, case), on_message=said.append)
    theirs = as_evas_authors(case)
    theirs |= {"mask_token": np.ones((1, 1, 32)), "lm_head.bias": np.ones(9)}
    one = {name: x for name, x in theirs.items() if not re.search(r"attn\.[qkv]_proj", name)}
    for i in range(3):
        parts = [theirs[f"blocks.{i}.attn.{part}_proj.weight"] for part in "qkv"]
        one[f"blocks.{i}.attn.qkv.weight"] = np.concatenate(parts)
    for i, arrays in enumerate((theirs, one)):
        path = write(tmp_path / f"{i}", arrays)
        assert same(load_pretrained(model_of(case), path, on_message=said.append), whole)
    assert len(said) == 2 and all(line.endswith("uses them: lm_head, mask_token") for line in said)


def test_a_tower_is_read_from_the_files_of_openclip_and_of_evas_authors(tmp_path) -> None:
    """OpenCLIP has timm's network in its own, the authors nearly that; what else stands there is for texts."""
    case, said = "eva02_base_patch16_clip_224", []
    whole = load_pretrained(model_of(case), released(tmp_path, case), on_message=said.append)
    timm = cases.weights_of(json.loads(str(STORED[f"{case}:shapes"])))
    texts = {"logit_scale": np.ones(()), "text.transformer.resblocks.0.ln_1.weight": np.ones(3)}
    openclip = {f"visual.trunk.{name}": x for name, x in timm.items()}
    authors = {f"visual.{name}": x for name, x in as_evas_authors(case).items()}
    for arrays in (openclip, authors):
        path = write(tmp_path / "tower", arrays | texts)
        assert same(load_pretrained(model_of(case), path, on_message=said.append), whole)
        loaded = tosa_jax.load(path, name=MODELS[case][0], num_heads=2, on_message=said.append)
        assert loaded.config.projection and same(loaded.model, whole)
    lines = {line.partition(": ")[2] for line in said if "left out" in line}
    assert lines == {"left out, as only texts need them: logit_scale, text"}
    # A head that OpenCLIP adds to timm's network is none of timm's.
    beside = openclip | {"visual.head.proj.weight": np.ones((4, 12), np.float32)}
    assert_refused(model_of(case), write(tmp_path / "beside", beside), "left over: visual/head/pro")


def test_the_linear_head_of_dinov2_is_read_with_the_network_and_alone(tmp_path) -> None:
    case = "Dinov2WithRegistersForImageClassification"
    whole = load_pretrained(model_of(case), released(tmp_path, case), on_message=lambda line: None)
    arrays = plain_timm(get_params(whole))
    head = {name: arrays.pop(f"head.{name}") for name in ("weight", "bias")}
    arrays["register_tokens"] = arrays.pop("reg_token")
    both = {f"backbone.{name}": x for name, x in arrays.items()}
    both |= {f"linear_head.{name}": x for name, x in head.items()}
    assert same(load_pretrained(model_of(case), write(tmp_path / "both", both)), whole)
    apart = model_of(case)
    said: list[str] = []
    load_pretrained(apart, write(tmp_path / "net", arrays), on_message=said.append)
    load_pretrained(apart, head=write(tmp_path / "head", head))
    assert same(apart, whole) and any("the file has none" in line for line in said)
    four = {"weight": np.zeros((5, 5 * 32), np.float32), "bias": head["bias"]}
    for path, says in (
        (write(tmp_path / "four", four), "reads four layers"),
        (tmp_path / "net", "holds no linear head alone"),
        (
            write(tmp_path / "wide", {**four, "weight": np.zeros((5, 32), np.float32)}),
            "of another shape: head/kernel",
        ),
    ):
        assert_refused(apart, None, says, head=path)


@pytest.mark.parametrize("case", ["CLIPModel", "SiglipModel"])
def test_timms_names_are_read(case, tmp_path) -> None:
    whole = load_pretrained(model_of(case), released(tmp_path, case), on_message=lambda line: None)
    path = write(tmp_path / "timm", plain_timm(get_params(whole)))
    said: list[str] = []
    assert same(load_pretrained(model_of(case), path, on_message=said.append), whole) and not said


def test_openclips_names_are_read(tmp_path) -> None:
    case = "CLIPVisionModelWithProjection"
    whole = load_pretrained(model_of(case), released(tmp_path, case), on_message=lambda line: None)
    arrays = {
        "visual.proj": np.asarray(whole.head.kernel[...]),
        "logit_scale": np.ones((), np.float32),
    }
    arrays["transformer.resblocks.0.ln_1.weight"] = np.ones(3, np.float32)  # of texts
    ours = [("blocks.", "transformer.resblocks."), (".norm", ".ln_"), ("norm_pre", "ln_pre"), (".fc1.", ".c_fc."),
            (".fc2.", ".c_proj."), ("attn.qkv.", "attn.in_proj_"), ("attn.proj.", "attn.out_proj."),
            ("cls_token", "class_embedding"), ("pos_embed", "positional_embedding")]  # fmt: skip
    for name, x in plain_timm(get_params(whole)).items():
        if not name.startswith("head"):
            name = name.replace("patch_embed.proj", "conv1")
            name = "ln_post." + name[5:] if name.startswith("norm.") else name
            for old, new in ours:
                name = name.replace(old, new)
            arrays[f"visual.{name}"] = x[0, 0] if "class" in name else x[0] if x.ndim == 3 else x
    said: list[str] = []
    model = load_pretrained(
        model_of(case), write(tmp_path / "open", arrays), on_message=said.append
    )
    assert same(model, whole)
    assert any("only texts need them: logit_scale, transformer" in line for line in said)


def test_files_of_our_own_go_round_and_state_the_rotary_positions(tmp_path) -> None:
    for i, case in enumerate(("SiglipModel", "DINOv3ViTModel")):
        model = model_of(case)
        save_weights(model, tmp_path / f"{i}")
        assert same(load_pretrained(model_of(case), tmp_path / f"{i}"), model)
    assert_refused(
        model_of(case, rope_base=50.0), tmp_path / "1", r"pass rope_base=100.0 to create_model"
    )


@pytest.mark.parametrize(
    ("case", "fields", "changes", "says"),
    [
        ("CLIPModel", {"mlp": "gelu"}, {}, "pass mlp='quick_gelu' to create_model"),
        ("CLIPModel", {"patch_size": 16}, {}, "pass patch_size=8"),
        ("SiglipModel", {"mlp": "gelu"}, {}, "pass mlp='gelu_tanh'"),
        ("SiglipVisionModel", {"num_heads": 4}, {}, "pass num_heads=2"),
        ("DINOv3ViTModel", {"rope_base": 10.0}, {}, "pass rope_base=100.0"),
        (
            "DINOv3ViTModel/gated",
            {},
            {"hidden_act": "gelu"},
            "hidden_act='gelu', which no model here computes",
        ),
    ],
)
def test_the_config_json_of_another_function_is_refused(
    case, fields, changes, says, tmp_path
) -> None:
    assert_refused(model_of(case, **fields), released(tmp_path, case, **changes), says)


def test_a_predictor_without_classes_gives_features_and_says_that_it_classifies_nothing() -> None:
    predictor = tosa_jax.Predictor(model_of("SiglipModel", plan="previous", keep_rate=0.5))
    picture = np.zeros((40, 50, 3), np.uint8)
    assert predictor(predictor.prepare(picture)[None]).features.shape == (1, 32)
    with pytest.raises(ConfigError, match=r"no classes \(num_classes=0\): use out = predictor"):
        predictor.classify([picture])


def test_a_linear_head_of_both_says_which_pool_it_needs(tmp_path) -> None:
    case, said = "Dinov2ForImageClassification", []
    load_pretrained(
        model_of(case, global_pool="token"), released(tmp_path, case), on_message=said.append
    )
    assert any("pass global_pool='token_avg'" in line for line in said)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"global_pool": "token"}, "there is no class token"),
        ({"global_pool": "token_avg"}, "there is no class token"),
        ({"plan": "class_attention", "keep_rate": 0.5}, "needs a class token"),
        ({"rope": "dinov3", "embed_dim": 12}, "needs heads whose width 4 divides, not 6"),
        ({"rope": "dino"}, "did you mean 'dinov3'"),
        ({"num_classes": -1}, "at least 0"),
        ({"task": "depth", "decoder": "dpt"}, "needs a class token"),
    ],
)
def test_what_does_not_go_together_is_named(fields, says) -> None:
    with pytest.raises(ConfigError, match=says):
        model_of("SiglipModel", **fields)


def test_every_name_of_the_hub_leads_to_a_variant_with_its_own_preprocessing() -> None:
    assert set(HUB_NAMES.values()) <= VARIANTS.keys()
    assert variant_config("facebook/dinov3-vits16-pretrain-lvd1689m").rope == "dinov3"
    clip = preprocessing_of("openai/clip-vit-base-patch32", 224)
    assert clip.mean[0] == pytest.approx(0.48145466) and clip.crop_pct == 1.0
    assert preprocessing_of("vit_so400m_patch14_siglip_224", 224)[:3] == ((0.5,), (0.5,), 1.0)
    assert preprocessing_of("vit_base_patch16_dinov3", 256)[1:3] == ((0.229, 0.224, 0.225), 1.0)
    assert variant_config("vit_so400m_patch14_siglip_224").mlp_dim == 4304
    assert variant_config("vit_huge_plus_patch16_dinov3").mlp_dim == 2 * 5120
    assert variant_config("facebook/dinov3-vit7b16-pretrain-lvd1689m").mlp_dim == 2 * 8192
    naflex = preprocessing_of("google/siglip2-base-patch16-naflex", 256)
    assert (naflex.mean, naflex.interpolation) == ((0.5,), "bilinear")
    widths = {"tiny": 512, "small": 1024, "base": 2048, "large": 2730}
    for size, width in widths.items():
        assert variant_config(f"eva02_{size}_patch14_224").mlp_dim == 2 * width


@pytest.mark.parametrize(
    ("name", "size", "crop", "resize"),
    [
        ("eva02_tiny_patch14_224", 224, 0.9, "crop"),
        ("eva02_small_patch14_336", 336, 1.0, "crop"),
        ("eva02_base_patch14_448", 448, 1.0, "squash"),
        ("eva02_base_patch14_448.mim_in22k_ft_in1k", 448, 1.0, "crop"),
        ("eva02_large_patch14_448.mim_m38m_ft_in22k_in1k", 448, 1.0, "squash"),
    ],
)
def test_images_of_an_eva02_are_prepared_as_timm_does(name, size, crop, resize) -> None:
    found = preprocessing_of(name, size)
    assert (found.mean, found.std) == preprocessing_of("vit_base_patch16_clip_224", 224)[:2]
    assert (found.crop_pct, found.interpolation, found.resize) == (crop, "bicubic", resize)


def test_the_cost_of_attention_pooling_is_what_xla_counts() -> None:
    model = model_of("SiglipModel", embed_dim=256, mlp_ratio=4.0)
    tokens = jnp.zeros((1, 64, 256))
    compiled = jax.jit(lambda pool, x: pool(x)).lower(model.attn_pool, tokens).compile()
    assert model.attn_pool.macs(64) * 2 / compiled.cost_analysis()["flops"] == pytest.approx(
        1, abs=0.02
    )


def test_released_sizes_were_measured_at_two_image_sizes() -> None:
    results = Path(__file__).parents[1] / "results"
    files = [results / f"families_exactness{end}.json" for end in ("", "_timm")]
    of_transformers, of_timm = (json.loads(file.read_text())["cases"] for file in files)
    assert (
        of_transformers.keys() == cases.WHOLE.keys() and of_timm.keys() == cases.TIMM_WHOLE.keys()
    )
    measured = of_transformers | of_timm
    for variant, found in measured.items():
        own = variant_config(variant).image_shape if variant in of_timm else (224, 224)
        sizes = {"224x224", "448x224", "x".join(map(str, own))}
        assert found["differences"].keys() == sizes, variant
        assert max(found["differences"].values()) <= 2e-5, variant
