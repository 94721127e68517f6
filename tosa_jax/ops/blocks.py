"""Runs the blocks of any vision transformer, ours or not, on fewer and fewer tokens: selection by redundancy."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from tosa_jax.errors import ConfigError
from tosa_jax.ops.array_types import Heads, Tokens
from tosa_jax.ops.reduction import pooled
from tosa_jax.ops.rotary import Rotary
from tosa_jax.ops.token_matching import bipartite_matching, least_after_matching, mean_of_heads

Attend = Callable[[Any, Tokens, Float[Array, "b n"], Rotary | None], tuple[Tokens, Heads]]
"""The first half of a block: `(block, tokens, key_bias, rotary) ->` the tokens [b n d] after attention and its
residual, and the keys [b n h c] that were compared. `key_bias` [b n] is to be added to every logit of a key before the
softmax: a token that stands for m counts m times."""


def run_blocks(
    blocks: Sequence[Any],
    tokens: Tokens,
    counts: Sequence[int],
    num_prefix_tokens: int,
    *,
    attend: Attend,
    finish: Callable[[Any, Tokens], Tokens],
    rotary: Rotary | None = None,
) -> Tokens:
    """All tokens [b n d] after the blocks, which ran on fewer of them, as the layers of `plan="redundancy"` do.

    After the attention of a block, the patches whose keys are most like another's leave. The one that represents them
    goes on as the mean of all; after the last block each token gets the updates of its representative.

    blocks   of a network with a residual around attention and one around the MLP.
    tokens   [b n d] before the first block, with their positions, prefix tokens first.
    counts   how many tokens, prefix included, are left by each block; at most half of the patches leave at once.
    attend   the first half of a block, `finish` the second: tokens [b n d] -> those after the MLP and its residual.
    rotary   positions of the n tokens, where a network has them; `attend` gets those of the tokens that are left.

    Raises ConfigError: not one count for each block, or one that is too low or rises.

    Matching is ToMe's (Bolya et al. 2023); there tokens stay merged.
    """
    if len(counts) != len(blocks):
        raise ConfigError(f"{len(counts)} counts for {len(blocks)} blocks: give one for each")
    sizes, groups = jnp.ones(tokens.shape[:2]), []
    for number, (block, count) in enumerate(zip(blocks, counts, strict=True)):
        _check_count(number, count, tokens.shape[1], num_prefix_tokens)
        tokens, keys = attend(block, tokens, jnp.log(sizes), rotary)
        if count < tokens.shape[1]:
            chosen, _ = bipartite_matching(mean_of_heads(keys), count, num_prefix_tokens)
            group = pooled(chosen, sizes)
            entered = group.merge(tokens)
            groups.append(group._replace(before=tokens, entered=entered))
            tokens, sizes = entered, groups[-1].sizes
            rotary = None if rotary is None else group.places(rotary)
        tokens = finish(block, tokens)
    for group in reversed(groups):
        tokens = group.restore(tokens)
    return tokens


def _check_count(block: int, count: int, num_tokens: int, num_prefix_tokens: int) -> None:
    least = least_after_matching(num_tokens, num_prefix_tokens)
    if not least <= count <= num_tokens:
        raise ConfigError(
            f"counts[{block}]={count}, but {num_tokens} tokens reach that block, of which {least} to {num_tokens} can "
            "be left: every second patch leaves at most"
        )
