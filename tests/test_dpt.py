"""The published depth decoder: released networks compute what transformers computes, and are loaded honestly."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from golden import dpt_cases as cases
from golden.pretrained_cases import quickly_drawn, random_weights
from PIL import Image
from small import drawn_model, forward
from trained import make_pictures
from weight_samples import GOLDEN, assert_refused, same, write

import tosa_jax
from tosa_jax import predict
from tosa_jax.config import default_config, make_run_config
from tosa_jax.errors import ConfigError
from tosa_jax.models.params import get_params
from tosa_jax.models.tracing import abstract
from tosa_jax.models.weights.load import load_pretrained, save_weights
from tosa_jax.models.weights.statements import WEIGHTS_FORMAT
from tosa_jax.tasks.depth.dpt import DPTDecoder

STORED = np.load(GOLDEN / "dpt.npz")
SIZES = {"embed_dim": 32, "num_heads": 2, "decoder": "dpt", "decoder_dim": 16,
         "decoder_widths": (8, 12, 16, 20), "task": "depth"}  # fmt: skip
ANYTHING = SIZES | {"depth": 4, "patch_size": 14, "image_size": 56, "layer_scale": 1.0,
                    "pos_resample": "bicubic", "readout": "ignore"}  # fmt: skip
FIELDS = {
    "depth_anything": ANYTHING | {"depth_estimation_type": "relative"},
    "depth_anything_metric": ANYTHING | {"depth": 5, "max_depth": 20.0, "decoder_norm": False}
    | {"decoder_layers": (0, 1, 3, 4)},
    "dpt": SIZES | {"depth": 4, "image_size": 64, "norm_eps": 1e-12, "pos_resample": "bilinear"}
    | {"decoder_norm": False, "depth_estimation_type": "relative"},
}  # fmt: skip
FIELDS["dpt_ignore"] = FIELDS["dpt"] | {"readout": "ignore", "norm_eps": 1e-6}


def weights_of(case: str) -> dict[str, np.ndarray]:
    return cases.lifted(random_weights(json.loads(str(STORED[f"{case}/shapes"]))))


def released(folder: Path, case: str, **changes) -> Path:
    """The folder that transformers wrote, its config.json with changes."""
    write(folder / "model.safetensors", weights_of(case), format="pt")
    config = json.loads(str(STORED[f"{case}/config"])) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def model_of(case: str, **fields):
    return drawn_model("vit", **(FIELDS[case] | fields))


def blank(case: str, **fields):
    """`model_of`, whose weights are to be loaded."""
    return quickly_drawn("vit", **(FIELDS[case] | fields))


def depth_of(model, size: tuple[int, int]):
    return np.asarray(forward(model, cases.image_of(size)).depth)


@pytest.mark.parametrize("key", [k for case, sizes in cases.SIZES.items() for k in
                                 [f"{case}/{height}x{width}" for height, width in sizes]])  # fmt: skip
def test_depth_is_that_of_transformers(key: str, tmp_path: Path) -> None:
    case, _, size = key.partition("/")
    said: list[str] = []
    model = load_pretrained(blank(case), released(tmp_path, case), on_message=said.append)
    assert not any("pos_resample" in line or "stays" in line for line in said)
    height, width = map(int, size.split("x"))
    found = depth_of(model, (height, width))
    assert (STORED[key] > 0).mean() > 0.3 and np.ptp(STORED[key]) > 0.3
    assert np.abs(found - STORED[key]).max() <= 2e-5


@pytest.mark.parametrize(
    ("case", "fields", "says"),
    [
        ("depth_anything", {"decoder": "light"}, r"decoder='dpt'.*\(it has decoder='light'"),
        ("depth_anything", {"decoder_layers": (0, 0, 1, 3)}, r"pass decoder_layers=\(0, 1, 2, 3\)"),
        ("depth_anything", {"decoder_norm": False}, "pass decoder_norm=True"),
        ("depth_anything", {"depth_estimation_type": "metric"}, "estimation_type='relative'"),
        ("depth_anything_metric", {"depth_estimation_type": "relative"}, "type='metric'"),
        ("depth_anything_metric", {"decoder_norm": True}, "pass decoder_norm=False"),
        (
            "dpt",
            {"decoder_dim": 8, "decoder_widths": ()},
            r"decoder_dim=16, decoder_widths=\(8, 12",
        ),
        ("dpt", {"readout": "ignore"}, "pass readout='project'"),
        ("dpt", {"decoder_norm": True, "num_heads": 4}, "num_heads=2|decoder_norm=False"),
    ],
)
def test_the_fields_of_another_decoder_are_named(case, fields, says, tmp_path) -> None:
    if fields.get("decoder") == "light":
        fields |= {"decoder_widths": (), "depth_estimation_type": "metric"}
    assert_refused(blank(case, **fields), released(tmp_path, case), says)


def test_without_its_config_json_a_file_still_says_which_decoder_it_holds(tmp_path) -> None:
    path = write(tmp_path / "w", weights_of("dpt"))
    light = {"decoder": "light", "decoder_widths": (), "depth_estimation_type": "metric"}
    assert_refused(model_of("dpt", **light), path, r"pass decoder='dpt'.*\(it has decoder='light'")


@pytest.mark.parametrize("stated", [True, False])
def test_a_light_decoder_is_not_put_into_the_published_one(stated, tmp_path) -> None:
    """Also from a file of before there were two, which does not state its decoder."""
    light = {"decoder": "light", "decoder_widths": (), "depth_estimation_type": "metric"}
    path = tmp_path / "light"
    save_weights(model_of("dpt", **light), path)
    if not stated:
        write(path, safetensors.numpy.load_file(path), format=WEIGHTS_FORMAT, fields="{}")
        load_pretrained(model_of("dpt", **light), path)
    assert_refused(model_of("dpt"), path, r"pass decoder='light'.*\(it has decoder='dpt'")


@pytest.mark.parametrize(
    ("case", "change", "says"),
    [
        ("dpt", {"is_hybrid": True}, "is_hybrid=True, which no decoder here computes"),
        ("dpt", {"backbone_config": {"model_type": "swinv2"}}, "backbone_config='swinv2'"),
        ("dpt", {"add_projection": True}, "add_projection=True"),
        ("dpt", {"readout_type": "add"}, "readout_type='add'"),
        ("dpt", {"use_batch_norm_in_fusion_residual": True}, "use_batch_norm"),
        ("depth_anything", {"head_in_index": 2}, "head_in_index=2"),
        ("depth_anything", {"reassemble_factors": [4, 2, 1, 1]}, r"reassemble_factors=\[4, 2, 1"),
    ],
)
def test_networks_that_no_decoder_here_computes_are_refused(case, change, says, tmp_path) -> None:
    assert_refused(model_of(case), released(tmp_path, case, **change), says)


def test_the_layers_may_be_stated_as_stages(tmp_path) -> None:
    """The hub's Depth Anything V2 has both forms, older files one of them."""
    backbone = json.loads(str(STORED["depth_anything_metric/config"]))["backbone_config"]
    for gone in ("out_indices", "out_features"):
        config = {name: x for name, x in backbone.items() if name != gone}
        folder = released(tmp_path / gone, "depth_anything_metric", backbone_config=config)
        load_pretrained(model_of("depth_anything_metric"), folder)
        assert_refused(
            model_of("depth_anything_metric", decoder_layers=()), folder, "decoder_layers"
        )


