"""Searches how many tokens each layer keeps: the counts whose features are nearest to the dense network's, at a cost.

No labels and no training: what is compared are the final tokens of a few images. A class token has a fraction of the
patches' error, so that in a sum it would hardly count; the error is a product, in which a per cent of either counts
alike. Which tokens merge changes with every count, and with it each image's error, up or down. So a schedule only
counts as better where the error falls by more than chance among the images explains.

Where a method has several settings (`Method.searched`), the one is taken whose linear schedule is the best. Then the
search bends that schedule: after selection i of n, a share of the patches is gone that grows with (i / n) to a power,
which is 1 in the linear schedule and 0 in the uniform one. Only the power is searched for, so that few schedules are
run, and a few images are enough. With `refine` one layer may then keep more tokens and another one fewer,
at the same cost, as long as the error falls; which ones, it learns from trying each layer alone.
"""

import bisect
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence, Set
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from tosa_jax.errors import ConfigError
from tosa_jax.models.cost import macs
from tosa_jax.models.factory import abstract_model
from tosa_jax.models.layer_programs import LayerPrograms, Schedule, schedule_of
from tosa_jax.models.method import METHODS, layer_kinds, method_of
from tosa_jax.models.options import OPTIONS
from tosa_jax.models.plan import layer_specs, selections
from tosa_jax.models.vit import VisionTransformer
from tosa_jax.models.vit_config import STANDARD, ViTConfig, check, check_choice
from tosa_jax.ops.array_types import Images

READ = ("both", "class", "patches")
"""Which final tokens are compared: the class token, the patches, or both, where a per cent of either counts alike."""

COSTS = ("gmacs", "time")
"""What a layer costs: multiply-adds, or its time on this device."""

_BEND = 1.3
"""By this factor the power is changed, as long as that helps. What less would change is hardly ever above chance."""

_TRIES = 8
"""Pairs of layers that are tried in vain, the most promising first, before a search ends."""

_SURE = 1.0
"""By how many of its standard errors over the images an error must fall."""

_GRAINS = 32
"""Into so many parts the patches are divided, of which a selection keeps some. More mean more programs to compile."""

Kept = tuple[int, ...]
"""For each selection its keep rate, as a number of the network's patches."""


Distances = Float[np.ndarray, "p b"]
"""Of each image, for the parts that are compared: the class token, the patches."""


