"""What becomes of tokens that a layer does not select: they stay as they were, or move on by a cheap estimate.

In the paper they stay as they were, but the layers after a selective one expect every token updated. `LowRank`
estimates the missed update when a group of layers opens, `Shared` when it closes, from the updates of selected tokens.
Every estimate counts in multiply-adds.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tosa_jax.models.layers import Block, linear
from tosa_jax.models.options import Options
from tosa_jax.models.token_state import LayerSpec, LinearFit
from tosa_jax.models.vit_config import ViTConfig, check, check_choice
from tosa_jax.ops.array_types import Tokens
from tosa_jax.ops.reduction import Reduction, pooled
from tosa_jax.ops.token_matching import with_representatives
from tosa_jax.ops.token_selection import Selection, complement, gather_tokens, scatter_tokens

Sizes = Float[Array, "b n"] | None
"""How many of the original tokens each one stands for; None: one each."""


@dataclass(frozen=True, kw_only=True)
class BypassOptions(Options):
    """What becomes of the tokens that a layer does not select. Raises ConfigError for values out of range.

    bypass            a key of `BYPASSES`; "": the one that the layer kind prefers (`default_bypass`).
    bypass_rank       of "low_rank": the rank of its linear map, at least 1.
    bypass_pool       with "shared", a selected token enters as the mean of the tokens that it stands for.
    bypass_size_bias  with "shared" and `bypass_pool`, a selected token counts in attention as often as it stands for
                      others.
    """

    bypass: str = ""
    bypass_rank: int = 64
    bypass_pool: bool = True
    bypass_size_bias: bool = True

    def __post_init__(self) -> None:
        check_choice("bypass", self.bypass, ("", *BYPASSES))
        check(self.bypass_rank >= 1, f"bypass_rank={self.bypass_rank} must be at least 1")


class Identity(nnx.Module):
    """The paper's bypass: tokens rejoin unchanged after the group of layers. The base class of the other ones."""

    pool = False
    """Whether a selected token enters the group as the mean of the tokens that it stands for."""

    def __init__(self, config: ViTConfig, spec: LayerSpec, *, rngs: nnx.Rngs) -> None:
        self.width = config.embed_dim

    def match(self, tokens: Tokens, selection: Selection) -> Selection:
        """The selection with what this bypass needs to know of it: here as it is.

        tokens  [b n d], those that reach the group.
        """
        return selection

    def open(
        self, block: Block, tokens: Tokens, selection: Selection, sizes: Sizes = None
    ) -> tuple[Float[Array, "b s d"], Reduction]:
        """The selected tokens [b s d] as they enter the group, and the reduction that ends with it.

        block   the first one of the group.
        tokens  [b n d], those that reach the group.
        sizes   [b n], how many of the original tokens each one stands for already; None: one each.
        """
        return gather_tokens(tokens, selection), Reduction(selection, before=tokens)

    def macs(self, spec: LayerSpec) -> int:
        """Multiply-adds of the estimate for one example."""
        return 0

    def linear_fits(self) -> tuple[LinearFit, ...]:
        """The linear maps that are fitted in closed form (`LayerKind.linear_fits`)."""
        return ()


class LowRank(Identity):
    """A bypassed token x rejoins as `x + norm1(x) A B + b`, where A B has rank `bypass_rank`.

    It starts at the identity, is fitted in closed form after the selector stage (`fit_bypass`), and is trained in
    fine-tuning.
    """

    def __init__(self, config: ViTConfig, spec: LayerSpec, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, spec, rngs=rngs)
        self.rank = config.options_of(BypassOptions).bypass_rank
        self.down = linear(config, config.embed_dim, self.rank, rngs, use_bias=False)
        zeros = nnx.initializers.zeros_init()
        self.up = linear(config, self.rank, config.embed_dim, rngs, kernel_init=zeros)

    def open(
        self, block: Block, tokens: Tokens, selection: Selection, sizes: Sizes = None
    ) -> tuple[Float[Array, "b s d"], Reduction]:
        others = complement(selection)
        missed = gather_tokens(tokens, others)
        moved = missed + self.up(self.down(block.norm1(missed)))
        group = Reduction(selection, before=scatter_tokens(tokens, moved, others))
        return gather_tokens(tokens, selection), group

    def macs(self, spec: LayerSpec) -> int:
        return (spec.count_in - spec.count) * 2 * self.width * self.rank

    def linear_fits(self) -> tuple[LinearFit, ...]:
        """The one map of this bypass: its target is the update that the group makes when it runs densely."""

        def params(down, up, bias):
            return {"bypass/down/kernel": down, "bypass/up/kernel": up, "bypass/up/bias": bias}

        return (LinearFit(self.rank, lambda block, before, after: after - before, params),)


class Shared(Identity):
    """A bypassed token gets the update of the selected token most like it.

    With `bypass_pool` the selected token enters as the mean of the tokens that it stands for; with `bypass_size_bias`
    attention counts it as often as there are. Both are from ToMe (Bolya et al. 2023). Unlike there, the update is added
    to each token, so that tokens stay different from each other.
    """

    def __init__(self, config: ViTConfig, spec: LayerSpec, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, spec, rngs=rngs)
        self.num_prefix_tokens = config.num_prefix_tokens
        self.pool = config.options_of(BypassOptions).bypass_pool

    def open(
        self, block: Block, tokens: Tokens, selection: Selection, sizes: Sizes = None
    ) -> tuple[Float[Array, "b s d"], Reduction]:
        if not self.pool:
            entered = gather_tokens(tokens, selection)
            return entered, Reduction(selection, before=tokens, entered=entered)
        weights = jnp.ones(tokens.shape[:2]) if sizes is None else sizes
        reduction = pooled(selection, jax.lax.stop_gradient(weights))
        entered = reduction.merge(tokens)
        return entered, reduction._replace(before=tokens, entered=entered)

    def match(self, tokens: Tokens, selection: Selection) -> Selection:
        """The selection in which each bypassed token has a representative, the selected one of largest cosine."""
        return with_representatives(tokens, selection, self.num_prefix_tokens)

    def macs(self, spec: LayerSpec) -> int:
        pairs = (spec.count_in - spec.count) * spec.count
        return pairs * self.width * (1 if not self.pool else 2)


BYPASSES: dict[str, type[Identity]] = {"identity": Identity, "low_rank": LowRank, "shared": Shared}
"""By the value of `BypassOptions.bypass`."""
