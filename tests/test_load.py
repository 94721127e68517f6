"""A network is loaded with all that its files state, in two lines; what they do not state is a guess that is said."""

import json
import re
from argparse import Namespace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from golden.pretrained_cases import hf_names
from PIL import Image
from test_families import released
from test_pretrained_configs import fake_hub
from trained import CLASSES, make_workdir
from weight_samples import TINY, assert_refused, same, tiny, tiny_weights, write, write_pth

import tosa_jax
from tosa_jax.errors import ConfigError, WeightsError
from tosa_jax.models.params import get_params
from tosa_jax.models.positions import resample_positions
from tosa_jax.models.variants import hub_repository, variant_config
from tosa_jax.models.weights import statements
from tosa_jax.models.weights.load import load_pretrained, save_weights

NAMES = ["ant", "bee", "cat", "dog", "eel"]
PHOTO = np.random.default_rng(3).integers(0, 256, (40, 50, 3), np.uint8)
HF = {
    "model_type": "vit", "num_attention_heads": 2, "hidden_act": "gelu", "patch_size": 8, "image_size": 32,
    "layer_norm_eps": 1e-6, "id2label": {str(i): name for i, name in enumerate(NAMES)},
}  # fmt: skip
PROCESSOR = {
    "do_resize": True, "size": {"height": 40, "width": 40}, "resample": 2, "do_center_crop": True,
    "crop_size": {"height": 32, "width": 32}, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6],
}  # fmt: skip
TIMM = {
    "architecture": "vit_tiny_patch16_224", "num_classes": 5, "label_names": NAMES,
    "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "crop_pct": 0.8,
                       "interpolation": "bilinear", "crop_mode": "center", "input_size": [3, 32, 32]},
}  # fmt: skip


def folder_of(path: Path, arrays, config, processor=None) -> Path:
    write(path / "model.safetensors", arrays)
    (path / "config.json").write_text(json.dumps(config))
    if processor is not None:
        (path / "preprocessor_config.json").write_text(json.dumps(processor))
    return path


def hf_folder(path: Path, **changes) -> Path:
    arrays = hf_names(variant_config("vit", **TINY), tiny_weights())
    return folder_of(path, arrays, HF | changes, PROCESSOR)


def load(source, **fields):
    """A predictor of one batch size, and what was said."""
    said: list[str] = []
    found = tosa_jax.load(source, batch_sizes=(1,), on_message=said.append, **fields)
    return found, said


def test_a_folder_of_transformers_in_two_lines(tmp_path: Path) -> None:
    predictor, said = load(hf_folder(tmp_path / "net"), keep_rate=0.7)
    (guesses,) = predictor.classify([PHOTO], k=2)
    assert guesses[0].name in NAMES and predictor.class_names == tuple(NAMES)
    assert predictor.num_selections == 1 and len(said) == 1 and "no selectors" in said[0]
    assert predictor.task.mean == (0.1, 0.2, 0.3) and predictor.task.std == (0.4, 0.5, 0.6)
    expected = Image.fromarray(PHOTO).resize((40, 40), Image.Resampling.BILINEAR)
    expected = np.asarray(expected.crop((4, 4, 36, 36)))
    np.testing.assert_array_equal(predictor.prepare(PHOTO), expected)
    straight = load_pretrained(tiny(plan="selective", keep_rate=0.7), tmp_path / "net")
    assert same(predictor.model, straight)


def test_a_folder_of_timm_in_two_lines(tmp_path: Path) -> None:
    sizes = {"num_heads": 3, "embed_dim": 24, "patch_size": 16}
    arrays = tiny_weights(**sizes)
    predictor, said = load(folder_of(tmp_path / "net", arrays, TIMM), keep_rate=0.7)
    assert predictor.classify([PHOTO])[0][0].name in NAMES
    assert not [line for line in said if "guess" in line]
    form = predictor.form
    assert (form.image_size, form.crop_pct, form.resize) == (32, 0.8, "crop")
    assert (form.interpolation, predictor.task.mean) == ("bilinear", (0.1, 0.2, 0.3))
    fields = sizes | {"plan": "selective", "keep_rate": 0.7}
    assert same(predictor.model, load_pretrained(tiny(**fields), tmp_path / "net"))


