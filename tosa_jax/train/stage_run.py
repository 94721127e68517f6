"""Builds what the loop needs of a stage: model, task, optimizer, teacher, first state, evaluator and figures."""

import dataclasses
import functools
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh

from tosa_jax.config import RunConfig, StageConfig
from tosa_jax.data.pipeline import DatasetFacts
from tosa_jax.distributed.mesh import check_batch
from tosa_jax.models import cost
from tosa_jax.models.factory import abstract_model, build, control_config, structure
from tosa_jax.models.method import DENSE
from tosa_jax.models.optim import HEAD, learning_rate, make_optimizer, split_trainable
from tosa_jax.models.params import Params, get_params
from tosa_jax.models.plan import layer_specs
from tosa_jax.models.tracing import rngs_of
from tosa_jax.models.vit_config import ViTConfig, check
from tosa_jax.paths import AnyPath
from tosa_jax.tasks import TASKS
from tosa_jax.tasks.selector_fitting import SelectorFitting
from tosa_jax.tasks.task import FrozenTeacher, Task
from tosa_jax.train.evaluate import Evaluator
from tosa_jax.train.stages import SELECTOR, Stage, trunk, uses_labels
from tosa_jax.train.step import StepSetup, TrainState, init_state

Draw = Callable[[Params], dict[str, np.ndarray]]
"""Parameters -> figures, uint8 RGB [rows, columns, 3], by file name."""


@dataclass(frozen=True)
class StageRun:
    """Everything that the loop needs to train a stage. The loop does not know which layer kinds exist.

    total_steps      updates in the stage; `eval_steps` and `checkpoint_steps` lie between two evaluations and two
                     checkpoints, 0: at the end alone.
    setup            the static half of a step.
    drawn_setups     the same at several keep rates, of which every update draws one; empty: all updates use `setup`.
    init             makes the state at step 0 of `init_args`: the parameters to start from, and the teacher's. They
                     are arguments, because a program would store arrays that it closes over as constants.
    evaluate_first   whether the model is also scored before the first step.
    flops_per_image  floating-point operations of training on one image, by arithmetic.
    profile_dir      where traces of steps are written.
    draw             the figures for TensorBoard; None: there are none.
    """

    name: str
    total_steps: int
    eval_steps: int
    checkpoint_steps: int
    setup: StepSetup
    init: Callable[[Params, Params], TrainState]
    init_args: tuple[Params, Params]
    evaluator: Evaluator
    evaluate_first: bool
    flops_per_image: float
    profile_dir: str
    drawn_setups: tuple[StepSetup, ...] = ()
    draw: Draw | None = None

    def is_due(self, step: int, every: int) -> bool:
        """Whether something done every so many steps, and at the end, is due before the next step."""
        return step == self.total_steps or (every > 0 and step > 0 and step % every == 0)

    def evaluates_at(self, step: int) -> bool:
        """Whether the model is scored before the next step."""
        return self.is_due(step, self.eval_steps) or (step == 0 and self.evaluate_first)


