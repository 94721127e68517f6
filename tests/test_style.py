"""Style and types: what `ruff` and `pyright` say of the code. Their settings are in `pyproject.toml`."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.subprocess
CODE = ["tosa_jax", "tests", "results", "configs"]


@pytest.mark.parametrize("check", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff_finds_nothing(check):
    ruff = Path(sys.executable).with_name("ruff")
    done = subprocess.run(
        [ruff, *check, "--quiet", *CODE], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_pyright_finds_nothing():
    pyright = Path(sys.executable).with_name("pyright")
    done = subprocess.run(
        [pyright, "--pythonpath", sys.executable], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