def test_the_hub_is_asked_by_timms_and_by_its_own_names(tmp_path: Path, monkeypatch) -> None:
    sizes = {"num_heads": 3, "embed_dim": 24, "patch_size": 16}
    folder = folder_of(tmp_path / "net", tiny_weights(**sizes), TIMM)
    asked = fake_hub(monkeypatch, folder)
    model = tosa_jax.create_model("vit_tiny_patch16_224", pretrained=True, on_message=print)
    assert asked[0] == "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k config.json None"
    assert same(model, load_pretrained(tiny(**sizes), folder))
    assert model.preprocessing.mean == (0.1, 0.2, 0.3) and set(model.config.plan) == {"standard"}
    whole = model.macs() / 1e9
    cheaper = tosa_jax.create_model(
        "vit_tiny_patch16_224.in21k", pretrained=True, budget_gmacs=0.9 * whole
    )
    assert "timm/vit_tiny_patch16_224.in21k config.json None" in asked
    assert 0.8 * whole < cheaper.macs() / 1e9 <= 0.9 * whole
    asked.clear()
    assert load("hf:me/net")[0].class_names == tuple(NAMES)
    assert load("hf-hub:me/net")[0].class_names == tuple(NAMES) and asked[0].startswith("me/net ")
    tuned = tosa_jax.create_model("vit_tiny_patch16_224", pretrained=folder, num_classes=3)
    assert tuned.head.kernel.shape == (24, 3)
    for name, tag in (
        ("eva02_base_patch16_clip_224", "merged2b"),
        ("eva02_base_patch14_224", "mim_in22k"),
    ):
        assert hub_repository(name) == f"timm/{name}.{tag}"
    with pytest.raises(ConfigError, match="pass pretrained=FILE"):
        tosa_jax.create_model("vit", pretrained=True)


@pytest.mark.parametrize("case", ["CLIPModel", "SiglipVisionModel", "DINOv3ViTModel/gated",
                                  "Dinov2WithRegistersForImageClassification",
                                  "eva02_tiny_patch14_224", "eva02_base_patch14_448/token",
                                  "eva02_base_patch16_clip_224"])  # fmt: skip
def test_every_family_is_told_from_its_files(case: str, tmp_path: Path) -> None:
    """The network that the config.json of transformers or timm describes, without a name."""
    from test_families import model_of

    predictor, said = load(released(tmp_path, case))
    assert any("its family is a guess" in line for line in said) != case.startswith("eva02")
    expected = model_of(case)
    assert same(predictor.model, load_pretrained(expected, tmp_path, on_message=print))
    ignored = ("projection", "layer_scale", "patch_size", "pos_resample", "norm_eps", "dtype")
    ours, theirs = predictor.config.to_fields(), expected.config.to_fields()
    differing = {name for name in ours if ours[name] != theirs[name]} - set(ignored)
    assert not differing
    if not expected.config.num_classes or expected.config.projection:
        with pytest.raises(ConfigError, match=r"has no classes.*out\.features"):
            predictor.classify([PHOTO])


def test_what_nothing_states_is_a_guess_or_refused(tmp_path: Path) -> None:
    arrays = tiny_weights(num_heads=3, embed_dim=24)
    with pytest.raises(WeightsError, match="does not state its network: name it"):
        load(write(tmp_path / "bare.safetensors", arrays))
    path = write(tmp_path / "vit_tiny_patch16_224-abc.safetensors", arrays)
    predictor, said = load(path)
    assert "vit_tiny_patch16_224 is a guess from its name" in said[0] and "guess" in said[1]
    assert (predictor.config.patch_size, predictor.config.image_size) == (8, 32)  # by its shapes
    assert load(path, name="deit_tiny_patch16_224")[0].task.mean[0] == 0.485


