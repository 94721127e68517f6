"""Carries a run through its stages: what each one loads, freezes and optimises; then scores what they left."""

import dataclasses
import platform
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np
from jax.sharding import Mesh

from tosa_jax import cost, figures, report, report_page
from tosa_jax.checkpoints import Checkpoints
from tosa_jax.config import RunConfig, StageConfig, to_json
from tosa_jax.data.class_names import readable, write_names
from tosa_jax.data.pipeline import DatasetFacts, open_dataset
from tosa_jax.errors import ConfigError
from tosa_jax.evaluate import Evaluator, shard, throughput
from tosa_jax.models.params import Params, get_params, set_params, split
from tosa_jax.models.pretrained import load_pretrained, save_selectors
from tosa_jax.models.vit import VisionTransformer
from tosa_jax.models.vit_config import ViTConfig, with_plan
from tosa_jax.optim import learning_rate, make_optimizer, split_trainable
from tosa_jax.progress import MetricWriter
from tosa_jax.run_plan import BUDGETLESS, Row, Stage, plan_stages, uses_labels
from tosa_jax.sharding import check_batch, make_mesh
from tosa_jax.steps import StepSetup, init_state, trained_params
from tosa_jax.tasks.classification import Classification, SelectorFitting
from tosa_jax.token_pictures import draw_tokens
from tosa_jax.train import StageRun, StopRequest, catch_signals, train_stage


class Runner:
    """Carries a run through its stages; networks of finished stages are kept by stage name."""

    def __init__(self, run: RunConfig, workdir: Path, stop: StopRequest) -> None:
        self.run, self.workdir, self.stop = run, workdir, stop
        self.mesh: Mesh = make_mesh(run.mesh)
        check_batch("batch_size", run.batch_size, self.mesh)
        check_batch("eval.batch_size", run.eval.batch_size, self.mesh)
        self.dataset: DatasetFacts = open_dataset(run.data)
        check_classes(run, self.dataset)
        self.networks: dict[str, Params] = {"init": shard(load_init(run), self.mesh)}
        self.facts: dict[str, dict[str, Any]] = {}

    @property
    def steps_per_epoch(self) -> int:
        return max(self.dataset.num_train // self.run.batch_size, 1)

    @property
    def trunk(self) -> str:
        """The dense network that the other stages start from."""
        return "pretrain" if self.run.has_stage("pretrain") else "init"

    def task(self, stage: StageConfig = StageConfig()) -> Classification:  # noqa: B008
        """The task, with this stage's smoothing and mixing."""
        channels = self.run.model.in_chans
        mean, std = (
            x * channels if len(x) == 1 else x for x in (self.run.inputs.mean, self.run.inputs.std)
        )
        return Classification(
            num_classes=self.run.model.num_classes,
            mean=mean,
            std=std,
            label_smoothing=stage.label_smoothing,
            mixing=stage.mixing,
        )

    def evaluator(self, model: ViTConfig, task: Any) -> Evaluator:
        """Scores networks of this configuration on the evaluation split."""
        graphdef, _ = split(cost.abstract_model(model))
        return Evaluator(
            graphdef, task, self.run.data, self.mesh, self.run.eval.batch_size, self.run.seed
        )

    def stage_run(self, stage: Stage) -> StageRun:
        """Everything that the loop needs to train this stage."""
        config: StageConfig = getattr(self.run, stage.kind)
        optim = config.optim(self.steps_per_epoch, self.run.batch_size)
        model = dataclasses.replace(stage.model, drop_path_rate=config.drop_path_rate)
        graphdef, own = split(cost.abstract_model(model))
        task = self.task(config)
        if stage.kind == "selector":
            task = SelectorFitting(task=task)
        teacher, teacher_params = None, {}
        if config.distill_weight:
            dense = with_plan(self.run.model, "standard")
            teacher, names = split(cost.abstract_model(dense))
            teacher_params = {name: self.networks[self.trunk][name] for name in names}
        setup = StepSetup(
            graphdef, task, make_optimizer(optim), learning_rate(optim), optim.ema_decay,
            self.run.seed, zlib.crc32(stage.name.encode()) >> 1, teacher, config.distill_weight,
        )  # fmt: skip
        start = {name: x for name, x in self.networks[stage.start].items() if name in own}

        def init(start, teacher_params):
            params = start
            if own.keys() - start.keys():
                rngs = jax.random.key(self.run.seed)
                fresh = get_params(VisionTransformer(model, rngs=flax.nnx.Rngs(params=rngs)))
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
            draw=self.drawer(self.run.model if stage.kind == "selector" else stage.model),
        )

    def drawer(self, model: ViTConfig) -> Callable[[Params], np.ndarray] | None:
        """What draws the tokens that networks of this configuration select on the first test images.

        None where nothing selects.
        """
        if set(model.plan) <= {"standard", "skip"} or not self.run.eval.figure_images:
            return None
        evaluator, names = self.evaluator(model, self.task()), split(cost.abstract_model(model))[1]
        classes = readable(self.dataset.class_names)

        def draw(params: Params) -> np.ndarray:
            own = {name: params[name] for name in names}
            batch, selected = evaluator.look(own, self.run.eval.figure_images)
            labels = [classes[i] for i in batch["label"]] if uses_labels(self.run) else None
            return draw_tokens(model, batch["image"], selected, labels=labels)

        return draw

    def train(self, stage: Stage, writer: MetricWriter) -> None:
        """Trains one stage, or goes on with it, or loads it when it is done."""
        stage_run = self.stage_run(stage)
        checkpoints = Checkpoints(
            self.workdir / "checkpoints" / stage.name, stage_run.setup.task.best_metric
        )
        try:
            state, facts = train_stage(
                stage_run, self.run, self.mesh, checkpoints, writer, self.stop
            )
        finally:
            checkpoints.close()
        self.facts[stage.name] = facts
        self.networks[stage.name] = self.networks[stage.start] | trained_params(state)
        if stage.kind == "selector":
            graphdef, names = split(cost.abstract_model(self.run.model))
            network = self.networks[stage.name]
            model = set_params(graphdef, {name: network[name] for name in names})
            save_selectors(model, self.workdir / "selectors.safetensors")

    def contestant(self, row: Row) -> tuple[Evaluator, Params]:
        """What scores a row, and its parameters on the mesh."""
        evaluator = self.evaluator(row.model, self.task())
        params = self.networks[row.network]
        names = split(cost.abstract_model(row.model))[1]
        return evaluator, shard({name: params[name] for name in names}, self.mesh)

    def compare(self, rows: list[Row]) -> list[dict[str, Any]]:
        """The rows of the report, scored and timed."""
        results, contestants = [], [self.contestant(row) for row in rows]
        for row, (evaluator, params) in zip(rows, contestants, strict=True):
            metrics, count = evaluator(params)
            result = {
                "name": row.name,
                "keep_rate": None if _is_budgetless(row) else _plain(row.model.keep_rate),
                "split": self.run.data.eval_split,
                "count": count,
                "metrics": metrics,
                "gmacs": cost.gmacs(row.model),
            }
            results.append(result)
        for result, speed in zip(results, throughput(contestants), strict=True):
            result["img_per_sec"] = speed
        return results

    def draw(self, rows: list[Row], writer: MetricWriter) -> None:
        """Writes the figure of the tokens that ToSA selects; nothing where no row does."""
        row = next((row for row in rows if row.name == "tosa"), None)
        drawer = self.drawer(row.model) if row else None
        if row is None or drawer is None:
            return
        figure = drawer(self.contestant(row)[1])
        figures.write_png(self.workdir / "selected_tokens.png", figure)
        writer.image("eval", 0, "selected_tokens", figure)


