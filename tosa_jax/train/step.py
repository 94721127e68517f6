"""One training step and one evaluation step: pure functions over `TrainState`.

No state hides anywhere: random keys are folded from seed, stage and step, so that a restored run draws what the
uninterrupted one would have drawn, on any number of devices.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from tosa_jax.distributed.mesh import gather_params
from tosa_jax.models.factory import with_image_size
from tosa_jax.models.optim import global_norm, update_ema
from tosa_jax.models.params import Params, set_params
from tosa_jax.tasks.metrics import Totals, totals

Batch = Mapping[str, jax.Array]

MIXING = 2**31 - 1
"""What the key of mixing is folded with: no layer has this number."""


class TrainState(NamedTuple):
    """All that a training step changes, and the frozen parameters beside it.

    step     int32, updates done.
    params   the trained parameters by path, `frozen` the others.
    opt      state of the optimizer, for `params` only.
    ema      float32 moving average of `params`, or {}.
    teacher  parameters of the dense network that is distilled from, or {}.
    """

    step: jax.Array
    params: Params
    frozen: Params
    opt: Any
    ema: Params
    teacher: Params


@dataclass(frozen=True)
class StepSetup:
    """The static half of a step.

    graphdef  structure of the model; `teacher` of the dense one, or None.
    task      inputs, loss and metrics.
    stage_id  what the stage's random keys are folded from, with `seed`.
    accumulate  parts that a batch is worked through in, one after the other, for less memory.
    """

    graphdef: nnx.GraphDef
    task: Any
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    ema_decay: float
    seed: int
    stage_id: int
    teacher: nnx.GraphDef | None = None
    distill_weight: float = 0.0
    accumulate: int = 1


def init_state(
    setup: StepSetup, params: Params, frozen: Params, teacher: Params | None = None
) -> TrainState:
    """A state at step 0."""
    ema = {k: x.astype(jnp.float32) for k, x in params.items()} if setup.ema_decay else {}
    return TrainState(
        jnp.zeros((), jnp.int32), params, frozen, setup.optimizer.init(params), ema, teacher or {}
    )


def trained_params(state: TrainState) -> Params:
    """The network that training is for: the moving average where there is one, frozen parameters included."""
    average = {path: x.astype(state.params[path].dtype) for path, x in state.ema.items()}
    return state.frozen | state.params | average


def network(graphdef: nnx.GraphDef, params: Params, mesh: Mesh) -> Any:
    """The model, inside a step: its layers' parameters are gathered when a layer runs, all others here."""
    model = set_params(graphdef, params)
    if mesh.shape["fsdp"] > 1:
        gather = functools.partial(gather_params, mesh=mesh, dtype=model.config.dtype)
        of_layers = ("blocks/", "kinds/")
        others = {path: x for path, x in params.items() if not path.startswith(of_layers)}
        model = set_params(graphdef, params | gather(others))
        model.gather = gather
    return model


def train_step(
    state: TrainState, batch: Batch, *, setup: StepSetup, mesh: Mesh
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update on a batch; the metrics are float32 scalars: loss, grad_norm, learning_rate."""
    key = jax.random.fold_in(
        jax.random.fold_in(jax.random.key(setup.seed), setup.stage_id), state.step
    )
    images, targets = setup.task.training_batch(batch, jax.random.fold_in(key, MIXING))

    def mean_loss(params, images, targets, keys):
        model = network(setup.graphdef, state.frozen | params, mesh)
        out = model(images, key=keys, train=True)
        loss = setup.task.loss(out, targets)
        if setup.teacher is not None:
            teacher_out = network(setup.teacher, state.teacher, mesh)(images)
            loss = loss + setup.distill_weight * setup.task.distillation(out, teacher_out)
        return loss.mean()

    loss, grads = mean_over_parts(
        functools.partial(jax.value_and_grad(mean_loss), state.params),
        (images, targets, jax.random.split(key, len(images))),
        setup.accumulate,
    )
    updates, opt = setup.optimizer.update(grads, state.opt, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {
        "loss": loss,
        "grad_norm": global_norm(grads),
        "learning_rate": jnp.asarray(setup.schedule(state.step), jnp.float32),
    }
    new = state._replace(
        step=state.step + 1,
        params=params,
        opt=opt,
        ema=update_ema(state.ema, params, setup.ema_decay),
    )
    return new, metrics


def mean_over_parts(function: Callable[..., Any], batch: tuple[Any, ...], parts: int) -> Any:
    """Mean of `function(*part)` over equal parts of a batch, which run one after the other.

    Part i has the rows i, i + parts, i + 2 * parts, ...: of each device's rows as many as of another's, so that no
    row has to move. Sums are float32; the mean has the function's own dtypes.
    """
    if parts == 1:
        return function(*batch)

    def split(x):
        return x.reshape(len(x) // parts, parts, *x.shape[1:]).swapaxes(0, 1)

    def body(total, part):
        return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, function(*part)), None

    split_batch = jax.tree.map(split, batch)
    out = jax.eval_shape(function, *jax.tree.map(lambda x: x[0], split_batch))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), out)
    total, _ = jax.lax.scan(body, zeros, split_batch)
    return jax.tree.map(lambda t, x: (t / parts).astype(x.dtype), total, out)


def eval_step(
    params: Params,
    batch: Batch,
    number: jax.Array,
    *,
    graphdef: nnx.GraphDef,
    task: Any,
    seed: int,
    mesh: Mesh,
) -> Totals:
    """(sum, count) of each metric over the examples of a batch whose `mask` is 1.

    `number` of the batch and `seed` give the key of random selections. Images may have another size than those that
    the network trained on, where the network takes any: its `keep_rate` is the share of the patches that they have.
    """
    key = jax.random.fold_in(jax.random.key(seed), number)
    model = with_image_size(network(graphdef, params, mesh), batch["image"].shape[1:3])
    out = task.predict(model, batch["image"], key)
    return totals(task.metrics(out, batch), batch["mask"])
