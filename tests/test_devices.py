"""What accelerators can do: names are found, unknown ones are not guessed."""

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from tosa_jax.distributed import devices
from tosa_jax.distributed.devices import ACCELERATORS, accelerator, peak_flops


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v4", "TPU v4"),
        ("TPU v5 lite", "TPU v5e"),
        ("TPU v5e", "TPU v5e"),
        ("TPU v5", "TPU v5p"),
        ("TPU v5p", "TPU v5p"),
        ("TPU v6 lite", "TPU v6e"),
        ("NVIDIA A100-SXM4-40GB", "A100 40 GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80 GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80 GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200"),
        ("TPU v4 lite", None),
        ("TPU v7", None),
        ("cpu", None),
    ],
)
def test_names_that_jax_gives(kind, name):
    known = accelerator(kind)
    assert (known and known.name) == name


def test_every_figure_has_a_source():
    assert all(known.source.startswith("https://") for _, known in ACCELERATORS)
    v5e = accelerator("TPU v5 lite")
    assert (v5e.peak_flops, v5e.memory) == (197e12, 16 * 2**30)


def test_one_unknown_device_makes_the_peak_unknown():
    cpu = jax.devices()[0]
    assert math.isnan(peak_flops([cpu]))


@pytest.mark.subprocess
def test_commands_print_nothing_of_a_tpu_that_is_not_there():
    code = """
import jax
from tosa_jax.cli.command import run_command
run_command(lambda: print(jax.devices()[0].platform))
"""
    env = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("cpu\n", "")


def test_a_tpu_that_is_there_is_left_to_jax(monkeypatch, tmp_path):
    monkeypatch.setattr(devices, "TPU_FILES", (str(tmp_path / "accel*"),))
    before = devices.has_only_cpus()
    (tmp_path / "accel0").touch()
    assert before == (importlib.util.find_spec("libtpu") is not None)
    assert not devices.has_only_cpus()
