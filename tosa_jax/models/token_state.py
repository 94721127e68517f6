"""The state that goes from layer to layer (`TokenState`), and the base class of all layer kinds (`LayerKind`).

A method of token reduction is one file in `methods/`, which declares layer kinds. The network knows none of them by
name: it runs its blocks in the order of a plan, each through the kind that the plan names.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from tosa_jax.errors import ConfigError
from tosa_jax.models.layers import (
    UNREAD,
    AttentionFn,
    Bias,
    Block,
    DropPath,
    log_counts,
    plain_attention,
)
from tosa_jax.models.options import Options
from tosa_jax.models.vit_config import ViTConfig
from tosa_jax.ops.array_types import (
    Indices,
    Keys,
    PerExample,
    Present,
    Queries,
    Scores,
    Tokens,
)
from tosa_jax.ops.attention import attention, attention_logits
from tosa_jax.ops.reduction import Reduction, TokenWeights
from tosa_jax.ops.rotary import Rotary

Labels = Float[Array, "b m 1"]
"""Of each token one number."""

Mask = Bool[Array, "b s"] | Float[Array, "b s"] | None
"""Which tokens attention may read: booleans, or 1 and 0 with a gradient; None: all."""


class WithMap(NamedTuple):
    """What attention reports where labels travel with tokens.

    summary   what it reports otherwise.
    mean_map  float32 [b q k], its map, mean over heads.
    """

    summary: Any
    mean_map: Float[Array, "b q k"]


class TokenState(NamedTuple):
    """The state between two layers. A field that no layer of the plan uses stays empty.

    tokens         float [b m d], what the next layer runs on; m < n while a reduction is in force.
    summary        what the layer before reports of its attention, in the form that this layer asked for (`needs`).
    persisting     the reductions whose tokens stay fewer in all later layers, the oldest first.
    open           the reductions that end with their group of layers, the oldest first. Each one works on the tokens
                   that the ones before it left, and those that persist come before all of these.
    selected       for each selection so far int32 [b s], indices into all n tokens.
    scores         for each selection so far float [b n], the scores that it chose by; 0 for tokens it did not see.
    aux            scalars [b] that layers report, by name.
    intermediate   for each layer that the head reads, by its number: all tokens [b n d] after that layer.
    attention_map  float [b h m m], rows sum to 1: the map of an earlier layer, for later layers to use in place of one
                   of their own (`shared_map`). A kind hands it on in `apply`; a change of the tokens ends it.
    policy         float [b m], 1 for tokens that later layers read and 0 for others: a choice in training, which a
                   gradient passes through. None: all are read. The tokens stay as many as they were.
    grid_rotary    rotary positions of all n tokens; None: the network has none. `rotary` has those of `tokens`.
    grid_present   bool [b n], false for those of all n tokens that are padding, which no token reads and no layer
                   selects before others; None: there is none. `present` has those of `tokens`.
    labels         float [b m 1] in [0, 1], a label of each token, which goes where the token goes and is mixed as
                   attention mixes tokens (`attended`); None: tokens have none.
    """

    tokens: Tokens
    summary: Any = None
    persisting: tuple[Reduction, ...] = ()
    open: tuple[Reduction, ...] = ()
    selected: tuple[Indices, ...] = ()
    scores: tuple[Scores, ...] = ()
    aux: dict[str, PerExample] = {}
    intermediate: dict[int, Tokens] = {}
    attention_map: Float[Array, "b h m m"] | None = None
    policy: Float[Array, "b m"] | None = None
    grid_rotary: Rotary | None = None
    grid_present: Present | None = None
    labels: Labels | None = None

    @property
    def shared_map(self) -> Float[Array, "b h m m"]:
        """The attention map of an earlier layer on the same tokens. Raises ConfigError if no layer handed one on."""
        if self.attention_map is None:
            raise ConfigError(
                "the plan has a layer that uses the attention map of an earlier one, but no earlier layer hands on a "
                "map of the same tokens; put one that does before it, in the same repeated part under scan_layers"
            )
        return self.attention_map

    @property
    def sizes(self) -> Float[Array, "b s"] | None:
        """How many of the original tokens each of `tokens` stands for, [b s]; None: one each."""
        return self._last.sizes if self._last else None

    @property
    def mask(self) -> Mask:
        """Which of `tokens` attention may read: booleans [b s], or `policy`; None: all."""
        if self.policy is not None:
            return self.policy
        return self._last.mask if self._last else self.grid_present

    @property
    def weights(self) -> Float[Array, "b s"] | None:
        """How much each of `tokens` counts in a mean over all, as `how_often` says; None: all the same."""
        return how_often(self.sizes, self.mask)

    @property
    def rotary(self) -> Rotary | None:
        """Rotary positions of `tokens`, for the block that runs on them: they go where the tokens go. None: none."""
        return self._last.rotary if self._last else self.grid_rotary

    @property
    def present(self) -> Present | None:
        """Which of `tokens` are no padding, [b s]; None: there is none."""
        if self.grid_present is None or not self._last:
            return self.grid_present
        return self._last.mask

    @property
    def counts(self) -> Float[Array, "b s"] | None:
        """`sizes`, and 0 for padding; None: one each."""
        return how_often(self.sizes, self.present)

    def past_padding(self, scores: Float[Array, "b m"], value: float) -> Float[Array, "b m"]:
        """Scores [b m] of `tokens`, with `value` for padding."""
        return scores if self.present is None else jnp.where(self.present, scores, value)

    def _placed(self, reduction: Reduction) -> Reduction:
        """The reduction with the rotary positions of its tokens, and a mask that is false for padding."""
        if self.policy is not None:
            raise ConfigError(
                "the plan has a layer that reduces tokens after one that masks them in training; use one method alone"
            )
        rotary = None if self.rotary is None else reduction.places(self.rotary)
        mask = reduction.mask
        if self.present is not None:
            present = reduction.present(self.present)
            mask = present if mask is None else mask & present
        return reduction._replace(rotary=rotary, labels=self.labels, mask=mask)

    def _merged_labels(self, reduction: Reduction) -> Labels | None:
        """Labels of the new tokens: means, also where the tokens themselves become sums, as EViT's fused one does."""
        if self.labels is None:
            return None
        merged, total = map(reduction.merge, (self.labels, jnp.ones_like(self.labels)))
        return jax.lax.stop_gradient(merged / jnp.maximum(total, UNREAD))

    def attended(
        self, tokens: Float[Array, "b q d"], summary: Any, keys: Labels | None = None
    ) -> "TokenState":
        """The state after attention that gave `tokens` [b q d] and reported `summary`.

        Labels are mixed as in TL-Align (Xiao et al. 2022, arXiv 2210.06455): a label becomes the mean of itself and of
        those that the mean map of the heads mixes for its token.

        keys  labels of the tokens that were read, where they are not those of the state.
        """
        if self.labels is None:
            return self._replace(tokens=tokens, summary=summary)
        read = self.labels if keys is None else keys
        found = jnp.einsum("bqk,bkl->bql", summary.mean_map, read, precision="highest")
        labels = (self.labels[:, : found.shape[1]] + found) / 2
        return self._replace(
            tokens=tokens, summary=summary.summary, labels=labels[:, : tokens.shape[1]]
        )

    @property
    def _last(self) -> Reduction | None:
        return (*self.persisting, *self.open)[-1] if self.persisting or self.open else None

    def opened(
        self, tokens: Tokens, reduction: Reduction, scores: Float[Array, "b m"] | None = None
    ) -> "TokenState":
        """The state after a reduction that ends with its group of layers.

        tokens  float [b s d], the new tokens.
        scores  float [b m], what the old tokens were chosen by, or None. If given, the reduction is reported as a
                selection of the tokens that represent the new ones.
        """
        state = self if scores is None else self.reporting(reduction, scores)
        opened = (*self.open, self._placed(reduction))
        return state._replace(
            tokens=tokens, open=opened, attention_map=None, labels=self._merged_labels(reduction)
        )

    def reduced(
        self, tokens: Tokens, reduction: Reduction, scores: Float[Array, "b m"] | None = None
    ) -> "TokenState":
        """The state after a reduction whose tokens stay fewer in all later layers. Arguments are those of `opened`."""
        assert not self.open, "a reduction that persists cannot begin inside a group"
        state = self if scores is None else self.reporting(reduction, scores)
        persisting = (*self.persisting, self._placed(reduction))
        labels = self._merged_labels(reduction)
        return state._replace(
            tokens=tokens, persisting=persisting, attention_map=None, labels=labels
        )

    def reporting(self, reduction: Reduction, scores: Float[Array, "b m"]) -> "TokenState":
        """The state that reports one more selection, as indices into all n tokens."""
        chosen = reduction.representatives()
        for around in reversed((*self.persisting, *self.open)):
            chosen = jnp.take_along_axis(around.representatives(), chosen, axis=1)
            scores = around.scores_before(scores)
        if isinstance(reduction.source, TokenWeights):
            chosen = jnp.sort(chosen, axis=1)
        return self._replace(selected=(*self.selected, chosen), scores=(*self.scores, scores))

    def restored(self) -> "TokenState":
        """The state with every open reduction ended. It has as many tokens as its group of layers began with."""
        if not self.open:
            return self
        return self._after(reversed(self.open))._replace(open=())

    def cut_off(self) -> "TokenState":
        """The state after a layer that worked out the first tokens alone: no reduction is left to end."""
        count = self.tokens.shape[1]
        policy = None if self.policy is None else self.policy[:, :count]
        present = None if self.grid_present is None else self.grid_present[:, :count]
        return self._replace(open=(), persisting=(), policy=policy, grid_present=present)

    def restored_grid(self) -> "TokenState":
        """The state with all n tokens back in their places: every reduction has ended, persisting ones too."""
        state = self.restored()
        if not self.persisting:
            return state
        return state._after(reversed(self.persisting))._replace(persisting=())

    def _after(self, ending: Iterable[Reduction]) -> "TokenState":
        """The state whose tokens and labels went back through the reductions, the newest first."""
        tokens, labels = self.tokens, self.labels
        for reduction in ending:
            tokens = reduction.restore(tokens)
            labels = None if labels is None else reduction.restore_labels(labels)
        return self._replace(tokens=tokens, labels=labels, attention_map=None)


