"""Memory of programs and devices, and what a person reads when it does not do."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from tosa_jax.cli.command import run_command
from tosa_jax.distributed import memory
from tosa_jax.errors import ConfigError, DeviceError


def compiled(n: int):
    return jax.jit(lambda x: x * 2).lower(jax.ShapeDtypeStruct((n,), jnp.float32)).compile()


def test_arguments_and_results_count():
    assert memory.needed_bytes(compiled(1000)) == 8000


def test_the_limit_of_the_allocator_counts_before_that_of_the_machine():
    assert memory.limit_of({"bytes_limit": 2**30, "bytes_in_use": 5}) == 2**30
    assert memory.limit_of(None) == memory.limit_of({}) > 2**28
    assert memory.device_bytes(jax.devices()[0]) == memory.limit_of(None)


def test_too_much_is_an_error_with_both_numbers(monkeypatch):
    memory.check_fits(compiled(1000), "it", "smaller")
    monkeypatch.setattr(memory, "needed_bytes", lambda program: 3 * 2**30)
    monkeypatch.setattr(memory, "device_bytes", lambda device: 2**30)
    with pytest.raises(DeviceError, match=r"^it needs 3\.0 GiB .* has 1\.0 GiB: smaller$"):
        memory.check_fits(compiled(1000), "it", "smaller")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ConfigError("batch_size=0\nis wrong"), "error: batch_size=0 is wrong"),
        (RuntimeError("RESOURCE_EXHAUSTED: out of memory"), "take a smaller batch size"),
    ],
)
def test_what_can_be_mended_is_one_line_and_status_2(error, says, capsys):
    def work():
        raise error

    assert run_command(work) == 2
    text = capsys.readouterr().err
    assert says in text and text.count("\n") == 1 and text.startswith("error: ")


def test_a_defect_keeps_its_traceback_and_a_status_is_passed_on():
    def defect():
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        run_command(defect)
    assert run_command(lambda: 1) == 1


FAULTS = """
import resource, sys
import jax, jax.numpy as jnp
from tosa_jax.distributed.memory import keep_freed_memory
jax.devices()
if sys.argv[1] == "keep":
    keep_freed_memory()
x, w = jnp.ones((2**16, 64)), jnp.ones((64, 64))  # 16 MiB, and little to compute
step = jax.jit(lambda x: jnp.tanh(jnp.cumsum(x @ w, axis=1) @ w).sum())
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):  # the heap grows until its free pieces are large enough
    step(x).block_until_ready()
before = faults()
for _ in range(10):
    step(x).block_until_ready()
print(faults() - before)
"""


@pytest.mark.subprocess
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_steps_use_again_what_earlier_ones_freed():
    # Unoptimised programs, as the other tests want them, would run for long here.
    ours = ("MALLOC_", "GLIBC_TUNABLES", "XLA_FLAGS")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(ours)}

    def faults(how, **tuned):
        command = [sys.executable, "-c", FAULTS, how]
        done = subprocess.run(
            command, env=clean | tuned | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=True
        )  # fmt: skip
        return int(done.stdout)

    without = faults("-")
    assert without > 10 * 2**24 / os.sysconf("SC_PAGE_SIZE")  # at least one array a step
    assert faults("keep") < 0.5 * without
    assert faults("keep", MALLOC_TOP_PAD_="0") > 0.5 * without  # the environment has decided
