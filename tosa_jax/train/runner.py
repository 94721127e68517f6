"""Carries a run through its stages, then scores and draws what they left."""

import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from tosa_jax.config import RunConfig, to_json
from tosa_jax.data.class_names import write_names
from tosa_jax.data.pipeline import DataConfig, DatasetFacts, open_dataset
from tosa_jax.distributed import coordination, memory
from tosa_jax.distributed.devices import check_dtype, describe_device, versions
from tosa_jax.distributed.mesh import make_mesh, to_global, to_host
from tosa_jax.distributed.messages import say
from tosa_jax.distributed.preemption import Stopped, StopRequest, catch_signals
from tosa_jax.errors import ConfigError
from tosa_jax.models import cost
from tosa_jax.models.bypass_fit import fit_bypass
from tosa_jax.models.factory import build, structure
from tosa_jax.models.method import MAIN
from tosa_jax.models.optim import HEAD, split_trainable
from tosa_jax.models.params import Params, get_params, set_params
from tosa_jax.models.weights.load import load_pretrained, save_selectors
from tosa_jax.models.weights.run_checkpoints import stage_folder
from tosa_jax.paths import AnyPath
from tosa_jax.reporting import figures, page, report
from tosa_jax.tasks.task import FrozenTeacher
from tosa_jax.train.checkpoints import Checkpoints
from tosa_jax.train.evaluate import Evaluator, shard, throughput
from tosa_jax.train.finite import check_metrics
from tosa_jax.train.identity import Identity
from tosa_jax.train.loop import stage_batches, train_stage
from tosa_jax.train.metric_writer import MetricWriter
from tosa_jax.train.reading import reading
from tosa_jax.train.stage_run import StageBuilder, StageRun
from tosa_jax.train.stages import (
    INIT,
    SELECTOR,
    KeepRate,
    Row,
    Stage,
    plan_stages,
    trunk,
    uses_labels,
)
from tosa_jax.train.step import StepSetup, trained_params


