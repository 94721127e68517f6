"""The training loop of one stage. Its order is fixed: checkpoint, evaluate, next batch, step."""

import contextlib
import functools
import math
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from jax.sharding import Mesh

from tosa_jax.config import RunConfig, profile_range
from tosa_jax.data.pipeline import open_dataset
from tosa_jax.distributed.coordination import is_main
from tosa_jax.distributed.devices import peak_flops
from tosa_jax.distributed.memory import check_fits
from tosa_jax.distributed.mesh import (
    batch_sharding,
    process_rows,
    replicated,
    to_global,
    tree_shardings,
)
from tosa_jax.distributed.preemption import Stopped, StopRequest
from tosa_jax.models.params import Params
from tosa_jax.tasks.task import Batch
from tosa_jax.train.checkpoints import Checkpoints, Timer, with_shardings
from tosa_jax.train.finite import StepWatch, check_metrics, check_state
from tosa_jax.train.metric_writer import MetricWriter
from tosa_jax.train.profiling import StepTrace
from tosa_jax.train.progress import Chrono, Progress
from tosa_jax.train.reading import Batches, reading
from tosa_jax.train.stage_run import StageRun
from tosa_jax.train.step import StepSetup, TrainState, saved_tree, train_step, trained_params

STEPS_AHEAD = 3
"""Steps the host may be ahead of the devices: enough to keep them busy, few enough to stop soon after a signal."""


def jit_step(setup: StepSetup, shardings: TrainState, mesh: Mesh) -> jax.stages.Wrapped:
    """The jitted training step, (state, batch) -> (state, metrics). The state's memory is used again (donated).

    shardings  of the state, going in and coming out.
    """
    return jax.jit(
        functools.partial(train_step, setup=setup, mesh=mesh),
        donate_argnums=0,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
    )


