"""A run as JSON: written into its work directory, read again, and compared with another's field by field."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from tosa_jax.config import SECTIONS, RunConfig, build_section
from tosa_jax.data.pipeline import DataConfig
from tosa_jax.errors import ConfigError
from tosa_jax.models.networks import NETWORKS
from tosa_jax.models.vit_config import check_choice
from tosa_jax.tasks import TASKS

MAY_CHANGE = {
    "accumulate",
    "log_steps",
    "profile_steps",
    "mesh",
    "eval.batch_size",
    "eval.figure_images",
    "data.data_dir",
    "data.source_dir",
    "data.workers",
    "data.prefetch_batches",
    "data.prefetch_mib",
    "data.in_memory",
}
"""Fields that do not change what is trained: a run may go on with other values of them."""


def to_json(run: RunConfig) -> dict[str, Any]:
    """The run as plain JSON values, in sections."""
    values = dataclasses.asdict(run)
    values["model"] |= {name: str(values["model"][name]) for name in ("dtype", "param_dtype")}
    return values


def from_json(values: Mapping[str, Any]) -> RunConfig:
    """The run that `to_json` wrote; fields that it does not have take their defaults.

    Raises ConfigError for values that this version does not know.
    """
    rest = dict(values)
    task = rest.get("task", "classification")
    check_choice("task", task, TASKS)
    sections = SECTIONS | {"model": NETWORKS[task].config_class, "data": DataConfig}
    sections |= {"options": TASKS[task].options}
    try:
        built = {
            name: build_section(cls, name, as_tuples(rest.pop(name, {})))
            for name, cls in sections.items()
        }
        return RunConfig(**built, **rest)
    except TypeError as error:
        raise ConfigError(f"config.json is of another version of tosa_jax: {error}") from error


def as_tuples(value: Any) -> Any:
    """A JSON value with tuples for its lists, which is what configurations hold."""
    if isinstance(value, Mapping):
        return {name: as_tuples(x) for name, x in value.items()}
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value


def process_differences(first: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Lines `field: first -> other` for what two processes of a run may not set differently: all but where data is."""
    return differences(first, other, may_change={x for x in MAY_CHANGE if x.startswith("data.")})


def differences(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    where: str = "",
    may_change: Collection[str] = MAY_CHANGE,
) -> list[str]:
    """Lines `field: old -> new` for what differs between two runs' JSON and may not."""
    lines = []
    for name in sorted(old.keys() | new.keys()):
        path = f"{where}{name}"
        before, after = old.get(name), new.get(name)
        if path in may_change:
            continue
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += differences(before, after, f"{path}.", may_change)
        elif before != after:
            lines.append(f"{path}: {before} -> {after}")
    return lines
