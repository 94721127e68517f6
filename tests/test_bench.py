"""The benchmark: what its records mean; speed itself is not asserted."""

import json
import subprocess
import sys

import numpy as np
import pytest
from small import SIZES

from tosa_jax import bench
from tosa_jax.cost import gmacs
from tosa_jax.models.vit_config import variant_config


@pytest.mark.parametrize("train", [False, True])
def test_records_have_the_arithmetic_of_their_medians(monkeypatch, train):
    seconds = np.array([[0.4, 0.2], [0.4, 0.2], [0.8, 0.2]])
    monkeypatch.setattr(bench, "interleaved_seconds", lambda programs, rounds: seconds)
    dense, tosa = bench.measure("vit", [0.25], batch_size=4, train=train, rounds=3, **SIZES)
    fields = {
        "name", "keep_rate", "batch_size", "image_size", "dtype", "train", "gmacs", "gmacs_by_part",
        "xla_gmacs", "ms",
        "ms_iqr", "img_per_sec", "temp_bytes", "speedup", "gmac_ratio", "realised",
    }  # fmt: skip
    assert dense.keys() == tosa.keys() == fields
    assert (dense["speedup"], dense["realised"], dense["ms"]) == (1.0, 1.0, 400.0)
    assert dense["ms_iqr"] == pytest.approx(200.0) and dense["img_per_sec"] == 10.0
    expected = gmacs(variant_config("vit", plan="selective", keep_rate=0.25, **SIZES))
    assert sum(tosa["gmacs_by_part"].values()) == pytest.approx(expected)
    assert tosa["gmacs"] == expected and tosa["speedup"] == 2.0
    assert tosa["realised"] == pytest.approx(2.0 * expected / dense["gmacs"])
    # XLA counts at least the matrix products; a training step has about three forward passes.
    passes = dense["xla_gmacs"] / dense["gmacs"]
    assert (2.5 < passes < 6) if train else (1 <= passes < 2)


def test_contestants_take_turns_and_the_first_round_is_left_out():
    order = []

    def program(name):
        return lambda x: order.append(name) or x

    seconds = bench.interleaved_seconds([(program("a"), (1.0,)), (program("b"), (1.0,))], 2)
    assert order == ["a", "b"] * 3 and seconds.shape == (2, 2)


def test_it_runs_without_data_libraries():
    code = "import sys, tosa_jax.bench; print([m for m in sys.modules if m in sys.argv])"
    argv = [sys.executable, "-c", code, "grain", "tensorflow_datasets", "torch", "matplotlib"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--keep_rate", "0"], "keep_rate=0.0 is not in (0, 1]"),
        (["--model=deit_smal_patch16_224"], "did you mean 'deit_small_patch16_224'"),
        (["--batch_size=0"], "--batch_size=0 must be at least 1"),
        (["--map_chunk=-2"], "map_chunk=-2 must be positive"),
        (["--data"], "--data needs --config"),
        (["--confg=x"], "unexpected argument '--confg=x'"),
    ],
)
def test_bad_input_is_one_line(argv, says, capsys):
    assert bench.main(argv) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_input_speed_of_a_recipe_as_json(capsys, digits_dir):
    argv = [
        "--data",
        "--config=configs/digits.py",
        f"--config.data.data_dir={digits_dir}",
        "--json",
    ]
    assert bench.main(argv) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows and all(isinstance(row, dict) for row in rows)


@pytest.mark.parametrize("train", [False, True])
def test_depth_networks_are_measured_with_their_decoder(monkeypatch, train):
    seconds = np.array([[0.4, 0.2]])
    monkeypatch.setattr(bench, "interleaved_seconds", lambda programs, rounds: seconds)
    sizes = {k: x for k, x in SIZES.items() if k != "num_classes"} | {"image_size": (8, 12)}
    dense, tosa = bench.measure(
        "vit", [0.25], batch_size=2, train=train, rounds=1, task="depth", decoder_dim=32, **sizes
    )
    assert dense["gmacs_by_part"]["head"] == tosa["gmacs_by_part"]["head"] > 0
    assert dense["gmacs_by_part"]["selection"] == 0 < tosa["gmacs_by_part"]["selection"]
    assert dense["image_size"] == (8, 12)
    # The decoder, here the larger part, is in the program.
    assert dense["gmacs_by_part"]["head"] > 2 * dense["gmacs_by_part"]["backbone"]
    assert dense["xla_gmacs"] > sum(dense["gmacs_by_part"].values()) * (2 if train else 0.8)
