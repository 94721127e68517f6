"""The depth network: any backbone, any image shape, a cost that adds up, released weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small import forward

import tosa_jax
from tosa_jax.errors import ConfigError
from tosa_jax.models import cost
from tosa_jax.models.factory import abstract_model
from tosa_jax.models.params import get_params, set_params, split
from tosa_jax.models.positions import resample_positions
from tosa_jax.models.weights.load import load_pretrained, save_weights
from tosa_jax.tasks import model_config

SIZES = {
    "embed_dim": 16,
    "depth": 4,
    "num_heads": 2,
    "mlp_ratio": 2.0,
    "image_size": (24, 40),
    "patch_size": 8,
    "decoder_dim": 8,
}


def depth_model(seed=0, **fields):
    return tosa_jax.create_model("vit", task="depth", rngs=nnx.Rngs(seed), **(SIZES | fields))


def images(height, width, batch=2, seed=0):
    return jax.random.normal(jax.random.key(seed), (batch, height, width, 3))


def with_head(model, seed=1):
    """The model with a decoder whose prediction differs from pixel to pixel."""
    out = model.decoder.out.kernel
    out[...] = jax.random.normal(jax.random.key(seed), out.shape)
    return model


def test_depth_is_in_metres_within_the_range_and_of_the_images_size():
    model = with_head(depth_model(keep_rate=0.5, max_depth=3.0))
    out = forward(model, images(24, 40))
    assert out.depth.shape == (2, 24, 40) and out.depth.dtype == jnp.float32
    assert out.logits is None and out.predictions == {"depth": out.depth}
    assert 0 < out.depth.min() < out.depth.max() < 3
    assert out.tokens.shape == (2, 16, 16) and [s.shape for s in out.selected] == [(2, 9), (2, 9)]
    half = forward(with_head(depth_model(max_depth=3.0, dtype=jnp.bfloat16)), images(24, 40))
    assert half.depth.dtype == jnp.float32
    full = forward(with_head(depth_model(max_depth=3.0)), images(24, 40))
    np.testing.assert_allclose(half.depth, full.depth, atol=0.15)


@pytest.mark.parametrize("plan", ["standard", "selective", "previous", "skip"])
def test_the_decoder_reads_four_depths_on_the_full_grid(plan):
    """Each depth is the whole grid after that layer, in every kind, also where a group of selective layers is open."""
    kinds = ("standard", plan, plan, plan)
    model = depth_model(plan=kinds, keep_rate=0.5)
    tokens = model.embed(images(24, 40))
    state = model.layers(tokens, key=None, train=False)
    assert model.config.intermediate_layers == (0, 1, 2, 3)
    for layer in range(4):
        shorter = depth_model(plan=kinds[: layer + 1], keep_rate=0.5, depth=layer + 1)
        names = get_params(shorter).keys() & get_params(model).keys()
        own = get_params(model)
        nested = {name: own[name] for name in names} | {
            name: x for name, x in get_params(shorter).items() if name not in names
        }
        cut = set_params(split(shorter)[0], nested)
        np.testing.assert_allclose(
            state.intermediate[layer], cut.layers(tokens, key=None, train=False).tokens, atol=1e-5
        )


def test_at_keep_rate_one_it_is_the_dense_network():
    dense, tosa = depth_model(), depth_model(keep_rate=1.0)
    np.testing.assert_allclose(
        forward(dense, images(24, 40)).depth, forward(tosa, images(24, 40)).depth, atol=1e-5
    )


def test_twelve_layers_are_read_where_dpt_reads_them():
    assert model_config("depth", "deit_small_patch16_224").intermediate_layers == (2, 5, 8, 11)
    assert model_config("depth", "vit_large_patch14_dinov2").intermediate_layers == (
        5,
        11,
        17,
        23,
    )
    assert model_config("depth", "vit", depth=2).intermediate_layers == (0, 0, 1, 1)


def test_the_class_token_is_read_out_or_ignored():
    for readout, minded in (("project", True), ("ignore", False)):
        model = depth_model(readout=readout)
        tokens = [jax.random.normal(jax.random.key(i), (1, 16, 16)) for i in range(4)]
        changed = [x.at[:, 0].add(1.0) for x in tokens]
        depths = [model.decoder(x, (3, 5), (24, 40)) for x in (tokens, changed)]
        assert bool((depths[0] != depths[1]).any()) == minded
        other = [x.at[:, 1].add(1.0) for x in tokens]
        assert (model.decoder(other, (3, 5), (24, 40)) != depths[0]).any()


def test_the_decoder_keeps_the_raster_of_the_grid():
    """A change of one token changes depth around its own patch, and nowhere far."""
    model = with_head(depth_model(readout="ignore"))
    grid, size = (8, 12), (64, 96)
    tokens = [jax.random.normal(jax.random.key(i), (1, 97, 16)) for i in range(4)]
    row, column = 2, 9
    token = 1 + row * grid[1] + column
    shallow = [tokens[0].at[:, token].add(5.0), *tokens[1:]]
    change = jnp.abs(model.decoder(shallow, grid, size) - model.decoder(tokens, grid, size))[0]
    rows, columns = np.nonzero(np.asarray(change) > 1e-5)
    assert abs(rows.mean() - (row + 0.5) * 8) < 4 and abs(columns.mean() - (column + 0.5) * 8) < 4
    assert np.ptp(rows) < 32 and np.ptp(columns) < 32


def test_an_image_that_the_patch_does_not_divide_is_resized_there_and_back():
    model = with_head(depth_model(image_size=(30, 44)))
    assert model.config.grid == (4, 6) and model.pos_embed.shape == (1, 25, 16)
    small = images(30, 44)
    out = forward(model, small)
    assert out.depth.shape == (2, 30, 44)
    large = jax.image.resize(small, (2, 32, 48, 3), "bilinear")
    whole = forward(model, large)
    np.testing.assert_allclose(out.tokens, whole.tokens, atol=1e-5)
    back = jax.image.resize(whole.depth, (2, 30, 44), "bilinear")
    assert jnp.abs(out.depth - back).max() < 0.2 * jnp.ptp(whole.depth)


@pytest.mark.parametrize("prefix", [True, False])
def test_images_of_another_size_get_resampled_positions(prefix):
    model = depth_model(image_size=(48, 48), pos_embed_prefix=prefix)
    model.pos_embed[...] = jax.random.normal(jax.random.key(0), model.pos_embed.shape)
    own = np.asarray(model.pos_embed[...])
    wanted = resample_positions(own[:, int(prefix) :], (3, 8), "bicubic_antialias")
    found = model.positions((24, 64))
    np.testing.assert_allclose(found[:, int(prefix) :], wanted, atol=1e-5)
    np.testing.assert_array_equal(found[:, : int(prefix)], own[:, : int(prefix)])
    assert model.positions((48, 48)) is not None
    np.testing.assert_array_equal(model.positions((48, 48)), own)
    assert forward(model, images(24, 64)).depth.shape == (2, 24, 64)


def test_rectangular_classifiers():
    fields = {k: x for k, x in SIZES.items() if k != "decoder_dim"}
    model = tosa_jax.create_model("vit", num_classes=5, rngs=nnx.Rngs(0), **fields)
    assert model.config.grid == (3, 5)
    assert forward(model, images(24, 40)).logits.shape == (2, 5)
    with pytest.raises(ConfigError, match="images are 40x24, but the model was made for 24x40"):
        model(images(40, 24))
    with pytest.raises(ConfigError, match=r"nearest that is: \(24, 40\)"):
        tosa_jax.create_model("vit", rngs=nnx.Rngs(0), **(fields | {"image_size": (24, 41)}))
    square = model_config("classification", "vit", image_size=(32, 32))
    assert square == model_config("classification", "vit", image_size=32)


@pytest.mark.compiler
def test_the_cost_in_parts_is_the_whole_and_the_decoder_what_xla_counts():
    config = model_config("depth", "vit", keep_rate=0.5, plan="selective", **SIZES)
    model = abstract_model(config)
    parts = cost.macs_by_part(model)
    assert sum(parts.values()) == cost.macs(model)
    assert parts["selection"] == 2 * 2 * 2 * 4 * 16**2  # two selectors: 2 h hidden n^2
    dense = cost.macs_by_part(abstract_model(model_config("depth", "vit", **SIZES)))
    assert dense["selection"] == 0 and dense["head"] == parts["head"]
    assert dense["backbone"] > parts["backbone"]
    # Of 64 channels on a large grid, where what is left out (interpolation, biases) is small.
    grid = (32, 32)
    config = model_config("depth", "vit", **(SIZES | {"decoder_dim": 64, "embed_dim": 64}))
    decoder = tosa_jax.tasks.depth.light.LightDecoder(config, rngs=nnx.Rngs(0))
    taps = [jnp.zeros((1, 1025, 64))] * 4
    compiled = jax.jit(lambda d, x: d(x, grid, (256, 256))).lower(decoder, taps).compile()
    counted = compiled.cost_analysis()["flops"] / 2
    assert 0.9 < decoder.macs(grid) / counted < 1.05


def test_the_decoder_is_light_at_nyu_size():
    config = model_config("depth", "deit_small_patch16_224", image_size=(480, 640))
    parts = cost.macs_by_part(abstract_model(config))
    assert parts["backbone"] / 1e9 == pytest.approx(39.15, abs=0.05)  # methods: 39.1
    assert parts["head"] < 0.07 * parts["backbone"]


def test_weights_of_a_classifier_go_into_the_backbone_and_the_decoder_stays(tmp_path):
    fields = {k: x for k, x in SIZES.items() if k != "decoder_dim"} | {"image_size": 32}
    classifier = tosa_jax.create_model("vit", num_classes=7, rngs=nnx.Rngs(3), **fields)
    save_weights(classifier, tmp_path / "classifier.safetensors")
    model, said = depth_model(keep_rate=0.5), []
    before = get_params(model)
    load_pretrained(model, tmp_path / "classifier.safetensors", on_message=said.append)
    after, theirs = get_params(model), get_params(classifier)
    for name, value in after.items():
        if name.startswith(("decoder/", "kinds/")):
            np.testing.assert_array_equal(value, before[name])
        elif name != "pos_embed":
            np.testing.assert_array_equal(value, theirs[name])
    assert after["pos_embed"].shape == (1, 16, 16)
    text = "\n".join(said)
    assert "resampled from 4x4 to 3x5" in text
    assert "its head is not used" in text and "the decoder stays as the model has it" in text


def test_a_depth_network_goes_through_a_file_whole_and_into_a_classifier_without_its_decoder(
    tmp_path,
):
    model, said = depth_model(5, keep_rate=0.5), []
    save_weights(model, tmp_path / "depth.safetensors")
    again = load_pretrained(depth_model(6, keep_rate=0.5), tmp_path / "depth.safetensors")
    for name, value in get_params(again).items():
        np.testing.assert_array_equal(value, get_params(model)[name])
    fields = {k: x for k, x in SIZES.items() if k != "decoder_dim"}
    classifier = tosa_jax.create_model("vit", num_classes=7, rngs=nnx.Rngs(3), **fields)
    load_pretrained(classifier, tmp_path / "depth.safetensors", on_message=said.append)
    assert any("its decoder is not used" in line for line in said)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"max_depth": 0.0}, "max_depth=0.0 must be above 0"),
        ({"decoder_dim": 1}, "decoder_dim=1 must be at least 2"),
        ({"readout": "projct"}, "did you mean 'project'"),
        ({"decoder_layers": (0, 1, 2)}, "must be four layers in"),
        ({"decoder_layers": (0, 1, 2, 4)}, "must be four layers in"),
        ({"decoder_layers": (0, 2, 1, 3)}, "ascending"),
        ({"image_size": (24, 0)}, "must be at least 1"),
    ],
)
def test_wrong_fields_are_named(fields, says):
    with pytest.raises(ConfigError, match=says):
        depth_model(**fields)


def test_an_unknown_task_is_named():
    with pytest.raises(ConfigError, match="did you mean 'depth'"):
        tosa_jax.create_model("vit", task="dept", rngs=nnx.Rngs(0))
