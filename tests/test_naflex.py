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
from tosa_jax.errors import ConfigError
from tosa_jax.models import naflex
from tosa_jax.models.params import set_params, split
from tosa_jax.models.vit_config import ViTConfig
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
        assert np.abs(alone.features - expected["head"][1]).max() <= 2e-5


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
    "previous": {"plan": "previous", "keep_rate": 0.5, "bypass": "low_rank", "map_chunk": 8},
    "random": {"plan": "random", "keep_rate": 0.5},
    "redundancy": {"plan": "redundancy", "keep_rate": 0.6, "budget": "linear"},
    "tome": {"plan": "tome", "keep_rate": 0.6, "budget": "linear"},
}  # fmt: skip


@pytest.fixture(scope="module")
def dense_features():
    return np.asarray(run(model_of(), batch()).features)


@pytest.mark.parametrize("name", METHODS)
def test_padding_is_neither_read_nor_chosen_before_patches(name: str, dense_features) -> None:
    """Its values change no bit, and an image with fewer patches than a layer selects is computed densely."""
    model = model_of(**METHODS[name])
    out, other = run(model, batch()), run(model, batch(1))
    np.testing.assert_array_equal(out.features, other.features)
    if name != "tome":
        np.testing.assert_array_equal(out.tokens[PRESENT], other.tokens[PRESENT])
    for scores, again in zip(out.scores, other.scores, strict=True):
        np.testing.assert_array_equal(scores, again)
        assert not np.any(np.asarray(scores)[~PRESENT])
    for chosen, again in zip(out.selected, other.selected, strict=True):
        np.testing.assert_array_equal(chosen, again)
        chosen = np.asarray(chosen)
        assert (chosen < COUNTS[:, None]).all()
        real = (chosen >= 0).sum(axis=1)
        if "plan" in METHODS[name] and METHODS[name]["plan"] in ("redundancy", "tome"):
            assert (real >= np.ceil(COUNTS / 4)).all() and (real <= COUNTS).all()
        else:
            np.testing.assert_array_equal(real, np.minimum(COUNTS, chosen.shape[1]))
        assert all((np.diff(row[row >= 0]) > 0).all() for row in chosen)
    if name in ("previous", "random", "tosa"):
        few = COUNTS <= min(chosen.shape[1] for chosen in out.selected)
        assert few.any()
        np.testing.assert_allclose(out.features[few], dense_features[few], atol=1e-5)
    if name != "dense":
        assert np.abs(out.features - dense_features)[COUNTS == 20].max() > 1e-4


def test_how_much_padding_there_is_changes_nothing(dense_features) -> None:
    longer = np.pad(batch(), ((0, 0), (0, 7), (0, 0)), constant_values=3.0)
    out = run(model_of(max_patches=27), longer)
    np.testing.assert_allclose(out.features, dense_features, atol=1e-5)


def test_gradients_are_finite_and_padding_has_none() -> None:
    model = model_of(plan="previous", keep_rate=0.5)
    graphdef, params = split(model)
    strips = jnp.asarray(batch().reshape(5, -1, 8, 3))

    def loss(params, strips):
        return (set_params(graphdef, params)(strips, grids=GRIDS).features ** 2).sum()

    of_params, of_strips = jax.jit(jax.grad(loss, (0, 1)))(params, strips)
    assert all(np.isfinite(x).all() and np.any(x) for x in of_params.values())
    per_patch = np.abs(of_strips).reshape(5, cases.MAX_PATCHES, -1).max(axis=2)
    np.testing.assert_array_equal(per_patch > 0, PRESENT)
