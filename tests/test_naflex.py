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
from weight_samples import GOLDEN, write

import tosa_jax
from tosa_jax.errors import ConfigError
from tosa_jax.models import naflex
from tosa_jax.models.params import set_params, split
from tosa_jax.models.weights.load import load_pretrained

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


def released(folder: Path, case: str) -> Path:
    """The folder that transformers or timm wrote."""
    shapes = json.loads(str(STORED[f"{case}:shapes"]))
    write(folder / "model.safetensors", weights_of(shapes), format="pt")
    (folder / "config.json").write_text(str(STORED[f"{case}:config"]))
    return folder


@functools.partial(jax.jit, static_argnums=0)
def _run(graphdef, params, strips, grids):
    return set_params(graphdef, params)(strips, grids=grids)


def run(model, patches: np.ndarray, grids: np.ndarray = GRIDS):
    """The network's output for patches [b most p*p*3]."""
    side = model.config.patch_size
    return _run(*split(model), patches.reshape(len(patches), -1, side, 3), grids)


def batch(seed: int = 0) -> np.ndarray:
    """The patches of the batch; with another seed only what pads them is other."""
    patches = cases.patches_of(cases.GRIDS, cases.MAX_PATCHES, 8)
    other = np.random.default_rng(seed).normal(0, 100, patches.shape).astype(np.float32)
    return patches if not seed else np.where(PRESENT[:, :, None], patches, other)


@pytest.mark.parametrize("case", cases.CASES | cases.TIMM_CASES)
def test_the_network_is_that_of_transformers_or_timm(case: str, tmp_path: Path) -> None:
    """Of five proportions in one batch, one of them at the size of the positions, and all at once with no padding."""
    said: list[str] = []
    model = load_pretrained(model_of(), released(tmp_path, case), on_message=said.append)
    out = run(model, batch())
    expected = {what: STORED[f"{case}:{what}"] for what in ("head", "tokens")}
    assert np.abs(out.features - expected["head"]).max() <= 2e-5
    assert np.abs(out.tokens - expected["tokens"])[PRESENT].max() <= 2e-5
    assert not any("pass" in line or "resampled" in line for line in said), said
