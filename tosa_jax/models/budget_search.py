"""Searches how many tokens each layer keeps: the counts whose features are nearest to the dense network's, at a cost.

No labels and no training: what is compared are the final tokens of a few images. The search starts from the better one
of the linear and the uniform schedule of that cost. It then lets one layer keep more tokens and another one fewer, at
the same cost, as long as the error falls; which ones, it learns from trying each layer alone.
"""

import bisect
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tosa_jax.errors import ConfigError
from tosa_jax.models.layer_programs import LayerPrograms, Schedule, schedule_of
from tosa_jax.models.method import layer_kinds
from tosa_jax.models.plan import keep_rates, layer_specs, selections
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
"""Into so many parts the patches are divided, of which a selection keeps some. More mean more programs to compile."""

Kept = tuple[int, ...]
"""For each selection its keep rate, as a number of the network's patches."""


class Found(NamedTuple):
    """What a search found.

    config   the network, with a `keep_rate` for each selection.
    counts   tokens that each selection leaves, prefix included.
    share    of the cost of the dense network's layers, in (0, 1].
    error    1 - cosine to the dense network's final tokens, mean over images.
    start    error of the schedule that the search started from, and its name.
    trials   schedules that were run.
    seconds  of the search.
    """

    config: ViTConfig
    counts: tuple[int, ...]
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
        self._selections = selections(config)
        self._nests = [kinds[i].nests for i in self._selections]
        self._schedules: dict[Kept, Schedule | None] = {}
        self._grain = max(1, config.num_patches // _GRAINS)
        self._say = on_message
        self._layers = LayerPrograms(model, images)
        self._cost_of = self._layers.macs if cost == "gmacs" else self._layers.seconds
        dense = schedule_of(dataclasses.replace(config, plan=(STANDARD,) * config.depth))
        self._dense_cost = self._cost_of(dense)
        self._errors: dict[Schedule, float] = {}
        self._truth, prefix = self._layers.tokens(dense), config.num_prefix_tokens

        @jax.jit
        def error(tokens, truth):
            near = (tokens * truth).sum(axis=2)
            near /= jnp.linalg.norm(tokens, axis=2) * jnp.linalg.norm(truth, axis=2)
            of_class, of_patches = near[:, 0].mean(), near[:, prefix:].mean()
            if not config.class_token or read == "patches":
                return 1 - of_patches
            return 1 - (of_class if read == "class" else (of_class + of_patches) / 2)

        self._error_of = error

    def with_kept(self, kept: Kept) -> ViTConfig:
        """The network with these keep rates."""
        rates = tuple(x / self.config.num_patches for x in kept)
        fields = {"budget": "uniform", "budget_gmacs": 0.0, "count_multiple": 1}
        return dataclasses.replace(self.config, keep_rate=rates, **fields)

    def counts(self, kept: Kept) -> tuple[int, ...]:
        """Tokens that each selection leaves. Raises ConfigError: keep rates that this plan cannot have."""
        specs = layer_specs(self.with_kept(kept))
        return tuple(specs[i].count for i in self._selections)

    def error(self, kept: Kept) -> float:
        """1 - cosine to the dense network's final tokens, mean over images, for keep rates that the plan can have."""
        schedule = self._schedule(kept)
        assert schedule is not None
        if schedule not in self._errors:
            tokens = self._layers.tokens(schedule)
            self._errors[schedule] = float(self._error_of(tokens, self._truth))
        return self._errors[schedule]

    def share(self, kept: Kept) -> float:
        """The cost over that of the dense network's layers, for keep rates that the plan can have."""
        schedule = self._schedule(kept)
        assert schedule is not None
        return self._cost_of(schedule) / self._dense_cost

    def _schedule(self, kept: Kept) -> Schedule | None:
        """None for keep rates that the plan cannot have."""
        if kept not in self._schedules:
            try:
                found = schedule_of(self.with_kept(kept))
            except ConfigError:
                found = None
            runs = found is not None and self._layers.has_params(found)
            self._schedules[kept] = found if runs else None
        return self._schedules[kept]

    def run(self, share: float) -> Found:
        """The counts for a share in (0, 1) of the cost of the dense network's layers.

        Raises ConfigError: the share is out of range, or this plan cannot reach it.
        """
        check(0 < share < 1, f"share={share} of the dense network's cost is not in (0, 1)")
        begun, tried = time.monotonic(), len(self._errors)
        starts = [(self.error(kept), name, kept) for name, kept in self._starts(share)]
        check(bool(starts),
              f"share={share} of the dense network's cost cannot be reached with this plan")  # fmt: skip
        error, name, kept = min(starts)
        for step in (2 * self._grain, self._grain):
            while (better := self._improved(kept, share, step)) != kept:
                kept = better
                counts = ",".join(map(str, self.counts(kept)))
                self._say(
                    f"share {self.share(kept):.3f}: error {self.error(kept):.5f}, counts {counts}"
                )
        return Found(
            self.with_kept(kept), self.counts(kept), self.share(kept), self.error(kept), (error, name),
            len(self._errors) - tried, time.monotonic() - begun,
        )  # fmt: skip

    def _starts(self, share: float) -> Iterator[tuple[str, Kept]]:
        """The largest linear and uniform schedule within the share, on the grid that the search moves on."""
        falling = range(self.config.num_patches, 0, -1)
        for budget in ("linear", "uniform"):

            def small_enough(patches: int, budget: str = budget) -> bool:
                kept = self._explicit(budget, patches)
                # What cannot be lies below all that can.
                return kept is None or self.share(kept) <= share

            place = bisect.bisect_left(falling, True, key=small_enough)
            kept = self._explicit(budget, falling[place]) if place < len(falling) else None
            if kept is not None:
                yield budget, kept

    def _explicit(self, budget: str, patches: int) -> Kept | None:
        """The keep rates of a schedule that keeps so many patches, or as the mean; rounded down to the grid.

        None: it cannot be.
        """
        rate = patches / self.config.num_patches
        fields = {"keep_rate": rate, "budget": budget, "budget_gmacs": 0.0}
        config = dataclasses.replace(self.config, **fields)
        try:
            specs = layer_specs(config)
        except ConfigError:
            return None
        kept = tuple(specs[i].count - config.num_prefix_tokens for i in self._selections)
        if self._schedule(kept) != schedule_of(config):  # a kind that counts in its own way
            kept = tuple(round(rate * config.num_patches) for rate in keep_rates(config))
        kept = tuple(max(self._grain, x // self._grain * self._grain) for x in kept)
        return None if self._schedule(kept) is None else kept

    def _moved(self, kept: Kept, selection: int, removed: int) -> Kept | None:
        """The keep rates if one selection keeps so many patches fewer; None where that cannot be, or changes nothing.

        If need be, a nested selection after it keeps no more than it, and one before it no fewer.
        """
        moved = list(kept)
        moved[selection] -= removed
        if not 0 < moved[selection] <= self.config.num_patches:
            return None
        alone = tuple(moved)
        for i in range(selection + 1, len(moved)):
            if not self._nests[i]:
                break
            moved[i] = min(moved[i], moved[i - 1])
        for i in range(selection, 0, -1):
            if not self._nests[i]:
                break
            moved[i - 1] = max(moved[i - 1], moved[i])
        for tried in (alone, tuple(moved)):
            if self._schedule(tried) not in (None, self._schedule(kept)):
                return tried
        return None

    def _improved(self, kept: Kept, share: float, step: int) -> Kept:
        """Keep rates of less error within the share, or the same ones."""
        for more, less in itertools.islice(self._exchanges(kept, step), _TRIES):
            while (tried := self._exchanged(kept, share, more, less, step)) is not None:
                if self.error(tried) >= self.error(kept):
                    break
                kept = tried
        return kept

    def _exchanges(self, kept: Kept, step: int) -> Iterator[tuple[int, int]]:
        """Selections (that keeps more, that keeps fewer), those first by which the error should fall most."""
        gains, losses = {}, {}
        error, cost = self.error(kept), self.share(kept)
        for i in range(len(kept)):
            for removed, found in ((step, losses), (-step, gains)):
                moved = self._moved(kept, i, removed)
                if moved is not None and (saved := cost - self.share(moved)):
                    found[i] = (self.error(moved) - error) / abs(saved)
        falls = {(i, j): gains[i] + losses[j] for i in gains for j in losses if i != j}
        yield from (pair for pair in sorted(falls, key=falls.__getitem__) if falls[pair] < 0)

    def _exchanged(self, kept: Kept, share: float, more: int, less: int, step: int) -> Kept | None:
        """Selection `more` keeps `step` patches more, and `less` so many fewer that the cost fits; None: it cannot."""
        moved = self._moved(kept, more, -step)
        while moved is not None and self.share(moved) > share:
            moved = self._moved(moved, less, self._grain)
        return moved
