"""Layers that leave fewer tokens for good: the base classes of the methods that drop, merge or fuse tokens.

`PersistentReduction` counts the tokens that are left, and its subclasses reduce them before the block. `ReducingLayer`
reduces them between attention and MLP. All later layers run on the tokens that are left. For dense prediction every
token gets a copy of the one that represents it, unless the method says otherwise.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tosa_jax.errors import ConfigError
from tosa_jax.models.layers import Bias, Block, plain_attention
from tosa_jax.models.methods.standard import Standard
from tosa_jax.models.options import Options
from tosa_jax.models.token_state import LayerContext, LayerSpec, TokenState, WithMap, key_bias
from tosa_jax.models.vit_config import ViTConfig, check
from tosa_jax.ops.array_types import AttnMap, Heads, Scores, Tokens
from tosa_jax.ops.attention import attention_logits, first_row
from tosa_jax.ops.reduction import Reduction
from tosa_jax.ops.token_selection import Selection, num_selected, with_one_hot


@dataclass(frozen=True, kw_only=True)
class RemovalOptions(Options):
    """How many tokens leave the layers of a method that removes a fixed number. Raises ConfigError for negative ones.

    removed  one number for all its layers, or one for each, in order; (): `keep_rate` says how many tokens stay.
    """

    removed: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for number in self.removed:
            check(number >= 0, f"removed={self.removed} has a negative number")

    def at(self, config: ViTConfig, layer: int) -> int | None:
        """The number of tokens that leave `layer`; None: `keep_rate` counts. Raises ConfigError: too many, too few."""
        if len(self.removed) < 2:
            return self.removed[0] if self.removed else None
        name = config.plan[layer]
        layers = [i for i, kind in enumerate(config.plan) if kind == name]
        given = len(self.removed)
        check(given == len(layers),
              f"removed has {given} numbers, but the plan has {len(layers)} layers of {name!r}")  # fmt: skip
        return self.removed[layers.index(layer)]


class PersistentReduction(Standard):
    """Leaves fewer tokens, in this layer and all later ones.

    A subclass says how many are left (`count_left`), and its `apply` reduces the tokens to that number.
    `reads_class_token` is whether it cannot do without a class token.
    """

    selects = nests = True
    reads_class_token = False

    def __init__(self, config: ViTConfig, spec: LayerSpec, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, spec, rngs=rngs)
        self.num_prefix_tokens = config.num_prefix_tokens
        self.one_hot = config.gather == "one_hot"

    @classmethod
    def counted(cls, config: ViTConfig, spec: LayerSpec, keep_rate: float | None) -> LayerSpec:
        """`count_left` tokens go on, in this layer and all later ones.

        Raises ConfigError for counts that cannot be reached, and if there is no class token where one is read.
        """
        check(config.class_token or not cls.reads_class_token,
              f"the layer kind {config.plan[spec.layer]!r} reads the attention of the class token, and this network "
              "has none")  # fmt: skip
        left = spec.count_in if keep_rate is None else cls.count_left(config, spec, keep_rate)
        left = min(left, spec.count_in)
        return spec._replace(opens=left < spec.count_in, closes=False, count=left, count_out=left)

    @classmethod
    def count_left(cls, config: ViTConfig, spec: LayerSpec, keep_rate: float) -> int:
        """How many tokens are left: the share `keep_rate` of the patches that reach the layer, and the prefix."""
        prefix = config.num_prefix_tokens
        return num_selected(spec.count_in - prefix, prefix, keep_rate, config.count_multiple)


class ReducingLayer(PersistentReduction):
    """Reduces the tokens between attention and MLP: attention runs on all that reach the layer, the MLP on those left.

    A subclass says how many are left (`count_left`), what it reads of its attention (`report`), and how the tokens
    become fewer (`reduction`).
    """

    def report(self, query: Heads, key: Heads, value: Heads, bias: Bias) -> Any:
        """What `reduction` gets of this layer's attention; here nothing. `bias` is that of the keys."""
        return None

    def reduction(
        self, tokens: Tokens, reported: Any, state: TokenState
    ) -> tuple[Reduction, Scores | None]:
        """How `tokens` [b n d], after attention, become `spec.count`; and what they were chosen by [b n], or None.

        reported  what `report` returned.
        state     before the layer.
        """
        raise NotImplementedError

    def apply(self, block: Block, state: TokenState, context: LayerContext) -> TokenState:
        # Where only the first tokens are read after the layer, nobody reads what a reduction would change.
        if not self.spec.opens or context.read is not None:
            return super().apply(block, state, context)
        before, sizes = state, state.sizes if self.proportional else None
        bias = key_bias(sizes, state.mask)

        def reduce(state, reported):
            tokens = state.tokens
            reduction, scores = self.reduction(tokens, reported, before)
            if self.one_hot and isinstance(reduction.source, Selection):
                hot = with_one_hot(reduction.source, tokens.dtype)
                reduction = reduction._replace(source=hot)
            return state.reduced(reduction.merge(tokens), reduction, scores)

        def report(query, key, value):
            return self.report(query, key, value, bias)

        return reduced_between(block, state, context.weighing(sizes, state.mask), report, reduce)

    def block_macs(self, block: Block) -> int:
        return block.attn_macs(self.spec.count_in) + block.mlp_macs(self.spec.count)


