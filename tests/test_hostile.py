"""Damaged and hostile files: a small form of `python -m tests.hostile`, and its means."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from tests import hostile
from tests.hostile_format import Format
from tosa_jax.data.streams import BatchStream
from tosa_jax.errors import ConfigError, ProcessError, one_line
from tosa_jax.models.vit_config import ViTConfig, check_types

CHEAP = "jpeg,png,png16,other images,idx,tfrecord,pth,pth legacy,safetensors,npz,config.json,weights config,classes"


@pytest.mark.subprocess
def test_hostile_files_are_a_line_or_a_right_result():
    command = [
        sys.executable,
        "-m",
        "tests.hostile",
        "--cases=4000",
        f"--formats={CHEAP}",
        "--small",
    ]
    root = Path(__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert told["failures"] == 0 and told["cases"] >= 3900
    assert all(own["refused"] > 0 for own in told["formats"].values())


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (lambda content: 1 / 0, "traceback: ZeroDivisionError"),
        (lambda content: os.kill(os.getpid(), 9), "crash: SIGKILL"),
        (lambda content: os.system("true"), "touched os.system"),
        (lambda content: Path("/tmp/outside").open("w"), "touched open /tmp/outside"),
        (
            lambda content: np.empty(2**33, np.uint8).fill(1),
            "traceback: MemoryError|_ArrayMemoryError",
        ),
        (lambda content: json.loads("["), "traceback: JSONDecodeError"),
    ],
)
def test_each_kind_of_harm_is_seen(bad, says, tmp_path):
    form = Format([b"abc"], lambda content, folder: bad(content), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX warns of forks
        outcomes = hostile.run_cases(form, 0, 2, 0, tmp_path)
    assert len(outcomes) == 2 and all(any(x in o for x in says.split("|")) for o in outcomes), (
        outcomes
    )


def test_messages_are_one_printable_line():
    assert one_line("a\n\x1b[31m\udcff b") == "a \\x1b[31m\\udcff b"
    assert len(one_line("x" * 10**6)) < 2000


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"depth": "3"}, "depth='3' must be of type int"),
        ({"depth": True}, "depth=True must be of type int"),
        ({"keep_rate": (0.5, "a")}, "must be of type float | tuple"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio=nan must be of type float, and finite"),
        ({"embed_dim": 10**20}, "below 2**32"),
    ],
)
def test_types_and_sizes_of_fields_are_checked(fields, says):
    with pytest.raises(ConfigError) as caught:
        check_types(ViTConfig, fields)
    assert says in str(caught.value)
    check_types(ViTConfig, {"keep_rate": [0.5, np.float32(0.25)], "depth": np.int64(3)})


def test_a_killed_worker_is_one_line():
    def die():
        raise RuntimeError("Worker process was terminated unexpectedly with exit code -9.")
        yield

    with pytest.raises(ProcessError, match="was killed, perhaps for its memory"):
        stream = BatchStream.__new__(BatchStream)
        stream._iterator = die()
        next(stream)
