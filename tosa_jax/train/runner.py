"""Carries a run through its stages: what each one loads, freezes and optimises; then scores what they left."""

import contextlib
import dataclasses
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from tosa_jax.config import RunConfig, StageConfig, to_json
from tosa_jax.data.class_names import write_names
from tosa_jax.data.pipeline import DatasetFacts, open_dataset
from tosa_jax.distributed import coordination, memory
from tosa_jax.distributed.devices import describe_device, versions
from tosa_jax.distributed.mesh import check_batch, make_mesh, to_global, to_host
from tosa_jax.distributed.preemption import StopRequest, catch_signals
from tosa_jax.errors import ConfigError
from tosa_jax.models import cost
from tosa_jax.models.bypass_fit import fit_bypass
from tosa_jax.models.factory import build, control_config
from tosa_jax.models.method import DENSE, MAIN
from tosa_jax.models.optim import HEAD, learning_rate, make_optimizer, split_trainable
from tosa_jax.models.params import Params, get_params, set_params, split
from tosa_jax.models.plan import layer_specs
from tosa_jax.models.vit_config import ViTConfig
from tosa_jax.models.weights.load import load_pretrained, save_selectors
from tosa_jax.paths import AnyPath
from tosa_jax.reporting import figures, page, report
from tosa_jax.tasks import TASKS
from tosa_jax.tasks.selector_fitting import SelectorFitting
from tosa_jax.tasks.task import FrozenTeacher, Task
from tosa_jax.train.checkpoints import Checkpoints
from tosa_jax.train.evaluate import Evaluator, shard, throughput
from tosa_jax.train.loop import StageRun, stage_batches, train_stage
from tosa_jax.train.metric_writer import MetricWriter
from tosa_jax.train.stages import Row, Stage, plan_stages, uses_labels
from tosa_jax.train.step import StepSetup, init_state, trained_params


