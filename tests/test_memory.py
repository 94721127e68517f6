"""Memory of programs and devices, and what a person reads when it does not do."""

import jax
import jax.numpy as jnp
import pytest

from tosa_jax import memory
from tosa_jax.errors import ConfigError, DeviceError
from tosa_jax.exit_status import guard


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

    assert guard(work) == 2
    text = capsys.readouterr().err
    assert says in text and text.count("\n") == 1 and text.startswith("error: ")


def test_a_defect_keeps_its_traceback_and_a_status_is_passed_on():
    def defect():
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        guard(defect)
    assert guard(lambda: 1) == 1
