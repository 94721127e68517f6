"""Ahead-of-time compilation of a recipe's training and evaluation steps, also for devices that are not present.

The TPU compiler in libtpu runs on any Linux machine. It reports the memory, operations and collectives of a step on a
TPU slice without one. No program is run.
"""

import dataclasses
import functools
import importlib.util
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from tosa_jax.config import RunConfig
from tosa_jax.data.pipeline import DatasetFacts
from tosa_jax.distributed.devices import Device, accelerator
from tosa_jax.distributed.mesh import batch_sharding, batch_ways, tree_shardings
from tosa_jax.errors import ConfigError
from tosa_jax.models import cost
from tosa_jax.models.factory import abstract_model, structure
from tosa_jax.models.params import Params
from tosa_jax.models.vit_config import ViTConfig
from tosa_jax.performance import tpu_cycles
from tosa_jax.performance.collectives import collectives, totals
from tosa_jax.tasks import TASKS, Task
from tosa_jax.train.checkpoints import with_shardings
from tosa_jax.train.loop import jit_step
from tosa_jax.train.stage_run import StageBuilder
from tosa_jax.train.stages import INIT, SELECTOR, plan_stages, uses_labels
from tosa_jax.train.step import trained_params

MISSING = 'the TPU compiler is not installed: pip install "tosa-jax[tpu]"'
"""Error message if libtpu is not installed."""

_USED = re.compile(r"[Uu]sed ([\d.]+)([KMGT]?)i?B? of [\d.]+[KMGT]?i?B? hbm")
_TEMPORARIES = re.compile(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Program:
    """A step that can be compiled.

    name         "train STAGE" or "evaluate ROW".
    lower        traces the step for the mesh.
    state_bytes  bytes on one device of the parameters, and in training of the optimizer state and the average.
    batch_size   global: images of all devices together.
    flops        floating-point operations of one device, by arithmetic.
    """

    name: str
    lower: Callable[[], jax.stages.Lowered]
    state_bytes: int
    batch_size: int
    flops: float


def tpu_devices(topology: str, slices: int = 1) -> list[Device]:
    """Devices of `slices` TPU slices of a topology such as "v5e:4x4", for compilation only.

    Raises ConfigError: libtpu is not installed, or does not know the topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(MISSING)
    settings = {
        # On a machine without a TPU, libtpu logs errors about facts that it cannot find.
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        # libtpu's lock protects the chips; several compilers may run at once.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    try:
        found = topologies.get_topology_desc(topology, "tpu", num_slices=slices)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise ConfigError(
            f"--topology={topology}: {error}; known are for example v5e:2x4, v5e:16x16, v5p:4x4x4, v6e:4x4"
        ) from error
    return found.devices


def abstract_init(run: RunConfig) -> Params:
    """Shapes of the parameters that a run would read from `init_from` and `init_selectors`; {} if it pretrains."""
    if run.has_stage("pretrain") and not run.init_from:
        return {}
    params = structure(run.model).shapes
    return {k: x for k, x in params.items() if run.init_selectors or not k.startswith("kinds/")}


def programs(run: RunConfig, mesh: Mesh) -> Iterator[Program]:
    """The steps of a run on this mesh: training and selector evaluation of each stage, then the final evaluations.

    A run with neither `init_from` nor a pretraining stage is compiled as if it started from released weights.
    """
    if not run.has_stage("pretrain"):
        run = dataclasses.replace(run, init_from=run.init_from or "released weights")
    facts = DatasetFacts(
        run.batch_size,
        run.eval.batch_size,
        run.model.num_classes,
        (),
        TASKS[run.task].data_kind,
    )
    builder = StageBuilder(run, mesh, facts, Path())
    params = {INIT: abstract_init(run)}
    stages, rows = plan_stages(run)
    for stage in stages:
        stage_run = builder.stage_run(stage, params)
        state = jax.eval_shape(stage_run.init, *stage_run.init_args)
        shardings = tree_shardings(state, mesh)
        state = with_shardings(state, shardings)
        step = jit_step(stage_run.setup, shardings, mesh)
        batch = abstract_batch(TASKS[run.task], run.model, run.batch_size, mesh)
        yield Program(
            f"train {stage.name}",
            functools.partial(step.lower, state, batch),
            _device_bytes(state),
            run.batch_size,
            stage_run.flops_per_image * run.batch_size / mesh.size,
        )
        params[stage.name] = params[stage.start] | jax.eval_shape(trained_params, state)
        if stage.kind == SELECTOR:
            task = stage_run.setup.task
            yield _evaluation(builder, stage.name, stage.model, task, params[stage.name])
    seen = []
    for row in rows if uses_labels(run) else ():
        if row.model not in seen:
            seen.append(row.model)
            yield _evaluation(builder, row.name, row.model, builder.task, params[row.stage])


def _evaluation(
    builder: StageBuilder, name: str, model: ViTConfig, task: Task, params: Params
) -> Program:
    run, mesh = builder.run, builder.mesh
    params = structure(model).select(params)
    params = with_shardings(params, tree_shardings(params, mesh))
    batch = abstract_batch(TASKS[run.task], model, run.eval.batch_size, mesh)
    mask = jax.ShapeDtypeStruct((run.eval.batch_size,), jnp.float32, sharding=batch_sharding(mesh))
    first = jax.ShapeDtypeStruct((), jnp.int32)
    step = builder.evaluator(model, task).step
    return Program(
        f"evaluate {name}",
        functools.partial(step.lower, params, batch | {"mask": mask}, first),
        _device_bytes(params),
        run.eval.batch_size,
        2.0 * cost.macs(abstract_model(model)) * run.eval.batch_size / mesh.size,
    )


def abstract_batch(
    task: type[Task], model: ViTConfig, batch_size: int, mesh: Mesh
) -> dict[str, Any]:
    """Shapes and sharding of a global batch of a task's examples."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((batch_size, *x.shape), x.dtype, sharding=sharding),
        dict(task.example(model)),
    )


