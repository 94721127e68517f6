"""Plan files: a plan with the tokens that each of its selections keeps, as `python -m tosa_jax.budget` finds them.

`create_model(name, plan="FILE.json")`, recipes (`model.plan`) and `predict --plan` read them. Keep rates are shares of
the patches, so that a file serves other image sizes too.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tosa_jax.errors import ConfigError
from tosa_jax.models.options import OPTIONS
from tosa_jax.models.vit_config import ViTConfig
from tosa_jax.paths import parse_json, write_atomically

SUFFIX = ".json"
"""How the name of a plan file ends; the name of a layer kind never does."""

_FORMAT, _VERSION = "tosa_jax plan", 1
_OWN = ("plan", "keep_rate", "budget")


def write_plan(path: Path, config: ViTConfig, facts: Mapping[str, Any]) -> None:
    """Writes the plan of a configuration, its keep rates and its methods' options; `facts` (JSON) stand beside them."""
    plain = type(config)()
    options = {name for name in OPTIONS if getattr(config, name) != getattr(plain, name)}
    fields = {name: getattr(config, name) for name in (*_OWN, *sorted(options))}
    said = {"format": _FORMAT, "version": _VERSION, "fields": fields, **facts}
    write_atomically(path, (json.dumps(said, indent=1) + "\n").encode())


def read_plan(path: str | Path) -> dict[str, Any]:
    """The fields of `ViTConfig` in a plan file.

    Raises ConfigError: there is no such file, or it is no plan file that this version reads.
    """
    path = Path(path).expanduser()
    try:
        said = parse_json(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"plan={str(path)!r} cannot be read: {error}") from error
    known = {*_OWN, *OPTIONS}
    if not isinstance(said, dict) or said.get("format") != _FORMAT:
        raise ConfigError(f"{path} is no plan file: python -m tosa_jax.budget writes those")
    fields = said.get("fields")
    if said.get("version") != _VERSION or not isinstance(fields, dict) or fields.keys() - known:
        raise ConfigError(f"{path} is a plan file of another version of tosa_jax: make it again")
    return from_json(fields) | {"budget_gmacs": 0.0}  # the keep rates are known


def from_json(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a configuration that were written as JSON, where its tuples are lists."""
    return {name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()}
