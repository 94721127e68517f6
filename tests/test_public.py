"""What a person meets first: the package's names, what importing it costs, and what is shipped."""

import ast
import doctest
import importlib
import inspect
import json
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tosa_jax

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "tosa_jax").rglob("*.py")
)
HEAVY = ("torch", "tensorflow", "matplotlib")


def python(code: str, **env: str) -> str:
    env = os.environ | {"JAX_PLATFORMS": "cpu"} | env
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.subprocess
def test_importing_brings_nothing_that_is_not_used_yet():
    code = f"""
import sys, tosa_jax
print([m for m in ("jax", "flax", "grain", *{HEAVY}) if m in sys.modules])
names = [getattr(tosa_jax, name) for name in tosa_jax.__all__]
print([m for m in {HEAVY} if m in sys.modules])
"""
    assert python(code).split("\n")[:2] == ["[]", "[]"]


def test_the_package_has_the_names_that_it_says_and_says_what_they_are():
    source = ast.parse((ROOT / "tosa_jax/__init__.py").read_text())
    imported = [a.name for n in ast.walk(source) if isinstance(n, ast.ImportFrom) for a in n.names]
    assert sorted(tosa_jax.__all__) == sorted(set(imported) - {"epy"})
    assert set(tosa_jax.__all__) <= set(dir(tosa_jax))
    for name in tosa_jax.__all__:
        thing = getattr(tosa_jax, name)
        if name == "VARIANTS":
            continue
        assert len(inspect.getdoc(thing) or "") > 30, f"{name} has no docstring"
        members = vars(thing).items() if inspect.isclass(thing) else ()
        for member, value in members:
            function = getattr(value, "__func__", value)
            if member.startswith("_") and member != "__call__" or not inspect.isfunction(function):
                continue
            assert function.__doc__, f"{name}.{member} has no docstring"


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_say_what_happens(name):
    names = {"tosa_jax": tosa_jax, "np": np, "jnp": jnp, "nnx": nnx}
    failed, _ = doctest.testmod(importlib.import_module(name), extraglobs=names)
    assert failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    found = [t for m in MODULES for t in finder.find(importlib.import_module(m)) if t.examples]
    assert len(found) >= 8


@pytest.mark.subprocess
def test_pydoc_opens_as_a_guide():
    text = python("import pydoc, tosa_jax; print(pydoc.plain(pydoc.render_doc(tosa_jax)))")
    guide = text.partition("PACKAGE CONTENTS")[0]
    for entry in ("create_model", "load_pretrained", "Predictor.from_workdir", "tosa_jax.main"):
        assert entry in guide
    listed = text.partition("\nCLASSES\n")[2]
    assert all(name in listed for name in tosa_jax.__all__)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel as `pip wheel` builds it, without an index."""
    from hatchling.builders.wheel import WheelBuilder

    folder = tmp_path_factory.mktemp("dist")
    path = Path(next(WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])))
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_the_package_and_its_data_alone(wheel):
    assert sorted(p.name for p in wheel.iterdir()) == ["tosa_jax", "tosa_jax-0.1.0.dist-info"]
    for name in ("data/imagenet_classes.txt", "reporting/page.css", "models/methods/tosa.py"):
        assert (wheel / "tosa_jax" / name).exists(), name
    metadata = (wheel / "tosa_jax-0.1.0.dist-info/METADATA").read_text()
    assert (
        "License-Expression: Apache-2.0" in metadata
        and "Description-Content-Type: text/markdown" in metadata
    )
    assert (wheel / "tosa_jax-0.1.0.dist-info/licenses/LICENSE").exists()
    core = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert not [
        d for d in core if d.startswith(("torch", "tensorflow-cpu", "tensorflow>", "pytest"))
    ]


@pytest.mark.subprocess
def test_a_run_from_the_wheel_with_a_recipe_of_ones_own(wheel, digits_dir, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from tosa_jax.config import default_config\n"
        "def get_config():\n"
        "    config = default_config()\n"
        "    config.batch_size = 16\n"
        "    config.model.update(image_size=8, patch_size=4, in_chans=1, num_classes=10, embed_dim=8,\n"
        "                        depth=2, num_heads=1)\n"
        "    config.data.update(name='digits', in_memory=True)\n"
        "    config.inputs.update(mean=(.3,), std=(.4,))\n"
        "    config.pretrain.steps = 2\n"
        "    config.selector.steps = 2\n"
        "    config.eval.update(batch_size=120)\n"
        "    return config\n"
    )
    argv = ["--config=mine.py", f"--config.data.data_dir={digits_dir}", "--workdir=run"]
    env = os.environ | {
        "PYTHONPATH": str(wheel),
        "JAX_PLATFORMS": "cpu",
        "PYTHONWARNINGS": "ignore",
    }
    command = [sys.executable, "-m", "tosa_jax.main", *argv]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert {row["name"] for row in json.loads((tmp_path / "run/report.json").read_text())["results"]} == {
        "dense_pretrained", "tosa",
    }  # fmt: skip
    page = (tmp_path / "run/report.html").read_text()
    assert (
        "<svg" in page
        and "data:image/png;base64," in page
        and "http://" not in page.replace("http://www.w3.org", "")
    )
    assert (tmp_path / "run/classes.txt").read_text().split() == list("0123456789")


@pytest.mark.subprocess
def test_a_device_that_is_not_there_is_one_line():
    code = (
        "import sys; from tosa_jax import main\n"
        f"sys.exit(main.main(['--config={ROOT}/configs/digits.py', '--workdir=/nonexistent/x']))"
    )
    env = os.environ | {"JAX_PLATFORMS": "cuda"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        "error: JAX finds no device of the kind asked for"
    )
