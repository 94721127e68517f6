"""Who takes turns in the benchmark: the dense network, ToSA and the controls, each a compiled JAX program.

A candidate is little more than a callable and what waits for its result, so that networks of other frameworks
(`performance/torch_baselines.py`) take part as well.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from tosa_jax.distributed import memory
from tosa_jax.models.factory import build, control_config, structure
from tosa_jax.models.method import DENSE, MAIN, METHODS
from tosa_jax.models.optim import OptimConfig, make_optimizer
from tosa_jax.models.params import Params, set_params, split
from tosa_jax.models.vit import VisionTransformer
from tosa_jax.models.vit_config import ViTConfig, check
from tosa_jax.tasks import TASKS, Task
from tosa_jax.tasks.task import Batch


def networks(
    make_config: Callable[..., ViTConfig], keep_rates: Sequence[float], names: Sequence[str]
) -> Iterator[tuple[str, float | None, ViTConfig]]:
    """Name, keep rate and network: dense, then ToSA and each control in `names` at each keep rate.

    A control whose cost does not depend on a keep rate takes part once, with None. Of a network in which no layer kinds
    of a plan run there is the first alone. Raises ConfigError if `names` has controls of such a network.
    """
    dense = make_config()
    yield DENSE, None, dense
    if not dense.has_plan:
        check(not names, f"no method runs in a {dense.architecture!r}: leave out the controls")
        return
    for name in dict.fromkeys([MAIN, *names]):
        for rate in keep_rates if METHODS[name].has_budget else [None]:
            budget = {} if rate is None else {"keep_rate": rate}
            yield name, rate, control_config(make_config(plan=METHODS[MAIN].plan, **budget), name)


class Candidate(NamedTuple):
    """One of the models that the benchmark times.

    name        in the records: a method's, or the library of a baseline.
    keep_rate   None if it selects no tokens.
    config      the model's configuration, from which its multiply-adds are computed.
    run         starts one pass over a batch; its result may still be computing.
    wait        blocks until the result of `run` is there.
    xla_gmacs   multiply-adds / 1e9 of one image by XLA's count of the program; None if unknown.
    temp_bytes  bytes of the program's temporaries by XLA's analysis; None if unknown.
    rest        seconds to pause after it, because its threads stay busy for a while.
    """

    name: str
    keep_rate: float | None
    config: ViTConfig
    run: Callable[[], Any]
    wait: Callable[[Any], Any]
    xla_gmacs: float | None = None
    temp_bytes: int | None = None
    rest: float = 0.0


def candidate(
    name: str,
    keep_rate: float | None,
    config: ViTConfig,
    batch_size: int,
    *,
    train: bool,
    task: str = "classification",
) -> Candidate:
    """A model with random weights and images: its forward pass, or a training step (forward, backward, AdamW).

    A training step minimises the loss of `task`, a key of `TASKS`, and reuses the memory of its state (donation), as in
    `train/loop.py`.

    Raises DeviceError if the program does not fit the device, before it allocates anything.
    """
    graphdef, params = structure(config)
    key, optimizer = jax.random.key(0), make_optimizer(OptimConfig(steps=100, learning_rate=1e-3))
    make_batch = functools.partial(_random_images, config, batch_size)
    state, function = params, _forward_pass(graphdef)
    if train:
        objective = objective_of(config, task)
        make_batch = functools.partial(training_batch, objective, config, batch_size)
        state = (params, jax.eval_shape(optimizer.init, params))
        function = _training_step(graphdef, optimizer, objective)
    jitted = jax.jit(function, donate_argnums=0 if train else ())
    program = jitted.lower(state, jax.eval_shape(make_batch, key), key).compile()
    check_fits(program, state, f"{name} at image_size={config.image_size}", batch_size)
    batch = jax.jit(make_batch)(key)
    state = params = split(build(config, rngs=nnx.Rngs(0)))[1]
    if train:
        state = (params, optimizer.init(params))

    def step():
        nonlocal state
        state, loss = program(state, batch, key)
        return state, loss

    return Candidate(
        name,
        keep_rate,
        config,
        run=step if train else lambda: program(state, batch, key),
        wait=jax.block_until_ready,
        xla_gmacs=_gmacs_by_xla(program, batch_size),
        temp_bytes=getattr(program.memory_analysis(), "temp_size_in_bytes", None),
    )


def objective_of(config: ViTConfig, task: str) -> Task:
    """The task, a key of `TASKS`, with its default options."""
    half = (0.5,) * config.in_chans
    return TASKS[task].of_model(config, TASKS[task].options(), mean=half, std=half)


def _random_images(config: ViTConfig, batch_size: int, key: jax.Array) -> jax.Array:
    return jax.random.normal(key, (batch_size, *config.image_shape, config.in_chans), config.dtype)


def training_batch(task: Task, config: ViTConfig, batch_size: int, key: jax.Array) -> Batch:
    """What the task makes of examples that are all ones, with random images in the dtype of the computation."""
    ones = {k: jnp.ones((batch_size, *x.shape), x.dtype) for k, x in task.example(config).items()}
    rows = task.training_batch(ones, key)
    return {**rows, "image": _random_images(config, batch_size, key)}


def _forward_pass(graphdef: nnx.GraphDef[VisionTransformer]) -> Callable:
    return lambda params, images, key: set_params(graphdef, params)(images, key=key).predictions


def _training_step(
    graphdef: nnx.GraphDef[VisionTransformer], optimizer: optax.GradientTransformation, task: Task
) -> Callable:
    def step(state, batch, key):
        params, opt = state
        value, grads = jax.value_and_grad(functools.partial(mean_loss, graphdef, task))(
            params, batch, key
        )
        updates, opt = optimizer.update(grads, opt, params)
        return (jax.tree.map(jnp.add, params, updates), opt), value

    return step


def mean_loss(
    graphdef: nnx.GraphDef[VisionTransformer],
    task: Task,
    params: Params,
    batch: Batch,
    key: jax.Array,
) -> jax.Array:
    """The mean of the task's loss over a batch, a scalar; a teacher is the model itself, for what it costs."""
    teacher = set_params(graphdef, jax.lax.stop_gradient(params)) if task.teacher else None
    keys = jax.random.split(key, len(batch["image"]))
    forward = functools.partial(set_params(graphdef, params), train=True)
    return task.training_loss(forward, batch, keys, teacher, task.init_state()).values.mean()


def _gmacs_by_xla(program: jax.stages.Compiled, batch_size: int) -> float | None:
    flops = (program.cost_analysis() or {}).get("flops")
    return None if flops is None else flops / 2e9 / batch_size


def check_fits(program: jax.stages.Compiled, state: Any, what: str, batch_size: int) -> None:
    """Raises DeviceError if the program does not fit; the message names a batch size that probably does.

    state  arrays, or their shapes, whose size does not depend on the batch; everything else is assumed to grow with it.
    """
    fixed = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    an_image = (memory.needed_bytes(program) - fixed) / batch_size
    fitting = int((memory.device_bytes(jax.local_devices()[0]) - fixed) / an_image)
    fitting -= fitting % 8 if fitting > 8 else 0
    memory.check_fits(
        program,
        f"{what}, batch_size={batch_size}",
        f"--batch_size={fitting} probably fits"
        if fitting > 0
        else "not even one image fits; --map_chunk=64 computes attention maps in parts, or take a smaller --image_size",
    )
