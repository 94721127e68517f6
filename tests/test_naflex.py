"""SigLIP 2's NaFlex: images of several proportions in one batch compute what transformers and timm do."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden import naflex_cases as cases
from golden.family_cases import weights_of
from PIL import Image
from weight_samples import GOLDEN, same, write

import tosa_jax
from tosa_jax import predict
from tosa_jax.data.decoding import size_of_patches
from tosa_jax.errors import ConfigError, WeightsError
from tosa_jax.models import naflex
from tosa_jax.models.params import set_params, split
from tosa_jax.models.weights.load import load_pretrained, save_weights
from tosa_jax.models.weights.preprocessing import Preprocessing

STORED = np.load(GOLDEN / "naflex.npz")
SMALL = {"embed_dim": 32, "depth": 3, "num_heads": 2, "patch_size": 8, "mlp_ratio": 2.5}
SMALL |= {"max_patches": cases.MAX_PATCHES, "image_size": 32}
COUNTS = np.prod(cases.GRIDS, axis=1)
GRIDS = np.array(cases.GRIDS, np.int32)
PRESENT = np.arange(cases.MAX_PATCHES)[None] < COUNTS[:, None]


def model_of(**fields):
    return tosa_jax.create_model(
        "naflexvit_base_patch16_siglip", rngs=nnx.Rngs(0), **SMALL | fields
    )


def released(folder: Path, case: str = "Siglip2VisionModel") -> Path:
    """The folder that transformers or timm wrote."""
    shapes = json.loads(str(STORED[f"{case}:shapes"]))
    write(folder / "model.safetensors", weights_of(shapes), format="pt")
    (folder / "config.json").write_text(str(STORED[f"{case}:config"]))
    return folder


@functools.partial(jax.jit, static_argnums=0)
def _run(graphdef, params, images, grids, key):
    return set_params(graphdef, params)(images, grids=grids, key=key)


def run(model, patches: np.ndarray, grids: np.ndarray = GRIDS):
    """The network's output for patches [b most p*p*3]."""
    strips = patches.reshape(len(patches), -1, model.config.patch_size, 3)
    return _run(*split(model), strips, grids, jax.random.key(0))


def batch(seed: int = 0) -> np.ndarray:
    """The patches of the batch; with another seed only what pads them is other."""
    patches = cases.patches_of(cases.GRIDS, cases.MAX_PATCHES, 8)
    other = np.random.default_rng(seed).normal(0, 100, patches.shape).astype(np.float32)
    return patches if not seed else np.where(PRESENT[:, :, None], patches, other)


def image_of(row: int) -> np.ndarray:
    """The image [1 height width 3] of a row of the batch."""
    rows, columns = cases.GRIDS[row]
    patches = batch()[row, : COUNTS[row]].reshape(rows, columns, 8, 8, 3)
    return patches.swapaxes(1, 2).reshape(1, rows * 8, columns * 8, 3)


@pytest.mark.parametrize("case", cases.CASES | cases.TIMM_CASES)
def test_the_network_is_that_of_transformers_or_timm(case: str, tmp_path: Path) -> None:
    """Of five proportions in one batch, and of one of them as a network for images of that size."""
    said: list[str] = []
    model = load_pretrained(model_of(), released(tmp_path, case), on_message=said.append)
    out = run(model, batch())
    expected = {what: STORED[f"{case}:{what}"] for what in ("head", "tokens")}
    assert np.abs(out.features - expected["head"]).max() <= 2e-5
    assert np.abs(out.tokens - expected["tokens"])[PRESENT].max() <= 2e-5
    assert not any("pass" in line or "resampled" in line for line in said), said
    if case == "Siglip2VisionModel":
        image = image_of(1)
        one = tosa_jax.with_image_size(model, image.shape[1:3])
        assert not one.config.max_patches and one.config.num_tokens == 6
        alone = _run(*split(one), image, None, jax.random.key(0))
        assert np.abs(alone.features[0] - expected["head"][1]).max() <= 2e-5


def test_released_sizes_were_measured_in_one_batch() -> None:
    found = json.loads(
        (Path(__file__).parents[1] / "results" / "naflex_exactness.json").read_text()
    )
    grids = {f"{rows}x{columns}" for rows, columns in cases.WHOLE_GRIDS}
    assert found["differences"].keys() == grids
    assert all(x <= 2e-5 for by_part in found["differences"].values() for x in by_part.values())


