"""The command line from outside: exit status, one line, nothing half-written."""

import gzip
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small import SIZES

from tosa_jax import main as entry

RECIPE = f"""
from tosa_jax.config import default_config
def get_config():
    config = default_config()
    config.batch_size = 16
    config.model.update({SIZES | {"depth": 2}})
    config.data.update(name="digits", in_memory=True)
    config.inputs.update(mean=(.3,), std=(.4,))
    config.pretrain.steps = 6
    config.eval.batch_size = 360
    return config
"""


@pytest.fixture
def argv(tmp_path, digits_dir, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    (tmp_path / "tiny.py").write_text(RECIPE)
    return [
        f"--config={tmp_path}/tiny.py",
        f"--workdir={tmp_path}/run",
        f"--config.data.data_dir={digits_dir}",
    ]


def test_a_run_from_the_command_line_and_its_repetition(argv, capsys, tmp_path):
    assert entry.main(argv) == 0
    first = capsys.readouterr().out
    assert "dense, as pretrained" in first and str(tmp_path / "run") in first
    assert entry.main(argv) == 0
    again = capsys.readouterr()
    assert again.out == first and "step" not in again.err
    assert entry.main([*argv, "--config.seed=5"]) == 2
    assert "seed: 0 -> 5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (
            "--config.model.kep_rate=0.5",
            "config has no field 'kep_rate' Did you mean \"keep_rate\"",
        ),
        ("--config.model.keep_rate=2.0", "keep_rate=2.0 is not in (0, 1]"),
        ("--config.model.num_heads=3", "num_heads=3 does not divide"),
        ("--config.model.image_size=9", "not a multiple of patch_size=2"),
        ("--config.model.plan=standard,selective,standard", "plan has 3 layers, but depth=2"),
        ("--config.data.name=cifar10", "tosa_jax.prepare"),
        ("--config.mesh.data=3", "needs 3 devices"),
        ("--config.batch_size=12", "batch_size=12 is not divided"),
    ],
)
def test_bad_input_is_one_line_and_status_2(argv, wrong, says, capsys, tmp_path):
    assert entry.main([*argv, wrong]) == 2
    error = capsys.readouterr().err.strip()
    assert says in error and "\n" not in error and "Traceback" not in error
    assert not list((tmp_path / "run").glob("checkpoints/*/*"))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("--config={folder}/nope.py", "nope.py: no such file"),
        ("--config={folder}/tiny.py:x", "get_config() takes 0 positional arguments"),
        ("--config={folder}/broken.py", "ValueError: not today"),
        ("--config.batch_sizes=3", "Did you mean"),
        ("--config.init_from={folder}/nope.pth", "nope.pth does not exist"),
        ("--workdir=/proc/run", "/proc/run cannot be made"),
    ],
)
def test_wrong_paths_and_recipes_are_one_line(argv, wrong, says, capsys, tmp_path):
    (tmp_path / "broken.py").write_text("def get_config():\n    raise ValueError('not today')\n")
    wrong = wrong.format(folder=tmp_path)
    flag = wrong.partition("=")[0]
    assert entry.main([*(a for a in argv if not a.startswith(f"{flag}=")), wrong]) == 2
    error = capsys.readouterr().err.strip()
    assert says in error and "\n" not in error and "Traceback" not in error


def test_a_start_that_failed_leaves_the_work_directory_free(argv, capsys):
    assert entry.main([*argv, "--config.pretrain.steps=0"]) == 2
    assert "nothing to start from" in capsys.readouterr().err
    assert entry.main([*argv, "--config.data.eval_split=nope"]) == 2
    assert "has no split 'nope'" in capsys.readouterr().err


def test_broken_idx_files_are_named(argv, capsys, tmp_path):
    source = tmp_path / "idx"
    source.mkdir()
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        with gzip.open(source / f"{name}-ubyte.gz", "wb") as file:
            file.write(b"\0\0\x08\x03" + b"\0" * 7)
    argv += ["--config.data.name=fashion_mnist", f"--config.data.source_dir={source}"]
    assert entry.main(argv) == 2
    assert "ubyte" in capsys.readouterr().err


def test_the_recipes_of_the_repository_are_valid():
    from tosa_jax.cli.flags import parse
    from tosa_jax.config import make_run_config

    root = Path(__file__).parents[1]
    for recipe in ("digits.py", "fashion_mnist.py", "fashion_mnist.py:cpu", "cluttered_fashion.py"):
        config, _ = parse("", [f"--config={root}/configs/{recipe}"])
        run = make_run_config(config)
        assert run.has_stage("pretrain") and run.model.keep_rate == 0.5


@pytest.mark.subprocess
def test_python_dash_m_says_what_it_wants():
    done = subprocess.run(
        [sys.executable, "-m", "tosa_jax.main"],
        capture_output=True, text=True, cwd=Path(__file__).parents[1], env=os.environ,
    )  # fmt: skip
    assert done.returncode == 2
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .startswith("error: command line: --config=FILE is missing")
    )
