"""Runs a network layer by layer with any counts of tokens, to try many schedules on the same images.

A schedule has a `Step` for each layer. Layers of one kind with the same counts share one compiled program, which gets
the layer's parameters as arguments; and where a schedule begins like the one before it, it goes on from there.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Float

from tosa_jax.models.layers import plain_attention
from tosa_jax.models.method import check_key, layer_kinds
from tosa_jax.models.options import Options
from tosa_jax.models.params import Params, set_params, split
from tosa_jax.models.plan import layer_specs
from tosa_jax.models.token_state import LayerContext, LayerSpec, TokenState
from tosa_jax.models.tracing import abstract
from tosa_jax.models.vit import VisionTransformer
from tosa_jax.models.vit_config import ViTConfig
from tosa_jax.ops.array_types import AttnMap, Images, Tokens
from tosa_jax.ops.reduction import Reduction


class Step(NamedTuple):
    """One layer of a schedule: its kind, as plans call it, its place and counts without its number, and its options."""

    kind: str
    spec: LayerSpec
    options: tuple[Options, ...]


Schedule = tuple[Step, ...]

Pair = tuple[Step, Step | None]
"""A layer, and the next one if it reads the attention of the first: what a program depends on."""


def schedule_of(config: ViTConfig) -> Schedule:
    """The schedule of a configuration. Raises ConfigError as `layer_specs`."""
    specs = layer_specs(config)
    return tuple(
        Step(x, spec._replace(layer=0), config.options)
        for x, spec in zip(config.plan, specs, strict=True)
    )


class Passing(NamedTuple):
    """What goes from one layer to the next: fields of `TokenState`."""

    tokens: Tokens
    summary: Any = None
    persisting: tuple[Reduction, ...] = ()
    open: tuple[Reduction, ...] = ()
    attention_map: AttnMap | None = None


class _Part(NamedTuple):
    """A layer without numbers.

    graphdef  of the block, the layer's kind, and the kind of the next layer if it reads the attention of this one.
    paths     of the parameters.
    """

    graphdef: nnx.GraphDef[nnx.List]
    paths: tuple[str, ...]
    macs: int
    needs: bool


class LayerPrograms:
    """A model's layers on some images.

    model   with its weights. Its own counts and options of methods are not read.
    images  float [b height width c], normalised.

    Raises ConfigError: a layer of the plan draws random numbers.
    """

    def __init__(self, model: VisionTransformer, images: Images) -> None:
        check_key(model.config.plan, None)
        self._config = model.config
        graphdef, self._params = split(model)
        embed = jax.jit(lambda params, x: set_params(graphdef, params).embed(x))
        self._first = Passing(embed(self._params, images))
        self._rotary = model.rotary(model.config.grid)
        norm = getattr(model, "norm", None)
        self._norm = jax.jit(lambda x: norm(x) if norm else x)
        self._restore = jax.jit(lambda reduction, tokens: reduction.restore(tokens))
        self._ran: tuple[tuple[Pair, ...], list[Passing]] = (), []
        self._blocks: dict[tuple[str, tuple[Options, ...]], Any] = {}
        self._parts: dict[Pair, _Part] = {}
        self._programs: dict[Pair, Callable[[Params, Passing], Passing]] = {}
        self._seconds: dict[Pair, float] = {}

    def macs(self, schedule: Schedule) -> int:
        """Multiply-adds of all layers for one image. Patch projection and head are not in it."""
        return sum(self._part(step, None).macs for step in schedule)

    def has_params(self, schedule: Schedule) -> bool:
        """Whether the model has the parameters of all layers: a selector, say, is only where its own plan chooses."""
        pairs = enumerate(self._pairs(schedule))
        return all(
            path in self._params for i, pair in pairs for path in self._paths(i, pair).values()
        )

    def seconds(self, schedule: Schedule) -> float:
        """Seconds of all layers for all images on this device: of each program the best of three runs."""
        pairs = self._pairs(schedule)
        if not self._seconds.keys() >= set(pairs):
            self._run(pairs, timed=True)
        return sum(self._seconds[pair] for pair in pairs)

    def tokens(self, schedule: Schedule) -> Tokens:
        """All n tokens [b n d] after the last layer, and after the final norm where the network has one."""
        state = self._run(self._pairs(schedule))
        return self._norm(self._whole(state.tokens, (*state.persisting, *state.open)))

    def _whole(self, tokens: Float[Array, "b s d"], reductions: tuple[Reduction, ...]) -> Tokens:
        for reduction in reversed(reductions):
            tokens = self._restore(reduction, tokens)
        return tokens

    def _pairs(self, schedule: Schedule) -> tuple[Pair, ...]:
        after = [step if self._part(step, None).needs else None for step in schedule[1:]]
        return tuple(zip(schedule, (*after, None), strict=True))

    def _part(self, step: Step, after: Step | None) -> _Part:
        if (step, after) not in self._parts:
            block, kind = self._block(step.kind, step.options), self._kind(step)
            following = [self._kind(after)] if after else []
            graphdef, params = split(nnx.List([block, kind, *following]))
            macs = kind.block_macs(block) + kind.own_macs(block)
            found = _Part(graphdef, tuple(params), macs, kind.needs() is not None)
            self._parts[step, after] = found
        return self._parts[step, after]

    def _block(self, name: str, options: tuple[Options, ...]) -> Any:
        """The block of a layer kind, without numbers. No count is in it: all steps of the kind share it."""
        if (name, options) not in self._blocks:
            config = dataclasses.replace(self._config, options=options)
            build = layer_kinds()[name].build_block
            self._blocks[name, options] = abstract(lambda rngs: build(config, rngs=rngs))
        return self._blocks[name, options]

    def _kind(self, step: Step) -> Any:
        config = dataclasses.replace(self._config, options=step.options)
        make = layer_kinds()[step.kind]
        return abstract(lambda rngs: make(config, step.spec, rngs=rngs))

    def _paths(self, layer: int, pair: Pair) -> dict[str, str]:
        """Paths of a layer's parameters: in its program -> in the model."""
        places = f"blocks/{layer}", f"kinds/{layer}", f"kinds/{layer + 1}"
        split_paths = [path.partition("/") for path in self._part(*pair).paths]
        return {f"{i}/{rest}": f"{places[int(i)]}/{rest}" for i, _, rest in split_paths}

    def _run(self, pairs: tuple[Pair, ...], timed: bool = False) -> Passing:
        before, states = self._ran
        same = 0
        while same < min(len(states), len(pairs)) and pairs[same] == before[same]:
            if timed and pairs[same] not in self._seconds:
                break
            same += 1
        states = states[:same]
        for layer in range(same, len(pairs)):
            state = states[-1] if states else self._first
            states.append(self._run_layer(layer, pairs[layer], state, timed))
        self._ran = pairs, states
        return states[-1]

    def _run_layer(self, layer: int, pair: Pair, state: Passing, timed: bool) -> Passing:
        params = {own: self._params[path] for own, path in self._paths(layer, pair).items()}
        if pair not in self._programs:
            self._programs[pair] = self._program(pair)
        program = self._programs[pair]
        # Of all reductions a layer reads the last one. With the others each layer would be a program of its own.
        last = state._replace(
            persisting=() if state.open else state.persisting[-1:], open=state.open[-1:]
        )
        after = program(params, last)
        if timed and pair not in self._seconds:
            self._seconds[pair] = min(_seconds(program, params, last) for _ in range(3))
        persisting = state.persisting + after.persisting[len(last.persisting) :]
        if state.open and not after.open:  # the group has ended, for the last of its reductions
            tokens = self._whole(after.tokens, state.open[:-1])
            return after._replace(tokens=tokens, persisting=persisting)
        return after._replace(persisting=persisting, open=state.open + after.open[len(last.open) :])

    def _program(self, pair: Pair) -> Callable[[Params, Passing], Passing]:
        graphdef = self._part(*pair).graphdef

        @jax.jit
        def run(params, before):
            block, kind, *after = set_params(graphdef, params)
            state = TokenState(grid_rotary=self._rotary, **before._asdict())
            attention_fn = (after[0].needs() if after else None) or plain_attention
            state = kind.apply(block, state, LayerContext(attention_fn, None, None, False))
            return Passing(*(getattr(state, name) for name in Passing._fields))

        return run


def _seconds(program: Callable, *arguments: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(program(*arguments))
    return time.perf_counter() - start
