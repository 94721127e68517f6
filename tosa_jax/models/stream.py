"""What flows from layer to layer, and what a layer kind is.

A method of token reduction is one file in `methods/`: the layer kinds it adds. The network knows none of them: it
runs its blocks in the order of a plan, each through the kind that the plan names.
"""

from typing import Any, NamedTuple, Protocol

import jax
from jaxtyping import Array, Float

from tosa_jax.array_types import Indices, PerExample, Scores, Tokens
from tosa_jax.models.layers import Attend, Block, DropPath
from tosa_jax.token_ops import Selection


class Stream(NamedTuple):
    """The state between two layers; a field that a plan does not use stays None.

    tokens     [b n' d], what the next layer runs on; `n' < n` while a group of selective layers is open.
    summary    what the layer before reports of its attention, because this one needs it.
    selection  the chosen set of the open group.
    bypassed   [b n d], all tokens as they were when the open group chose.
    selected   int32 [b s] a selection made so far: the indices.
    scores     float [b n] a selection made so far: what it chose by.
    aux        per-example scalars that layers report, by name.
    """

    tokens: Tokens
    summary: Any = None
    selection: Selection | None = None
    bypassed: Tokens | None = None
    selected: tuple[Indices, ...] = ()
    scores: tuple[Scores, ...] = ()
    aux: dict[str, PerExample] = {}


class LayerCall(NamedTuple):
    """How a layer is run this time.

    attend     how its attention runs, so that it reports what the next layer needs.
    key        a key of its own, or None where nothing random was asked for.
    drop_path  rate in [0, 1); used only with `train`.
    """

    attend: Attend
    key: jax.Array | None
    drop_path: Float[Array, ""] | float
    train: bool

    def run(self, block: Block, tokens: Tokens) -> tuple[Tokens, Any]:
        """The block on `tokens` [b n d]: the tokens after it, and its summary."""
        drop = DropPath(self.drop_path, self.key) if self.train and self.key is not None else None
        return block(tokens, self.attend, drop)


class LayerKind(Protocol):
    """One way to run a transformer block. An NNX module: it may hold parameters, a selector for instance.

    Built as `Kind(config, layer, rngs=rngs)` by the network for layer number `layer` of its plan, and listed
    under its name in `methods.LAYER_KINDS`. Two class attributes speak of the plan:

    selects   the kind chooses tokens: neighbours of the same kind form a group that shares one choice.
    fit_kind  name of the kind that stands in its place while its own parameters are trained.
    """

    selects: bool
    fit_kind: str

    def num_tokens(self, n: int) -> int:
        """Static count of tokens that the block runs on, of `n`."""

    def macs(self, block: Block, n: int) -> int:
        """Multiply-adds for one example of `n` tokens, the kind's own work included."""

    def needs(self) -> Attend | None:
        """What the layer before has to report: the attention it must run for that, or None."""

    def apply(self, block: Block, stream: Stream, call: LayerCall) -> Stream:
        """Run `block` on the tokens this kind chooses."""

    def restore(self, stream: Stream) -> Stream:
        """Bring the stream back to the full grid, for dense tasks."""