def test_own_files_and_work_directories_state_all(tmp_path: Path) -> None:
    model = tiny(image_size=(48, 64), keep_rate=0.5, global_pool="avg")
    said: list[str] = []
    model.preprocessing = tosa_jax.create_model("vit_tiny_patch16_224").preprocessing
    save_weights(model, tmp_path / "own.safetensors")
    predictor, said = load(tmp_path / "own.safetensors")
    assert predictor.config == model.config and same(predictor.model, model) and not said
    assert predictor.task.mean == (0.5, 0.5, 0.5) and predictor.form.crop_pct == 0.9
    assert predictor.prepare(PHOTO).shape == (48, 64, 3)
    make_workdir(tmp_path / "run")
    assert load(tmp_path / "run", keep_rate=0.25)[0].class_names == CLASSES
    predictor.save(tmp_path / "all.safetensors")
    again, said = load(tmp_path / "all.safetensors")
    assert again.config == model.config and again.form == predictor.form and not said


def test_positions_of_another_orientation_are_resampled_not_scrambled(tmp_path: Path) -> None:
    """48x64 into 64x48: as many positions, at other places."""
    source, said = tiny(image_size=(48, 64)), []
    save_weights(source, tmp_path / "own")
    turned = load_pretrained(tiny(image_size=(64, 48)), tmp_path / "own", on_message=said.append)
    assert "positions resampled from 6x8 to 8x6" in said[0]
    own = np.asarray(source.pos_embed[...])
    expected = resample_positions(own[:, 1:], (8, 6), "bicubic_antialias", (6, 8))
    np.testing.assert_allclose(turned.pos_embed[:, 1:], expected, atol=1e-6)
    square = load_pretrained(tiny(image_size=56), tmp_path / "own", on_message=said.append)
    assert "from 6x8 to 7x7" in said[-1]  # not "7x7" from 48 patches and a class token
    expected = resample_positions(own[:, 1:], (7, 7), "bicubic_antialias", (6, 8))
    np.testing.assert_allclose(square.pos_embed[:, 1:], expected, atol=1e-6)


def test_a_grid_that_nothing_states_is_a_guess(tmp_path: Path) -> None:
    arrays, said = tiny_weights(image_size=(32, 64)), []  # 4x8 patches
    path = write(tmp_path / "a", arrays)
    load_pretrained(tiny(image_size=(64, 32)), path, on_message=said.append)
    assert "does not state its grid, 8x4 is a guess" in said[0]
    path = write(tmp_path / "b", tiny_weights(image_size=48))  # 6x6 patches, into 4x9
    load_pretrained(tiny(image_size=(32, 72)), path, on_message=said.append)
    assert "resampled from 6x6 to 4x9" in said[1] and "6x6 is a guess" in said[1]


def test_a_head_that_would_be_random_is_refused(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "net")
    for fields in ({"num_classes": 6}, {"class_names": [*NAMES, ""]}):
        with pytest.raises(WeightsError, match="head would be random.*has 5 classes, the model 6"):
            load(folder, **fields)
        with pytest.raises(WeightsError, match="head would be random"):
            tosa_jax.Predictor.from_pretrained("vit", folder, **(TINY | fields))
    arrays = {k: x for k, x in tiny_weights().items() if not k.startswith("head")}
    features = tosa_jax.Predictor.from_pretrained(
        "vit", write(tmp_path / "bare", arrays), batch_sizes=(1,),
        **{k: x for k, x in TINY.items() if k != "num_classes"},
    )  # fmt: skip
    assert features(np.zeros((1, 32, 32, 3), np.uint8)).features.shape == (1, 16)
    with pytest.raises(ConfigError, match=r"no classes.*out\.features"):
        features.classify([PHOTO])
    with pytest.raises(WeightsError, match="decoder would be random"):
        load(folder, task="depth")


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    arrays = tiny_weights()
    arrays["norm.weight"][3:5] = np.nan
    assert_refused(
        tiny(), write(tmp_path / "a", arrays), "holds 2 values that are not finite, in norm/scale"
    )


