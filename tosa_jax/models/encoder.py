"""Runs the layers of a plan, one after the other or scanned, and decides what is kept of them for the backward pass.

Neither choice changes parameter paths, and both change results only by rounding.
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
"""A layer's parameters by path, as they are stored -> as the layer computes with them."""

POLICIES: dict[str, Callable | None] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
"""What is kept for the backward pass, by the value of `ViTConfig.remat`.

"full": the layers' inputs only; "dots": also all matrix products; "dots_no_batch": also those with weights.
"""


def drop_path_rates(config: ViTConfig) -> list[float]:
    """The rate of each layer: it rises linearly from 0 to `drop_path_rate`, as in DeiT."""
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
    read: int | None = None,
    after: Sequence[int] = (),
) -> TokenState:
    """Runs each layer in turn.

    blocks, kinds  NNX lists with one module a layer.
    state          its tokens are [b n d]; `intermediate` gets all tokens [b n d] after each layer that the head reads.
    key            for drop path and random selection: one, one an example, or None.
    train          turns drop path on.
    gather_params  gets the parameters of a layer when that layer runs, so that only one layer at a time is whole.
    read           how many of the first tokens are read after the last layer; the others need not be there. None: all.
    after          layers whose tokens are kept as if the head read them.
    """
    rates = drop_path_rates(config)
    drops = [train and rate > 0 for rate in rates]
    return _run_stretch(
        config, blocks, kinds, state, first=0, rates=rates, drops=drops, train=train, key=key,
        gather_params=gather_params, read=read,
        wrap=lambda layer: rematerialised(config, layer, gather_params),
        kept=(*config.intermediate_layers, *after),
    )  # fmt: skip


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
    """Runs all layers by one compiled program for the shortest part of the plan that repeats (`jax.lax.scan`).

    Arguments are those of `run_layers`.

    Raises ConfigError if the plan does not repeat, if token counts differ between repetitions, or if the head reads
    tokens between layers.
    """
    period = repeated_part(config)
    starts = range(0, config.depth, period)
    graphdef = nnx.graphdef(_part(blocks, kinds, 0, period))
    states = [nnx.state(_part(blocks, kinds, i, period)) for i in starts]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *states)
    rates = jnp.asarray(drop_path_rates(config), jnp.float32).reshape(-1, period)
    drops = [train and config.drop_path_rate > 0] * period

    placed = TokenState(
        state.tokens, grid_rotary=state.grid_rotary, grid_present=state.grid_present
    )

    def body(carried, part):
        tokens, labels = carried
        state, part_rates, start = part
        part_blocks, part_kinds = _gathered(nnx.merge(graphdef, state), gather_params)
        entering = placed._replace(tokens=tokens, labels=labels)
        inner = _run_stretch(
            config, part_blocks, part_kinds, entering, first=start, rates=part_rates, drops=drops, train=train, key=key,
        )  # fmt: skip
        return (inner.tokens, inner.labels), (inner.selected, inner.scores, inner.aux)

    xs = (stacked, rates, jnp.asarray(list(starts), jnp.uint32))
    carried = state.tokens, state.labels
    wrapped = rematerialised(config, body, gather_params)
    (tokens, labels), reported = jax.lax.scan(wrapped, carried, xs)
    return _gather_reports(state._replace(tokens=tokens, labels=labels), reported, starts)


def _run_stretch(
    config: ViTConfig,
    blocks: Any,
    kinds: Any,
    state: TokenState,
    *,
    first: Any,
    rates: Any,
    drops: Sequence[bool],
    train: bool,
    key: jax.Array | None,
    gather_params: GatherParams | None = None,
    wrap: Callable[[Callable], Callable] = lambda layer: layer,
    read: int | None = None,
    kept: Sequence[int] = (),
) -> TokenState:
    """Runs neighbouring layers in turn, and tells each one what the next one needs of its attention.

    first          number of the first one in the plan: an int, or a traced integer in a scan.
    rates, drops   for each layer the rate of drop path, and whether it is on.
    train          whether the network is being trained.
    gather_params  as in `run_layers`.
    wrap           turns a layer, `(state, key) -> state`, into the function that is called.
    read           as in `run_layers`, after the last of these layers.
    kept           layers whose tokens go to `intermediate`; none where `first` is traced.
    """
    for i, (kind, block) in enumerate(zip(kinds, blocks, strict=True)):
        after = kinds[i + 1].needs() if i + 1 < len(kinds) else None
        layer_key = None if key is None else fold_key(key, first + i)

        wanted = read if i == len(kinds) - 1 else None

        def layer(state, layer_key, i=i, kind=kind, block=block, after=after, wanted=wanted):
            block, kind = _gathered(nnx.List([block, kind]), gather_params)
            attention_fn = after or plain_attention
            rate = rates[i] if drops[i] else None
            aligns = state.labels is not None
            context = LayerContext(attention_fn, layer_key, rate, train, wanted, aligns)
            return kind.apply(block, state, context)

        state = wrap(layer)(state, layer_key)
        if kept and first + i in kept:
            grid = kind.restore(state).tokens
            state = state._replace(intermediate=state.intermediate | {first + i: grid})
    return state


def repeated_part(config: ViTConfig) -> int:
    """The number of layers in the shortest part of the plan whose repetition is the plan.

    Raises ConfigError if there is no such part, or if the head reads tokens between layers.
    """
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


def rematerialised(
    config: ViTConfig, function: Callable, gather_params: GatherParams | None = None
) -> Callable:
    """The function, which keeps for the backward pass what `config.remat` says."""
    if config.remat != "none":
        policy = POLICIES[config.remat]
    elif gather_params is not None:
        policy = _all_but_gathered
    else:
        return function
    return jax.checkpoint(function, policy=policy, prevent_cse=not config.scan_layers)


def _all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """A policy that keeps everything but gathered parameters, which alone are constrained to a sharding."""
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
    """The state with all reports of the repetitions, in the order of layers; names of `aux` end in a layer's number."""
    selected, scores, aux = [], [], {}
    for i, start in enumerate(starts):
        part_selected, part_scores, part_aux = jax.tree.map(lambda x, i=i: x[i], reported)
        selected += part_selected
        scores += part_scores
        for name, values in part_aux.items():
            group, _, layer = name.rpartition("/")
            aux[f"{group}/{int(layer) + start}"] = values
    return state._replace(selected=tuple(selected), scores=tuple(scores), aux=aux)