class Runner:
    """Trains the stages of a run, and compares, times and draws the models that they leave.

    builder  makes each stage's `StageRun`.
    params   the parameters that each stage left, by its name; "init": those that `init_from` and `init_selectors` hold.
    facts    what the report says of each stage, by its name.

    Raises ConfigError: batch size, data set, task and weights do not go together.
    """

    def __init__(self, run: RunConfig, workdir: AnyPath, stop: StopRequest) -> None:
        self.run, self.workdir, self.stop = run, workdir, stop
        self.mesh: Mesh = make_mesh(run.mesh)
        check_dtype("config.model.dtype", run.model.dtype, self.mesh.devices.flat[0])
        memory.keep_freed_memory()
        dataset = coordination.together(functools.partial(identified, run.data))
        coordination.check_same({"data set": dataclasses.asdict(dataset)})
        self.builder = StageBuilder(run, self.mesh, dataset, workdir)
        params, self.init_is_trained = load_init(run)
        if trunk(run) == INIT and not self.init_is_trained:
            self.check_teachers()
        self.params: dict[str, Params] = {INIT: shard(params, self.mesh)}
        self.facts: dict[str, dict[str, Any]] = {}

    def check_teachers(self) -> None:
        """Raises ConfigError if a stage distills from the dense model, whose head is random."""
        for stage in plan_stages(self.run)[0]:
            if isinstance(self.builder.stage_task(stage).teacher, FrozenTeacher):
                raise ConfigError(
                    f"config.{stage.kind}.distill_weight={stage.config.distill_weight} needs a trained dense model: "
                    "init_from has no head for this task, and there is no pretrain stage"
                )

    def stage_run(self, stage: Stage) -> StageRun:
        """A stage, ready for the loop, from what the stage before it left."""
        return self.builder.stage_run(stage, self.params)

    def train(self, stage: Stage, writer: MetricWriter) -> None:
        """Trains one stage, or goes on with it, or loads it when it is done."""
        stage_run = self.stage_run(stage)
        task = stage_run.setup.task
        folder = stage_folder(self.workdir, stage.name)
        with Checkpoints(
            folder,
            task.best_metric,
            task.lower_is_better,
            self.run.keep_checkpoints,
            Identity(self.run, self.builder.dataset),
        ) as checkpoints:
            state, facts = train_stage(
                stage_run, self.run, self.mesh, checkpoints, writer, self.stop
            )
        self.facts[stage.name] = facts | {
            "row": stage.row,
            "keep_rate": _single_number(stage.keep_rate),
        }
        self.params[stage.name] = self.params[stage.start] | trained_params(state)
        if stage.kind == SELECTOR:
            self.params[stage.name] |= self.fit(stage, stage_run.setup)

    def fit(self, stage: Stage, setup: StepSetup) -> Params:
        """Fits what the bypass needs, in closed form, and writes it with the selectors to a file of their own."""
        own = structure(self.run.model)
        params = own.select(self.params[stage.name])
        model = set_params(own.graphdef, params)
        fitted = shard(fit_bypass(model, self.images(setup)), self.mesh)
        on_host = to_host(params | fitted)
        if coordination.is_main():
            path = self.workdir / "selectors.safetensors"
            save_selectors(set_params(own.graphdef, on_host), path)
        return fitted

    def images(self, setup: StepSetup) -> Iterator[jax.Array]:
        """The first `bypass_fit_images` images of a stage, in whole batches: normalised, [b height width c]."""
        with reading(stage_batches(self.run, setup, self.mesh), "fit of the bypass") as batches:
            for _ in range(-(-self.run.bypass_fit_images // self.run.batch_size)):
                yield setup.task.inputs(to_global(next(batches), self.mesh)["image"])

    def row_params(self, row: Row) -> Params:
        """The parameters of a row's model, on the mesh."""
        return shard(structure(row.model).select(self.params[row.stage]), self.mesh)

    def compare(self, rows: list[Row], *, timed: bool = True) -> list[dict[str, Any]]:
        """The rows of the report, scored and timed. A model with a random head has a cost and a speed, but no score.

        timed  False: the speed of all is None.

        Raises Stopped: a signal, before the next row; NonFiniteLossError: a score is not finite.
        """
        results: list[dict[str, Any]] = []
        candidates: list[tuple[Evaluator, Params]] = []
        for row in rows:
            if (signum := self.stop.agreed()) is not None:
                raise Stopped(signum)
            evaluator = self.builder.evaluator(row.model, self.builder.task)
            params = self.row_params(row)
            scored = row.stage != INIT or self.init_is_trained
            metrics, count = evaluator(params) if scored else ({}, self.builder.dataset.num_eval)
            check_metrics(
                f"the closing row {row.name}", metrics, params, "all checkpoints are kept"
            )
            result = {
                "name": row.name,
                "keep_rate": _single_number(row.keep_rate),
                "split": self.run.data.eval_split,
                "count": count,
                "metrics": metrics,
                "gmacs": cost.gmacs(row.model),
            }
            results.append(result)
            candidates.append((evaluator, params))
        speeds = throughput(candidates) if timed else [None] * len(rows)
        for result, speed in zip(results, speeds, strict=True):
            result["img_per_sec"] = speed
        return results

    def draw(self, rows: list[Row], writer: MetricWriter) -> None:
        """Writes the figures of what ToSA, or else the last row, makes of the first test images."""
        row = next((row for row in rows if row.name == MAIN), rows[-1])
        if (draw := self.builder.drawer(row.model)) is None:
            return
        drawn = draw(self.row_params(row))
        writer.truncate("eval", -1)  # a run that was stopped after this draws again
        for name, figure in drawn.items() if coordination.is_main() else ():
            try:
                figures.write_png(self.workdir / f"{name}.png", figure)
            except OSError as error:
                say(f"{name}.png cannot be written ({error.strerror or error})")
            writer.image("eval", 0, name, figure)


def identified(data: DataConfig) -> DatasetFacts:
    """The facts of a data set with its fingerprint."""
    dataset = open_dataset(data)
    return dataclasses.replace(dataset.facts, fingerprint=dataset.fingerprint())


def _single_number(keep_rate: KeepRate) -> float | list[float] | None:
    """A keep rate for the report: a tuple of one value becomes that value."""
    if isinstance(keep_rate, tuple):
        return keep_rate[0] if len(keep_rate) == 1 else list(keep_rate)
    return keep_rate


def load_init(run: RunConfig) -> tuple[Params, bool]:
    """The parameters that `init_from` and `init_selectors` hold, and whether the model's head is among them.

    A head that is not is random. Raises WeightsError: a file cannot be read, or does not fit the model.
    """
    if not (run.init_from or run.init_selectors):
        return {}, False

    def tell(line: str) -> None:
        say(line)

    model = build(run.model, rngs=nnx.Rngs(run.seed))
    fresh = get_params(model)
    load_pretrained(
        model,
        run.init_from or None,
        selectors=run.init_selectors or None,
        on_message=tell,
    )
    params = get_params(model)
    wanted = r"^kinds/" if not run.init_from else "." if run.init_selectors else r"^(?!kinds/)"
    trained = all(params[name] is not fresh[name] for name in params if re.search(HEAD, name))
    return split_trainable(params, wanted)[0], trained


def run_stages(run: RunConfig, workdir: AnyPath, *, timed: bool = True) -> dict[str, Any]:
    """A whole run in its work directory; goes on where an earlier one stopped. Returns the report.

    timed  whether the report has the speed of each network; measuring takes as long as scoring some batches.

    Raises Stopped: a signal, after a checkpoint.
    """
    if (done := report.read_report(workdir)) is not None:
        if coordination.is_main() and not (workdir / page.FILE).exists():
            write_reports(workdir, done)
        return done
    stages, rows = plan_stages(run)
    with (
        catch_signals(run.grace_seconds) as stop,
        MetricWriter(workdir, coordination.is_main()) as writer,
    ):
        runner = Runner(run, workdir, stop)
        write_names(workdir, runner.builder.dataset.class_names)
        for stage in stages:
            runner.train(stage, writer)
        if not uses_labels(run):
            rows = []  # labels that mean nothing here are not scored
        results = runner.compare(rows, timed=timed) if rows else []
        if rows:
            runner.draw(rows, writer)
    result = {
        "config": to_json(run),
        "device": describe_device(),
        "versions": versions(),
        "stages": runner.facts,
        "results": results,
    }
    if coordination.is_main():
        write_reports(workdir, result)
    return result


def write_reports(workdir: AnyPath, result: dict[str, Any]) -> None:
    """Writes `report.json` and its page. Without room for them a line says so: checkpoints have what they tell."""
    try:
        if not (workdir / report.FILE).exists():
            report.write_report(workdir, result)
        page.write_page(workdir, result)
    except OSError as error:
        say(
            f"the report cannot be written ({error.strerror or error}); mend that, and the same command writes it"
        )
