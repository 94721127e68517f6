"""Who takes turns in the benchmark: the dense network, ToSA and the controls, each a compiled JAX program.

A candidate is little more than a callable and what waits for its result, so that networks of other frameworks
(`performance/torch_baselines.py`) take part as well.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from tosa_jax.distributed import memory
from tosa_jax.models.factory import build, control_config, structure
from tosa_jax.models.method import DENSE, MAIN, METHODS
from tosa_jax.models.optim import OptimConfig, make_optimizer
from tosa_jax.models.params import set_params, split
from tosa_jax.models.vit import Output
from tosa_jax.models.vit_config import ViTConfig
from tosa_jax.tasks.depth.errors import silog
from tosa_jax.tasks.losses import smoothed_targets, soft_cross_entropy


def networks(
    make_config: Callable[..., ViTConfig], keep_rates: Sequence[float], names: Sequence[str]
) -> Iterator[tuple[str, float | None, ViTConfig]]:
    """Name, keep rate and network: dense, then ToSA and each control in `names` at each keep rate.

    A control whose cost does not depend on a keep rate takes part once, with None.
    """
    yield DENSE, None, make_config()
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
    name: str, keep_rate: float | None, config: ViTConfig, batch_size: int, *, train: bool
) -> Candidate:
    """A model with random weights and images: its forward pass, or a training step (forward, backward, AdamW).

    A training step reuses the memory of its state (donation), as in `train/loop.py`.

    Raises DeviceError if the program does not fit the device, before it allocates anything.
    """
    graphdef, params = structure(config)
    optimizer = make_optimizer(OptimConfig(steps=100, learning_rate=1e-3))
    key, shape = jax.random.key(0), (batch_size, *config.image_shape, config.in_chans)
    state = (params, jax.eval_shape(optimizer.init, params)) if train else params
    function = _training_step(graphdef, optimizer) if train else _forward_pass(graphdef)
    jitted = jax.jit(function, donate_argnums=0 if train else ())
    program = jitted.lower(state, jax.ShapeDtypeStruct(shape, config.dtype), key).compile()
    check_fits(program, state, f"{name} at image_size={config.image_size}", batch_size)
    images = jax.random.normal(key, shape, config.dtype)
    state = params = split(build(config, rngs=nnx.Rngs(0)))[1]
    if train:
        state = (params, optimizer.init(params))

    def step():
        nonlocal state
        state, loss = program(state, images, key)
        return state, loss

    return Candidate(
        name,
        keep_rate,
        config,
        run=step if train else lambda: program(state, images, key),
        wait=jax.block_until_ready,
        xla_gmacs=_gmacs_by_xla(program, batch_size),
        temp_bytes=getattr(program.memory_analysis(), "temp_size_in_bytes", None),
    )


def _forward_pass(graphdef: nnx.GraphDef) -> Callable:
    return lambda params, images, key: set_params(graphdef, params)(images, key=key).predictions


def _training_step(graphdef: nnx.GraphDef, optimizer: Any) -> Callable:
    def step(state, images, key):
        params, opt = state

        def loss(p):
            return _task_loss(set_params(graphdef, p)(images, key=key)).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt = optimizer.update(grads, opt, params)
        return (jax.tree.map(jnp.add, params, updates), opt), value

    return step


def _task_loss(out: Output) -> jax.Array:
    """The loss of the model's task for constant targets."""
    if out.depth is not None:
        return silog(out.depth, jnp.full_like(out.depth, 2.0), jnp.ones(out.depth.shape, bool))
    assert out.logits is not None
    batch_size, num_classes = out.logits.shape
    labels = jnp.zeros(batch_size, jnp.int32)
    return soft_cross_entropy(out.logits, smoothed_targets(labels, num_classes, 0.1))


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
