"""The TPU compiler's estimate: what is added up of a compiled program, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tosa_jax import bench
from tosa_jax.errors import ConfigError
from tosa_jax.performance.tpu_cycles import count

ROOT = Path(__file__).parents[1]

KERNELS = """
import json
import jax, jax.numpy as jnp
from tosa_jax.ops.attention import attention
from tosa_jax.ops.tpu_attention import attention_and_selector_sums
from tosa_jax.performance import tpu_cycles, tpu_estimate

dumps = tpu_cycles.kernel_dumps()
device = tpu_estimate.tpu_devices("v5e:2x2")[0]
def arrays(count):
    heads = [jax.ShapeDtypeStruct((64, 197, count, 64), jnp.bfloat16)] * 3
    shapes = (count, 2 * count), (2 * count,), (2 * count, count)
    return heads, heads + [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]

heads, selected = arrays(6)

def backward(query, key, value):
    return jax.vjp(attention, query, key, value)[1](query)

for function, given in (
    (attention, heads), (backward, heads), (attention_and_selector_sums, selected),
    (attention_and_selector_sums, arrays(12)[1]),
):
    found = tpu_estimate.cycles(function, *given, device=device, dumps=dumps)
    kernels = {name: x for name, x in found["kernel_cycles"].items()}
    print(json.dumps([found["kernels"], sum(kernels.values()) / 64]))
"""

PROGRAM = """
HloModule jit_f
%fused (p: bf16[8]) -> bf16[8] {
  ROOT %a = bf16[8]{0} add(%p, %p), backend_config={"estimated_cycles":"999"}
}
ENTRY %main (x: bf16[8]) -> bf16[8] {
  %x = bf16[8]{0} parameter(0)
  %b = (f32[8]{0:T(8,128)S(1)}, f32[8]{0}) fusion(%x), metadata={op_name="jit(f)/jvp(attention)/dot"}, \
backend_config={"estimated_cycles":"100"}
  %c = bf16[8]{0} fusion(%b), metadata={op_name="jit(f)/attention/selection/sum"}, \
backend_config={"estimated_cycles":"20"}
  %k.1 = bf16[8]{0} custom-call(%c), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/attention/call"}, \
backend_config={"body":"same"}
  %k.2 = bf16[8]{0} custom-call(%k.1), custom_call_target="tpu_custom_call", \
metadata={op_name="jit(f)/attention/call"}, backend_config={"body":"same"}
  ROOT %r = bf16[8]{0} reshape(%k.2), metadata={op_name="jit(f)/reshape"}
}
"""

LOOP = """
HloModule jit_g
%%again (i: s32[]) -> pred[] {
  %%i = s32[] parameter(0)
  %%n = s32[]{:T(128)} constant(%d)
  ROOT %%lt = pred[] compare(%%i, %%n), direction=LT
}
%%inner (x: bf16[8]) -> bf16[8] {
  ROOT %%y = bf16[8]{0} fusion(%%x), metadata={op_name="mlp/add"}, backend_config={"estimated_cycles":"20"}
}
%%body (x: bf16[8]) -> bf16[8] {
  %%b = bf16[8]{0} fusion(%%x), metadata={op_name="attention/dot"}, backend_config={"estimated_cycles":"100"}
  ROOT %%c = bf16[8]{0} call(%%b), to_apply=%%inner
}
ENTRY %%main (x: bf16[8]) -> bf16[8] {
  %%w = bf16[8]{0} while(%%x), condition=%%again, body=%%body
  ROOT %%e = bf16[8]{0} fusion(%%w), backend_config={"estimated_cycles":"7"}
}
"""

BUNDLES = """
 0x0   :  { %s1 = smov 0 }
 0x1   : > { %v = vadd }
 0x2   : > { %p = scmp.ge.s32.totalorder %s1, 64 /* loop exit test */ }
 0x3   :  { nop }
"""


def test_cycles_are_those_of_the_program_and_of_each_kernel(tmp_path):
    """A kernel that occurs twice is written once; what fusions hold inside is theirs already."""
    (tmp_path / "1-k.1-final_bundles.txt").write_text(BUNDLES)
    kernel = 2 + 2 * 64
    assert count(PROGRAM, tmp_path) == {
        "cycles": 120 + 2 * kernel,
        "parts": {"selection": 20, "attention": 100 + 2 * kernel},
        "kernels": 2,
        "uncounted": 1,
        "kernel_cycles": {"k.1": kernel},
    }


def test_what_would_be_counted_wrong_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="wrote no kernels"):
        count(PROGRAM, tmp_path)


def test_a_loop_that_depends_on_data_counts_once_and_is_told(tmp_path):
    found = count(LOOP.replace("LT", "NE") % 3, tmp_path)
    assert (found["cycles"], found["uncounted"]) == (7 + 100 + 20, 1)


@pytest.mark.parametrize("rounds", [1, 3])
def test_what_stands_in_a_loop_counts_as_often_as_it_goes_round(rounds, tmp_path):
    found = count(LOOP % rounds, tmp_path)
    assert found["cycles"] == 7 + rounds * (100 + 20)
    assert found["parts"] == {"attention": 100 * rounds, "mlp": 20 * rounds, "rest": 7}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--estimate=v9"], "--estimate='v9' is unknown; known: v5e, v6e"),
        (["--estimate=v5e", "--against=timm"], "--against needs a device"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message, capsys):
    assert bench.main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.compiler
@pytest.mark.subprocess
def test_the_tpu_compiler_takes_the_kernels_and_they_take_no_more_cycles_than_they_did():
    """Cycles an image of attention in DeiT-S: forward, backward, and with a selector; with a selector in DeiT-B.

    The compiler writes kernels down only where it was asked to before it is loaded: in a process of its own.
    """
    done = subprocess.run(
        [sys.executable, "-c", KERNELS], cwd=ROOT, capture_output=True, text=True, check=True
    )
    ceilings = 1800, 4300, 5300, 11_000
    for line, ceiling in zip(done.stdout.splitlines()[-4:], ceilings, strict=True):
        kernels, cycles = json.loads(line)
        assert kernels == 1 and ceiling / 2 < cycles < ceiling
