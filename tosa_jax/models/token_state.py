"""What flows from layer to layer, and what a layer kind is.

A method of token reduction is one file in `methods/`: the layer kinds it adds. The network knows none of them: it
runs its blocks in the order of a plan, each through the kind that the plan names.
"""

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from tosa_jax.errors import ConfigError
from tosa_jax.models.layers import AttentionFn, Block, DropPath, plain_attention
from tosa_jax.models.options import Options
from tosa_jax.models.vit_config import ViTConfig
from tosa_jax.ops.array_types import Indices, PerExample, Scores, Tokens
from tosa_jax.ops.attention import attention
from tosa_jax.ops.reduction import Reduction
from tosa_jax.ops.token_selection import Selection


class TokenState(NamedTuple):
    """The state between two layers; a field that a plan does not use stays empty.

    tokens    [b n' d], what the next layer runs on; `n' < n` while a group is open.
    summary   what the layer before reports of its attention, because this one needs it.
    persisting  the reductions whose tokens stay fewer until `restored_grid`, the first one first.
    open      the reductions that end with their group of layers, the outermost first: a later one chose among the
              tokens that an earlier one left. They come after all that persist.
    selected  int32 [b s] a selection made so far: indices into all n tokens.
    scores    float [b n] a selection made so far: what it chose by; 0 for tokens that it did not see.
    aux       per-example scalars that layers report, by name.
    intermediate  by layer, all tokens [b n d] after the layers that the head reads.
    """

    tokens: Tokens
    summary: Any = None
    persisting: tuple[Reduction, ...] = ()
    open: tuple[Reduction, ...] = ()
    selected: tuple[Indices, ...] = ()
    scores: tuple[Scores, ...] = ()
    aux: dict[str, PerExample] = {}
    intermediate: dict[int, Tokens] = {}

    @property
    def sizes(self) -> Float[Array, "b s"] | None:
        """How many tokens each of `tokens` stands for; None: one."""
        return self._last.sizes if self._last else None

    @property
    def mask(self) -> Bool[Array, "b s"] | None:
        """False for those of `tokens` that no attention may read; None: all are read."""
        return self._last.mask if self._last else None

    @property
    def _last(self) -> Reduction | None:
        return (*self.persisting, *self.open)[-1] if self.persisting or self.open else None

    def opened(
        self, tokens: Tokens, reduction: Reduction, scores: Float[Array, "b m"] | None = None
    ) -> "TokenState":
        """The state after a reduction that ends with its group of layers; the new tokens go on as `tokens`.

        With `scores`, what the choice was made by, it is reported as a selection: every reduction so far must then
        have a `Selection` as its source.
        """
        state = self if scores is None else self._reporting(reduction, scores)
        return state._replace(tokens=tokens, open=(*self.open, reduction))

    def reduced(
        self, tokens: Tokens, reduction: Reduction, scores: Float[Array, "b m"] | None = None
    ) -> "TokenState":
        """The same for a reduction whose tokens stay fewer, also in the layers of other kinds that follow."""
        assert not self.open, "a reduction that persists cannot begin inside a group"
        state = self if scores is None else self._reporting(reduction, scores)
        return state._replace(tokens=tokens, persisting=(*self.persisting, reduction))

    def _reporting(self, reduction: Reduction, scores: Float[Array, "b m"]) -> "TokenState":
        """The state that reports a selection, as indices into all n tokens."""
        sources = [around.source for around in (*self.persisting, *self.open)]
        assert isinstance(reduction.source, Selection)
        chosen = reduction.source.indices
        for source in reversed(sources):
            assert isinstance(source, Selection)
            chosen = jnp.take_along_axis(source.indices, chosen, axis=1)
            seen = jnp.take_along_axis(scores, source.slot, axis=1)
            scores = jnp.where(source.mask, seen, 0)
        return self._replace(selected=(*self.selected, chosen), scores=(*self.scores, scores))

    def restored(self) -> "TokenState":
        """The state with every open reduction ended: as many tokens as the group of layers began with."""
        tokens = self.tokens
        for reduction in reversed(self.open):
            tokens = reduction.restore(tokens)
        return self._replace(tokens=tokens, open=())

    def restored_grid(self) -> "TokenState":
        """The state with all n tokens back in their places, whatever persisted."""
        state = self.restored()
        tokens = state.tokens
        for reduction in reversed(self.persisting):
            tokens = reduction.restore(tokens)
        return state._replace(tokens=tokens, persisting=())


