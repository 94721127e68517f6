"""DiffRate (Chen et al. 2023, arXiv 2305.17997): counts of each layer that were found by training, read from a file.

After the attention of a layer, patches are ordered by the class token's attention. The least attended are pruned, and
the next ones merge into those of the rest that are most like them. How many, each layer's schedule says: training has
found it once for a network and a cost. For dense prediction, patches that are gone get copies of the token that is
most like them.
"""

import json
from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx

from tosa_jax.errors import ConfigError
from tosa_jax.models.layers import Bias, Block
from tosa_jax.models.method import Method, every_layer
from tosa_jax.models.methods.reducing import ReducingLayer, class_row, sizes_of
from tosa_jax.models.options import Options
from tosa_jax.models.token_state import LayerSpec, TokenState
from tosa_jax.models.vit_config import ViTConfig, check, check_choice
from tosa_jax.ops.array_types import Heads, Scores, Tokens
from tosa_jax.ops.reduction import Reduction, group_totals
from tosa_jax.ops.token_matching import with_nearest
from tosa_jax.ops.token_selection import select_tokens
from tosa_jax.paths import as_path


@dataclass(frozen=True, kw_only=True)
class DiffRateOptions(Options):
    """The schedule: tokens left after each layer of the network, prefix included.

    pruned_to      after pruning; (): none is pruned.
    merged_to      after merging; (): `keep_rate` is the share of the patches that reach a layer which are left.
    """

    pruned_to: tuple[int, ...] = ()
    merged_to: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check(bool(self.merged_to) or not self.pruned_to, "pruned_to needs merged_to beside it")

    def check_network(self, config: ViTConfig) -> None:
        """Raise a ConfigError if a schedule is of another depth than the network of `config`."""
        for name in ("pruned_to", "merged_to"):
            given = getattr(self, name)
            check(len(given) in (0, config.depth),
                  f"{name} is a schedule for {len(given)} layers, but depth={config.depth}")  # fmt: skip

    def counts(self, layer: int, count_in: int) -> tuple[int, int]:
        """Tokens after pruning and after merging, of those `count_in` that reach the layer: never more than before."""
        pruned = min(self.pruned_to[layer], count_in) if self.pruned_to else count_in
        return pruned, min(self.merged_to[layer], pruned)


def read_schedule(path: str, network: str, cost: str) -> dict[str, tuple[int, ...]]:
    """The options for one schedule of a file like DiffRate's `compression_rate.json`.

    path     of the file: `{network: {cost: {"prune_kept_num": "[...]", "merge_kept_num": "[...]"}}}`.
    network  such as "ViT-S-DeiT".
    cost     in GMACs, as the file names it, such as "2.9".

    Raises ConfigError, which names what there is: no such network or cost; or the file is none of this kind.
    """
    try:
        table = json.loads(as_path(path).read_text())
        check_choice(f"a network of {path}", network, table)
        check_choice(f"a cost of {network} in {path}", cost, table[network])
        lists = (table[network][cost][f"{part}_kept_num"] for part in ("prune", "merge"))
        pruned, merged = (tuple(map(int, json.loads(text))) for text in lists)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: no schedule of DiffRate: {error!r}") from error
    return {"pruned_to": pruned, "merged_to": merged}


class DiffRate(ReducingLayer):
    """Prunes and merges as many tokens as the schedule says."""

    options = (DiffRateOptions,)
    reads_class_token = True

    def __init__(self, config: ViTConfig, spec: LayerSpec, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, spec, rngs=rngs)
        options = config.options_of(DiffRateOptions)
        schedule = options.merged_to
        self.pruned = options.counts(spec.layer, spec.count_in)[0] if schedule else spec.count_in

    @classmethod
    def count_left(cls, config: ViTConfig, spec: LayerSpec, keep_rate: float) -> int:
        """As the schedule says, or as `keep_rate` does. Raises ConfigError where the schedule leaves no patch."""
        options = config.options_of(DiffRateOptions)
        if not options.merged_to:
            return super().count_left(config, spec, keep_rate)
        least = config.num_prefix_tokens + 1
        left = options.counts(spec.layer, spec.count_in)[1]
        check(
            left >= least,
            f"merged_to leaves layer {spec.layer} {left} tokens; the least is {least}",
        )
        return left

    def report(self, query: Heads, key: Heads, value: Heads, bias: Bias) -> Scores:
        """The class token's attention, [b n]."""
        return class_row(query, key, bias)

    def reduction(
        self, tokens: Tokens, reported: Scores, state: TokenState
    ) -> tuple[Reduction, Scores]:
        prefix = self.num_prefix_tokens
        kept = select_tokens(reported, self.spec.count, prefix)
        groups, similarity = with_nearest(tokens, kept, prefix)
        stays = select_tokens(reported, self.pruned, prefix).mask
        weights = stays.astype(jnp.float32)
        # A merged token counts in its group's size by how much it is like the group's representative.
        counts = jnp.where(kept.mask, 1.0, similarity) * weights * sizes_of(state)
        reduction = Reduction(
            groups,
            weights,
            totals=group_totals(weights, groups),
            sizes=group_totals(counts, groups),
        )
        return reduction, reported

    def own_macs(self, block: Block) -> int:
        """The class token's row once more, and the comparison of merging tokens with those that stay."""
        if not self.spec.opens:
            return 0
        merging = (self.pruned - self.spec.count) * self.spec.count
        return (self.spec.count_in + 2 * merging) * block.width


METHODS = (
    Method(
        name="diffrate",
        kind=DiffRate,
        label="DiffRate",
        colours=("#8a5a1f", "#d9a866"),
        whole_plan=every_layer,
        equal_gmacs=True,
        fields={"budget": "uniform", "pruned_to": (), "merged_to": (), "scan_layers": False},
    ),
)