METHODS = {
    "dense": {},
    "tosa": {"plan": "selective", "keep_rate": 0.5, "kernel_size": 3, "selector_query_stride": 2},
    "tosa weighed": {"plan": "selective", "keep_rate": 0.4, "redundancy_weight": 0.5, "bypass": "shared"},
    "previous": {"plan": "previous", "keep_rate": 0.5, "map_chunk": 8},
    "random": {"plan": "random", "keep_rate": 0.5},
    "redundancy": {"plan": "redundancy", "keep_rate": 0.6, "budget": "linear"},
    "tome": {"plan": "tome", "keep_rate": 0.6, "budget": "linear"},
    "class_attention": {"plan": "class_attention", "keep_rate": 0.5, "class_token": True},
    "skip": {"plan": "skip"},
    "scanned": {"scan_layers": True},
}  # fmt: skip


def with_other_selectors(model):
    """They start as the identity, which hides what they read."""
    rng = np.random.default_rng(0)
    for kind in model.kinds:
        if (selector := getattr(kind, "selector", None)) is not None:
            for conv in (selector.conv1, selector.conv2):
                conv.kernel[...] = jnp.asarray(rng.normal(size=conv.kernel.shape), jnp.float32)
    return model


@functools.cache
def dense_features(class_token: bool = False) -> np.ndarray:
    return np.asarray(run(model_of(class_token=class_token), batch()).features)


@pytest.mark.parametrize("name", METHODS)
def test_padding_is_neither_read_nor_chosen_before_patches(name: str) -> None:
    """Its values change no bit, and an image with fewer patches than a layer selects is computed densely."""
    fields = METHODS[name]
    model = with_other_selectors(model_of(**fields))
    prefix = model.config.num_prefix_tokens
    present = np.pad(PRESENT, ((0, 0), (prefix, 0)), constant_values=True)
    counts, dense = COUNTS + prefix, dense_features(bool(prefix))
    out, other = run(model, batch()), run(model, batch(1))
    np.testing.assert_array_equal(out.features, other.features)
    if name != "tome":
        np.testing.assert_array_equal(out.tokens[present], other.tokens[present])
    for scores, again in zip(out.scores, other.scores, strict=True):
        np.testing.assert_array_equal(scores, again)
        assert not np.any(np.asarray(scores)[~present])
    for chosen, again in zip(out.selected, other.selected, strict=True):
        np.testing.assert_array_equal(chosen, again)
        chosen = np.asarray(chosen)
        assert (chosen < counts[:, None]).all()
        real = (chosen >= 0).sum(axis=1)
        if name in ("redundancy", "tome"):
            assert (real >= np.ceil(counts / 4)).all() and (real <= counts).all()
        else:
            np.testing.assert_array_equal(real, np.minimum(counts, chosen.shape[1]))
        assert all((np.diff(row[row >= 0]) > 0).all() for row in chosen)
    if name in ("previous", "random", "tosa", "class_attention"):
        few = counts <= min(chosen.shape[1] for chosen in out.selected)
        assert few.any()
        np.testing.assert_allclose(out.features[few], dense[few], atol=1e-5)
    if "plan" in fields:
        assert np.abs(out.features - dense)[COUNTS == 20].max() > 1e-4
    else:
        np.testing.assert_allclose(out.features, dense, atol=1e-5)


def test_how_much_padding_there_is_changes_nothing() -> None:
    longer = np.pad(batch(), ((0, 0), (0, 7), (0, 0)), constant_values=3.0)
    out = run(model_of(max_patches=27), longer)
    np.testing.assert_allclose(out.features, dense_features(), atol=1e-5)


def test_gradients_are_finite_and_padding_has_none() -> None:
    model = model_of(plan="previous", keep_rate=0.5)
    graphdef, params = split(model)
    strips = jnp.asarray(batch().reshape(5, -1, 8, 3))

    def loss(params, strips):
        return (set_params(graphdef, params)(strips, grids=jnp.asarray(GRIDS)).features ** 2).sum()

    of_params, of_strips = jax.jit(jax.grad(loss, (0, 1)))(params, strips)
    assert all(np.isfinite(x).all() and np.any(x) for x in of_params.values())
    per_patch = np.abs(of_strips).reshape(5, cases.MAX_PATCHES, -1).max(axis=2)
    np.testing.assert_array_equal(per_patch > 0, PRESENT)


