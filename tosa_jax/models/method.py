"""The table of methods: one row a method, which plans, configurations, benchmarks, reports and charts read.

The files in `models/methods/` declare the rows of this package, and `register` adds one of your own. Nothing outside a
method's file knows the method by name.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from tosa_jax.errors import ConfigError
from tosa_jax.models.options import Options, declare
from tosa_jax.models.token_state import LayerKind
from tosa_jax.models.vit_config import STANDARD, ViTConfig, alternate, check, check_choice

DENSE = "dense"
"""The name of the network without any method, in which every layer is a standard one."""

MAIN = "tosa"
"""The name of the network that a run configures, and that controls are compared with."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One method of token reduction. Raises ConfigError if the name is no lower-case identifier.

    name         what `eval.controls`, `bench --controls`, reports and stages call it.
    kind         how its layers run.
    plan         what plans call its layers; "": the name.
    label        for tables; "": the name.
    short_label  for charts and legends; "": the label.
    colours      "#rrggbb" on light and on dark paper; (): charts choose.
    control      it may stand beside the main network in `eval.controls`.
    oracle       it uses what a method would have to predict, so that no benchmark times it.
    needs_key    it draws random numbers, so that the network must be called with a key.
    free_choice  its layers run as those of the main network do, but choosing tokens costs no time: the benchmark takes
                 the difference between the two for the time of choosing (`selector_overhead`).
    whole_plan   `(plan, depth) ->` the kind of each layer: what its name means as a plan, and as a control. None:
                 every second layer, between standard ones; as a control, the places of layers that are not standard.
    takes_padding  its layers leave padding alone: they neither read it nor choose it before other tokens.
    has_budget   its cost depends on `keep_rate`.
    equal_gmacs  as a control its `keep_rate` is solved for the GMACs of the main network.
    fields       fields of `ViTConfig` and options that it sets as a control, by name.
    searched     settings of its options that a search for a budget tries beside those that are given.
    fit_kind     the kind that runs in place of `kind` in the selector stage; plans call it by the plan's name and
                 "_fit". None: a standard layer.
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
    free_choice: bool = False
    whole_plan: Callable[[str, int], tuple[str, ...]] | None = None
    takes_padding: bool = False
    has_budget: bool = True
    equal_gmacs: bool = False
    fields: Mapping[str, Any] = field(default_factory=dict)
    searched: tuple[Mapping[str, Any], ...] = ()
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
        """What plans call its layers in the selector stage."""
        return STANDARD if self.fit_kind is None else f"{self.plan}_fit"


def every_layer(plan: str, depth: int) -> tuple[str, ...]:
    """A `whole_plan`: all layers."""
    return (plan,) * depth


def at_quarters(plan: str, depth: int) -> tuple[str, ...]:
    """A `whole_plan`: the layers after a quarter, a half and three quarters of the depth: 3, 6 and 9 of twelve."""
    return at_layers(plan, depth, {depth * part // 4 for part in (1, 2, 3)} - {0})


def at_layers(plan: str, depth: int, layers: Collection[int]) -> tuple[str, ...]:
    """The plan whose `layers`, counted from 0, are of the kind `plan`, and all others standard."""
    return tuple(plan if i in layers else STANDARD for i in range(depth))


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
    """The layer kinds of one method, by what plans call them."""
    fit = {} if method.fit_kind is None else {method.fit_plan: method.fit_kind}
    return {method.plan: method.kind} | fit


def layer_kinds() -> dict[str, type[LayerKind]]:
    """Every layer kind, by what plans call it."""
    return {name: kind for method in METHODS.values() for name, kind in kinds_of(method).items()}


def method_of(kind: str) -> Method:
    """The method whose layers plans call `kind`. Raises ConfigError, which names the known ones, if there is none."""
    check_choice("a layer kind of the plan", kind, layer_kinds())
    return next(method for method in METHODS.values() if kind in kinds_of(method))


def controls(*, timed: bool = False) -> tuple[str, ...]:
    """Names of the methods that may stand beside the main network; with `timed`, of those that a benchmark times."""
    return tuple(
        name
        for name, method in METHODS.items()
        if method.control and not (timed and (method.oracle or name == DENSE))
    )


def plan_named(kind: str, depth: int) -> tuple[str, ...]:
    """The plan that the name of a layer kind alone means. Raises ConfigError if there is no such kind."""
    whole_plan = method_of(kind).whole_plan
    return whole_plan(kind, depth) if whole_plan else alternate(kind, depth)


def control_plan(plan: tuple[str, ...], name: str) -> tuple[str, ...]:
    """The plan of the control `name` beside a network with `plan`.

    Layers of the control take the places of all layers that are not standard, or those of its `whole_plan`.
    """
    method = METHODS[name]
    if method.whole_plan:
        return method.whole_plan(method.plan, len(plan))
    return tuple(kind if kind == STANDARD else method.plan for kind in plan)


def fitting_plan(plan: tuple[str, ...]) -> tuple[str, ...]:
    """The plan in the selector stage: each layer is of the kind in which its method is fitted."""
    return tuple(method_of(kind).fit_plan for kind in plan)


def is_fitted(plan: tuple[str, ...]) -> bool:
    """Whether the selector stage has anything to train in a network of this plan."""
    return any(method_of(kind).fit_kind is not None for kind in plan)


def fitted_paths(plan: tuple[str, ...]) -> str:
    """A regular expression of the parameter paths that the selector stage trains in a network of this plan.

    It matches none if no layer has any.
    """
    kinds = layer_kinds()
    modules = dict.fromkeys(module for name in plan for module in kinds[name].fit_modules)
    return rf"^kinds/\d+/({'|'.join(modules)})/" if modules else r"^(?!)"


def table_order(name: str) -> tuple[int, int]:
    """The place of a row in a table: dense, then methods, oracles, methods without a budget, unknown names."""
    if name not in METHODS:
        return 4, 0
    method = METHODS[name]
    group = 0 if name == DENSE else 3 if not method.has_budget else 2 if method.oracle else 1
    return group, list(METHODS).index(name)


def check_key(plan: tuple[str, ...], key: Any) -> None:
    """Raise a ConfigError if a layer of the plan draws random numbers and `key` is None."""
    for kind in plan if key is None else ():
        if method_of(kind).needs_key:
            raise ConfigError(
                f"the layer kind {kind!r} draws its tokens: call model(images, key=...)"
            )
