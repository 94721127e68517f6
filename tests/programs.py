"""Programs that several runs of a test file share: each run would trace and compile its own, though they are equal."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import pytest

from tosa_jax.train import loop, stage_run
from tosa_jax.train.evaluate import Evaluator
from tosa_jax.train.stage_run import StageBuilder


@contextlib.contextmanager
def kept_programs() -> Iterator[None]:
    """Runs in this context share the programs that are made of equal parts: structure, task, optimizer, seed, mesh.

    What a traced function reads beside its parts must not change in it, a patched function above all.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in (
            "make_optimizer",
            "learning_rate",
        ):  # closures, of which only the same are equal
            patch.setattr(stage_run, name, functools.cache(getattr(stage_run, name)))
        patch.setattr(loop, "jit_step", _kept_step(loop.jit_step))
        patch.setattr(StageBuilder, "stage_run", _with_kept_init(StageBuilder.stage_run))
        for name in ("step", "_look"):
            patch.setattr(Evaluator, name, _kept_property(name))
        yield


def _kept_step(make: Callable[..., Any]) -> Callable[..., Any]:
    kept: dict[Any, Any] = {}

    def jit_step(setup, shardings, mesh):
        leaves, structure = jax.tree.flatten(shardings)
        key = setup, (*leaves, structure), mesh
        if key not in kept:
            kept[key] = make(setup, shardings, mesh)
        return kept[key]

    return jit_step


def _with_kept_init(make: Callable[..., Any]) -> Callable[..., Any]:
    kept = functools.cache(functools.partial)

    def stage(builder, *args):
        found = make(builder, *args)
        return dataclasses.replace(found, init=kept(found.init.func, *found.init.args))

    return stage


def _kept_property(name: str) -> property:
    make, kept = vars(Evaluator)[name].func, {}

    def jitted(evaluator):
        key = evaluator.graphdef, evaluator.task, evaluator.seed, evaluator.mesh
        if key not in kept:
            kept[key] = make(evaluator)
        return kept[key]

    return property(jitted)