def test_the_form_of_positions_is_said_as_images_of_any_size_need_it(tmp_path) -> None:
    for case, form in (("depth_anything", "bicubic"), ("dpt", "bilinear")):
        said: list[str] = []
        model = model_of(case, pos_resample="bicubic_antialias")
        load_pretrained(model, released(tmp_path / case, case), on_message=said.append)
        assert any(f"pass pos_resample={form!r} to create_model" in line for line in said)


def test_the_backbone_alone_goes_into_a_classifier(tmp_path) -> None:
    fields = {name: x for name, x in FIELDS["depth_anything"].items()
              if name not in ("task", "decoder", "decoder_dim", "decoder_widths", "readout",
                              "depth_estimation_type")}  # fmt: skip
    classifier = tosa_jax.create_model("vit", num_classes=3, rngs=nnx.Rngs(0), **fields)
    said: list[str] = []
    folder = released(tmp_path, "depth_anything")
    load_pretrained(classifier, folder, on_message=said.append)
    assert any("its decoder is not used" in line for line in said)
    whole = get_params(load_pretrained(model_of("depth_anything"), folder))
    own = get_params(classifier)
    assert {name for name in own if not np.array_equal(own[name], whole.get(name))} == {
        "head/kernel",
        "head/bias",
    }


def test_tokens_are_selected_under_it_and_it_goes_through_a_file(tmp_path) -> None:
    fields = {"plan": "selective", "keep_rate": 0.5}
    model = model_of("depth_anything_metric", **fields)
    save_weights(model, tmp_path / "w")
    again = load_pretrained(blank("depth_anything_metric", **fields), tmp_path / "w")
    assert same(model, again)
    assert depth_of(again, (30, 44)).shape == (1, 30, 44)  # the patch divides neither side
    dense = model_of("depth_anything_metric", plan="selective", keep_rate=1.0)
    plain = model_of("depth_anything_metric")
    np.testing.assert_allclose(depth_of(dense, (42, 56)), depth_of(plain, (42, 56)), atol=1e-4)