class LinearFit(NamedTuple):
    """A linear map in a layer kind that is fitted in closed form after the selector stage (`bypass_fit`).

    It reads the normalised tokens at the start of a group of layers, float [b n d], and predicts a target.

    rank    of the map, at least 1.
    target  `(block, before, after) -> float [b n e]`: what the map has to predict. `block` is the first of the group,
            `before` and `after` are the tokens [b n d] before and after the group when the network runs densely.
    params  `(down [d rank], up [rank e], bias [e]) -> parameters`: the fitted map as parameters of the kind, by path
            below `kinds/<layer>/`.
    """

    rank: int
    target: Callable[[Block, Tokens, Tokens], Float[Array, "b n e"]]
    params: Callable[[np.ndarray, np.ndarray, np.ndarray], Mapping[str, np.ndarray]]


class LayerSpec(NamedTuple):
    """Where a layer stands in its plan, and how many tokens, prefix included, it works on.

    layer        its number, from 0.
    opens        it is the first of a group and chooses tokens.
    closes       it is the last of a group, after which all tokens rejoin.
    count_group  tokens that reach the first layer of its group, and rejoin after the last one.
    count_in     tokens that reach the layer.
    count        tokens that are left by its choice; `count_in` if it chooses nothing.
    count_out    tokens that the next layer gets.
    """

    layer: int
    opens: bool
    closes: bool
    count_group: int
    count_in: int
    count: int
    count_out: int