@dataclass(frozen=True)
class StageBuilder:
    """Makes the `StageRun` of each stage of a run. It needs no device: abstract parameters and meshes will do.

    workdir  the work directory, where traces are written.

    Raises ConfigError: the mesh does not divide a batch size, or the task cannot learn from the data set.
    """

    run: RunConfig
    mesh: Mesh
    dataset: DatasetFacts
    workdir: AnyPath

    def __post_init__(self) -> None:
        check_batch("batch_size", self.run.batch_size, self.mesh, self.run.accumulate)
        check_batch("eval.batch_size", self.run.eval.batch_size, self.mesh)
        if uses_labels(self.run):
            TASKS[self.run.task].check_dataset(self.run, self.dataset)

    @functools.cached_property
    def task(self) -> Task:
        """The task of the closing evaluation."""
        return TASKS[self.run.task].from_run(self.run, StageConfig())

    def stage_task(self, stage: Stage) -> Task:
        """What a stage trains its model for."""
        task = TASKS[self.run.task].from_run(self.run, stage.config)
        return SelectorFitting.of_task(task) if stage.kind == SELECTOR else task

    def evaluator(self, model: ViTConfig, task: Task) -> Evaluator:
        """Scores models of this configuration on the evaluation split."""
        run = self.run
        return Evaluator(
            structure(model).graphdef, task, run.data, self.mesh, run.eval.batch_size, run.seed
        )

    def stage_run(self, stage: Stage, params: Mapping[str, Params]) -> StageRun:
        """The stage, ready for the loop; `params` by name of the stage that left them, and "init".

        Raises ConfigError: the recipe's `trainable` matches no parameter that the stage trains.
        """
        steps_per_epoch = max(self.dataset.num_train // self.run.batch_size, 1)
        model = dataclasses.replace(stage.model, drop_path_rate=stage.config.drop_path_rate)
        setup = self.step_setup(stage, model, steps_per_epoch)
        own = structure(model).shapes
        trainable = (stage.trainable, stage.config.trainable)
        trained = split_trainable(own, *trainable)[0]
        check(
            bool(trained) or not stage.config.trainable,
            f"config.{stage.kind}.trainable={stage.config.trainable!r} matches no parameter that the stage trains: "
            f"paths begin with {', '.join(dict.fromkeys(path.partition('/')[0] for path in own))}",
        )
        only_head = bool(trained) and all(re.search(HEAD, path) for path in trained)
        part = "selectors" if stage.kind == SELECTOR else "head" if only_head else "network"
        macs = cost.training_macs(abstract_model(model), part)
        teacher_params = {}
        if setup.teacher is not None:
            dense = control_config(self.run.model, DENSE)
            macs += cost.macs(abstract_model(dense))
            teacher_params = structure(dense).select(params[trunk(self.run)])
        start = {name: x for name, x in params[stage.start].items() if name in own}
        return StageRun(
            name=stage.name,
            total_steps=setup.total_steps,
            eval_steps=stage.config.duration("eval", steps_per_epoch),
            checkpoint_steps=stage.config.duration("checkpoint", steps_per_epoch),
            setup=setup,
            init=functools.partial(first_state, setup, model, trainable),
            init_args=(start, teacher_params),
            evaluator=self.evaluator(stage.model, setup.task),
            evaluate_first=bool(start),
            flops_per_image=2.0 * macs,
            profile_dir=str(self.workdir / "profile" / stage.name),
            drawn_setups=drawn_setups(setup, model, stage.config.keep_rates),
            draw=self.drawer(self.run.model if stage.kind == SELECTOR else stage.model),
        )

    def step_setup(self, stage: Stage, model: ViTConfig, steps_per_epoch: int) -> StepSetup:
        """The static half of the stage's step on this model."""
        task = self.stage_task(stage)
        optim = stage.config.optim(steps_per_epoch, self.run.batch_size)
        teacher = None
        if isinstance(task.teacher, FrozenTeacher):
            teacher = structure(control_config(self.run.model, DENSE)).graphdef
        return StepSetup(
            graphdef=structure(model).graphdef,
            task=task,
            optimizer=make_optimizer(optim),
            schedule=learning_rate(optim),
            ema_decay=optim.ema_decay,
            seed=self.run.seed,
            stage_id=zlib.crc32(stage.name.encode()) >> 1,
            teacher=teacher,
            accumulate=self.run.accumulate,
            total_steps=optim.steps,
            skip=self.run.on_nonfinite == "skip",
            max_grad_norm=self.run.max_grad_norm,
        )

    def drawer(self, model: ViTConfig) -> Draw | None:
        """What draws the figures that such a model makes of the first test images; None: there is nothing to see."""
        task = self.task
        selects = any(spec.opens for spec in layer_specs(model))
        if not self.run.eval.figure_images or not (selects or task.draws_predictions):
            return None
        class_names = self.dataset.class_names if uses_labels(self.run) else ()
        evaluator = self.evaluator(model, task)

        def draw(params: Params) -> dict[str, np.ndarray]:
            own = structure(model).select(params)
            batch, out = evaluator.look(own, self.run.eval.figure_images)
            return task.pictures(batch, out, model, class_names)

        return draw


def first_state(
    setup: StepSetup, model: ViTConfig, trainable: tuple[str, ...], start: Params, teacher: Params
) -> TrainState:
    """The state at step 0: parameters of `start`, and random ones where it has none.

    trainable  regular expressions: the parameters are trained whose paths match all of them.
    teacher    parameters of a frozen teacher, or {}.
    """
    own, params = structure(model).shapes, start
    if own.keys() - start.keys():
        rngs = rngs_of(jax.random.key(setup.seed))
        params = get_params(build(model, rngs=rngs)) | start
    return init_state(setup, *split_trainable(params, *trainable), teacher)


def drawn_setups(
    setup: StepSetup, model: ViTConfig, keep_rates: tuple[float, ...]
) -> tuple[StepSetup, ...]:
    """The step at each of several keep rates; empty where the model selects no tokens."""
    if not any(spec.opens for spec in layer_specs(model)):
        return ()
    models = [dataclasses.replace(model, keep_rate=rate) for rate in keep_rates]
    return tuple(dataclasses.replace(setup, graphdef=structure(x).graphdef) for x in models)
