"""What the suite's own type checker must do, and must leave alone."""

import random

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError
from type_checker import check

from tosa_jax.ops.token_selection import select_tokens


def test_arrays_of_another_rank_are_refused():
    with pytest.raises(TypeCheckError, match="scores"):
        select_tokens(jnp.zeros(4), 2, 1)


def test_checks_draw_nothing_from_pythons_generator():
    @check
    def total(numbers: list[int]) -> int:
        return sum(numbers)

    before = random.getstate()
    assert total([1, 2, 3]) == 6
    assert random.getstate() == before