class Log:
    """Fetches the metrics of steps one interval late, so that the device never waits for the log.

    peak_share  the operations that training on one image takes, as a share of what all devices do in a second.
    watch       looks at each step.
    """

    def __init__(
        self,
        stage: str,
        writer: MetricWriter,
        progress: Progress,
        chrono: Chrono,
        peak_share: float,
        watch: StepWatch,
    ) -> None:
        self.watch = watch
        self.stage, self.writer, self.progress, self.chrono = stage, writer, progress, chrono
        self.peak_share = peak_share
        self.fresh: list[tuple[int, dict]] = []
        self.ready: list[tuple[int, dict]] = []

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of the update that led to `step`; waits for the update `STEPS_AHEAD` before it."""
        self.fresh.append((step, metrics))
        if len(self.fresh) > STEPS_AHEAD:
            jax.block_until_ready(self.fresh[-1 - STEPS_AHEAD][1])

    def flush(self, *, everything: bool = False) -> None:
        """Writes the interval before this one; with `everything`, this one too.

        Raises NonFiniteLossError: a loss of these steps is not finite.
        """
        due = self.ready + self.fresh if everything else self.ready
        self.ready, self.fresh = [] if everything else self.fresh, []
        if not due:
            return
        values = jax.device_get([metrics for _, metrics in due])
        self.chrono.tick(due[-1][0])
        for (step, _), step_metrics in zip(due, values, strict=True):
            if line := self.watch.look(step, step_metrics):
                self.progress.message(line)
        last = due[-1][0]
        record = {name: float(x) for name, x in values[-1].items() if name != "bad_gradient"}
        losses = [float(v["loss"]) for v in values if math.isfinite(v["loss"])]
        record["loss"] = sum(losses) / len(losses) if losses else math.nan
        mfu = self.chrono.images_per_second * self.peak_share
        self.writer.write(
            self.stage,
            last,
            {f"train/{name}": x for name, x in record.items()}
            | {
                "perf/img_per_sec": self.chrono.images_per_second,
                "perf/data_wait_frac": self.chrono.data_wait_fraction,
                "perf/mfu": mfu,
            },
        )
        self.progress.update(last, record["loss"], self.chrono, mfu)


class Start(NamedTuple):
    """What a stage starts or goes on from.

    shardings  one for each array of `state`, in its structure.
    facts      what the report says of the stage so far: JSON values.
    restored   whether state and facts come from a checkpoint.
    """

    shardings: TrainState
    state: TrainState
    facts: dict[str, Any]
    restored: bool


def restore_or_init(stage: StageRun, mesh: Mesh, checkpoints: Checkpoints) -> Start:
    """The newest checkpoint that can be read, else the state at step 0.

    Raises WorkdirError: there are checkpoints, and none of them can be read.
    """
    abstract = jax.eval_shape(stage.init, *stage.init_args)
    shardings = tree_shardings(abstract, mesh)
    restored = checkpoints.restore(saved_tree(with_shardings(abstract, shardings)))
    if restored is not None:
        tree, facts = restored
        return Start(shardings, abstract._replace(**tree), facts, restored=True)
    state = jax.jit(stage.init, out_shardings=shardings)(*stage.init_args)
    return Start(shardings, state, {}, restored=False)


def begin(stage: StageRun, mesh: Mesh, checkpoints: Checkpoints, writer: MetricWriter) -> Start:
    """What the stage goes on from, with the scores that its step has; records of later steps are dropped.

    Raises WorkdirError as `restore_or_init`.
    """
    start = restore_or_init(stage, mesh, checkpoints)
    first = int(start.state.step)
    writer.truncate(stage.name, first, with_scores=first in checkpoints.scores)
    if checkpoints.scores.get(first):
        start.facts[score_name(first)] = checkpoints.scores[first]
    return start


def check_evaluation(stage: StageRun, params: Params) -> None:
    """Raises DeviceError if an evaluation does not fit the device. A signal ends this; who calls asks for it next."""
    with contextlib.suppress(Stopped):
        stage.evaluator.check(params)


def compile_fitting(
    step: jax.stages.Wrapped, state: TrainState, batch: Batch, batch_size: int
) -> jax.stages.Compiled:
    """The step compiled for these arguments. Raises DeviceError if it does not fit the device."""
    compiled = step.lower(state, batch).compile()
    check_fits(
        compiled,
        f"a training step of batch_size={batch_size}",
        "set --config.batch_size lower, --config.model.map_chunk=64, or spread the state with --config.mesh.fsdp=N",
    )
    return compiled


def draw_keep_rate(seed: int, stage_id: int, step: int, count: int) -> int:
    """Which of `count` keep rates the update after `step` uses: the same in every process and after a restart.

    In each `count` updates every keep rate is used once, in an order that is drawn anew.
    """
    draw = np.random.default_rng([seed, stage_id, step // count])
    return int(draw.permutation(count)[step % count])


class Updates:
    """The compiled steps of a stage: one, or one for each drawn keep rate. Each is compiled at first use."""

    def __init__(self, stage: StageRun, shardings: TrainState, mesh: Mesh, batch_size: int) -> None:
        self.setups = stage.drawn_setups or (stage.setup,)
        self.shardings, self.mesh, self.batch_size = shardings, mesh, batch_size
        self.compiled: dict[int, jax.stages.Compiled] = {}

    def __call__(
        self, step: int, state: TrainState, batch: Batch
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """The state after an update on `batch`, and its metrics. Raises DeviceError if it does not fit."""
        setup = self.setups[0]
        i = draw_keep_rate(setup.seed, setup.stage_id, step, len(self.setups))
        if i not in self.compiled:
            jitted = jit_step(self.setups[i], self.shardings, self.mesh)
            self.compiled[i] = compile_fitting(jitted, state, batch, self.batch_size)
        return self.compiled[i](state, batch)


def evaluate(stage: StageRun, step: int, params: Params, writer: MetricWriter) -> dict[str, float]:
    """Scores the model, and writes its metrics and figures of the first examples.

    Raises DeviceError or DataError, as the evaluator.
    """
    metrics, _ = stage.evaluator(params)
    writer.write(stage.name, step, {f"val/{k}": x for k, x in metrics.items()})
    for name, figure in stage.draw(params).items() if stage.draw else ():
        writer.image(stage.name, step, name, figure)
    writer.flush()
    return metrics


def stage_batches(run: RunConfig, setup: StepSetup, mesh: Mesh, first: int = 0) -> Batches:
    """This process's rows of a stage's batches, from the update `first` on."""
    index, count = process_rows(mesh)
    return open_dataset(run.data).train_batches(
        batch_size=run.batch_size,
        seed=run.seed + setup.stage_id,
        start_step=first,
        process_index=index,
        process_count=count,
    )


def batch_examples(run: RunConfig, setup: StepSetup, step: int) -> str:
    """Which examples the update that led to `step` took, as a part of a sentence."""
    found = open_dataset(run.data).batch_examples(
        batch_size=run.batch_size, seed=run.seed + setup.stage_id, step=step - 1
    )
    rest = f" and {len(found) - 8} more" if len(found) > 8 else ""
    return f"{', '.join(found[:8])}{rest}"


def step_watch(
    stage: StageRun, run: RunConfig, state: TrainState, checkpoints: Checkpoints
) -> StepWatch:
    """What looks at the steps of a stage, as `on_nonfinite` says."""
    return StepWatch(
        stage.name,
        sorted(state.params),
        checkpoints.kept,
        functools.partial(batch_examples, run, stage.setup),
        run.skip_at_most if run.on_nonfinite == "skip" else None,
        run.max_grad_norm,
    )


class Saver:
    """Saves the states of one stage: when it is asked to, and when the last checkpoint is too long ago.

    log      is written up to a state before that is saved.
    seconds  that the stage took before this start, which its facts count in.
    """

    def __init__(
        self,
        stage: StageRun,
        run: RunConfig,
        checkpoints: Checkpoints,
        log: Log,
        seconds: float,
    ) -> None:
        self.stage, self.checkpoints, self.log, self.chrono = stage, checkpoints, log, log.chrono
        self.seconds = seconds
        self.timer = Timer(60 * run.checkpoint_minutes, run.log_steps)

    def is_due(self, step: int) -> bool:
        """Whether a state is saved before the next step: so many steps or minutes after the last one, and at the end.

        It is due before each evaluation but that of step 0 too: an evaluation that fails costs no training.
        """
        scored = step > 0 and self.stage.evaluates_at(step)
        planned = self.stage.is_due(step, self.stage.checkpoint_steps)
        return self.timer.is_over(step) or planned or scored

    def __call__(self, step: int, state: TrainState, facts: dict[str, Any]) -> None:
        """Starts writing, with the facts of this moment. Raises NonFiniteLossError: the state is not worth it."""
        self.log.flush(everything=True)
        tree = saved_tree(state)
        facts |= {"steps": step, "seconds": self.seconds + self.chrono.elapsed_seconds}
        with self.chrono.pause("checkpoint"):
            check_state(self.stage.name, step, tree, self.checkpoints.kept())
            self.log.writer.flush()
            self.checkpoints.save(step, tree, facts)
        self.timer.restart()

    def and_stop(
        self, signum: int, step: int, state: TrainState, facts: dict[str, Any]
    ) -> NoReturn:
        """Saves, waits until everything is written, and raises Stopped."""
        self(step, state, facts)
        self.checkpoints.wait()
        raise Stopped(signum)


def train_stage(
    stage: StageRun,
    run: RunConfig,
    mesh: Mesh,
    checkpoints: Checkpoints,
    writer: MetricWriter,
    stop: StopRequest,
) -> tuple[TrainState, dict[str, Any]]:
    """Trains a stage to its end, from its newest checkpoint if there is one.

    Returns the state and what the report tells of the stage: `steps`, `seconds`, and the metrics `before` and `after`.
    Raises Stopped (a signal) after a checkpoint; NonFiniteLossError, which saves nothing; DeviceError (too large) at
    the first step.
    """
    shardings, state, facts, restored = begin(stage, mesh, checkpoints, writer)
    first = int(state.step)
    if restored and first == stage.total_steps and first in checkpoints.scores:
        return state, facts

    update = Updates(stage, shardings, mesh, run.batch_size)
    chrono = Chrono(first, stage.total_steps, run.batch_size)
    batches = reading(stage_batches(run, stage.setup, mesh, first), stage.name)
    trace = StepTrace(profile_range(run.profile_steps), stage.profile_dir)
    bar = Progress(stage.name, first, stage.total_steps, main_process=is_main())
    with batches as reader, bar as progress, trace:
        peak_share = stage.flops_per_image / peak_flops(mesh.devices.ravel().tolist())
        watch = step_watch(stage, run, state, checkpoints)
        log = Log(stage.name, writer, progress, chrono, peak_share, watch)
        save = Saver(stage, run, checkpoints, log, facts.get("seconds", 0.0))
        for step in range(first, stage.total_steps + 1):
            trace.at(step, state)
            if (signum := stop.agreed()) is not None:
                save.and_stop(signum, step, state, facts)
            if (step > first or not restored) and save.is_due(step):
                save(step, state, facts)
            scores = stage.evaluates_at(step) and step not in checkpoints.scores
            if scores:
                log.flush(everything=True)
                with chrono.pause("evaluate"):
                    line = score(stage, step, trained_params(state), facts, checkpoints, writer)
                progress.message(line)
            if step == stage.total_steps:
                break
            try:
                with chrono.data_wait():
                    batch = to_global(next(reader), mesh)
            except Stopped as stopped:  # input may have stalled: there is no next step
                save.and_stop(stopped.signum, step, state, facts)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, step_metrics = update(step, state, batch)
            log.add(step + 1, step_metrics)
            if step == first and not scores:
                check_evaluation(stage, trained_params(state))  # not after all of the training
            if (step + 1) % run.log_steps == 0:
                log.flush()
    checkpoints.wait()
    return state, facts


def score_name(step: int) -> str:
    """Under which name the facts of a stage have the metrics of a step."""
    return "before" if step == 0 else "after"


def score(
    stage: StageRun,
    step: int,
    params: Params,
    facts: dict[str, Any],
    checkpoints: Checkpoints,
    writer: MetricWriter,
) -> str:
    """Evaluates, and writes down what came out, so that it is not done again. Returns a line that tells it.

    Raises NonFiniteLossError: a metric is not finite; DeviceError or DataError, as the evaluator.
    """
    metrics = evaluate(stage, step, params, writer)
    check_metrics(f"{stage.name} step {step}", metrics, params, checkpoints.kept())
    facts[score_name(step)] = metrics
    checkpoints.score(step, metrics)
    return f"{stage.name} step {step}: {summary_line(metrics)}"


def summary_line(metrics: dict[str, float]) -> str:
    """Metrics on one line, without those of single layers."""
    return ", ".join(
        f"{k} {x:.4f}" for k, x in metrics.items() if not k.rpartition("/")[2].isdigit()
    )
