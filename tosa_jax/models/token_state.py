"""What flows from layer to layer, and what a layer kind is.

A method of token reduction is one file in `methods/`: the layer kinds it adds. The network knows none of them: it
runs its blocks in the order of a plan, each through the kind that the plan names.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tosa_jax.models.layers import AttentionFn, Block, DropPath
from tosa_jax.ops.array_types import Indices, PerExample, Scores, Tokens
from tosa_jax.ops.token_matching import spread_groups
from tosa_jax.ops.token_selection import Selection, scatter_tokens


class TokenGroup(NamedTuple):
    """A choice in force: layers run on the selected tokens until the group is closed and the others rejoin.

    selection  which tokens were chosen.
    bypassed   [b n d], all tokens as they were when the group chose; bypassed ones may have moved on by an estimate.
    entered    [b s d], what the selected ones went in as, where the others share their updates; else None.
    sizes      [b s], how many tokens each selected one stands for, itself included; None: one.
    """

    selection: Selection
    bypassed: Tokens
    entered: Float[Array, "b s d"] | None = None
    sizes: Float[Array, "b s"] | None = None

    def close(self, tokens: Float[Array, "b s d"]) -> Tokens:
        """The full set [b n d] after the selected tokens became `tokens` [b s d]."""
        if self.entered is None:
            return scatter_tokens(self.bypassed, tokens, self.selection)
        return self.bypassed + spread_groups(tokens - self.entered, self.selection)


class TokenState(NamedTuple):
    """The state between two layers; a field that a plan does not use stays empty.

    tokens    [b n' d], what the next layer runs on; `n' < n` while a group is open.
    summary   what the layer before reports of its attention, because this one needs it.
    open      the open groups, the outermost first: a later one chose among the tokens that an earlier one selected.
    selected  int32 [b s] a selection made so far: indices into all n tokens.
    scores    float [b n] a selection made so far: what it chose by; 0 for tokens that it did not see.
    aux       per-example scalars that layers report, by name.
    intermediate  by layer, all tokens [b n d] after the layers that the head reads.
    """

    tokens: Tokens
    summary: Any = None
    open: tuple[TokenGroup, ...] = ()
    selected: tuple[Indices, ...] = ()
    scores: tuple[Scores, ...] = ()
    aux: dict[str, PerExample] = {}
    intermediate: dict[int, Tokens] = {}

    @property
    def sizes(self) -> Float[Array, "b s"] | None:
        """How many tokens each of `tokens` stands for; None: one."""
        return self.open[-1].sizes if self.open else None

    def opened(
        self, tokens: Tokens, group: TokenGroup, scores: Float[Array, "b m"]
    ) -> "TokenState":
        """The state inside `group`, chosen by `scores`, whose selected tokens enter it as `tokens`."""
        chosen = group.selection.indices
        if self.open:
            chosen = jnp.take_along_axis(self.selected[-1], chosen, axis=1)
        for around in reversed(self.open):
            seen = jnp.take_along_axis(scores, around.selection.slot, axis=1)
            scores = jnp.where(around.selection.mask, seen, 0)
        return self._replace(
            tokens=tokens,
            open=(*self.open, group),
            selected=(*self.selected, chosen),
            scores=(*self.scores, scores),
        )

    def restored(self) -> "TokenState":
        """The state with every group closed: all n tokens."""
        tokens = self.tokens
        for group in reversed(self.open):
            tokens = group.close(tokens)
        return self._replace(tokens=tokens, open=())


class LayerSpec(NamedTuple):
    """Where a layer stands in its plan, and what that means for its token counts.

    opens      it is the first of a group, and chooses tokens.
    closes     it is the last of a group, after which all tokens rejoin.
    count_in   tokens that reach it.
    count      tokens that its group selects; `count_in` where nothing is chosen.
    """

    layer: int
    opens: bool
    closes: bool
    count_in: int
    count: int


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

    def run(self, block: Block, tokens: Tokens) -> tuple[Tokens, Any]:
        """The block on `tokens` [b n d]: the tokens after it, and its summary."""
        return block(tokens, self.attention_fn, self.drop)


class LayerKind(Protocol):
    """One way to run a transformer block. An NNX module: it may hold parameters, a selector for instance.

    Built as `Kind(config, spec, rngs=rngs)` by the network for each layer of its plan, and listed under its name in
    `methods.LAYER_KINDS`. Class attributes speak of the plan:

    selects   the kind chooses tokens: neighbours of the same kind form a group.
    nests     each layer of a group chooses, among what the one before it left; else the group shares one choice.
    fit_kind  name of the kind that stands in its place while its own parameters are trained.
    """

    selects: bool
    nests: bool
    fit_kind: str

    def block_macs(self, block: Block) -> int:
        """Multiply-adds of the block for one example, on the tokens that this kind runs it on."""

    def own_macs(self, block: Block) -> int:
        """Multiply-adds of what the kind does beside it: selector, representatives, estimates."""

    def needs(self) -> AttentionFn | None:
        """What the layer before has to report: the attention it must run for that, or None."""

    def apply(self, block: Block, state: TokenState, context: LayerContext) -> TokenState:
        """Run `block` on the tokens this kind chooses."""

    def restore(self, state: TokenState) -> TokenState:
        """Bring the state back to the full grid, for dense tasks."""
