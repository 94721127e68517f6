"""Steps compiled for TPU slices that are not there, by the real TPU compiler where the platform has one."""

import json
import re
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from tosa_jax import compile_check
from tosa_jax.cli.flags import parse
from tosa_jax.config import make_run_config
from tosa_jax.distributed.devices import accelerator
from tosa_jax.distributed.mesh import MeshConfig, make_mesh
from tosa_jax.performance import aot
from tosa_jax.performance.aot import following, largest_batch, preceding
from tosa_jax.tasks import TASKS

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.compiler
DIGITS = f"--config={ROOT}/configs/digits.py"
TINY = [
    "--config.model.depth=2", "--config.model.embed_dim=256", "--config.model.num_classes=128",
    "--config.batch_size=32", "--config.eval.controls=()",
]  # fmt: skip


GRADIENTS = 2 * 12 * 256**2 * 4
"""Bytes of the gradients of TINY's layers, but for vectors."""


def check(capsys, *argv):
    """Exit status and records of the command line."""
    status = compile_check.main([DIGITS, *TINY, "--topology=v5e:2x2", "--json", *argv])
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.skipif(sys.platform != "linux", reason="libtpu is for Linux only")
def test_the_training_step_is_compiled_for_the_tpu(capsys):
    status, (record,) = check(capsys, "--only=train finetune", "--mesh=fsdp:4,data:1")
    assert status == 0 and record["fits"]
    assert (record["platform"], record["device"], record["devices"]) == ("tpu", "TPU v5 lite", 4)
    # Libraries that programs for other platforms call.
    assert not [
        x
        for x in record["custom_calls"]
        if re.search("cpu|onednn|lapack|TopK|cublas|cudnn|triton", x)
    ]
    batch = 8 * (8 * 8 + 4)
    assert record["argument_bytes"] - batch == pytest.approx(record["state_bytes"], rel=0.01)
    assert record["total_bytes"] < record["memory_bytes"] == 16 * 2**30
    assert record["collectives"]["all-gather"]["count"] > 4
    assert record["collectives"]["reduce-scatter"]["bytes"] > 0.5 * GRADIENTS
    assert record["flops"] == pytest.approx(record["flops_arithmetic"], rel=0.5)


@pytest.mark.skipif(sys.platform != "linux", reason="libtpu is for Linux only")
def test_kernels_are_divided_over_the_chips(capsys):
    """In bfloat16: each chip has its examples and its heads, and nothing of the map is sent."""
    status, (record,) = check(
        capsys, "--only=evaluate tosa", "--mesh=data:2,model:2", "--config.model.dtype=bfloat16",
        "--config.model.embed_dim=128", "--config.model.num_heads=4",
    )  # fmt: skip
    assert status == 0 and "tpu_custom_call" in record["custom_calls"]


@pytest.mark.skipif(sys.platform != "linux", reason="libtpu is for Linux only")
def test_a_batch_that_is_too_large_does_not_fit(capsys):
    status, (record,) = check(capsys, "--only=evaluate tosa", f"--config.eval.batch_size={2**23}")
    assert status == 1 and not record["fits"]
    assert record["total_bytes"] > record["memory_bytes"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([DIGITS], "--topology=SLICE is missing"),
        ([DIGITS, "--topology=v5e:3x3"], "--topology=v5e:3x3: .*not divisible"),
        ([DIGITS, "--topology=v5e:2x2", "--mesh=rows:4"], "unknown axes .'rows'.; write AXIS:SIZE"),
        ([DIGITS, "--topology=v5e:2x2", "--mesh=data:four"], "--mesh=data:four: invalid literal"),
        ([DIGITS, "--topology=v5e:2x2", "--mesh=data:3"], "needs 3 devices, but there are 4"),
        ([DIGITS, "--topology=v5e:2x2", "--only=pretrian"], "no step has this in its name"),
        (["--topology=v5e:2x2"], "--config=FILE is missing"),
        ([DIGITS, "--topolgy=v5e:2x2"], "topolgy"),
        ([DIGITS, "--topology=v5e:2x2", "--fit=16"], "--fit: ignored explicit argument"),
    ],
)
def test_wrong_command_lines_say_so_in_one_line(argv, says, capsys, monkeypatch):
    monkeypatch.setattr(aot, "compile_program", lambda *_: pytest.fail("compiled"))
    assert compile_check.main(argv) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and re.search(says, line)


