"""Released weights compute what PyTorch computes: logits and resampled positions of golden/."""

import json
from pathlib import Path

import numpy as np
import pytest
from golden import pretrained_cases as cases
from weight_samples import GOLDEN, write

from tosa_jax.models.positions import resample_positions
from tosa_jax.models.variants import variant_config

LOGITS = np.load(GOLDEN / "pretrained.npz")
RESAMPLED = np.load(GOLDEN / "torch_resampled.npz")


@pytest.mark.parametrize("key", LOGITS.files)
def test_logits_equal_pytorchs(key: str, tmp_path: Path) -> None:
    case, way, size = key.split("/")
    name, fields = cases.case_fields(case, cases.GOLDEN[case])
    config = variant_config(name, **fields)
    weights = cases.random_weights(cases.timm_shapes(config))
    arrays = cases.hf_names(config, weights) if way == "transformers" else weights
    path = write(tmp_path / "weights.safetensors", arrays)
    fields |= cases.hf_fields(config) if way == "transformers" else {}
    fields.pop("image_size", None)
    found = cases.our_logits(name, int(size), path, weights, **fields)
    assert np.abs(found - LOGITS[key]).max() <= 2e-5


def test_every_variant_was_measured_whole_at_two_sizes_in_every_way() -> None:
    results = Path(__file__).parents[1] / "results" / "pretrained_exactness.json"
    measured = json.loads(results.read_text())["cases"]
    assert measured.keys() == cases.MEASURED.keys() and len(measured) == 24
    for case, found in measured.items():
        name, fields = cases.case_fields(case, {})
        config = variant_config(name, **fields)
        sizes = (config.image_size, cases.other_size(config))
        keys = {f"{way}_{size}" for way in cases.ways(config) for size in sizes}
        assert found["differences"].keys() == keys, case
        assert max(found["differences"].values()) <= (1e-4 if "giant" in case else 2e-5), case
        assert found["depth"] == config.depth or "giant" in case, case


@pytest.mark.parametrize("key", [key for key in RESAMPLED.files if "/" in key])
def test_positions_are_resampled_as_torch_does(key: str) -> None:
    how, new = key.split("/")
    out = resample_positions(RESAMPLED["before"], (int(new), int(new)), how)
    np.testing.assert_allclose(out, RESAMPLED[key], rtol=0, atol=1e-6)


def test_rows_and_columns_are_kept_apart() -> None:
    ramp = np.broadcast_to(np.arange(5, dtype=np.float32)[:, None], (5, 5)).reshape(1, 25, 1)
    out = resample_positions(ramp, (4, 7), "bicubic").reshape(4, 7)
    assert (np.diff(out[:, 0]) > 0).all() and np.ptp(out, axis=1).max() < 1e-5