def how_often(sizes: Float[Array, "b s"] | None, mask: Mask) -> Float[Array, "b s"] | None:
    """How often each token counts beside others, float32: its size, 0 where the mask leaves it out; None: once.

    One that a mask with a gradient leaves out counts `UNREAD`. Arguments are those of `LayerContext.weighing`.
    """
    if mask is None:
        return sizes
    read = mask.astype(jnp.float32) + (0.0 if mask.dtype == bool else UNREAD)
    return read if sizes is None else sizes * read


def key_bias(sizes: Float[Array, "b s"] | None, mask: Mask) -> Float[Array, "b s"] | None:
    """What is added to the attention logits of tokens as keys, float32; None: nothing.

    A token that stands for several counts as often as a key (ToMe's proportional attention), one that the mask leaves
    out not at all. Arguments are those of `LayerContext.weighing`.
    """
    counts = how_often(sizes, mask)
    return None if counts is None else log_counts(counts)


class LayerContext(NamedTuple):
    """What one run of a layer gets beside its tokens.

    attention_fn  the attention that the layer must run. It reports what the next layer needs.
    key           the layer's own random key, or one an example; None: the network was called without a key.
    drop_path     rate in [0, 1), used only with `train`; None: there is none.
    train         whether the network is being trained.
    read          how many of the first tokens are read after this layer, which then is the last one; None: all. A kind
                  may return these alone; it need not.
    aligns        whether labels travel with the tokens, so that `attend` reports its map too.
    key_bias      what is added to the attention logits of each key (`weighing`); None: nothing.
    """

    attention_fn: AttentionFn
    key: jax.Array | None
    drop_path: Float[Array, ""] | float | None
    train: bool
    read: int | None = None
    aligns: bool = False
    key_bias: Bias = None

    @property
    def attend(self) -> AttentionFn:
        """`attention_fn` as blocks run it. Where labels travel, it reports a `WithMap`, for `TokenState.attended`."""
        return self._with_map if self.aligns else self.attention_fn

    def _with_map(self, query: Queries, key: Keys, value: Keys) -> tuple[Queries, WithMap]:
        out, summary = self.attention_fn(query, key, value)
        query, key = jax.lax.stop_gradient((query, key))
        logits = attention_logits(query, key)
        if self.key_bias is not None:
            logits += jax.lax.stop_gradient(self.key_bias)[:, None, None]
        return out, WithMap(summary, jax.nn.softmax(logits, axis=-1).mean(axis=1))

    @property
    def drop(self) -> DropPath | None:
        """The drop path that the block's branches go through; None: they go through none."""
        if not self.train or self.drop_path is None or self.key is None:
            return None
        return DropPath(self.drop_path, self.key)

    def weighing(self, sizes: Float[Array, "b s"] | None, mask: Mask) -> "LayerContext":
        """The context whose attention weighs tokens by their number and reads no masked ones.

        sizes  [b s], how many tokens each one stands for: it counts that often as a key (ToMe's proportional
               attention). None: once.
        mask   [b s], false or 0 for tokens that must not be read. None: all are read.

        Raises ConfigError if the next layer reads this layer's attention by a function that takes no `key_bias`.
        """
        if sizes is None and mask is None:
            return self
        bias, read = key_bias(sizes, mask), self.attention_fn
        if read is plain_attention:
            return self._replace(
                attention_fn=lambda q, k, v: (attention(q, k, v, bias), None), key_bias=bias
            )
        if "key_bias" not in inspect.signature(read).parameters:
            raise ConfigError(
                "the plan has a layer that reads the attention map of merged tokens or of padding; put it before the "
                "merging ones, and give it images without padding"
            )
        fields: dict[str, Any] = {"key_bias": bias}
        return self._replace(attention_fn=functools.partial(read, **fields), key_bias=bias)

    def run(
        self, block: Block, tokens: Tokens, rotary: Rotary | None = None
    ) -> tuple[Float[Array, "b m d"], Any]:
        """Runs the block on `tokens` [b n d]: the tokens after it, and what `attend` reports.

        With `read` these are the first `read` tokens. `rotary` are the tokens' rotary positions (`TokenState.rotary`),
        which a network that has some needs.
        """
        fields: dict[str, Any] = {} if rotary is None else {"rotary": rotary}
        if self.read is None:
            return block(tokens, self.attend, self.drop, **fields)
        if type(block).__call__ is Block.__call__:
            return block(tokens, self.attend, self.drop, read=self.read, **fields)
        after, summary = block(tokens, self.attend, self.drop, **fields)  # a method's own block
        return after[:, : self.read], summary