def test_images_are_resized_as_transformers_does() -> None:
    found = [size_of_patches(*given) for given in cases.SEARCHES]
    np.testing.assert_array_equal(found, STORED["sizes"])


PICTURES = [np.random.default_rng(i).integers(0, 256, size, np.uint8) for i, size in enumerate(
    [(50, 31, 3), (32, 32, 3), (9, 90, 3), (90, 30, 3), (30, 90, 3)])]  # fmt: skip


def test_a_folder_of_transformers_is_read_whole(tmp_path: Path) -> None:
    """The network, its patches and its preprocessing; pictures of all proportions go through one program."""
    said: list[str] = []
    folder = released(tmp_path)
    (folder / "preprocessor_config.json").write_text(str(STORED["processor"]))
    predictor = tosa_jax.load(folder, batch_sizes=(4,), on_message=said.append)
    assert not said
    assert same(predictor.model, load_pretrained(model_of(), folder))
    prepared = [predictor.prepare(picture) for picture in (cases.picture(), *PICTURES[1:])]
    strips, grids = naflex.to_strips(prepared, predictor.config)
    assert grids[0].tolist() == STORED["grid"].tolist() and len({tuple(x) for x in grids}) == 5
    seen = predictor.task.inputs(jnp.asarray(strips[:1])).reshape(cases.MAX_PATCHES, -1)
    count = grids[0].prod()
    np.testing.assert_allclose(seen[:count], STORED["patches"][:count], atol=1e-6)
    together = predictor.each(prepared)
    assert len(predictor._programs) == 1
    normalised = predictor.task.inputs(jnp.asarray(strips)).reshape(5, cases.MAX_PATCHES, -1)
    expected = run(predictor.model, np.asarray(normalised), grids).features
    np.testing.assert_allclose(np.concatenate([x.features for x in together]), expected, atol=1e-5)
    alone = predictor(prepared[3][None])
    np.testing.assert_allclose(alone.features, together[3].features, atol=1e-5)
    assert len(predictor._programs) == 1
    again = json.loads(str(STORED["processor"])) | {"max_num_patches": 6, "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(again))
    other = tosa_jax.load(folder, on_message=said.append)
    assert (other.config.max_patches, other.form.interpolation) == (6, "bicubic")
    assert tosa_jax.load(folder, max_patches=9, on_message=said.append).prepare(
        PICTURES[0]
    ).shape == (32, 16, 3)
    fixed = tosa_jax.load(folder, image_size=(16, 24), on_message=said.append)
    assert (fixed.config.max_patches, fixed.config.num_tokens) == (0, 6)
    assert fixed.prepare(PICTURES[0]).shape == (16, 24, 3)


def test_predict_takes_a_picture_of_each_proportion(tmp_path: Path, capsys) -> None:
    """A classifier, saved and read again; what each picture gets is what it gets alone."""
    model = model_of(num_classes=4, plan="previous", keep_rate=0.5)
    model.preprocessing = Preprocessing((0.5,), (0.5,), 1.0, "bilinear")
    predictor = tosa_jax.Predictor(model, class_names="abcd", batch_sizes=(5,))
    predictor.save(tmp_path / "net.safetensors")
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for path, picture in zip(paths, PICTURES, strict=True):
        Image.fromarray(picture).save(path)
    flags = [f"--weights={tmp_path / 'net.safetensors'}", "--json", f"--show_tokens={tmp_path}/out"]
    assert predict.main([*flags, *map(str, paths)]) == 0
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    guesses = predictor.classify(PICTURES, k=1)
    assert len(predictor._programs) == 1
    for record, (best, *_) in zip(shown, guesses, strict=True):
        assert record["top"][0]["name"] == best.name
        assert record["top"][0]["probability"] == pytest.approx(best.probability, abs=1e-5)
        assert Path(record["tokens"]).exists()
    alone = [predictor.classify([picture], k=1)[0][0] for picture in PICTURES]
    for (best, *_), other in zip(guesses, alone, strict=True):
        assert (other.name, other.probability) == (
            best.name,
            pytest.approx(best.probability, abs=1e-5),
        )
    assert predictor.classify([]) == []
    again = tosa_jax.load(tmp_path / "net.safetensors", image_size=(16, 24))
    assert again.form.image_size == (16, 24) and not again.form.max_patches
    again.save(tmp_path / "fixed.safetensors")
    back = tosa_jax.load(tmp_path / "fixed.safetensors", max_patches=9)
    assert (back.form.image_size, back.form.max_patches, back.form.patch_size) == (None, 9, 8)


@pytest.mark.parametrize("names", ["hf", "timm"])
def test_written_under_other_names_it_is_read_here_and_there(names: str, tmp_path: Path) -> None:
    model = model_of(image_size=(32, 24) if names == "timm" else 32, max_patches=20)
    model.preprocessing = Preprocessing((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 1.0, "bilinear")
    save_weights(model, tmp_path / "net", names=names)
    said: list[str] = []
    again = tosa_jax.load(tmp_path / "net", on_message=said.append)
    assert same(again.model, model) and again.config == model.config and not said
    assert again.model.preprocessing == model.preprocessing
    if names == "timm":
        return
    refused = model_of(image_size=(32, 24))
    with pytest.raises(WeightsError, match=r"Siglip2VisionModel, the nearest, has no ima"):
        save_weights(refused, tmp_path / "other", names="hf")


@pytest.mark.parametrize("names", ["hf", "timm"])
def test_timm_and_transformers_compute_the_same(names: str, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="compares with PyTorch, which the extra `compare` brings")
    library = pytest.importorskip({"timm": "timm", "hf": "transformers"}[names])
    from golden.make_naflex import computed

    model = model_of()
    save_weights(model, tmp_path, names=names)
    if names == "timm":
        theirs = library.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    else:
        theirs, read = library.Siglip2VisionModel.from_pretrained(
            tmp_path, output_loading_info=True
        )
        assert not read["missing_keys"] and not read["unexpected_keys"]
    expected = computed(theirs.eval(), batch(), cases.GRIDS)
    out = run(model, batch())
    np.testing.assert_allclose(out.features, expected["head"], atol=2e-5)
    np.testing.assert_allclose(out.tokens[PRESENT], expected["tokens"][PRESENT], atol=2e-5)


def test_maps_and_intermediate_tokens_leave_padding_out() -> None:
    model = model_of()
    strips = jnp.asarray(batch().reshape(5, -1, 8, 3))
    grids = jnp.asarray(GRIDS)
    (attn_map,) = jax.jit(lambda x: model.attention_maps(x, grids=grids))(strips)
    paid = np.asarray(attn_map).max(axis=(1, 2))
    np.testing.assert_array_equal(paid > 0, PRESENT)
    (last,) = jax.jit(lambda x: model.intermediate_layers(x, grids=grids))(strips)
    features = jax.jit(lambda x: model.features(x, grids=grids))(strips)
    out = run(model, batch())
    np.testing.assert_allclose(last, out.tokens, atol=1e-5)
    np.testing.assert_allclose(features, out.features, atol=1e-5)
    with pytest.raises(ConfigError, match="leave it out with grids"):
        model.intermediate_layers(strips, reshape=True, grids=grids)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"max_patches": -1}, "max_patches=-1 must be at least 1, or 0"),
        ({"pos_resample": "bicubic"}, "max_patches=20 needs learned positions with pos_resample='bil"),
        ({"rope": "dinov3"}, "and no rotary ones"),
        ({"task": "depth"}, "networks for depth take images of any size already"),
        ({"plan": "expedit", "keep_rate": 0.5}, "the layer kind 'expedit' would take padding for pat"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_named(fields: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        model_of(**fields)


def test_images_that_do_not_fit_are_named(tmp_path: Path) -> None:
    model = model_of()
    predictor = tosa_jax.Predictor(model)
    strips = jnp.zeros((1, 160, 8, 3))
    for call, says in (
        (lambda: predictor(np.zeros((1, 20, 16, 3), np.uint8)), "20x16 pixels is not made of 1 to 20"),
        (lambda: predictor.each([np.zeros((48, 32, 3), np.uint8)]), "48x32 pixels is not made of"),
        (lambda: model(jnp.zeros((1, 32, 32, 3))), "takes 20 patches, and images of 32x32 have others"),
        (lambda: model(strips[:, 8:], grids=jnp.ones((1, 2), jnp.int32)), "these are 152x8 pixels"),
        (lambda: tosa_jax.export(predictor, tmp_path / "out"), "this model takes images of any prop"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=says):
            call()