class Found(NamedTuple):
    """What a search found.

    config   the network, with a `keep_rate` for each selection.
    counts   tokens that each selection leaves, prefix included.
    share    of the dense network's cost, in (0, 1].
    error    as `BudgetSearch.error`.
    start    error of the schedule that the search started from, with the settings that the model has, and its name.
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

    `config` is the model's, with the settings that the last `run` took.

    model   with its weights, and a plan with layers that select tokens. Its own `keep_rate` is not read.
    images  float [b height width c], normalised, b at least 1; 16 to 64 images are enough.
    read    one of `READ`. A network without a class token compares patches.
    cost    one of `COSTS`.
    refine  whether layers exchange tokens in the end, which takes some hundred schedules.

    Raises ConfigError: nothing in the plan selects tokens, or it draws them at random.
    """

    def __init__(
        self,
        model: VisionTransformer,
        images: Images,
        *,
        read: str = "both",
        cost: str = "gmacs",
        refine: bool = False,
        on_message: Callable[[str], None] = print,
    ) -> None:
        check_choice("read", read, READ)
        check_choice("cost", cost, COSTS)
        self.config = config = model.config
        kinds = [layer_kinds()[name] for name in config.plan]
        check(any(kind.selects for kind in kinds),
              f"the plan {','.join(config.plan)} selects no tokens: there is nothing to search")  # fmt: skip
        self._settings = _settings(config)
        self._selections = selections(config)
        self._nests = [kinds[i].nests for i in self._selections]
        self._schedules: dict[tuple[ViTConfig, Kept], Schedule | None] = {}
        self._grain = max(1, config.num_patches // _GRAINS)
        self._refine, self._say = refine, on_message
        self._layers = LayerPrograms(model, images)
        self._cost_of = self._layers.macs if cost == "gmacs" else self._layers.seconds
        dense = schedule_of(_dense(config))
        # What the layers do not cost, as patch projection and head: the same in all schedules, and never timed.
        self._beside = 0
        if cost == "gmacs":
            self._beside = macs(abstract_model(_dense(config))) - self._layers.macs(dense)
        self._dense_cost = self._cost_of(dense) + self._beside
        self._distances: dict[Schedule, Distances] = {}
        self._truth, prefix = self._layers.tokens(dense), config.num_prefix_tokens

        @jax.jit
        def distances(tokens, truth):
            unit, true = (x / jnp.linalg.norm(x, axis=2, keepdims=True) for x in (tokens, truth))
            far = jnp.square(unit - true).sum(axis=2)
            parts = [far[:, 0]] if config.class_token and read != "patches" else []
            parts += [far[:, prefix:].mean(axis=1)] if read != "class" or not parts else []
            return jnp.sqrt(jnp.maximum(jnp.stack(parts), 1e-12))  # below that it is rounding

        self._distances_of = distances

    def with_kept(self, kept: Sequence[float], budget: str = "uniform") -> ViTConfig:
        """The network with these keep rates."""
        rates = tuple(x / self.config.num_patches for x in kept)
        fields = {"budget": budget, "budget_gmacs": 0.0, "count_multiple": 1}
        return dataclasses.replace(self.config, keep_rate=rates, **fields)

    def counts(self, kept: Kept) -> tuple[int, ...]:
        """Tokens that each selection leaves. Raises ConfigError: keep rates that this plan cannot have."""
        specs = layer_specs(self.with_kept(kept))
        return tuple(specs[i].count for i in self._selections)

    def distances(self, kept: Kept) -> Distances:
        """How far each image's features are from the dense network's, for keep rates that the plan can have.

        Both have length 1, so that a distance is sqrt(2 - 2 cosine); of patches the root of the mean square.
        """
        schedule = self._schedule(kept)
        assert schedule is not None
        if schedule not in self._distances:
            tokens = self._layers.tokens(schedule)
            found = np.asarray(self._distances_of(tokens, self._truth), np.float64)
            self._distances[schedule] = found
        return self._distances[schedule]

    def error(self, kept: Kept) -> float:
        """The mean distance over images; of class token and patches the geometric mean."""
        return float(np.exp(np.log(self.distances(kept).mean(axis=1)).mean()))

    def _change(self, before: Kept, after: Kept) -> Float[np.ndarray, " b"]:
        """What each image adds to the relative change of the error; their mean is that change."""
        return _relative_change(self.distances(before), self.distances(after))

    def share(self, kept: Kept) -> float:
        """The cost over that of the dense network, for keep rates that the plan can have; of time the layers alone."""
        schedule = self._schedule(kept)
        assert schedule is not None
        return (self._cost_of(schedule) + self._beside) / self._dense_cost

    def _schedule(self, kept: Kept) -> Schedule | None:
        """None for keep rates that the plan cannot have."""
        key = self.config, kept
        if key not in self._schedules:
            try:
                found = schedule_of(self.with_kept(kept))
            except ConfigError:
                found = None
            runs = found is not None and self._layers.has_params(found)
            self._schedules[key] = found if runs else None
        return self._schedules[key]

    def run(self, share: float) -> Found:
        """The counts for a share in (0, 1) of the dense network's cost; that of time is of its layers.

        Raises ConfigError: the share is out of range, or this plan cannot reach it.
        """
        check(0 < share < 1, f"share={share} of the dense network's cost is not in (0, 1)")
        begun, tried = time.monotonic(), len(self._distances)
        self.config = self._settings[0]
        powers = {"linear": 1.0, "uniform": 0.0}
        starts = ((name, self._largest(share, power)) for name, power in powers.items())
        name, kept = next((start for start in starts if start[1] is not None), ("", None))
        check(kept is not None,
              f"share={share} of the dense network's cost cannot be reached with this plan")  # fmt: skip
        assert kept is not None
        start = self.error(kept)
        kept = self._with_settings(kept, share, powers[name])
        if name == "linear":
            kept = self._bent(kept, share)
        for step in (2 * self._grain, self._grain) if self._refine else ():
            kept = self._refined(kept, share, step)
        return Found(
            self.with_kept(kept), self.counts(kept), self.share(kept), self.error(kept), (start, name),
            len(self._distances) - tried, time.monotonic() - begun,
        )  # fmt: skip

    def _with_settings(self, kept: Kept, share: float, power: float) -> Kept:
        """Takes the settings with which the schedule of this power is the best; `kept` is that of the first ones."""
        best, config = self.distances(kept), self.config
        for setting in self._settings[1:]:
            self.config = setting
            tried = self._largest(share, power)
            if tried is not None and _upper(_relative_change(best, self.distances(tried))) < 0:
                best, config, kept = self.distances(tried), setting, tried
                self._tell(kept, f"{_difference(self._settings[0], config)}, ")
        self.config = config
        return kept

    def _bent(self, kept: Kept, share: float) -> Kept:
        """The best one of the linear schedule `kept` and bent ones within the share."""
        power = 1.0
        for factor in (1 / _BEND, _BEND):
            while (tried := self._largest(share, power * factor)) is not None:
                if _upper(self._change(kept, tried)) >= 0:
                    break
                kept, power = tried, power * factor
                self._tell(kept, f"power {power:.2f}, ")
            if power != 1:
                break
        return kept

    def _tell(self, kept: Kept, about: str = "") -> None:
        counts = ",".join(map(str, self.counts(kept)))
        self._say(
            f"share {self.share(kept):.3f}: {about}error {self.error(kept):.5f}, counts {counts}"
        )

    def _largest(self, share: float, power: float) -> Kept | None:
        """The keep rates of the schedule with this power that keeps most within the share; None: none is."""
        gone = range(self.config.num_patches + 1)

        def small_enough(patches: int) -> bool:
            kept = self._explicit(patches, power)
            # What cannot be lies beyond all that can.
            return kept is None or self.share(kept) <= share

        place = bisect.bisect_left(gone, True, key=small_enough)
        return self._explicit(place, power) if place < len(gone) else None

    def _explicit(self, gone: int, power: float) -> Kept | None:
        """The keep rates where `gone` patches are gone in the end; None: they cannot be.

        They are rounded to the grid where the plan can have that: few shapes are few programs.
        """
        patches, number = self.config.num_patches, len(self._selections)
        rates = tuple(1 - gone / patches * ((i + 1) / number) ** power for i in range(number))
        # With "linear" a kind keeps more where it cannot leave as few tokens.
        config = self.with_kept(tuple(max(rate * patches, 1) for rate in rates), "linear")
        try:
            specs = layer_specs(config)
        except ConfigError:
            return None
        kept = tuple(specs[i].count - config.num_prefix_tokens for i in self._selections)
        if self._schedule(kept) != schedule_of(config):  # a kind that counts in its own way
            kept = tuple(round(max(rate * patches, 1)) for rate in rates)
        rounded = tuple(max(1, round(x / self._grain)) * self._grain for x in kept)
        return next((x for x in (rounded, kept) if self._schedule(x) is not None), None)

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

    def _refined(self, kept: Kept, share: float, step: int) -> Kept:
        """Keep rates of less error within the share, or the same ones."""
        losses = {i: self._loss(kept, i, step) for i in range(len(kept))}
        failed: set[tuple[int, int]] = set()
        vain = 0
        while vain < _TRIES and (pair := _most_promising(losses, failed)):
            failed.add(pair)
            begun = kept
            while (tried := self._exchanged(kept, share, *pair, step)) is not None:
                if _upper(self._change(kept, tried)) >= 0:
                    vain += 1
                    break
                kept, vain = tried, 0
            if kept == begun:
                continue
            # The others are not tried alone again: what they promise is only a reason to try a pair.
            losses |= {i: self._loss(kept, i, step) for i in pair}
            failed = {pair}
            self._tell(kept)
        return kept

    def _loss(self, kept: Kept, selection: int, step: int) -> Float[np.ndarray, " b"] | None:
        """The change of the error per share of the cost that one selection saves, by image; None: it has no choice.

        It keeps `step` patches fewer. Only where that cannot be, it keeps as many more, which tells about the same: one
        schedule is run instead of two.
        """
        for removed in (step, -step):
            moved = self._moved(kept, selection, removed)
            if moved is not None and (saved := self.share(kept) - self.share(moved)):
                return self._change(kept, moved) / saved
        return None

    def _exchanged(self, kept: Kept, share: float, more: int, less: int, step: int) -> Kept | None:
        """Selection `more` keeps `step` patches more, and `less` so many fewer that the cost fits; None: it cannot."""
        moved = self._moved(kept, more, -step)
        while moved is not None and self.share(moved) > share:
            moved = self._moved(moved, less, self._grain)
        return moved


def _dense(config: ViTConfig) -> ViTConfig:
    return dataclasses.replace(config, plan=(STANDARD,) * config.depth)


def _settings(config: ViTConfig) -> tuple[ViTConfig, ...]:
    """The network as it is, and with each of the settings that its methods would have searched."""
    methods = {name: METHODS[name] for name in (method_of(kind).name for kind in config.plan)}
    others = [dataclasses.replace(config, **x) for one in methods.values() for x in one.searched]
    return tuple(dict.fromkeys([config, *others]))


def _difference(before: ViTConfig, after: ViTConfig) -> str:
    """The options that differ, as text."""
    return ", ".join(
        f"{x}={getattr(after, x)}" for x in OPTIONS if getattr(before, x) != getattr(after, x)
    )


def _relative_change(old: Distances, new: Distances) -> Float[np.ndarray, " b"]:
    return ((new - old) / old.mean(axis=1, keepdims=True)).mean(axis=0)


def _upper(changes: Float[np.ndarray, " b"]) -> float:
    """What the mean over all images there are stays below, as far as these can tell."""
    count = len(changes)
    spread = changes.std(ddof=1) / count**0.5 if count > 1 else 0.0
    return float(changes.mean() + _SURE * spread)


def _most_promising(
    losses: Mapping[int, Float[np.ndarray, " b"] | None], failed: Set[tuple[int, int]]
) -> tuple[int, int] | None:
    """Selections (that keeps more, that keeps fewer) by which the error should fall most surely; None: by none."""
    falls = {
        (i, j): _upper(less - lost)
        for i, lost in losses.items()
        for j, less in losses.items()
        if i != j and (i, j) not in failed and lost is not None and less is not None
    }
    pair = min(falls, key=falls.__getitem__, default=None)
    return pair if pair is not None and falls[pair] < 0 else None
