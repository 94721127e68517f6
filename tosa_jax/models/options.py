"""Options of methods: dataclasses in the methods' own files, read and set by the names of their fields.

A layer kind lists the classes that it reads (`LayerKind.options`), and `models.method.register` declares them. From
then on their fields can be set wherever fields of `ViTConfig` can: in recipes, on the command line, in `create_model`.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tosa_jax.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Options:
    """The base of a method's options: frozen, keyword-only, with a default for every field.

    `__post_init__` of a subclass raises ConfigError for values out of range.
    """

    def check_network(self, config: Any) -> None:
        """Raise a ConfigError if these values do not fit the network of `config`, a `ViTConfig`."""


OPTIONS: dict[str, type[Options]] = {}
"""Every declared option: the name of the field -> the class that it belongs to."""


def declare(options: type[Options]) -> None:
    """Adds the fields of a class to `OPTIONS`. Raises ConfigError for a name that another class has declared."""
    for field in dataclasses.fields(options):
        if OPTIONS.setdefault(field.name, options) is not options:
            raise ConfigError(
                f"{options.__name__} declares the option {field.name!r}, which "
                f"{OPTIONS[field.name].__name__} has declared already; give it another name"
            )


def with_values(options: tuple[Options, ...], values: Mapping[str, Any]) -> tuple[Options, ...]:
    """`options` with new values for some fields; `values` has them by name, each one a key of `OPTIONS`.

    There is one object a class, in the order of the classes' names. A class with all its fields at their defaults has
    none, so that configurations are equal if their options are. Raises ConfigError for values out of range.
    """
    found = {type(one): one for one in options}
    for cls in {OPTIONS[name] for name in values}:
        given = {name: value for name, value in values.items() if OPTIONS[name] is cls}
        found[cls] = dataclasses.replace(found.get(cls, cls()), **given)
    kept = [one for cls, one in found.items() if one != cls()]
    return tuple(sorted(kept, key=lambda one: type(one).__name__))
