"""MCTF, Multi-Criteria Token Fusion (Lee et al. 2024, arXiv 2403.10030): alike, uninformative, small tokens merge.

Tokens at even and at odd places are matched in both directions. A pair's weight is the product of three things, each
to a power: how similar the two are, how little attention they get, and how small they are. Merged tokens are means
weighted by attention and size. How informative a token is in the layer that comes can be told in several ways:

own       the layer's own map, computed before its tokens merge, and merged with them ("one step ahead": the paper);
previous  the column sums of the map of the layer before, which costs nothing;
class     the class token's row of the map of the layer before;
and by the kind "mctf_predicted": the map that ToSA's selector predicts from the layer before.

For dense prediction, merged tokens are copied back to where they came from.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tosa_jax.models.layers import AttentionFn, Bias, Block
from tosa_jax.models.method import Method, at_layers
from tosa_jax.models.methods.reducing import (
    PersistentReduction,
    RemovalOptions,
    class_row,
    left_after_merging,
    own_map,
    run_by_map,
    sizes_of,
)
from tosa_jax.models.methods.tosa import SelectiveFit
from tosa_jax.models.options import Options
from tosa_jax.models.selector import SelectorOptions, TokenSelector
from tosa_jax.models.token_state import LayerContext, LayerSpec, TokenState
from tosa_jax.models.vit_config import ViTConfig, check, check_choice
from tosa_jax.ops.array_types import AttnMap, Heads, Scores
from tosa_jax.ops.attention import attention, attention_and_column_sums
from tosa_jax.ops.reduction import Reduction, group_totals
from tosa_jax.ops.token_matching import cosines, sum_groups, two_way_matching

LEAST = 10
"""Tokens that the published code leaves at least."""


@dataclass(frozen=True, kw_only=True)
class MCTFOptions(Options):
    """What counts when tokens are matched. Raises ConfigError for values out of range.

    mctf_information           "own", "previous" or "class": whose attention says how informative a token is.
    mctf_restore               "copy": for dense prediction merged tokens get copies of what they merged into (the
                               paper). "update": they keep their values and get its updates, as in redundancy.
    tau_sim tau_info tau_size  the power of each criterion is 1 over it; 0: it does not count.
    """

    mctf_information: str = "own"
    mctf_restore: str = "copy"
    tau_sim: float = 1.0
    tau_info: float = 20.0
    tau_size: float = 40.0

    def __post_init__(self) -> None:
        check_choice("mctf_information", self.mctf_information, ("own", "previous", "class"))
        check_choice("mctf_restore", self.mctf_restore, ("copy", "update"))
        for name in ("tau_sim", "tau_info", "tau_size"):
            check(getattr(self, name) >= 0, f"{name}={getattr(self, name)} is negative")


class MCTF(PersistentReduction):
    """Merges tokens before the layer. `removed` is the paper's r; otherwise `keep_rate` counts as in ToMe."""

    options = (RemovalOptions, MCTFOptions)

    def __init__(self, config: ViTConfig, spec: LayerSpec, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, spec, rngs=rngs)
        self.criteria, self.map_chunk = config.options_of(MCTFOptions), config.map_chunk or None

    @classmethod
    def counted(cls, config: ViTConfig, spec: LayerSpec, keep_rate: float | None) -> LayerSpec:
        """As the base class. Raises ConfigError also if there is no layer before whose attention could be read."""
        spec = super().counted(config, spec, keep_rate)
        read = cls.source(config)
        check(spec.layer > 0 or not spec.opens or read == "own",
              f"plan starts with {config.plan[0]!r}, which reads the layer before it ({read})")  # fmt: skip
        check(read != "class" or config.class_token,
              "mctf_information='class' reads the attention of the class token, and this network has none")  # fmt: skip
        return spec

    @classmethod
    def source(cls, config: ViTConfig) -> str:
        """Whose attention says how informative a token is."""
        return config.options_of(MCTFOptions).mctf_information

    @classmethod
    def count_left(cls, config: ViTConfig, spec: LayerSpec, keep_rate: float) -> int:
        """Raises ConfigError where more than half of the patches would have to merge."""
        half = spec.count_in - (spec.count_in - config.num_prefix_tokens) // 2
        left = left_after_merging(config, spec, keep_rate, half)
        fixed = bool(config.options_of(RemovalOptions).removed)
        return max(left, min(LEAST, spec.count_in)) if fixed else left

    def needs(self) -> AttentionFn | None:
        if not self.spec.opens or self.criteria.mctf_information == "own":
            return None
        return (
            self._sum_columns if self.criteria.mctf_information == "previous" else self._class_row
        )

    def _sum_columns(
        self, query: Heads, key: Heads, value: Heads, key_bias: Bias = None
    ) -> tuple[Heads, Scores]:
        out, sums = attention_and_column_sums(query, key, value, self.map_chunk, key_bias)
        return out, sums.mean(axis=1)

    def _class_row(
        self, query: Heads, key: Heads, value: Heads, key_bias: Bias = None
    ) -> tuple[Heads, Scores]:
        return attention(query, key, value, key_bias), class_row(query, key, key_bias)

    @property
    def reads_own_map(self) -> bool:
        """Whether the layer merges its own map with its tokens."""
        return self.criteria.mctf_information == "own"

    def apply(self, block: Block, state: TokenState, context: LayerContext) -> TokenState:
        if not self.spec.opens:
            return super().apply(block, state, context)
        if not self.reads_own_map:
            state, _ = self.fused(state, state.summary)
            return super().apply(block, state, context)
        attn_map = own_map(block, state, state.sizes if self.proportional else None)
        state, reduction = self.fused(state, attn_map.mean(axis=(1, 2)))
        return run_by_map(merge_map(attn_map, reduction), block, state, context)

    def fused(self, state: TokenState, informative: Scores) -> tuple[TokenState, Reduction]:
        """The state with merged tokens, and how they merged; `informative` as for `fusion`."""
        reduction = self.fusion(state, informative)
        tokens = reduction.merge(state.tokens)
        if self.criteria.mctf_restore == "update":
            reduction = reduction._replace(before=state.tokens, entered=tokens)
        return state.reduced(tokens, reduction), reduction

    def fusion(self, state: TokenState, informative: Scores) -> Reduction:
        """The merging of the state's tokens, which get `informative` [b n] attention."""
        sizes, informative = sizes_of(state), jax.lax.stop_gradient(informative)
        even, odd = slice(0, None, 2), slice(1, None, 2)
        weight = jnp.ones(())
        if self.criteria.tau_sim:
            similarity = cosines(state.tokens[:, even], state.tokens[:, odd])
            weight = jnp.maximum((similarity + 1) / 2, 0) ** (1 / self.criteria.tau_sim)
        for values, tau in (
            (informative, self.criteria.tau_info),
            (sizes, self.criteria.tau_size),
        ):
            if tau:
                little = values.min(axis=1, keepdims=True) / values
                weight = weight * (little[:, even, None] * little[:, None, odd]) ** (1 / tau)
        leaving = self.spec.count_in - self.spec.count
        groups = two_way_matching(
            weight, (leaving // 2, leaving - leaving // 2), self.num_prefix_tokens
        )
        # In proportion to the largest ones, so that no precision is lost.
        shares = informative * sizes
        shares = shares / shares.max(axis=1, keepdims=True)
        totals = group_totals(shares, groups)
        return Reduction(groups, shares, totals=totals, sizes=group_totals(sizes, groups))

    def block_macs(self, block: Block) -> int:
        into, left = self.spec.count_in, self.spec.count
        if not self.spec.opens or not self.reads_own_map:
            return block.macs(left)
        before = 2 * into * block.width**2 + into**2 * block.width
        after = 2 * left * block.width**2 + left**2 * block.width
        return before + after + block.mlp_macs(left)

    def own_macs(self, block: Block) -> int:
        """Matching and merging; merging the map adds up attention and multiplies nothing."""
        if not self.spec.opens:
            return 0
        into, left = self.spec.count_in, self.spec.count
        matching = (into + 1) // 2 * (into // 2)
        row = into if self.criteria.mctf_information == "class" else 0
        return (matching + (into - left) * left + row) * block.width


def merge_map(attn_map: AttnMap, reduction: Reduction) -> Float[Array, "b h s s"]:
    """A map [b h n n] of merged tokens: attention to a group adds up, that of a group is the mean of its members."""
    b, h, n, _ = attn_map.shape
    groups = reduction.source
    by_key = attn_map.transpose(0, 3, 1, 2).reshape(b, n, h * n)
    by_key = sum_groups(by_key, groups)
    s = by_key.shape[1]
    by_query = by_key.reshape(b, s, h, n).transpose(0, 3, 2, 1).reshape(b, n, h * s)
    return reduction.merge(by_query).reshape(b, s, h, s).transpose(0, 2, 1, 3)


class MCTFPredicted(MCTF):
    """How informative a token is, ToSA's selector predicts from the logits of the layer before."""

    options = (*MCTF.options, SelectorOptions)
    fit_modules = ("selector",)

    def __init__(self, config: ViTConfig, spec: LayerSpec, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, spec, rngs=rngs)
        self.selector = TokenSelector(config) if spec.opens else None

    @classmethod
    def source(cls, config: ViTConfig) -> str:
        return "predicted"

    @property
    def reads_own_map(self) -> bool:
        return False

    def needs(self) -> AttentionFn | None:
        return self._predict if self.spec.opens else None

    def _predict(
        self, query: Heads, key: Heads, value: Heads, key_bias: Bias = None
    ) -> tuple[Heads, Scores]:
        assert self.selector is not None  # the layer opens
        out, sums = self.selector.attention_and_sums(query, key, value, self.map_chunk, key_bias)
        return out, sums.mean(axis=1)

    def own_macs(self, block: Block) -> int:
        return super().own_macs(block) + self.selector_macs()

    def selector_macs(self) -> int:
        return 0 if self.selector is None else self.selector.macs(self.spec.count_in)


class MCTFFit(SelectiveFit):
    """Takes the place of `MCTFPredicted` while selectors are trained, densely, one in each layer that merges."""

    nests = True

    @classmethod
    def counted(cls, config: ViTConfig, spec: LayerSpec, keep_rate: float | None) -> LayerSpec:
        """All tokens go on; `count` is how many the recall of the selector is measured on."""
        merging = MCTFPredicted.counted(config, spec, keep_rate)
        return merging._replace(closes=False, count_out=spec.count_in)


def all_but_the_first(plan: str, depth: int) -> tuple[str, ...]:
    """A `whole_plan`: every layer merges but the first one, as in the paper."""
    return at_layers(plan, depth, range(1, depth))


_CONTROL = {"budget": "linear", "removed": (), "scan_layers": False}

METHODS = (
    Method(
        name="mctf",
        kind=MCTF,
        label="MCTF",
        colours=("#3d5a99", "#93aee6"),
        whole_plan=all_but_the_first,
        equal_gmacs=True,
        fields=_CONTROL,
    ),
    Method(
        name="mctf_predicted",
        kind=MCTFPredicted,
        label="MCTF, attention predicted by ToSA's selector",
        short_label="MCTF, predicted",
        control=False,
        whole_plan=all_but_the_first,
        fields=_CONTROL,
        fit_kind=MCTFFit,
    ),
)