class Runner:
    """Carries a run through its stages; networks of finished stages are kept by stage name.

    `mesh`, `dataset` and `init` (what `init_from` and `init_selectors` hold) are opened from the configuration unless
    they are given: for `stage_run` alone, devices for compiling only and abstract parameters will do.
    """

    def __init__(
        self,
        run: RunConfig,
        workdir: AnyPath,
        stop: StopRequest,
        *,
        mesh: Mesh | None = None,
        dataset: DatasetFacts | None = None,
        init: Params | None = None,
    ) -> None:
        self.run, self.workdir, self.stop = run, workdir, stop
        self.mesh: Mesh = make_mesh(run.mesh) if mesh is None else mesh
        memory.keep_freed_memory()
        check_batch("batch_size", run.batch_size, self.mesh, run.accumulate)
        check_batch("eval.batch_size", run.eval.batch_size, self.mesh)
        if dataset is None:
            dataset = coordination.together(lambda: open_dataset(run.data).facts)
            coordination.check_same({"data set": dataclasses.asdict(dataset)})
        self.dataset: DatasetFacts = dataset
        if uses_labels(run):
            TASKS[run.task].check_dataset(run, self.dataset)
        params, self.init_is_trained = load_init(run) if init is None else (init, True)
        if init is None:
            params = shard(params, self.mesh)
        self.networks: dict[str, Params] = {"init": params}
        self.facts: dict[str, dict[str, Any]] = {}

    @property
    def steps_per_epoch(self) -> int:
        """Updates in an epoch, a last part of a batch left out; at least 1."""
        return max(self.dataset.num_train // self.run.batch_size, 1)

    @property
    def trunk(self) -> str:
        """The dense network that the other stages start from."""
        return "pretrain" if self.run.has_stage("pretrain") else "init"

    def task(self, stage: StageConfig = StageConfig()) -> Task:  # noqa: B008
        """The task, as this stage has it."""
        return TASKS[self.run.task].from_run(self.run, stage)

    def evaluator(self, model: ViTConfig, task: Task) -> Evaluator:
        """Scores networks of this configuration on the evaluation split."""
        graphdef, _ = split(cost.abstract_model(model))
        return Evaluator(
            graphdef, task, self.run.data, self.mesh, self.run.eval.batch_size, self.run.seed
        )

    def stage_run(self, stage: Stage) -> StageRun:
        """Everything that the loop needs to train this stage. Raises ConfigError: no teacher to distill from."""
        config = stage.config
        optim = config.optim(self.steps_per_epoch, self.run.batch_size)
        model = dataclasses.replace(stage.model, drop_path_rate=config.drop_path_rate)
        network = cost.abstract_model(model)
        graphdef, own = split(network)
        macs = cost.training_macs(network, only_selectors=stage.kind == "selector")
        task = self.task(config)
        if stage.kind == "selector":
            task = SelectorFitting.of_task(task)
        teacher, teacher_params = None, {}
        if isinstance(task.teacher, FrozenTeacher):
            if self.trunk == "init" and not self.init_is_trained:
                raise ConfigError(
                    f"config.{stage.kind}.distill_weight={config.distill_weight} needs a trained dense network: "
                    "init_from has no head for this task, and there is no pretrain stage"
                )
            dense = control_config(self.run.model, DENSE)
            teacher, names = split(cost.abstract_model(dense))
            macs += cost.macs(cost.abstract_model(dense))
            teacher_params = {name: self.networks[self.trunk][name] for name in names}
        setup = StepSetup(
            graphdef, task, make_optimizer(optim), learning_rate(optim), optim.ema_decay,
            self.run.seed, zlib.crc32(stage.name.encode()) >> 1, teacher, self.run.accumulate,
            optim.steps,
        )  # fmt: skip
        budgets = tuple(
            dataclasses.replace(setup, graphdef=split(cost.abstract_model(
                dataclasses.replace(model, keep_rate=rate)))[0])
            for rate in (config.keep_rates if any(p.opens for p in layer_specs(model)) else ())
        )  # fmt: skip
        start = {name: x for name, x in self.networks[stage.start].items() if name in own}

        def init(start, teacher_params):
            params = start
            if own.keys() - start.keys():
                rngs = jax.random.key(self.run.seed)
                fresh = get_params(build(model, rngs=nnx.Rngs(params=rngs)))
                params = {name: start.get(name, fresh[name]) for name in own}
            return init_state(setup, *split_trainable(params, stage.trainable), teacher_params)

        return StageRun(
            name=stage.name,
            total_steps=optim.steps,
            eval_steps=config.duration("eval", self.steps_per_epoch),
            checkpoint_steps=config.duration("checkpoint", self.steps_per_epoch),
            setup=setup,
            init=init,
            init_args=(start, teacher_params),
            evaluator=self.evaluator(stage.model, task),
            evaluate_first=bool(start),
            flops_per_image=2.0 * macs,
            budgets=budgets,
            profile_dir=str(self.workdir / "profile" / stage.name),
            draw=self.drawer(self.run.model if stage.kind == "selector" else stage.model),
        )

    def drawer(self, model: ViTConfig) -> Callable[[Params], dict[str, np.ndarray]] | None:
        """What draws the figures, by file name, of what such networks make of the first test images.

        None where there is nothing to see.
        """
        task = self.task()
        selects = any(spec.opens for spec in layer_specs(model))
        if not self.run.eval.figure_images or not (selects or task.draws_predictions):
            return None
        names_of_classes = self.dataset.class_names if uses_labels(self.run) else ()
        evaluator, names = self.evaluator(model, task), split(cost.abstract_model(model))[1]

        def draw(params: Params) -> dict[str, np.ndarray]:
            own = {name: params[name] for name in names}
            batch, out = evaluator.look(own, self.run.eval.figure_images)
            return task.pictures(batch, out, model, names_of_classes)

        return draw

    def train(self, stage: Stage, writer: MetricWriter) -> None:
        """Trains one stage, or goes on with it, or loads it when it is done."""
        stage_run = self.stage_run(stage)
        task = stage_run.setup.task
        folder = self.workdir / "checkpoints" / stage.name
        with Checkpoints(folder, task.best_metric, task.lower_is_better) as checkpoints:
            state, facts = train_stage(
                stage_run, self.run, self.mesh, checkpoints, writer, self.stop
            )
        self.facts[stage.name] = facts | {"row": stage.row, "keep_rate": _plain(stage.keep_rate)}
        self.networks[stage.name] = self.networks[stage.start] | trained_params(state)
        if stage.kind == "selector":
            self.fit_and_save(stage)

    def fit_and_save(self, stage: Stage) -> None:
        """Fits what the bypass needs, in closed form, and writes it with the selectors to a file of their own."""
        graphdef, names = split(cost.abstract_model(self.run.model))
        network = self.networks[stage.name]
        model = set_params(graphdef, {name: network[name] for name in names})
        fitted = shard(fit_bypass(model, self.images(stage)), self.mesh)
        network |= fitted
        params = to_host({name: network[name] for name in names})
        if coordination.is_main():
            save_selectors(set_params(graphdef, params), self.workdir / "selectors.safetensors")

    def images(self, stage: Stage) -> Iterator[jax.Array]:
        """The first normalised images [b height width c] of a stage, `bypass_fit_images` or a few more."""
        setup = self.stage_run(stage).setup
        with contextlib.closing(stage_batches(self.run, setup, self.mesh)) as batches:
            for _ in range(-(-self.run.bypass_fit_images // self.run.batch_size)):
                yield setup.task.inputs(to_global(next(batches), self.mesh)["image"])

    def candidate(self, row: Row) -> tuple[Evaluator, Params]:
        """What scores a row, and its parameters on the mesh."""
        evaluator = self.evaluator(row.model, self.task())
        params = self.networks[row.network]
        names = split(cost.abstract_model(row.model))[1]
        return evaluator, shard({name: params[name] for name in names}, self.mesh)

    def compare(self, rows: list[Row]) -> list[dict[str, Any]]:
        """The rows of the report, scored and timed; an untrained head has a cost and a speed, but no score."""
        results, candidates = [], [self.candidate(row) for row in rows]
        for row, (evaluator, params) in zip(rows, candidates, strict=True):
            scored = row.network != "init" or self.init_is_trained
            metrics, count = evaluator(params) if scored else ({}, self.dataset.num_eval)
            result = {
                "name": row.name,
                "keep_rate": _plain(row.keep_rate),
                "split": self.run.data.eval_split,
                "count": count,
                "metrics": metrics,
                "gmacs": cost.gmacs(row.model),
            }
            results.append(result)
        for result, speed in zip(results, throughput(candidates), strict=True):
            result["img_per_sec"] = speed
        return results

    def draw(self, rows: list[Row], writer: MetricWriter) -> None:
        """Writes the figures of what ToSA, or else the last row, makes of the first test images."""
        row = next((row for row in rows if row.name == MAIN), rows[-1])
        if (draw := self.drawer(row.model)) is None:
            return
        drawn = draw(self.candidate(row)[1])
        for name, figure in drawn.items() if coordination.is_main() else ():
            figures.write_png(self.workdir / f"{name}.png", figure)
            writer.image("eval", 0, name, figure)


def _plain(keep_rate: Any) -> Any:
    """A single budget as a number."""
    if isinstance(keep_rate, tuple):
        return keep_rate[0] if len(keep_rate) == 1 else list(keep_rate)
    return keep_rate


def load_init(run: RunConfig) -> tuple[Params, bool]:
    """The parameters of the run's own network with what `init_from` and `init_selectors` hold, and whether its head
    is among that; a head that is not is random."""
    if not (run.init_from or run.init_selectors):
        return {}, False
    model = build(run.model, rngs=nnx.Rngs(run.seed))
    fresh = get_params(model)
    load_pretrained(
        model,
        run.init_from or None,
        selectors=run.init_selectors or None,
        on_message=lambda line: print(line, file=sys.stderr),
    )
    params = get_params(model)
    wanted = r"^kinds/" if not run.init_from else "." if run.init_selectors else r"^(?!kinds/)"
    trained = all(params[name] is not fresh[name] for name in params if re.search(HEAD, name))
    return split_trainable(params, wanted)[0], trained


def run_stages(run: RunConfig, workdir: AnyPath) -> dict[str, Any]:
    """A whole run in its work directory; goes on where an earlier one stopped. Returns the report."""
    if (done := report.read_report(workdir)) is not None:
        return done
    stages, rows = plan_stages(run)
    with catch_signals() as stop, MetricWriter(workdir, coordination.is_main()) as writer:
        runner = Runner(run, workdir, stop)
        write_names(workdir, runner.dataset.class_names)
        for stage in stages:
            runner.train(stage, writer)
        if not uses_labels(run):
            rows = []  # labels that mean nothing here are not scored
        results = runner.compare(rows) if rows else []
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
        report.write_report(workdir, result)
        page.write_page(workdir, result)
    return result