def test_the_tanh_layer_before_the_head_is_left_out_with_it(tmp_path: Path) -> None:
    arrays = tiny_weights() | {"pre_logits.fc.weight": np.ones((16, 16), np.float32)}
    path, said = write(tmp_path / "a", arrays), []
    load_pretrained(tiny(num_classes=0), path, on_message=said.append)
    assert said == [
        f"{path}: left out, as only pretraining uses them: pre_logits (and the head, which reads pre_logits)"
    ]


def test_shards_of_torch_are_read(tmp_path: Path) -> None:
    arrays = tiny_weights()
    names = sorted(arrays)
    parts = {"a-1.bin": names[::2], "a-2.bin": names[1::2]}
    for shard, part in parts.items():
        write_pth(tmp_path / shard, {name: arrays[name] for name in part})
    index = {"weight_map": {name: shard for shard, part in parts.items() for name in part}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert same(load_pretrained(tiny(1), tmp_path), load_pretrained(tiny(), arrays))


class Whatever:
    """Pickles as a call of a name that need not exist here."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


def test_settings_in_a_checkpoint_do_not_refuse_it(tmp_path: Path) -> None:
    import collections
    import pathlib

    tree = {"model": tiny_weights(), "args": pathlib.PurePosixPath("a/b"), "score": np.float64(0.5),
            "sets": {1, 2}, "counts": collections.defaultdict(int, a=1)}  # fmt: skip
    path = write_pth(tmp_path / "a.pth", tree)
    assert same(load_pretrained(tiny(), path), load_pretrained(tiny(1), tiny_weights()))


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("model", "vit_tiny"),
        ("class_names", "ant,bee"),
        ("preprocessing", "no"),
        ("predictor", "b"),
    ],
)
def test_the_metadata_of_another_project_is_no_statement(key, text, tmp_path: Path) -> None:
    path = folder_of(tmp_path, tiny_weights(), HF)
    write(path / "model.safetensors", tiny_weights(), format="pt", **{key: text})
    assert same(load_pretrained(tiny(), path), load_pretrained(tiny(1), tiny_weights()))
    assert load(path)[0].class_names == tuple(NAMES)


@pytest.mark.parametrize("statement", ["model", "class_names", "predictor"])
def test_a_statement_of_our_own_of_an_unknown_form_is_one_line(statement, tmp_path: Path) -> None:
    for text in ("5", "no JSON"):
        header = {
            "format": statements.WEIGHTS_FORMAT,
            "model": json.dumps(tiny().config.to_fields()),
        }
        path = write(tmp_path / "a.safetensors", tiny_weights(), **{**header, statement: text})
        with pytest.raises(WeightsError, match="unknown form|describes no model"):
            load(path)


def test_a_network_of_several_is_chosen(tmp_path: Path) -> None:
    teacher = {f"backbone.{k}": x for k, x in tiny_weights().items()}
    teacher |= {"head.mlp.0.weight": np.ones((3, 16), np.float32)}  # DINO's own head
    teacher = {k: x for k, x in teacher.items() if not k.startswith("backbone.head")}
    student = {f"module.{k}": x + 1 for k, x in teacher.items()}
    path, said = (
        write_pth(tmp_path / "a.pth", {"student": student, "teacher": teacher, "epoch": 3}),
        [],
    )
    plain = {k: x for k, x in tiny_weights().items() if not k.startswith("head")}
    bare = {"num_classes": 0}
    found = load_pretrained(tiny(**bare), path, on_message=said.append)
    assert (
        same(found, load_pretrained(tiny(1, **bare), plain)) and "the teacher's weights" in said[0]
    )
    found = load_pretrained(tiny(**bare), path, checkpoint_key="student")
    plus = load_pretrained(tiny(1, **bare), {k: x + 1 for k, x in plain.items()})
    assert same(found, plus)
    both = {f"teacher.{k}": x for k, x in teacher.items()} | {
        f"student.{k}": x for k, x in student.items()
    }
    path = write_pth(tmp_path / "b.pth", {"model": both})
    assert same(load_pretrained(tiny(**bare), path, checkpoint_key="student"), plus)
    assert same(load_pretrained(tiny(**bare), path, prefix="student."), plus)
    assert_refused(
        tiny(**bare),
        path,
        "holds no 'ema': its names begin with student, teacher",
        checkpoint_key="ema",
    )
    assert_refused(tiny(**bare), path, "no names that begin with 'encoder.'", prefix="encoder.")


def as_dinov2_trains(network: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """DINOv2's names while it trains: blocks in chunks, and the heads of both losses."""
    chunked = {re.sub(r"^blocks\.(\d+)", r"blocks.0.\1", k): x for k, x in network.items()}
    arrays = {f"backbone.{k}": x for k, x in chunked.items()}
    arrays |= {"backbone.mask_token": np.ones((1, 16), np.float32)}
    for head in ("dino_head", "ibot_head"):
        arrays |= {f"{head}.mlp.0.weight": np.ones((3, 16), np.float32),
                   f"{head}.last_layer.weight_v": np.ones((4, 3), np.float32)}  # fmt: skip
    return arrays


def test_training_checkpoints_give_the_network_that_is_asked_for(tmp_path: Path) -> None:
    """The layouts of dino/main_dino.py, dinov2/train/{train,ssl_meta_arch}.py and timm's and DeiT's savers."""
    net = {k: x for k, x in tiny_weights().items() if not k.startswith("head")}
    other = {k: x + 1 for k, x in net.items()}  # the student's, or that which is not averaged
    center = np.zeros((1, 4), np.float32)
    rest = {
        "optimizer": {"state": {0: {"exp_avg": center}}, "param_groups": [{"lr": 0.1}]},
        "args": Namespace(arch="vit_small", lr=0.1),
        "epoch": 3,
    }
    heads = {"head.mlp.0.weight": center, "head.last_layer.weight_g": center}
    dino = {
        "student": {f"module.backbone.{k}": x for k, x in other.items()}
        | {f"module.{k}": x for k, x in heads.items()},
        "teacher": {f"backbone.{k}": x for k, x in net.items()} | heads,
        "dino_loss": {"center": center},
    }
    both = {f"student.{k}": x for k, x in as_dinov2_trains(other).items()}
    both |= {f"teacher.{k}": x for k, x in as_dinov2_trains(net).items()}
    both |= {"dino_loss.center": center, "ibot_patch_loss.center": center[None]}
    students = {k: x for k, x in both.items() if k.startswith("student.")}
    files = {
        "dino": (dino, {None: net, "teacher": net, "student": other}),
        "dinov2": (
            {"model": both, "iteration": 5},
            {None: net, "teacher": net, "student": other, "model": net},
        ),
        "dinov2 teacher": ({"teacher": as_dinov2_trains(net)}, {None: net, "teacher": net}),
        "a student alone": ({"model": students}, {None: other, "student": other}),
        "deit": ({"model": other, "model_ema": net}, {None: net, "ema": net, "model": other}),
        "timm": (
            {"state_dict": other, "state_dict_ema": net},
            {None: net, "ema": net, "model": other, "state_dict": other},
        ),
    }
    expected = {id(x): load_pretrained(tiny(num_classes=0), x) for x in (net, other)}
    for name, (tree, choices) in files.items():
        path = write_pth(tmp_path / f"{name}.pth", tree | rest)
        for key, arrays in choices.items():
            found = load_pretrained(
                tiny(1, num_classes=0), path, checkpoint_key=key, on_message=lambda line: None
            )
            assert same(found, expected[id(arrays)]), (name, key)
    assert_refused(
        tiny(num_classes=0), tmp_path / "dino.pth", "holds no 'ema'", checkpoint_key="ema"
    )


def test_rgb_weights_are_fitted_to_other_channels_as_timm_does(tmp_path: Path) -> None:
    arrays, said = tiny_weights(), []
    grey = np.random.default_rng(0).random((1, 32, 32, 1), np.float32)
    colour = load_pretrained(tiny(), arrays).patch_embed(jnp.asarray(np.repeat(grey, 3, 3)))
    for channels in (1, 4):
        model = load_pretrained(tiny(in_chans=channels), arrays, on_message=said.append)
        found = model.patch_embed(jnp.asarray(np.repeat(grey, channels, 3)))
        if channels == 1:
            np.testing.assert_allclose(found, colour, atol=1e-4)
    assert "the patch projection of 3 channels was fitted to 1" in said[0]
    weight = arrays["patch_embed.proj.weight"]  # [d 3 p p]
    expected = np.concatenate([weight, weight[:, :1]], axis=1) * 0.75
    kernel = np.asarray(get_params(model)["patch_embed/proj/kernel"]).reshape(8, 8, 4, 16)
    np.testing.assert_allclose(kernel, expected.transpose(2, 3, 1, 0), rtol=1e-6)


def as_big_vision(params, prefix: str, stacked: bool) -> dict[str, np.ndarray]:
    """big_vision's names and layouts (`models/vit.py`) of the parameters of a tiny network of two heads."""
    ours = {name: np.asarray(x) for name, x in params.items()}
    out = {"embedding/kernel": ours["patch_embed/proj/kernel"].reshape(8, 8, 3, 16),
           "embedding/bias": ours["patch_embed/proj/bias"], "pos_embedding": ours["pos_embed"],
           "Transformer/encoder_norm/scale": ours["norm/scale"], "Transformer/encoder_norm/bias": ours["norm/bias"],
           "MAPHead_0/probe": ours["attn_pool/latent"], "head/kernel": ours["head/kernel"],
           "head/bias": ours["head/bias"]}  # fmt: skip
    layers = []
    for i in range(2):
        layer = {}
        for number, norm in enumerate(("norm1", "norm2")):
            for part in ("scale", "bias"):
                layer[f"LayerNorm_{number}/{part}"] = ours[f"blocks/{i}/{norm}/{part}"]
        for number in (1, 2):
            for part in ("kernel", "bias"):
                layer[f"MlpBlock_0/Dense_{number - 1}/{part}"] = ours[
                    f"blocks/{i}/mlp/fc{number}/{part}"
                ]
        kernels = np.split(ours[f"blocks/{i}/attn/qkv/kernel"], 3, axis=1)
        biases = np.split(ours[f"blocks/{i}/attn/qkv/bias"], 3)
        for name, kernel, bias in zip(("query", "key", "value"), kernels, biases, strict=True):
            attention = f"MultiHeadDotProductAttention_0/{name}"
            layer |= {
                f"{attention}/kernel": kernel.reshape(16, 2, 8),
                f"{attention}/bias": bias.reshape(2, 8),
            }
        layer["MultiHeadDotProductAttention_0/out/kernel"] = ours[
            f"blocks/{i}/attn/proj/kernel"
        ].reshape(2, 8, 16)
        layer["MultiHeadDotProductAttention_0/out/bias"] = ours[f"blocks/{i}/attn/proj/bias"]
        layers.append(layer)
    if stacked:
        out |= {
            f"Transformer/encoderblock/{k}": np.stack([x[k] for x in layers]) for k in layers[0]
        }
    else:
        out |= {
            f"Transformer/encoderblock_{i}/{k}": v
            for i, x in enumerate(layers)
            for k, v in x.items()
        }
    pool = "MAPHead_0/MultiHeadDotProductAttention_0"
    keys, values = np.split(ours["attn_pool/kv/kernel"], 2, axis=1)
    key_bias, value_bias = np.split(ours["attn_pool/kv/bias"], 2)
    for name, kernel, bias in (("query", ours["attn_pool/q/kernel"], ours["attn_pool/q/bias"]),
                               ("key", keys, key_bias), ("value", values, value_bias)):  # fmt: skip
        out |= {
            f"{pool}/{name}/kernel": kernel.reshape(16, 2, 8),
            f"{pool}/{name}/bias": bias.reshape(2, 8),
        }
    out |= {f"{pool}/out/kernel": ours["attn_pool/proj/kernel"].reshape(2, 8, 16),
            f"{pool}/out/bias": ours["attn_pool/proj/bias"]}  # fmt: skip
    for part in ("scale", "bias"):
        out[f"MAPHead_0/LayerNorm_0/{part}"] = ours[f"attn_pool/norm/{part}"]
    for number in (1, 2):
        for part in ("kernel", "bias"):
            out[f"MAPHead_0/MlpBlock_0/Dense_{number - 1}/{part}"] = ours[
                f"attn_pool/mlp/fc{number}/{part}"
            ]
    return {f"{prefix}{name}": x for name, x in out.items()} | {"params/t": np.ones(1, np.float32)}


@pytest.mark.parametrize(("prefix", "stacked"), [("params/", False), ("params/img/", True)])
def test_files_of_big_vision_are_read(prefix: str, stacked: bool, tmp_path: Path) -> None:
    fields = {"class_token": False, "global_pool": "map", "mlp": "gelu_tanh"}
    source = tiny(**fields)
    for name, x in get_params(source).items():
        assert np.any(x) or name.endswith("bias"), name
    np.savez(tmp_path / "a.npz", **as_big_vision(get_params(source), prefix, stacked))
    found = load_pretrained(tiny(1, **fields), tmp_path / "a.npz", on_message=print)
    assert same(found, source)
    assert same(load(tmp_path / "a.npz", name="vit", norm_eps=1e-6)[0].model, source)


def test_tokens_and_maps_of_any_layer() -> None:
    model = tiny(keep_rate=0.5, plan=("standard", "selective"))
    images = jnp.asarray(np.random.default_rng(0).random((2, 32, 32, 3), np.float32))
    out = model(images)
    first, last = model.intermediate_layers(images, 2)
    np.testing.assert_array_equal(last, out.tokens)
    np.testing.assert_array_equal(model.forward_features(images), out.tokens)
    np.testing.assert_array_equal(model.head(model.features(images)), out.logits)
    (grid,) = model.intermediate_layers(images, [-2], reshape=True)
    np.testing.assert_array_equal(grid.reshape(2, 16, 16), first[:, 1:])
    tokens = model.embed(images)
    block = model.blocks[0]
    (attn_map,) = model.attention_maps(images, [0])
    assert attn_map.shape == (2, 2, 17, 17)
    np.testing.assert_allclose(attn_map.sum(axis=-1), 1, atol=1e-5)
    value = jnp.split(block.attn.qkv(block.norm1(tokens)), 3, axis=2)[2].reshape(2, 17, 2, 8)
    mixed = block.attn.proj(jnp.einsum("bhqk,bkhc->bqhc", attn_map, value).reshape(2, 17, 16))
    np.testing.assert_allclose(mixed, block.attn(block.norm1(tokens))[0], atol=1e-5)
    with pytest.raises(ConfigError, match="layer 1 is 'selective' and has no map of all tokens"):
        model.attention_maps(images)
    with pytest.raises(ConfigError, match="layer 2 is not there"):
        model.intermediate_layers(images, [2])


def test_a_classifier_of_another_size_keeps_its_share_of_tokens() -> None:
    model = tiny(keep_rate=0.5)
    larger = tosa_jax.with_image_size(model, (48, 64))
    out = larger(jnp.zeros((1, 48, 64, 3)))
    assert out.selected[0].shape == (1, 25) and larger.config.image_size == (48, 64)
    expected = resample_positions(np.asarray(model.pos_embed[:, 1:]), (6, 8), "bicubic_antialias")
    np.testing.assert_allclose(larger.pos_embed[:, 1:], expected, atol=1e-6)
    with pytest.raises(ConfigError, match="with_image_size"):
        model(jnp.zeros((1, 48, 64, 3)))
    with pytest.raises(ConfigError, match="multiple of patch_size"):
        tosa_jax.with_image_size(model, 33)
