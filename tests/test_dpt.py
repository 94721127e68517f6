"""The published depth decoder: released networks compute what transformers computes, and are loaded honestly."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from golden import dpt_cases as cases
from golden.pretrained_cases import random_weights
from weight_samples import GOLDEN, write

import tosa_jax
from tosa_jax.models.params import set_params, split
from tosa_jax.models.weights.load import load_pretrained

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
    write(folder / "model.safetensors", weights_of(case))
    config = json.loads(str(STORED[f"{case}/config"])) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def model_of(case: str, **fields):
    return tosa_jax.create_model("vit", rngs=nnx.Rngs(0), **(FIELDS[case] | fields))


def depth_of(model, size: tuple[int, int]):
    graphdef, params = split(model)
    return jax.jit(lambda p, x: set_params(graphdef, p)(x).depth)(params, cases.image_of(size))


@pytest.mark.parametrize("key", [k for case, sizes in cases.SIZES.items() for k in
                                 [f"{case}/{height}x{width}" for height, width in sizes]])  # fmt: skip
def test_depth_is_that_of_transformers(key: str, tmp_path: Path) -> None:
    case, _, size = key.partition("/")
    said: list[str] = []
    model = load_pretrained(model_of(case), released(tmp_path, case), on_message=said.append)
    assert not any("pos_resample" in line or "stays" in line for line in said)
    height, width = map(int, size.split("x"))
    found = depth_of(model, (height, width))
    assert (STORED[key] > 0).mean() > 0.3 and np.ptp(STORED[key]) > 0.3
    assert np.abs(found - STORED[key]).max() <= 2e-5