def _is_budgetless(row: Row) -> bool:
    return row.name in (*BUDGETLESS, "dense_pretrained")


def _plain(keep_rate: Any) -> Any:
    """A single budget as a number."""
    if isinstance(keep_rate, tuple):
        return keep_rate[0] if len(keep_rate) == 1 else list(keep_rate)
    return keep_rate


def check_classes(run: RunConfig, dataset: DatasetFacts) -> None:
    """Raise a ConfigError if labels are needed and the head does not fit them."""
    if uses_labels(run) and run.model.num_classes != dataset.num_classes:
        raise ConfigError(
            f"config.model.num_classes={run.model.num_classes}, but {run.data.name!r} has "
            f"{dataset.num_classes} classes: set it to that"
        )


def load_init(run: RunConfig) -> Params:
    """The parameters that `init_from` and `init_selectors` hold, read for the run's own network."""
    if not (run.init_from or run.init_selectors):
        return {}
    model = VisionTransformer(run.model, rngs=flax.nnx.Rngs(run.seed))
    load_pretrained(
        model,
        run.init_from or None,
        selectors=run.init_selectors or None,
        on_message=lambda line: print(line, file=sys.stderr),
    )
    params = get_params(model)
    wanted = r"^kinds/" if not run.init_from else "." if run.init_selectors else r"^(?!kinds/)"
    return split_trainable(params, wanted)[0]


def run_stages(run: RunConfig, workdir: Path) -> dict[str, Any]:
    """A whole run in its work directory; goes on where an earlier one stopped. Returns the report."""
    if (done := report.read_report(workdir)) is not None:
        return done
    stages, rows = plan_stages(run)
    with catch_signals() as stop, MetricWriter(workdir) as writer:
        runner = Runner(run, workdir, stop)
        write_names(workdir, runner.dataset.class_names)
        for stage in stages:
            runner.train(stage, writer)
        if not uses_labels(run):
            rows = []  # labels that mean nothing here are not scored
        results = runner.compare(rows) if rows else []
        runner.draw(rows, writer)
    result = {
        "config": to_json(run),
        "device": describe_device(),
        "versions": versions(),
        "stages": runner.facts,
        "results": results,
    }
    report.write_report(workdir, result)
    report_page.write_page(workdir, result)
    return result


def describe_device() -> str:
    """Number and kind of the devices."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": flax.__version__,
    }
