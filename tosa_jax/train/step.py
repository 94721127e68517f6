"""One training step and one evaluation step: pure functions over `TrainState`.

No state hides anywhere: random keys are folded from seed, stage and step, so that a restored run draws what the
uninterrupted one would have drawn, on any number of devices.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from tosa_jax.distributed.mesh import gather_params, kernels_over
from tosa_jax.models.factory import with_image_size
from tosa_jax.models.optim import global_norm, square_sum, update_ema
from tosa_jax.models.params import Params, set_params
from tosa_jax.models.vit import VisionTransformer
from tosa_jax.tasks.metrics import Totals, totals
from tosa_jax.tasks.task import AverageTeacher, Batch, FrozenTeacher, State, Task

Tree = TypeVar("Tree")

MIXING = 2**31 - 1
"""What the key of mixing is folded with: no layer has this number."""


class TrainState(NamedTuple):
    """All that a training step changes, and the frozen parameters beside it.

    step     int32, updates done.
    params   the trained parameters by path, `frozen` the others.
    opt      the optimizer's state, for `params` alone.
    ema      the moving average of `params`, float32; {}: there is none.
    teacher  the parameters of a frozen teacher; of an average teacher the moving average of `params`, float32; {}: no
             teacher.
    task     the task's own state (`Task.init_state`), or {}.
    """

    step: jax.Array
    params: Params
    frozen: Params
    opt: optax.OptState
    ema: Params
    teacher: Params
    task: State = {}


@dataclass(frozen=True)
class StepSetup:
    """The static half of a step.

    graphdef     of the model.
    task         makes batches, loss and metrics.
    schedule     update count -> learning rate, for the log; the optimizer has its own.
    ema_decay    share in [0, 1) that the moving average keeps in an update; 0: no average.
    seed         of the run. All random keys of the stage are made of it, `stage_id` and the step.
    teacher      graph definition of a frozen teacher; None: there is none.
    skip         whether an update whose loss or gradient is bad changes nothing but the number of the step.
    max_grad_norm  a gradient that is longer is bad, as one that is not finite; 0: none is too long.
    accumulate   number of parts of a batch, which are computed one after the other to save memory.
    total_steps  updates in the stage, for schedules of the task.
    """

    graphdef: nnx.GraphDef[VisionTransformer]
    task: Task
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    ema_decay: float
    seed: int
    stage_id: int
    teacher: nnx.GraphDef[VisionTransformer] | None = None
    accumulate: int = 1
    total_steps: int = 0
    skip: bool = False
    max_grad_norm: float = 0.0


def init_state(
    setup: StepSetup, params: Params, frozen: Params, teacher: Params | None = None
) -> TrainState:
    """The state at step 0. `teacher`: parameters of a frozen teacher."""

    def average() -> Params:
        return {path: x.astype(jnp.float32) for path, x in params.items()}

    if isinstance(setup.task.teacher, AverageTeacher):
        teacher = average()
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        frozen=frozen,
        opt=setup.optimizer.init(params),
        ema=average() if setup.ema_decay else {},
        teacher=teacher or {},
        task=setup.task.init_state(),
    )


def saved_tree(state: TrainState) -> dict[str, Any]:
    """What a checkpoint holds of a state: all fields, `task` only if the task has a state.

    So checkpoints from before tasks had a state can still be read.
    """
    tree = state._asdict()
    return tree if jax.tree.leaves(state.task) else {k: x for k, x in tree.items() if k != "task"}


def trained_params(state: TrainState) -> Params:
    """The parameters of the trained model, of trained ones the moving average if there is one."""
    return state.frozen | state.params | _as_stored(state.ema, state.params)


def _as_stored(average: Params, params: Params) -> Params:
    """A float32 moving average in the dtypes of the parameters."""
    return {path: x.astype(params[path].dtype) for path, x in average.items()}


def build_model(
    graphdef: nnx.GraphDef[VisionTransformer], params: Params, mesh: Mesh
) -> VisionTransformer:
    """The model, for use inside a step. Parameters that are split over `fsdp` are gathered: those of a layer when it
    runs, all others here."""
    model = set_params(graphdef, params)
    if mesh.shape["fsdp"] > 1:
        gather = functools.partial(gather_params, mesh=mesh, dtype=model.config.dtype)
        of_layers = ("blocks/", "kinds/")
        others = {path: x for path, x in params.items() if not path.startswith(of_layers)}
        model = set_params(graphdef, params | gather(others))
        model.gather_params = gather
    return model


def train_step(
    state: TrainState, batch: Batch, *, setup: StepSetup, mesh: Mesh
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update on a global batch. Returns the new state and scalars.

    These are loss, grad_norm and learning_rate, float32, and bad_gradient, int32: what `bad_gradient` returns.
    """
    with kernels_over(mesh):
        return _updated(state, batch, setup, mesh)