def _device_bytes(tree: Any) -> int:
    shards = [(x.sharding.shard_shape(x.shape), x.dtype) for x in jax.tree.leaves(tree)]
    return sum(int(jnp.prod(jnp.asarray(shape, int))) * dtype.itemsize for shape, dtype in shards)


def compile_program(program: Program, mesh: Mesh, dumps: Path | None = None) -> dict[str, Any]:
    """Compiles a step and returns its record. Numbers are of one device, and by the compiler except where noted:

    compile_seconds      to trace and compile, by the clock.
    compile_cpu_seconds  the same, summed over this machine's cores.
    flops_arithmetic     by `models/cost.py`; the compiler's `flops` count the body of a loop once.
    state_bytes          parameters, optimizer state and average, by arithmetic.
    total_bytes          arguments, temporaries, code, and results that do not reuse an argument's memory.
    collectives          by kind: executions in one run, and the bytes of their buffers.
    estimate             `tpu_cycles.count` of the program, where `dumps`, the folder of `kernel_dumps` there, is given.

    If the compiler itself runs out of device memory, `fits` is False, `total_bytes` is its figure or None, and the
    other results are None.
    """
    device = mesh.devices.flat[0]
    known = accelerator(device.device_kind)
    record = {
        "name": program.name,
        "platform": device.platform,
        "device": device.device_kind,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "batch_size": program.batch_size,
        "device_batch_size": program.batch_size // batch_ways(mesh),
        "memory_bytes": known.memory if known else None,
        "state_bytes": program.state_bytes,
        "flops_arithmetic": program.flops,
    }
    found: dict[str, Any] = dict.fromkeys(
        ("argument_bytes", "temp_bytes", "total_bytes", "flops", "collectives", "custom_calls")
    )
    tpu_cycles.empty(dumps)
    start, start_cpu = time.perf_counter(), time.process_time()
    try:
        compiled = program.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        found |= {"fits": False, "total_bytes": _bytes_wanted(str(error))}
    else:
        facts = _facts(compiled)
        found |= facts
        if dumps is not None:
            found["estimate"] = tpu_cycles.count(compiled.as_text() or "", dumps)
        found["fits"] = known is None or facts["total_bytes"] <= known.memory
    record["compile_seconds"] = time.perf_counter() - start
    record["compile_cpu_seconds"] = time.process_time() - start_cpu
    return record | found


def _facts(compiled: jax.stages.Compiled) -> dict[str, Any]:
    memory, text = compiled.memory_analysis(), compiled.as_text() or ""
    assert memory is not None, "every compiler that JAX runs ahead of time reports its memory"
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes + results
    return {
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "total_bytes": total + memory.generated_code_size_in_bytes,
        "flops": (compiled.cost_analysis() or {}).get("flops"),
        "collectives": totals(collectives(text)),
        "custom_calls": sorted(set(re.findall(r'custom_call_target="([^"]+)"', text))),
    }


def _bytes_wanted(message: str) -> int | None:
    """Bytes that a TPU program would need (all, or only temporaries), from the compiler's error message."""
    match = _USED.search(message) or _TEMPORARIES.search(message)
    return int(float(match.group(1)) * _UNITS[match.group(2)]) if match else None


def following(batch: int) -> int:
    """The next larger batch size to try: 1, 2, 4, then multiples of 8, which fill a TPU's tiles."""
    return max(1, 2 * batch) if batch < 8 else batch + 8


def preceding(batch: int) -> int:
    """The next smaller batch size to try; 0 below 1."""
    if batch > 8:
        return (batch - 1) // 8 * 8
    return 2 ** ((batch - 1).bit_length() - 1) if batch > 1 else 0


def largest_batch(needed: Callable[[int], tuple[bool, int | None]], memory: int, start: int) -> int:
    """The largest batch size that fits in `memory` bytes; 0 if none does.

    needed  batch size -> (whether it fits, the bytes it needs or None). Bytes should grow about linearly.
    memory  bytes of a device.
    start   the first batch size to try.
    """
    fits, fails, known = 0, None, {}
    batch = preceding(start + 1)
    while following(fits) != fails:
        good, known[batch] = needed(batch)
        fits, fails = (batch, fails) if good else (fits, batch)
        highest = preceding(fails) if fails else 16 * fits
        guess = _where_full(known, memory) or (fits + highest) // 2
        batch = preceding(min(max(guess, following(fits)), highest) + 1)
    return fits


def _where_full(known: dict[int, int | None], memory: int) -> int | None:
    """The batch size that needs `memory` bytes, on the line through the two largest known points."""
    points = sorted((batch, used) for batch, used in known.items() if used is not None)
    if len(points) < 2:
        return int(points[0][0] * memory / points[0][1]) if points else None
    (a, at_a), (b, at_b) = points[-2:]
    return a + int((memory - at_a) * (b - a) / max(at_b - at_a, 1))