def test_depth_networks_are_compiled_with_their_own_batches():
    argv = [f"--config={ROOT}/configs/rooms.py", "--config.model.depth=4"]
    argv += ["--config.eval.batch_size=16", "--config.pretrain.warmup_steps=0"]
    config, _ = parse("", argv)
    mesh = make_mesh(MeshConfig())
    batch = aot.abstract_batch(TASKS["depth"], make_run_config(config).model, 16, mesh)
    assert {k: (x.shape, x.dtype) for k, x in batch.items()} == {
        "image": ((16, 96, 128, 3), jnp.uint8), "depth": ((16, 96, 128), jnp.float32)
    }  # fmt: skip
    program = next(aot.programs(make_run_config(config), mesh))
    assert program.name == "train pretrain" and "96x128" in program.lower().as_text()


def test_without_the_compiler_it_says_how_to_get_it(capsys, monkeypatch):
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: None)
    assert compile_check.main([DIGITS, "--topology=v5e:2x2"]) == 2
    assert capsys.readouterr().err.strip() == f"error: {aot.MISSING}"
    assert 'pip install "tosa-jax[tpu]"' in aot.MISSING


def test_batches_worth_trying():
    batches = [1, 2, 4, 8, 16, 24]
    assert [following(b) for b in [0, *batches[:-1]]] == batches
    assert [preceding(b) for b in batches[1:]] == batches[:-1]
    assert [preceding(b) for b in (3, 7, 10, 23)] == [2, 4, 8, 16]


@pytest.mark.parametrize("largest", [0, 1, 4, 8, 96, 1000])
@pytest.mark.parametrize("start", [1, 100])
@pytest.mark.parametrize("told", [True, False])
def test_the_largest_batch_is_found_in_few_compilations(largest, start, told):
    memory, tried = 10**6 + 1, []

    def needed(batch):
        tried.append(batch)
        size = 10**5 + 9 * 10**5 * batch // max(largest, 1) + (10**6 if not largest else 0)
        return size <= memory, size if told or size <= memory else None

    assert largest_batch(needed, memory, start) == largest
    assert len(set(tried)) == len(tried) <= 9


def test_people_read_what_fits():
    record = {
        "name": "train finetune", "fits": True, "devices": 4, "device": "TPU v5 lite",
        "mesh": {"data": 4}, "batch_size": 64, "device_batch_size": 16, "compile_seconds": 9.4,
        "memory_bytes": accelerator("TPU v5e").memory, "total_bytes": 12_600_000,
        "argument_bytes": 1970, "state_bytes": 900, "temp_bytes": 6_390_000, "flops": 2.05e8,
        "flops_arithmetic": 1.68e8,
        "collectives": {"all-reduce": {"count": 1, "bytes": 409_000}},
        "largest_device_batch_size": 24, "tried": {"16": 12_600_000, "32": None},
    }  # fmt: skip
    assert compile_check.format_record(record).splitlines() == [
        "train finetune: fits; 4 x TPU v5 lite, data=4; batch 64, 16 a chip; compiled in 9 s",
        "  bytes a chip: 12.6 MB of 17.2 GB: arguments 1.97 kB (parameters, optimizer, average 900 B), "
        "temporaries 6.39 MB",
        "  flops a chip: 2.05e+08 by the compiler, 1.68e+08 by arithmetic",
        "  collectives: 1 all-reduce of 409 kB together",
        "  largest batch a chip: 24 (tried 16: 12.6 MB, 32: unknown)",
    ]