def _updated(
    state: TrainState, batch: Batch, setup: StepSetup, mesh: Mesh
) -> tuple[TrainState, dict[str, jax.Array]]:
    key = jax.random.fold_in(
        jax.random.fold_in(jax.random.key(setup.seed), setup.stage_id), state.step
    )
    rows = setup.task.training_batch(batch, jax.random.fold_in(key, MIXING))
    teacher = teacher_model(state, setup, mesh)

    def mean_loss(params, rows, keys):
        model = build_model(setup.graphdef, state.frozen | params, mesh)
        forward = functools.partial(model, train=True)
        loss = setup.task.training_loss(forward, rows, keys, teacher, state.task)
        return loss.values.mean(), (loss.statistics, loss.running)

    (loss, (statistics, running)), grads = mean_over_parts(
        functools.partial(jax.value_and_grad(mean_loss, has_aux=True), state.params),
        (rows, jax.random.split(key, len(jax.tree.leaves(rows)[0]))),
        setup.accumulate,
    )
    updates, opt = setup.optimizer.update(grads, state.opt, state.params)
    params = cast(Params, optax.apply_updates(state.params, updates))
    params |= {path: x for path, x in running.items() if path in params}  # frozen ones stay
    metrics = {
        "loss": loss,
        "grad_norm": global_norm(grads),
        "learning_rate": jnp.asarray(setup.schedule(state.step), jnp.float32),
        "bad_gradient": bad_gradient(grads, setup.max_grad_norm),
    }
    new = state._replace(
        step=state.step + 1,
        params=params,
        opt=opt,
        ema=update_ema(state.ema, params, setup.ema_decay),
        teacher=updated_teacher(state, params, setup),
        task=setup.task.update_state(state.task, jax.lax.stop_gradient(statistics)),
    )
    if setup.skip:
        good = jnp.isfinite(loss) & (metrics["bad_gradient"] == 0)
        kept = jax.tree.map(lambda new, old: jnp.where(good, new, old), new, state)
        new = kept._replace(step=new.step)
    return new, metrics


def bad_gradient(grads: Params, max_norm: float) -> jax.Array:
    """Which array makes a gradient bad: its number, from 1 in the order of the paths; 0: the gradient is good. int32.

    That is the first array that holds NaN or infinity. If none does and the norm of all is above `max_norm`, it is the
    array whose own norm is the largest. `max_norm` 0 allows any norm.
    """
    squares = jnp.stack([square_sum(x) for x in jax.tree.leaves(grads)])
    bad = ~jnp.isfinite(squares)
    found = jnp.where(bad.any(), jnp.argmax(bad) + 1, 0)
    if max_norm:
        too_long = jnp.sqrt(squares.sum()) > max_norm
        found = jnp.where(~bad.any() & too_long, jnp.argmax(squares) + 1, found)
    return found.astype(jnp.int32)


def teacher_model(state: TrainState, setup: StepSetup, mesh: Mesh) -> VisionTransformer | None:
    """The teacher that the task asks for, in evaluation mode; None without one.

    Raises ValueError: the teacher is frozen, and `setup.teacher` is missing.
    """
    match setup.task.teacher:
        case None:
            return None
        case FrozenTeacher():
            if setup.teacher is None:
                raise ValueError(
                    "the task has a frozen teacher, but the setup has no graphdef of one"
                )
            return build_model(setup.teacher, state.teacher, mesh)
        case AverageTeacher():
            params = state.frozen | _as_stored(state.teacher, state.params)
            return build_model(setup.graphdef, params, mesh)


def updated_teacher(state: TrainState, params: Params, setup: StepSetup) -> Params:
    """The teacher's parameters after the update that gave `params`."""
    teacher = setup.task.teacher
    if not isinstance(teacher, AverageTeacher):
        return state.teacher
    return update_ema(state.teacher, params, teacher.decay(state.step, setup.total_steps))


def mean_over_parts(function: Callable[..., Tree], batch: tuple[Any, ...], parts: int) -> Tree:
    """Mean of `function(*part)` over equal parts of a batch, which are computed one after the other.

    Part i has the rows i, i + parts, i + 2 * parts, ...: equally many rows of each device, so that no row moves to
    another device. Sums are float32; the mean has the dtypes of the function's results.
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


def example_keys(seed: int, first: jax.Array, count: int) -> jax.Array:
    """A random key for each of `count` examples of a split, from the one with the number `first` on: [count]."""
    key = jax.random.key(seed)
    return jax.vmap(lambda number: jax.random.fold_in(key, number))(first + jnp.arange(count))


def eval_step(
    params: Params,
    batch: Batch,
    first: jax.Array,
    *,
    graphdef: nnx.GraphDef[VisionTransformer],
    task: Task,
    seed: int,
    mesh: Mesh,
) -> Totals:
    """(sum, count) of each metric over the examples of a batch whose `mask` is 1.

    `first` is the number of the first example in its split, int32. Each example's random selections follow from `seed`
    and its own number, so that they do not depend on the batch size. Images may have another size than those that the
    model trained on, where the model takes any size: its `keep_rate` is the share of the patches that they have.
    """
    model = with_image_size(build_model(graphdef, params, mesh), batch["image"].shape[1:3])
    with kernels_over(mesh):
        out = task.predict(model, batch, example_keys(seed, first, len(batch["image"])))
    return totals(task.metrics(out, batch), batch["mask"])
