"""Token methods on one pretrained network at equal multiply-adds: how near each one's features are to the dense ones.

Nothing is trained. A row names a method and what differs from its settings as a control: "mctf" or
"mctf:mctf_information=previous,tau_size=0". All rows of a target have its share of the dense network's multiply-adds.
"""

import ast
import bisect
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from tosa_jax.models import cost
from tosa_jax.models.factory import with_budget
from tosa_jax.models.method import METHODS, at_layers, plan_named
from tosa_jax.models.params import set_params, split
from tosa_jax.models.plan import selections
from tosa_jax.models.vit import VisionTransformer
from tosa_jax.models.vit_config import ViTConfig, check, check_choice
from tosa_jax.ops.array_types import Images, Tokens

TOLERANCE = 0.02
"""By how much of a target a row's multiply-adds may differ from it."""

BATCH = 16
"""Images a forward pass."""


class Contender(NamedTuple):
    """One row: its name as it was given, its method, fields of the model, and the layers where it runs.

    layers  (first, last) of the method's layers, counted from 0; None: those of its paper.
    """

    name: str
    method: str
    fields: dict[str, Any]
    layers: tuple[int, int] | None


def contender(text: str) -> Contender:
    """Reads "METHOD" or "METHOD:FIELD=VALUE,...", where the field `layers=4-11` says where the method runs.

    Raises ConfigError: no such method, or no such form. Fields are checked by `solved`.
    """
    method, _, rest = text.partition(":")
    check_choice("--methods", method, METHODS)
    fields: dict[str, Any] = {}
    for part in rest.split(",") if rest else ():
        name, equals, value = part.partition("=")
        check(bool(equals and name and value), f"--methods: {text!r} has {part!r}, not FIELD=VALUE")
        try:
            fields[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            fields[name] = value
    layers = fields.pop("layers", None)
    if layers is None:
        return Contender(text, method, fields, None)
    first, _, last = str(layers).partition("-")
    check(first.isdigit() and last.isdigit(), f"--methods: layers={layers!r} is not FIRST-LAST")
    return Contender(text, method, fields, (int(first), int(last)))


def solved(dense: ViTConfig, row: Contender, share: float) -> ViTConfig:
    """The row's network with `share` of the multiply-adds of `dense`, within `TOLERANCE`.

    Raises ConfigError: it cannot have as many, or a field is unknown or out of range.
    """
    method = METHODS[row.method]
    plan = plan_named(method.plan, dense.depth)
    if row.layers is not None:
        first, last = row.layers
        check(first <= last < dense.depth,
              f"--methods: layers={first}-{last} are not among 0-{dense.depth - 1}")  # fmt: skip
        plan = at_layers(method.plan, dense.depth, range(first, last + 1))
    dense_gmacs = cost.gmacs(dense)
    fields = {**method.fields, **row.fields}
    config = dataclasses.replace(dense, plan=plan, **fields)
    if method.has_budget and "keep_rate" not in row.fields:
        config = _nearest(dataclasses.replace(config, keep_rate=1.0), share * dense_gmacs)
    reached = cost.gmacs(config) / dense_gmacs
    check(abs(reached / share - 1) <= TOLERANCE,
          f"{row.name} has no setting within {TOLERANCE:.0%} of {share:g} of the dense multiply-adds; "
          f"the nearest below has {reached:.3f}")  # fmt: skip
    return config


def _nearest(config: ViTConfig, gmacs: float) -> ViTConfig:
    """The largest `keep_rate` within `gmacs`; where one is for all, the last layers keep a patch more if that fits."""
    found = with_budget(config, gmacs)
    number = len(selections(found))
    if found.budget != "uniform" or number < 2:
        return found
    rate = found.keep_rates_given[0]
    more = min(rate + 1 / found.num_patches, 1.0)

    def raised(count: int) -> ViTConfig:
        rates = (rate,) * (number - count) + (more,) * count
        return dataclasses.replace(found, keep_rate=rates)

    place = bisect.bisect_right(range(number + 1), gmacs, key=lambda k: cost.gmacs(raised(k)))
    return raised(max(place - 1, 0)) if place > 1 else found


def grid_tokens(model: VisionTransformer, images: Images, key: jax.Array | None) -> Tokens:
    """The final tokens [b n d], all of them: those that a method removed come back by its rule for dense prediction."""
    state = model.layers(model.embed(images), key=key, train=False)
    tokens = model.kinds[-1].restore(state).tokens
    return tokens if model.config.global_pool == "avg" else model.norm(tokens)


def features(
    forward: Callable[[Any, np.ndarray], Tokens], params: Any, images: np.ndarray
) -> Float[np.ndarray, "b n d"]:
    """`forward(params, images)`, which is compiled, for all images [b height width c], `BATCH` at a time; float32."""
    jitted = jax.jit(forward)
    parts = [jitted(params, images[i : i + BATCH]) for i in range(0, len(images), BATCH)]
    return np.concatenate([np.asarray(part, np.float32) for part in parts])


def grid_features(model: VisionTransformer, images: np.ndarray) -> Float[np.ndarray, "b n d"]:
    """Final tokens of normalised images [b height width c], as `grid_tokens`; what is drawn comes from key 0."""
    graphdef, params = split(model)

    def forward(params, images):
        return grid_tokens(set_params(graphdef, params), images, jax.random.key(0))

    return features(forward, params, images)


def cosine(
    a: Float[np.ndarray, "b n d"], b: Float[np.ndarray, "b n d"]
) -> Float[np.ndarray, "b n"]:
    """The cosine of each token with the same one of the other network."""
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def closeness(
    tokens: Float[np.ndarray, "b n d"], dense: Float[np.ndarray, "b n d"], config: ViTConfig
) -> dict[str, Float[np.ndarray, " b"]]:
    """For each image the cosine to the dense network's: "class" (with a class token), "patches" (their mean)."""
    near, prefix = cosine(tokens, dense), config.num_prefix_tokens
    found = {"class": near[:, 0]} if config.class_token else {}
    return found | {"patches": near[:, prefix:].mean(axis=1)}


def time_networks(
    configs: dict[str, ViTConfig], batch_size: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Median and interquartile range in ms of a forward pass of each network, interleaved; weights are random."""
    from tosa_jax.performance.benchmark import seconds_of
    from tosa_jax.performance.candidates import candidate

    timed = [candidate(name, None, one, batch_size, train=False) for name, one in configs.items()]
    low, median, high = np.percentile(seconds_of(timed, rounds), [25, 50, 75], axis=0) * 1e3
    return {
        one.name: {"ms": float(median[i]), "ms_iqr": float(high[i] - low[i])}
        for i, one in enumerate(timed)
    }
