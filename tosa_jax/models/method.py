"""What a method is: one row that plans, configurations, benchmarks, reports and charts read.

`models/methods/` declares the rows of this package; `register` adds one of your own. Nothing outside a method's file
knows it by name.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tosa_jax.errors import ConfigError
from tosa_jax.models.options import Options, declare
from tosa_jax.models.token_state import LayerKind
from tosa_jax.models.vit_config import STANDARD, ViTConfig, alternate, check, check_choice

DENSE = "dense"
"""Name of the network without any method: every layer is a standard one."""

MAIN = "tosa"
"""Name of the network that a run configures: the row that the controls stand beside."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One method of token reduction. Raises ConfigError for a name that is no lower-case identifier.

    name         in `eval.controls`, `bench --controls`, reports and stages.
    kind         how its layers run.
    plan         what plans call its layers; "": the name.
    label        for tables; "": the name.
    short_label  for charts and legends; "": the label.
    colours      "#rrggbb" on light and on dark paper; (): charts choose.
    control      it may stand beside the main network in `eval.controls`.
    oracle       it knows what a method would have to predict: no benchmark times it.
    needs_key    it draws random numbers: the network must be called with a key.
    every_layer  the plan of this name has no standard layers; else every second layer is standard.
    has_budget   its cost depends on `keep_rate`.
    equal_gmacs  as a control its keep_rate is solved for the GMACs of the main network.
    fields       fields of `ViTConfig` and options that it sets as a control.
    fit_kind     stands in for `kind` in the selector stage, under the plan's name and "_fit"; None: a standard layer.
    """

    name: str
    kind: type[LayerKind]
    plan: str = ""
    label: str = ""
    short_label: str = ""
    colours: tuple[str, ...] = ()
    control: bool = True
    oracle: bool = False
    needs_key: bool = False
    every_layer: bool = False
    has_budget: bool = True
    equal_gmacs: bool = False
    fields: Mapping[str, Any] = field(default_factory=dict)
    fit_kind: type[LayerKind] | None = None

    def __post_init__(self) -> None:
        check(
            re.fullmatch(r"[a-z][a-z0-9_]*", self.name) is not None,
            f"the method name {self.name!r} must be a lower-case identifier",
        )
        for name, default in (("plan", "name"), ("label", "name"), ("short_label", "label")):
            object.__setattr__(self, name, getattr(self, name) or getattr(self, default))

    @property
    def fit_plan(self) -> str:
        """What plans call a layer of it in the selector stage."""
        return STANDARD if self.fit_kind is None else f"{self.plan}_fit"


METHODS: dict[str, Method] = {}
"""Every method by name, in the order of registration."""


def register(*methods: Method) -> None:
    """Adds methods and declares their options.

    Raises ConfigError: a method, a layer kind or an option has a name that is taken.
    """
    for method in methods:
        check(method.name not in METHODS, f"there is already a method {method.name!r}")
        for name in kinds_of(method):
            check(name not in layer_kinds(), f"there is already a layer kind {name!r}")
        for kind in kinds_of(method).values():
            for options in kind.options:
                _declare(options)
        METHODS[method.name] = method


def _declare(options: type[Options]) -> None:
    taken = options.__dataclass_fields__.keys() & ViTConfig.__dataclass_fields__.keys()
    check(
        not taken, f"{options.__name__} declares {min(taken, default='')!r}, a field of ViTConfig"
    )
    declare(options)


def kinds_of(method: Method) -> dict[str, type[LayerKind]]:
    """The layer kinds of one method, by their names in plans."""
    fit = {} if method.fit_kind is None else {method.fit_plan: method.fit_kind}
    return {method.plan: method.kind} | fit


def layer_kinds() -> dict[str, type[LayerKind]]:
    """Every layer kind, by its name in plans."""
    return {name: kind for method in METHODS.values() for name, kind in kinds_of(method).items()}


def method_of(kind: str) -> Method:
    """The method that a plan calls `kind`. Raises ConfigError, naming what is known."""
    check_choice("a layer kind of the plan", kind, layer_kinds())
    return next(method for method in METHODS.values() if kind in kinds_of(method))


def controls(*, timed: bool = False) -> tuple[str, ...]:
    """Names of what may stand beside the main network; with `timed` what a benchmark times there."""
    return tuple(
        name
        for name, method in METHODS.items()
        if method.control and not (timed and (method.oracle or name == DENSE))
    )


def plan_named(kind: str, depth: int) -> tuple[str, ...]:
    """The plan that is meant where only a layer kind is named. Raises ConfigError: there is no such kind."""
    return alternate(kind, depth, 0 if method_of(kind).every_layer else 2)


def control_plan(plan: tuple[str, ...], name: str) -> tuple[str, ...]:
    """The plan of the control `name` beside a network of this plan: its layers stand where that one's methods do."""
    method = METHODS[name]
    if method.every_layer:
        return (method.plan,) * len(plan)
    return tuple(kind if kind == STANDARD else method.plan for kind in plan)


def fitting_plan(plan: tuple[str, ...]) -> tuple[str, ...]:
    """The plan in the selector stage: each layer as its method is fitted."""
    return tuple(method_of(kind).fit_plan for kind in plan)


def is_fitted(plan: tuple[str, ...]) -> bool:
    """Whether any layer of the plan has something to fit in the selector stage."""
    return any(method_of(kind).fit_kind is not None for kind in plan)


def table_order(name: str) -> tuple[int, int]:
    """Where a row stands in a table: dense, methods and controls, oracles, what has no budget, unknown names."""
    if name not in METHODS:
        return 4, 0
    method = METHODS[name]
    group = 0 if name == DENSE else 3 if not method.has_budget else 2 if method.oracle else 1
    return group, list(METHODS).index(name)


def check_key(plan: tuple[str, ...], key: Any) -> None:
    """Raise a ConfigError if a layer of the plan draws random numbers and there is no key."""
    for kind in plan if key is None else ():
        if method_of(kind).needs_key:
            raise ConfigError(
                f"the layer kind {kind!r} draws its tokens: call model(images, key=...)"
            )
