"""What networks cost on a TPU by the compiler's own estimate (`tpu_cycles`). No TPU is needed, and nothing is run."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from tosa_jax.distributed.devices import Device
from tosa_jax.models import cost
from tosa_jax.models.factory import structure
from tosa_jax.models.params import set_params
from tosa_jax.models.vit_config import ViTConfig, check_choice
from tosa_jax.performance import tpu_cycles
from tosa_jax.performance.aot import tpu_devices
from tosa_jax.performance.candidates import mean_loss, networks, objective_of, training_batch
from tosa_jax.tasks import model_config

CLOCKS = {"v5e": 1.5e9, "v6e": 1.75e9}
"""Cycles a second of the chips that an estimate can be had for: peak operations over those of the matrix units."""

Record = dict[str, Any]


def estimate(
    model: str,
    keep_rates: Sequence[float],
    *,
    chip: str,
    batch_size: int,
    train: bool,
    task: str = "classification",
    controls: Sequence[str] = (),
    **fields: Any,
) -> list[Record]:
    """The records of a dense model, ToSA and each control at each keep rate, on one chip of a kind in `CLOCKS`.

    The program is a forward pass, or with `train` forward and backward of the task's loss without the optimizer.
    `fields` are those of `ViTConfig`. Weights are stored in `dtype`, unless `param_dtype` says otherwise.

    A record has `mcycles` (10**6 cycles a batch), `ms` at the chip's clock, `speedup` and `gmac_ratio` over the dense
    model, `realised` (one over the other), `mcycles_by_part`, `kernels` (how many there are) and `uncounted`.

    Raises ConfigError: no such chip, libtpu is not installed or was loaded without being asked for kernels.
    """
    check_choice("--estimate", chip, CLOCKS)
    dumps = tpu_cycles.kernel_dumps()
    device = tpu_devices(f"{chip}:2x2")[0]
    fields = {"param_dtype": fields.get("dtype", "bfloat16")} | {"dtype": "bfloat16"} | fields
    make_config = functools.partial(model_config, task, model, **fields)
    records: list[Record] = []
    for name, keep_rate, config in networks(make_config, keep_rates, controls):
        found = network_cycles(config, batch_size, task, train=train, device=device, dumps=dumps)
        gmacs = cost.gmacs(config)
        record = {
            "name": name,
            "keep_rate": keep_rate,
            "batch_size": batch_size,
            "image_size": config.image_size,
            "dtype": str(config.dtype),
            "train": train,
            "gmacs": gmacs,
            "ms": found["cycles"] / CLOCKS[chip] * 1e3,
            "mcycles": found["cycles"] / 1e6,
            "mcycles_by_part": {k: v / 1e6 for k, v in found["parts"].items()},
            "kernels": found["kernels"],
            "uncounted": found["uncounted"],
        }
        dense = records[0] if records else record
        speedup, ratio = dense["mcycles"] / record["mcycles"], dense["gmacs"] / gmacs
        records.append(
            record | {"speedup": speedup, "gmac_ratio": ratio, "realised": speedup / ratio}
        )
    return records


def forward_mcycles(configs: Iterable[ViTConfig], chip: str, batch_size: int) -> Iterator[float]:
    """10**6 cycles of a forward pass of each network on one chip, in bfloat16. Raises ConfigError as `estimate`."""
    check_choice("--estimate", chip, CLOCKS)
    dumps = tpu_cycles.kernel_dumps()
    device = tpu_devices(f"{chip}:2x2")[0]
    for config in configs:
        short = dataclasses.replace(config, dtype="bfloat16", param_dtype="bfloat16")
        found = network_cycles(
            short, batch_size, config.task, train=False, device=device, dumps=dumps
        )
        yield found["cycles"] / 1e6


def network_cycles(
    config: ViTConfig, batch_size: int, task: str, *, train: bool, device: Device, dumps: Path
) -> dict[str, Any]:
    """What `cycles` finds of one network's program."""
    program, arguments = _program(config, batch_size, task, train=train)
    return cycles(program, *arguments, device=device, dumps=dumps)


def _program(
    config: ViTConfig, batch_size: int, task: str, *, train: bool
) -> tuple[Callable, tuple[Any, ...]]:
    """The function, and the shapes of its arguments."""
    graphdef, params = structure(config)
    objective, key = objective_of(config, task), jax.eval_shape(jax.random.key, 0)
    batch = jax.eval_shape(
        functools.partial(training_batch, objective, config, batch_size), jax.random.key(0)
    )
    if train:
        loss = functools.partial(mean_loss, graphdef, objective)
        return jax.grad(loss), (params, batch, key)

    def forward(params, images, key):
        return objective.run_model(set_params(graphdef, params), images, key).predictions

    return forward, (params, batch["image"], key)


def cycles(function: Callable, *arguments: Any, device: Device, dumps: Path) -> dict[str, Any]:
    """Cycles of a function on one chip, as `tpu_cycles.count` returns them.

    arguments  arrays or their shapes.
    dumps      the folder that the compiler was told to write kernels into.

    Raises ConfigError: a kernel was not written there, because libtpu was loaded before it was asked to.
    """
    sharding = SingleDeviceSharding(device)
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments
    )
    tpu_cycles.empty(dumps)
    lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",))
    return tpu_cycles.count(lowered.compile().as_text() or "", dumps)