def test_its_cost_is_what_xla_counts() -> None:
    """But for biases and interpolations, which are two products each, rows before columns."""
    fields = {"embed_dim": 256, "decoder_dim": 64, "decoder_widths": (16, 32, 64, 64)}
    config = blank("dpt", **fields).config
    decoder, grid = abstract(lambda rngs: DPTDecoder(config, rngs=rngs)), (16, 16)
    taps = [jnp.zeros((1, 257, 256))] * 4
    compiled = jax.jit(lambda d, x: d(x, grid, (256, 256))).lower(decoder, taps).compile()
    resized = [(8, 16, 64), (16, 32, 64), (32, 64, 64), (64, 128, 64), (128, 256, 32)]
    resizing = sum(new * old * (old + new) * channels for old, new, channels in resized)
    counted = compiled.cost_analysis()["flops"] / 2
    assert (decoder.macs(grid) + resizing) / counted == pytest.approx(1, abs=0.01)


@pytest.fixture(scope="module")
def relative(tmp_path_factory) -> Path:
    """One file of a network of relative depth."""
    folder = tmp_path_factory.mktemp("relative")
    predictor = tosa_jax.Predictor.from_pretrained(
        "vit", released(folder, "depth_anything"), on_message=lambda line: None,
        **FIELDS["depth_anything"],
    )  # fmt: skip
    predictor.save(folder / "relative.safetensors")
    return folder / "relative.safetensors"


def test_relative_depth_has_no_metres_where_it_is_printed_and_written(
    relative, tmp_path, capsys
) -> None:
    (picture,) = make_pictures(tmp_path / "pictures", 1, (56, 42))
    argv = [f"--weights={relative}", f"--depth_dir={tmp_path}", f"--show_tokens={tmp_path}/tokens"]
    assert predict.main([*argv, str(picture)]) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "median" in x]
    assert "relative inverse depth" in line and " m" not in line.replace(" median", "")
    with Image.open(tmp_path / "0.png") as image:
        assert np.asarray(image).max() == 65535
    assert predict.main([*argv, f"--truth={tmp_path}", str(picture)]) == 2
    assert "--truth is in metres" in capsys.readouterr().err


def test_relative_depth_is_neither_trained_nor_scored() -> None:
    config = default_config(task="depth")
    config.data.name = "rooms"
    config.model.decoder = "dpt"
    make_run_config(config)
    config.model.depth_estimation_type = "relative"
    with pytest.raises(ConfigError, match="'relative' has no metres to train or score"):
        make_run_config(config)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"decoder": "dtp"}, "did you mean 'dpt'"),
        ({"depth_estimation_type": "absolute"}, "known: metric, relative"),
        ({"decoder_widths": (1, 2, 3)}, "must be four numbers"),
        ({"decoder_widths": (0, 2, 3, 4)}, "must be four numbers"),
        ({"decoder": "light"}, "decoder_widths=.* needs decoder='dpt'"),
        ({"decoder": "light", "decoder_widths": (), "depth_estimation_type": "relative"},
         "'relative' needs decoder='dpt'"),
    ],
)  # fmt: skip
def test_wrong_fields_are_named(fields, says) -> None:
    with pytest.raises(ConfigError, match=says):
        model_of("depth_anything_metric", **fields)
