"""PPT, Token Pruning and Pooling (Wu et al. 2023, arXiv 2310.01812): each image prunes or merges, as suits it.

After the attention of a few layers, a patch's score is the class token's attention to it times the length of its value,
divided by the sum over patches. Where scores vary little, no patch can be spared, and similar ones merge as in ToMe;
where they vary much, those with the lowest scores are pruned. Both leave as many tokens. For dense prediction, patches
that are gone get copies of the token that they merged into, or of the one that is most like them.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from tosa_jax.models.layers import Bias, Block
from tosa_jax.models.method import Method, at_quarters
from tosa_jax.models.methods.reducing import class_scores, sizes_of
from tosa_jax.models.methods.tome import ToMe
from tosa_jax.models.options import Options
from tosa_jax.models.token_state import LayerSpec, TokenState
from tosa_jax.models.vit_config import ViTConfig, check
from tosa_jax.ops.array_types import Heads, Scores, Tokens
from tosa_jax.ops.reduction import Reduction, group_totals
from tosa_jax.ops.token_matching import bipartite_matching, mean_of_heads, with_nearest
from tosa_jax.ops.token_selection import select_tokens


@dataclass(frozen=True, kw_only=True)
class PPTOptions(Options):
    """ppt_threshold: images whose scores have a smaller variance merge, the others prune; at least 0."""

    ppt_threshold: float = 7e-5

    def __post_init__(self) -> None:
        check(self.ppt_threshold >= 0, f"ppt_threshold={self.ppt_threshold} is negative")


class Report(NamedTuple):
    """What PPT reads of an attention: keys as their mean over heads, and the scores of all tokens."""

    keys: Float[Array, "b n dh"]
    scores: Scores


class PPT(ToMe):
    """Removes as many tokens as ToMe would, in each image by pruning or by merging."""

    options = (*ToMe.options, PPTOptions)
    reads_class_token = True

    def __init__(self, config: ViTConfig, spec: LayerSpec, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, spec, rngs=rngs)
        self.threshold = config.options_of(PPTOptions).ppt_threshold

    def report(self, query: Heads, key: Heads, value: Heads, bias: Bias) -> Report:
        return Report(mean_of_heads(key), class_scores(query, key, value, bias))

    def reduction(
        self, tokens: Tokens, reported: Report, state: TokenState
    ) -> tuple[Reduction, Scores]:
        prefix, count, sizes = self.num_prefix_tokens, self.spec.count, sizes_of(state)
        merging, _ = bipartite_matching(reported.keys, count, prefix, first=prefix % 2)
        pruning = select_tokens(reported.scores, count, prefix)
        pruning, _ = with_nearest(reported.keys, pruning, prefix)
        merges = self.merges(reported.scores)[:, None]
        chosen = jax.tree.map(lambda a, b: jnp.where(merges, a, b), merging, pruning)
        weights = jnp.where(merges | chosen.mask, sizes, 0)
        return Reduction(chosen, weights, sizes=group_totals(weights, chosen)), reported.scores

    def merges(self, scores: Scores) -> Bool[Array, " b"]:
        """Whether each image merges its tokens."""
        patches = scores[:, self.num_prefix_tokens :]
        patches = patches / patches.sum(axis=1, keepdims=True)
        return patches.var(axis=1, ddof=1) < self.threshold

    def own_macs(self, block: Block) -> int:
        """What merging takes, and the class token's row once more."""
        row = self.spec.count_in * block.width if self.spec.opens else 0
        return super().own_macs(block) + row


METHODS = (
    Method(
        name="ppt",
        kind=PPT,
        label="PPT",
        colours=("#7a3b69", "#cf8abd"),
        whole_plan=at_quarters,
        equal_gmacs=True,
        fields={"budget": "linear", "removed": (), "scan_layers": False},
    ),
)
