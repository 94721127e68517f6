"""Searches how many tokens each layer keeps: the counts whose features are nearest to the dense network's, at a cost.

No labels and no training: what is compared are the final tokens of a few images. The search starts from the better one
of the linear and the uniform schedule of that cost. It then lets one layer keep more tokens and another one fewer, at
the same cost, as long as the error falls; which ones, it learns from trying each layer alone.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tosa_jax.errors import ConfigError
from tosa_jax.models.layer_programs import LayerPrograms, schedule_of
from tosa_jax.models.method import layer_kinds
from tosa_jax.models.plan import layer_specs
from tosa_jax.models.vit import VisionTransformer
from tosa_jax.models.vit_config import STANDARD, ViTConfig, check, check_choice
from tosa_jax.ops.array_types import Images

READ = ("both", "class", "patches")
"""Which final tokens are compared: the class token, the patches, or both with equal weight."""

COSTS = ("gmacs", "time")
"""What a layer costs: multiply-adds, or its time on this device."""

_TRIES = 8
"""Pairs of layers that are tried, the most promising first, before each layer is tried alone again."""

_GRAINS = 32
"""Into so many parts the patches are divided; counts are multiples of one. More mean more programs to compile."""

Counts = tuple[int, ...]
"""Tokens that each selection leaves, prefix included."""


class Found(NamedTuple):
    """What a search found.

    config   the network, with a `keep_rate` for each selection.
    counts   of its selections.
    share    of the cost of the dense network's layers, in (0, 1].
    error    1 - cosine to the dense network's final tokens, mean over images.
    start    error of the schedule that the search started from, and its name.
    trials   schedules that were run.
    seconds  of the search.
    """

    config: ViTConfig
    counts: Counts
    share: float
    error: float
    start: tuple[float, str]
    trials: int
    seconds: float


class BudgetSearch:
    """One network on some images; several shares may be searched for.

    model   with its weights, and a plan with layers that select tokens. Its own `keep_rate` is not read.
    images  float [b height width c], normalised, b at least 1; 16 to 64 images are enough.
    read    one of `READ`. A network without a class token compares patches.
    cost    one of `COSTS`.

    Raises ConfigError: nothing in the plan selects tokens, or it draws them at random.
    """

    def __init__(
        self,
        model: VisionTransformer,
        images: Images,
        *,
        read: str = "both",
        cost: str = "gmacs",
        on_message: Callable[[str], None] = print,
    ) -> None:
        check_choice("read", read, READ)
        check_choice("cost", cost, COSTS)
        self.config = config = model.config
        kinds = [layer_kinds()[name] for name in config.plan]
        check(any(kind.selects for kind in kinds),
              f"the plan {','.join(config.plan)} selects no tokens: there is nothing to search")  # fmt: skip
        specs = layer_specs(dataclasses.replace(config, keep_rate=1.0, budget="uniform"))
        self._selections = [
            i for i, kind in enumerate(kinds) if kind.selects and (kind.nests or specs[i].opens)
        ]
        self._nests = [kinds[i].nests for i in self._selections]
        self._grain = max(1, config.num_patches // _GRAINS)
        self._say = on_message
        self._layers = LayerPrograms(model, images)
        self._cost_of = self._layers.macs if cost == "gmacs" else self._layers.seconds
        dense = schedule_of(dataclasses.replace(config, plan=(STANDARD,) * config.depth))
        self._dense_cost = self._cost_of(dense)
        self._errors: dict[Counts, float] = {}
        truth, prefix = self._layers.tokens(dense), config.num_prefix_tokens

        @jax.jit
        def error(tokens):
            near = (tokens * truth).sum(axis=2)
            near /= jnp.linalg.norm(tokens, axis=2) * jnp.linalg.norm(truth, axis=2)
            of_class, of_patches = near[:, 0].mean(), near[:, prefix:].mean()
            if not config.class_token or read == "patches":
                return 1 - of_patches
            return 1 - (of_class if read == "class" else (of_class + of_patches) / 2)

        self._error_of = error

    def with_counts(self, counts: Counts) -> ViTConfig:
        """The network with these counts."""
        prefix, patches = self.config.num_prefix_tokens, self.config.num_patches
        rates = tuple((count - prefix) / patches for count in counts)
        fields = {"budget": "uniform", "budget_gmacs": 0.0, "count_multiple": 1}
        return dataclasses.replace(self.config, keep_rate=rates, **fields)

    def error(self, counts: Counts) -> float:
        """1 - cosine to the dense network's final tokens, mean over images. Raises ConfigError: unreachable counts."""
        if counts not in self._errors:
            tokens = self._layers.tokens(schedule_of(self.with_counts(counts)))
            self._errors[counts] = float(self._error_of(tokens))
        return self._errors[counts]

    def share(self, counts: Counts) -> float:
        """The cost over that of the dense network's layers. Raises ConfigError: counts that cannot be reached."""
        return self._cost_of(schedule_of(self.with_counts(counts))) / self._dense_cost

    def run(self, share: float) -> Found:
        """The counts for a share in (0, 1) of the cost of the dense network's layers.

        Raises ConfigError: the share is out of range, or this plan cannot reach it.
        """
        check(0 < share < 1, f"share={share} of the dense network's cost is not in (0, 1)")
        begun, tried = time.monotonic(), len(self._errors)
        starts = [(self.error(counts), name, counts) for name, counts in self._starts(share)]
        check(
            bool(starts),
            f"share={share} of the dense network's cost cannot be reached with this plan",
        )
        *start, counts = min(starts)
        for step in (2 * self._grain, self._grain):
            while (better := self._improved(counts, share, step)) != counts:
                counts = better
                said = f"share {self.share(counts):.3f}: error {self.error(counts):.5f}"
                self._say(f"{said}, counts {','.join(map(str, counts))}")
        return Found(
            self.with_counts(counts), counts, self.share(counts), self.error(counts), tuple(start),
            len(self._errors) - tried, time.monotonic() - begun,
        )  # fmt: skip

    def _starts(self, share: float) -> Iterator[tuple[str, Counts]]:
        """The largest linear and uniform schedule within the share, on the grid of counts that the search moves on."""
        prefix, patches = self.config.num_prefix_tokens, self.config.num_patches
        for budget in ("linear", "uniform"):

            def counts(kept: int, budget: str = budget) -> Counts:
                fields = {"keep_rate": kept / patches, "budget": budget, "budget_gmacs": 0.0}
                specs = layer_specs(dataclasses.replace(self.config, **fields))
                found = (specs[i].count - prefix for i in self._selections)
                return tuple(prefix + x // self._grain * self._grain for x in found)

            def fits(kept: int) -> bool:
                try:
                    return self.share(counts(kept)) <= share
                except ConfigError:
                    return False

            # Not all of fewer can be reached: from the dense network down, the first one that fits.
            best = next(filter(fits, range(patches, 0, -1)), None)
            if best is not None:
                yield budget, counts(best)

    def _moved(self, counts: Counts, selection: int, removed: int) -> Counts | None:
        """The counts if one selection leaves so many patches fewer; None where that cannot be.

        A nested selection after it leaves no more than it, one before it no fewer.
        """
        moved = list(counts)
        moved[selection] -= removed
        for i in range(selection + 1, len(moved)):
            if not self._nests[i]:
                break
            moved[i] = min(moved[i], moved[i - 1])
        for i in range(selection, 0, -1):
            if not self._nests[i]:
                break
            moved[i - 1] = max(moved[i - 1], moved[i])
        if not self.config.num_prefix_tokens < moved[selection] <= self.config.num_tokens:
            return None
        try:
            schedule_of(self.with_counts(tuple(moved)))
        except ConfigError:
            return None
        return tuple(moved)

    def _improved(self, counts: Counts, share: float, step: int) -> Counts:
        """Counts of less error within the share, or the same ones."""
        for more, less in itertools.islice(self._pairs(counts, step), _TRIES):
            while (tried := self._exchanged(counts, share, more, less, step)) is not None:
                if self.error(tried) >= self.error(counts):
                    break
                counts = tried
        return counts

    def _pairs(self, counts: Counts, step: int) -> Iterator[tuple[int, int]]:
        """Selections (that keeps more, that keeps fewer), those first by which the error should fall most."""
        gains, losses = {}, {}
        error, cost = self.error(counts), self.share(counts)
        for i in range(len(counts)):
            for removed, found in ((step, losses), (-step, gains)):
                moved = self._moved(counts, i, removed)
                if moved is not None and (saved := cost - self.share(moved)):
                    found[i] = (self.error(moved) - error) / abs(saved)
        rates = {(i, j): gains[i] + losses[j] for i in gains for j in losses if i != j}
        yield from (pair for pair in sorted(rates, key=rates.__getitem__) if rates[pair] < 0)

    def _exchanged(
        self, counts: Counts, share: float, more: int, less: int, step: int
    ) -> Counts | None:
        """Selection `more` keeps `step` patches more, and `less` so many fewer that the cost fits; None: it cannot."""
        moved = self._moved(counts, more, -step)
        while moved is not None and self.share(moved) > share:
            moved = self._moved(moved, less, self._grain)
        return moved
