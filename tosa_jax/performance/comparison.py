"""Token methods on one pretrained network at equal multiply-adds: how near each one's features are to the dense ones.

Nothing is trained. A row names a method and what differs from its settings as a control: "mctf" or
"mctf:mctf_information=previous,tau_size=0". All rows of a target have its share of the dense network's multiply-adds:
a keep rate is solved for it, or a plan file has the counts of its layers ("redundancy:plan=FILE.json").
"""

import ast
import bisect
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from tosa_jax.models import cost
from tosa_jax.models.factory import with_budget
from tosa_jax.models.method import METHODS, at_layers, method_of, plan_named
from tosa_jax.models.params import set_params, split
from tosa_jax.models.plan import selections
from tosa_jax.models.plan_file import read_plan
from tosa_jax.models.vit import VisionTransformer
from tosa_jax.models.vit_config import ViTConfig, check, check_choice
from tosa_jax.ops.array_types import Images, Tokens

TOLERANCE = 0.02
"""By how much of a target a row's multiply-adds may differ from it."""

BATCH = 16
"""Images a forward pass."""


class Contender(NamedTuple):
    """One row: its name as it was given, its method, fields of the model, and the layers where it runs.

    name    a plan file is without its folder in it.
    layers  (first, last) of the method's layers, counted from 0; None: those of its paper.
    plan    path of a plan file, which says how many tokens each layer keeps; {} in it stands for the share. "": none.
    """

    name: str
    method: str
    fields: dict[str, Any]
    layers: tuple[int, int] | None
    plan: str = ""

    def plan_fields(self, share: float) -> dict[str, Any]:
        """The fields of the model in the plan file for a share. Raises ConfigError as `read_plan`."""
        return read_plan(self.plan.replace("{}", f"{share:g}")) if self.plan else {}


def contender(text: str) -> Contender:
    """Reads "METHOD" or "METHOD:FIELD=VALUE,...".

    The field `layers=4-11` says where the method runs, `plan=FILE.json` how many tokens each layer keeps.

    Raises ConfigError: no such method, or no such form. Fields are checked by `solved`.
    """
    method, _, rest = text.partition(":")
    check_choice("--methods", method, METHODS)
    fields: dict[str, Any] = {}
    path = ""
    for part in rest.split(",") if rest else ():
        name, equals, value = part.partition("=")
        check(bool(equals and name and value), f"--methods: {text!r} has {part!r}, not FIELD=VALUE")
        if name == "plan":
            path = value
            text = text.replace(part, f"plan={Path(path).name}")
            continue
        try:
            fields[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            fields[name] = value
    layers = fields.pop("layers", None)
    if layers is None:
        return Contender(text, method, fields, None, path)
    check(not path, f"--methods: {text!r} has layers beside a plan file, which has its own")
    first, _, last = str(layers).partition("-")
    check(first.isdigit() and last.isdigit(), f"--methods: layers={layers!r} is not FIRST-LAST")
    return Contender(text, method, fields, (int(first), int(last)))


def solved(
    dense: ViTConfig, row: Contender, share: float, planned: dict[str, Any] | None = None
) -> ViTConfig:
    """The row's network with `share` of the multiply-adds of `dense`, within `TOLERANCE`.

    planned  what `plan_fields` read before. None: it is read now.

    Raises ConfigError: it cannot have as many, a field is unknown or out of range, or the plan is of another method.
    """
    method = METHODS[row.method]
    planned = row.plan_fields(share) if planned is None else planned
    plan = plan_named(method.plan, dense.depth)
    if row.layers is not None:
        first, last = row.layers
        check(first <= last < dense.depth,
              f"--methods: layers={first}-{last} are not among 0-{dense.depth - 1}")  # fmt: skip
        plan = at_layers(method.plan, dense.depth, range(first, last + 1))
    dense_gmacs = cost.gmacs(dense)
    fields = {"plan": plan, **method.fields, **planned, **row.fields}
    config = dataclasses.replace(dense, **fields)
    kinds = ",".join(dict.fromkeys(config.plan))
    check(method in map(method_of, config.plan), f"{row.name}: the layers of this plan are {kinds}")
    if method.has_budget and "keep_rate" not in fields:
        config = _nearest(dataclasses.replace(config, keep_rate=1.0), share * dense_gmacs)
    reached = cost.gmacs(config) / dense_gmacs
    near = abs(reached / share - 1) <= TOLERANCE
    check(near or not row.plan,
          f"{row.name} has {reached:.3f} of the dense multiply-adds, not {share:g} within {TOLERANCE:.0%}")  # fmt: skip
    check(near,
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