def left_after_merging(config: ViTConfig, spec: LayerSpec, keep_rate: float, least: int) -> int:
    """How many tokens a layer leaves that merges them: `removed` fewer, or the share `keep_rate` of all patches.

    least  what it leaves at least. `removed`, and rates that fall linearly, go as far down as that.

    Raises ConfigError if `keep_rate` asks for fewer.
    """
    removed = config.options_of(RemovalOptions).at(config, spec.layer)
    if removed is not None:
        return max(spec.count_in - removed, least)
    wanted = num_selected(
        config.num_patches, config.num_prefix_tokens, keep_rate, config.count_multiple
    )
    check(
        wanted >= least or config.budget == "linear",
        f"keep_rate={config.keep_rate} leaves layer {spec.layer} {wanted} of {spec.count_in} tokens; "
        f"{config.plan[spec.layer]!r} merges half of the patches at most and leaves {least}",
    )
    return max(wanted, least)


def reduced_between(
    block: Block,
    state: TokenState,
    context: LayerContext,
    report: Callable[[Heads, Heads, Heads], Any],
    reduce: Callable[[TokenState, Any], TokenState],
) -> TokenState:
    """Runs the block, with fewer tokens after its attention: the state after it.

    report  `(query, key, value) ->` what `reduce` needs of the attention.
    reduce  `(state after attention, report) ->` the state with fewer tokens.
    """

    def attend(query, key, value):
        out, summary = context.attend(query, key, value)
        return out, (summary, report(query, key, value))

    def between(tokens, reported):
        summary, own = reported
        after = reduce(state.attended(tokens, summary), own)
        return after.tokens, after

    run = block(state.tokens, attend, context.drop, between, context.read, state.rotary)
    tokens, after = run
    return after._replace(tokens=tokens)


def own_map(block: Block, state: TokenState, sizes: Float[Array, "b n"] | None = None) -> AttnMap:
    """The block's attention map of the state's tokens, float32 [b h n n]; `sizes` as for `LayerContext.weighing`."""
    query, key = block.attn.query_key(block.norm1(state.tokens), state.rotary)
    logits, bias = attention_logits(query, key), key_bias(sizes, state.mask)
    return jax.nn.softmax(logits if bias is None else logits + bias[:, None, None], axis=-1)


def run_by_map(
    attn_map: AttnMap, block: Block, state: TokenState, context: LayerContext
) -> TokenState:
    """The state after the block, whose attention has the given map [b h n n] instead of one of its own.

    Raises ConfigError if the next layer reads the attention of this one.
    """
    if context.attention_fn is not plain_attention:
        raise ConfigError(
            "the plan has a layer that reads the attention of one which runs a given map ('mctf', 'psvit'); put a "
            "standard layer between"
        )
    update = block.map_branch(state.tokens, attn_map[:, :, : context.read])
    tokens = block.finished(state.tokens[:, : context.read], update, context.drop)
    mean_map = jax.lax.stop_gradient(attn_map[:, :, : context.read].mean(axis=1))
    state = state.attended(tokens, WithMap(None, mean_map) if context.aligns else None)
    return state if context.read is None else state.cut_off()


def class_row(query: Heads, key: Heads, bias: Bias) -> Scores:
    """How much attention the class token pays to each token, mean over heads, float32 [b n]."""
    return first_row(query, key, bias).mean(axis=1)


def class_scores(query: Heads, key: Heads, value: Heads, bias: Bias) -> Scores:
    """The class token's attention times the length of a token's value, float32 [b n]. No gradient passes."""
    length = jnp.sqrt(jnp.square(value.astype(jnp.float32)).sum(axis=(2, 3)))
    return jax.lax.stop_gradient(class_row(query, key, bias) * length)


def sizes_of(state: TokenState) -> Float[Array, "b n"]:
    """How many of the original tokens each of the state's tokens stands for, float32; 0 for padding."""
    return jnp.ones(state.tokens.shape[:2]) if state.counts is None else state.counts
