"""Means with 95 % intervals, and whether two methods that saw the same pictures differ."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy import stats

Interval = tuple[float, float]


def interval(values: Sequence[float] | Float[np.ndarray, " b"]) -> Interval:
    """Where the mean lies in 95 % of 2000 resamples of the values."""
    values = np.asarray(values)
    rows = np.random.default_rng(0).integers(0, len(values), (2000, len(values)))
    low, high = np.percentile(values[rows].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def by_picture(
    values: Float[np.ndarray, " b"], sources: Sequence[object]
) -> Float[np.ndarray, " p"]:
    """Means over the values of each source, in the order in which sources come first.

    Crops of one picture are alike: what is resampled are pictures.
    """
    names = {name: i for i, name in enumerate(dict.fromkeys(sources))}
    place = np.array([names[name] for name in sources])
    return np.bincount(place, values) / np.bincount(place)


def difference(
    ours: Sequence[float] | Float[np.ndarray, " p"],
    theirs: Sequence[float] | Float[np.ndarray, " p"],
) -> tuple[float, Interval]:
    """Mean of ours - theirs, pair by pair, and its interval."""
    pairs = np.asarray(ours) - np.asarray(theirs)
    return float(pairs.mean()), interval(pairs)


def over_seeds(values: Sequence[float]) -> tuple[float, Interval | None]:
    """Mean of few values, one a seed, and its 95 % interval by Student's t; None for a single one."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    return mean, (mean - half, mean + half)


def seeds_record(values: Sequence[float]) -> dict[str, float]:
    """`over_seeds` for a record: "mean", "low" and "high"; of one value only the mean."""
    mean, bounds = over_seeds(values)
    return {"mean": mean} | (dict(zip(("low", "high"), bounds, strict=True)) if bounds else {})


def is_level(bounds: Interval) -> bool:
    """Whether the interval of a difference has 0 in it."""
    return bounds[0] <= 0 <= bounds[1]