class LayerKind(nnx.Module):
    """One way to run a transformer block. Methods subclass it, most of them through `methods.standard.Standard`.

    The network builds `Kind(config, spec, rngs=rngs)` for each layer of its plan; a `Method` gives the kind its name in
    plans. It is an NNX module and may hold parameters, which then lie under `kinds/<layer>/`.

    Class attributes:

    selects       the kind chooses tokens. Neighbouring layers of one kind that selects form a group.
    nests         each layer of a group chooses among the tokens that the one before it left; otherwise the first layer
                  chooses for the whole group.
    proportional  attention counts a token as often as it stands for others (ToMe).
    options       the dataclasses that the kind reads from the configuration with `ViTConfig.options_of`.
    fit_modules   names of its modules that the selector stage trains, and fine-tuning leaves as they are.
    """

    selects: bool
    nests: bool
    proportional: bool
    options: ClassVar[tuple[type[Options], ...]] = ()
    fit_modules: ClassVar[tuple[str, ...]] = ()
    spec: LayerSpec

    def __init__(self, config: ViTConfig, spec: LayerSpec, *, rngs: nnx.Rngs) -> None:
        self.spec = spec

    @classmethod
    def counted(cls, config: ViTConfig, spec: LayerSpec, keep_rate: float | None) -> LayerSpec:
        """`spec` with the token counts of a layer of this kind. On entry all counts but `count_group` are `count_in`.

        keep_rate  the share of all patches to keep, in (0, 1]; None: the layer chooses nothing.

        Raises ConfigError if the kind cannot reach that count.
        """
        raise NotImplementedError

    @staticmethod
    def build_block(config: ViTConfig, *, rngs: nnx.Rngs) -> Block:
        """The block under `blocks/<layer>`: the transformer layer whose parameters released weights have."""
        return Block(config, rngs=rngs)

    def block_macs(self, block: Block) -> int:
        """Multiply-adds of the block for one example, on the tokens that this kind runs it on."""
        raise NotImplementedError

    def own_macs(self, block: Block) -> int:
        """Multiply-adds of everything else that the kind does for one example: selectors, matching, estimates."""
        raise NotImplementedError

    def selector_macs(self) -> int:
        """The part of `own_macs` that is spent in `fit_modules`."""
        return 0

    def needs(self) -> AttentionFn | None:
        """The attention function that the layer before has to run, whose report this layer reads; None: any will do."""
        raise NotImplementedError

    def apply(self, block: Block, state: TokenState, context: LayerContext) -> TokenState:
        """Runs the layer: the state after it."""
        raise NotImplementedError

    def restore(self, state: TokenState) -> TokenState:
        """The state with all n tokens back in their places, for heads that read the grid of patches."""
        raise NotImplementedError

    def linear_fits(self) -> tuple[LinearFit, ...]:
        """The linear maps that are fitted after the selector stage, in order: each target may use the maps before."""
        return ()