class LayerSpec(NamedTuple):
    """Where a layer stands in its plan, and what that means for its token counts.

    opens      it is the first of a group, and chooses tokens.
    closes     it is the last of a group, after which all tokens rejoin.
    count_group  tokens that reach the first layer of its group, and rejoin after the last.
    count_in   tokens that reach it.
    count      tokens that go on from its choice; `count_in` where nothing is chosen.
    count_out  tokens that the next layer gets.
    """

    layer: int
    opens: bool
    closes: bool
    count_group: int
    count_in: int
    count: int
    count_out: int


class LayerContext(NamedTuple):
    """How a layer is run this time.

    attention_fn  how its attention runs, so that it reports what the next layer needs.
    key        a key of its own, or None where nothing random was asked for.
    drop_path  rate in [0, 1); used only with `train`.
    """

    attention_fn: AttentionFn
    key: jax.Array | None
    drop_path: Float[Array, ""] | float
    train: bool

    @property
    def drop(self) -> DropPath | None:
        """What branches go through, if anything."""
        return DropPath(self.drop_path, self.key) if self.train and self.key is not None else None

    def weighing(
        self, sizes: Float[Array, "b s"] | None, mask: Bool[Array, "b s"] | None
    ) -> "LayerContext":
        """The context in which attention counts a token as often as it stands for others, and leaves masked ones out.

        Raises ConfigError: the next layer reads this one's attention map, which then is not to be had.
        """
        if sizes is None and mask is None:
            return self
        if self.attention_fn is not plain_attention:
            raise ConfigError(
                "the plan has a layer that reads the attention map of merged tokens; put it before the merging ones"
            )
        bias = None if sizes is None else jnp.log(sizes)
        if mask is not None:
            bias = jnp.where(mask, 0.0 if bias is None else bias, jnp.finfo(jnp.float32).min)
        return self._replace(attention_fn=lambda q, k, v: (attention(q, k, v, bias), None))

    def run(self, block: Block, tokens: Tokens) -> tuple[Tokens, Any]:
        """The block on `tokens` [b n d]: the tokens after it, and its summary."""
        return block(tokens, self.attention_fn, self.drop)


class LayerKind(nnx.Module):
    """One way to run a transformer block. An NNX module: it may hold parameters, a selector for instance.

    Built as `Kind(config, spec, rngs=rngs)` by the network for each layer of its plan; a `Method` gives it a name.
    Class attributes speak of the plan:

    selects   the kind chooses tokens: neighbours of the same kind form a group.
    nests     each layer of a group chooses, among what the one before it left; else the group shares one choice.
    proportional  attention counts a token as often as it stands for others.
    options  the dataclasses whose fields the kind reads from the configuration (`ViTConfig.options_of`).
    """

    selects: bool
    nests: bool
    proportional: bool
    options: ClassVar[tuple[type[Options], ...]] = ()
    spec: LayerSpec

    def __init__(self, config: ViTConfig, spec: LayerSpec, *, rngs: nnx.Rngs) -> None:
        self.spec = spec

    @classmethod
    def counted(cls, config: ViTConfig, spec: LayerSpec, keep_rate: float | None) -> LayerSpec:
        """`spec` with the token counts of a layer of this kind; all that it does not know are `count_in` there.

        keep_rate  share of the patches to keep; None where the layer chooses nothing.
        """
        raise NotImplementedError

    @staticmethod
    def build_block(config: ViTConfig, *, rngs: nnx.Rngs) -> Block:
        """The block under `blocks/<layer>`: the transformer layer that released weights fill."""
        return Block(config, rngs=rngs)

    def block_macs(self, block: Block) -> int:
        """Multiply-adds of the block for one example, on the tokens that this kind runs it on."""
        raise NotImplementedError

    def own_macs(self, block: Block) -> int:
        """Multiply-adds of what the kind does beside it: selector, representatives, estimates."""
        raise NotImplementedError

    def selector_macs(self) -> int:
        """Those of them that the selector stage trains: what lies under `kinds/<layer>/selector`."""
        return 0

    def needs(self) -> AttentionFn | None:
        """What the layer before has to report: the attention it must run for that, or None."""
        raise NotImplementedError

    def apply(self, block: Block, state: TokenState, context: LayerContext) -> TokenState:
        """The state after `block` ran on the tokens that this kind chooses."""
        raise NotImplementedError

    def restore(self, state: TokenState) -> TokenState:
        """The state with all n tokens back in their places, for heads that need the grid."""
        raise NotImplementedError
