"""What a program costs on a TPU by the TPU compiler's own estimate. No TPU is needed, and nothing is run.

Two sources are added up. XLA writes the cycles that it expects of an instruction into the compiled program. For a
Pallas kernel it does not; but the compiler can write down the kernel's final instruction bundles, and the core runs one
bundle a cycle, in order: bundles times loop counts are the kernel's cycles, as long as its copies hide behind them.

The sum compares programs. It is no measurement: what waits for memory or for another instruction is in it only as far
as the compiler's model knows, and an instruction without an estimate is not in it at all (`uncounted` is their number).
"""

import atexit
import collections
import functools
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from tosa_jax.distributed.devices import Device
from tosa_jax.models import cost
from tosa_jax.models.factory import structure
from tosa_jax.models.params import set_params
from tosa_jax.models.vit_config import ViTConfig, check, check_choice
from tosa_jax.performance.aot import tpu_devices
from tosa_jax.performance.candidates import mean_loss, networks, objective_of, training_batch
from tosa_jax.tasks import model_config

CLOCKS = {"v5e": 1.5e9, "v6e": 1.75e9}
"""Cycles a second of the chips that an estimate can be had for: peak operations over those of the matrix units."""

PARTS = ("selector", "selection", "attention", "mlp", "embed", "head")
"""Scopes that models name (`jax.named_scope`); where they lie within one another the first of these counts."""

_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
_NAME = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = .*? ([a-z][a-z\-]*)\(")
_OP = re.compile(r'op_name="([^"]*)"')
_CONFIG = re.compile(r"backend_config=(.*)$")
_BUNDLE = re.compile(r"^\s*0x[0-9a-f]+\s*(?:\w+)?\s*:\s*(>*)")
_TRIPS = re.compile(r"scmp\.\w+\.s32\.totalorder %s\w+, (\d+) /\* loop exit test \*/")
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "copy-done"}
_FREE |= {"copy-start", "after-all", "broadcast", "slice-start", "slice-done", "async-done"}

Record = dict[str, Any]


@functools.cache
def _kernel_dumps() -> Path:
    """The folder that the compiler writes bundles of kernels into; asked for before it is loaded, or it does not."""
    folder = tempfile.mkdtemp(prefix="kernels_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    wanted = (
        f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
        "--xla_jf_dump_llo_pass_label_regex=final_bundles"
    )
    os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {wanted}".strip()
    return Path(folder)


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
    dumps = _kernel_dumps()
    device = tpu_devices(f"{chip}:2x2")[0]
    fields = {"param_dtype": fields.get("dtype", "bfloat16")} | {"dtype": "bfloat16"} | fields
    make_config = functools.partial(model_config, task, model, **fields)
    records: list[Record] = []
    for name, keep_rate, config in networks(make_config, keep_rates, controls):
        program, arguments = _program(config, batch_size, task, train=train)
        found = cycles(program, *arguments, device=device, dumps=dumps)
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
    """Cycles of a function on one chip: `cycles`, `parts` (by `PARTS`, and "rest"), `kernels`, `uncounted`.

    `kernel_cycles` are those of each different kernel, by the name of its first call.

    arguments  arrays or their shapes.
    dumps      the folder that the compiler was told to write kernels into.

    Raises ConfigError: a kernel was not written there, because libtpu was loaded before it was asked to.
    """
    sharding = SingleDeviceSharding(device)
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments
    )
    for old in dumps.iterdir():
        old.unlink()
    lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",))
    return count(lowered.compile().as_text() or "", dumps)


def count(text: str, dumps: Path) -> dict[str, Any]:
    """The same for the text of a compiled program.

    Raises ConfigError: a loop in it, or kernels that were not written into `dumps`.
    """
    check(
        " while(" not in text, "an estimate counts the body of a loop once: set scan_layers=False"
    )
    parts: collections.Counter[str] = collections.Counter()
    # The compiler writes a kernel once, under the name of its first call.
    first_call: dict[str, str] = {}
    kernel_cycles: dict[str, int] = {}
    kernels, uncounted = 0, 0
    for line in _entry(text):
        if not (found := _NAME.match(line)):
            continue
        name, operation = found.groups()
        if estimated := _CYCLES.search(line):
            parts[_part(line)] += int(estimated.group(1))
        elif "tpu_custom_call" in line:
            first = first_call.setdefault(_CONFIG.findall(line)[0], name)
            if first not in kernel_cycles:
                kernel_cycles[first] = _bundles(dumps, first)
            parts[_part(line)] += kernel_cycles[first]
            kernels += 1
        elif operation not in _FREE:
            uncounted += 1
    return {
        "cycles": sum(parts.values()),
        "parts": {part: parts[part] for part in (*PARTS, "rest") if parts[part]},
        "kernels": kernels,
        "uncounted": uncounted,
        "kernel_cycles": kernel_cycles,
    }


def _entry(text: str) -> list[str]:
    """The lines of the program itself; those of the computations that its fusions call come before it."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("ENTRY "))
    return lines[start + 1 :]


def _part(line: str) -> str:
    found = _OP.search(line)
    scopes = set(re.findall(r"[\w]+", found.group(1))) if found else set()
    return next((part for part in PARTS if part in scopes), "rest")


def _bundles(dumps: Path, name: str) -> int:
    """Bundles of a kernel times the counts of the loops that they stand in.

    Of several loops at one depth the longest stands for all.

    Raises ConfigError: the kernel was not written.
    """
    files = [x for x in dumps.glob(f"*-{name}-*final_bundles.txt") if "schedule" not in x.name]
    check(
        bool(files),
        "the compiler wrote no kernels: it was loaded before; run the estimate in a process of its own",
    )
    bundles: collections.Counter[int] = collections.Counter()
    trips: dict[int, int] = collections.defaultdict(lambda: 1)
    for line in sorted(files)[-1].read_text().splitlines():
        if not (found := _BUNDLE.match(line)):
            continue
        depth = len(found.group(1))
        bundles[depth] += 1
        if counted := _TRIPS.search(line):
            trips[depth] = max(trips[depth], int(counted.group(1)))
    total = 0
    for depth, number in bundles.items():
        for outer in range(1, depth + 1):
            number *= trips[outer]
        total += number
    return total
