"""How the layers of a plan are run: one after the other, or scanned; what backward keeps of them.

Both are choices of execution: parameters lie the same way, and the results are equal up to float noise.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tosa_jax.errors import ConfigError
from tosa_jax.models.layers import fold_key, plain_attention
from tosa_jax.models.params import Params, set_params, split
from tosa_jax.models.plan import layer_specs
from tosa_jax.models.token_state import LayerContext, TokenState
from tosa_jax.models.vit_config import ViTConfig

GatherParams = Callable[[Params], Params]
"""Parameters by path, as they are stored -> as a layer computes with them."""

POLICIES: dict[str, Callable | None] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
"""What is kept for backward, by name: nothing but layer inputs, matrix products, those of weights alone."""


def drop_path_rates(config: ViTConfig) -> list[float]:
    """A rate a layer, rising linearly from 0 to `drop_path_rate`, as in DeiT."""
    last = max(config.depth - 1, 1)
    return [config.drop_path_rate * i / last for i in range(config.depth)]


def run_layers(
    config: ViTConfig,
    blocks: Any,
    kinds: Any,
    state: TokenState,
    *,
    key: jax.Array | None,
    train: bool,
    gather_params: GatherParams | None = None,
) -> TokenState:
    """Each layer in turn (`blocks`, `kinds`: NNX lists).

    `state.intermediate` gets all tokens [b n d] after each layer that the head reads.

    `gather_params` gets a layer's parameters when that layer runs, so that no more than one layer is whole at a time.
    """
    rates = drop_path_rates(config)
    for i, (kind, block) in enumerate(zip(kinds, blocks, strict=True)):
        after = kinds[i + 1].needs() if i + 1 < len(kinds) else None
        layer_key = None if key is None else fold_key(key, i)

        def layer(state, layer_key, kind=kind, block=block, after=after, rate=rates[i]):
            block, kind = _gathered(nnx.List([block, kind]), gather_params)
            context = LayerContext(after or plain_attention, layer_key, rate, train and rate > 0)
            return kind.apply(block, state, context)

        state = _remat(config, layer, gather_params)(state, layer_key)
        if i in config.intermediate_layers:
            state = state._replace(
                intermediate=state.intermediate | {i: kind.restore(state).tokens}
            )
    return state


def run_scanned(
    config: ViTConfig,
    blocks: Any,
    kinds: Any,
    state: TokenState,
    *,
    key: jax.Array | None,
    train: bool,
    gather_params: GatherParams | None = None,
) -> TokenState:
    """One compiled body for all repetitions of the plan's shortest part that repeats.

    Raises ConfigError where the plan does not repeat, counts differ from one repetition to the next, or a head reads
    tokens between them.
    """
    period = repeated_part(config)
    starts = range(0, config.depth, period)
    graphdef = nnx.graphdef(_part(blocks, kinds, 0, period))
    states = [nnx.state(_part(blocks, kinds, i, period)) for i in starts]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *states)
    rates = jnp.asarray(drop_path_rates(config), jnp.float32).reshape(-1, period)
    drops = train and config.drop_path_rate > 0

    def body(tokens, part):
        state, part_rates, start = part
        part_blocks, part_kinds = _gathered(nnx.merge(graphdef, state), gather_params)
        inner = TokenState(tokens)
        for j, (kind, block) in enumerate(zip(part_kinds, part_blocks, strict=True)):
            after = part_kinds[j + 1].needs() if j + 1 < period else None
            layer_key = None if key is None else fold_key(key, start + j)
            context = LayerContext(after or plain_attention, layer_key, part_rates[j], drops)
            inner = kind.apply(block, inner, context)
        return inner.tokens, (inner.selected, inner.scores, inner.aux)

    xs = (stacked, rates, jnp.asarray(list(starts), jnp.uint32))
    tokens, reported = jax.lax.scan(_remat(config, body, gather_params), state.tokens, xs)
    return _gather_reports(state._replace(tokens=tokens), reported, starts)


def repeated_part(config: ViTConfig) -> int:
    """Layers in the shortest part of the plan that repeats to make all of it. Raises ConfigError if none does."""
    if config.intermediate_layers:
        raise ConfigError(
            "scan_layers: this network's head reads tokens between layers; leave it False"
        )
    found = [spec._replace(layer=0) for spec in layer_specs(config)]
    for period in range(1, config.depth // 2 + 1):
        plan = config.plan[:period] * (config.depth // period)
        same = found[:period] * (config.depth // period)
        end = found[period - 1]
        whole = end.count_out == config.num_tokens and not (end.opens and not end.closes)
        if plan == config.plan and same == found and whole:
            return period
    raise ConfigError(
        f"scan_layers: no part of the plan {','.join(config.plan)} repeats with the same token counts; use a plan of "
        "equal groups with one keep_rate and budget='uniform', or leave scan_layers False"
    )


def _remat(config: ViTConfig, function: Callable, gather_params: GatherParams | None) -> Callable:
    if config.remat != "none":
        policy = POLICIES[config.remat]
    elif gather_params is not None:
        policy = _all_but_gathered
    else:
        return function
    return jax.checkpoint(function, policy=policy, prevent_cse=not config.scan_layers)


def _all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """Keeps everything but what was put together for a layer: only that is constrained to a sharding."""
    return primitive.name != "sharding_constraint"


def _gathered(part: Any, gather_params: GatherParams | None) -> Any:
    if gather_params is None:
        return part
    graphdef, params = split(part)
    return set_params(graphdef, gather_params(params))


def _part(blocks: Any, kinds: Any, start: int, period: int) -> Any:
    stop = start + period
    return nnx.List([nnx.List(list(blocks)[start:stop]), nnx.List(list(kinds)[start:stop])])


def _gather_reports(state: TokenState, reported: Any, starts: Sequence[int]) -> TokenState:
    """What each repetition reported, in the order of layers; names end in the layer's number."""
    selected, scores, aux = [], [], {}
    for i, start in enumerate(starts):
        part_selected, part_scores, part_aux = jax.tree.map(lambda x, i=i: x[i], reported)
        selected += part_selected
        scores += part_scores
        for name, values in part_aux.items():
            group, _, layer = name.rpartition("/")
            aux[f"{group}/{int(layer) + start}"] = values
    return state._replace(selected=tuple(selected), scores=tuple(scores), aux=aux)
