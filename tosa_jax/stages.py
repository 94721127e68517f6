"""The stages of a run: what each one loads, freezes and optimises; then what the closing evaluation compares.

    pretrain -> selector -> finetune (and a fine-tune for each control and budget) -> eval
"""

import dataclasses
import logging
import platform
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np
from jax.sharding import Mesh

from tosa_jax import cost, figures, report
from tosa_jax.checkpoints import Checkpoints
from tosa_jax.config import RunConfig, StageConfig, to_json
from tosa_jax.data.pipeline import DatasetFacts, open_dataset
from tosa_jax.errors import ConfigError
from tosa_jax.evaluate import Evaluator, shard, throughput
from tosa_jax.models.methods import LAYER_KINDS
from tosa_jax.models.params import Params, get_params, split
from tosa_jax.models.vit import VisionTransformer
from tosa_jax.models.vit_config import ViTConfig, with_plan
from tosa_jax.optim import learning_rate, make_optimizer, split_trainable
from tosa_jax.progress import MetricWriter
from tosa_jax.sharding import check_batch, make_mesh, to_global
from tosa_jax.steps import StepSetup, init_state, trained_params
from tosa_jax.tasks.classification import Classification, SelectorFitting
from tosa_jax.train import StageRun, StopRequest, catch_signals, train_stage

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """One training stage.

    kind       "pretrain", "selector" or "finetune": which section of the configuration it follows.
    model      the network as it runs in this stage, its plan included.
    start      name of the stage whose network it starts from; "" for random weights.
    trainable  regular expression of the parameter paths that are trained.
    result     row of the closing table that its network fills, or "".
    """

    name: str
    kind: str
    model: ViTConfig
    start: str
    trainable: str = "."
    result: str = ""


def plan_stages(run: RunConfig) -> list[Stage]:
    """The stages of a run in order."""
    dense = with_plan(run.model, "standard")
    stages = []
    if run.has_stage("pretrain"):
        stages.append(Stage("pretrain", "pretrain", dense, "", result="dense_pretrained"))
    trunk = selectors = "pretrain" if stages else ""
    fit = tuple(LAYER_KINDS[kind].fit_kind for kind in run.model.plan)
    if run.has_stage("selector") and "selective_fit" in fit:
        model = dataclasses.replace(run.model, plan=fit)
        stages.append(Stage("selector", "selector", model, trunk, r"^kinds/\d+/selector/"))
        selectors = "selector"
    if not run.has_stage("finetune"):
        return stages
    for rate in run.keep_rates:
        name = "finetune" if rate == run.keep_rates[0] else f"finetune_{rate}"
        model = dataclasses.replace(run.model, keep_rate=rate)
        stages.append(
            Stage(name, "finetune", model, selectors, r"^(?!kinds/\d+/selector/)", "tosa")
        )
    for control in run.eval.controls:
        once = control in ("dense", "skip")
        kind = "standard" if control == "dense" else control
        for rate in run.keep_rates[:1] if once else run.keep_rates:
            name = f"finetune_{control}" + ("" if once else f"_{rate}")
            model = with_plan(run.model, kind, keep_rate=rate)
            stages.append(Stage(name, "finetune", model, trunk, result=control))
    return stages


class Runner:
    """Carries a run through its stages; networks of finished stages are kept by stage name."""

    def __init__(self, run: RunConfig, workdir: Path, stop: StopRequest) -> None:
        self.run, self.workdir, self.stop = run, workdir, stop
        self.mesh: Mesh = make_mesh(run.mesh)
        check_batch("batch_size", run.batch_size, self.mesh)
        check_batch("eval.batch_size", run.eval.batch_size, self.mesh)
        self.dataset: DatasetFacts = open_dataset(run.data)
        check_classes(run, self.dataset)
        self.networks: dict[str, Params] = {}
        self.facts: dict[str, dict[str, Any]] = {}

    @property
    def steps_per_epoch(self) -> int:
        return max(self.dataset.num_train // self.run.batch_size, 1)

    def task(self, label_smoothing: float = 0.0) -> Classification:
        """The task, with this stage's smoothing."""
        channels = self.run.model.in_chans
        mean, std = (
            x * channels if len(x) == 1 else x for x in (self.run.inputs.mean, self.run.inputs.std)
        )
        return Classification(mean=mean, std=std, label_smoothing=label_smoothing)

    def evaluator(self, model: ViTConfig, task: Any) -> Evaluator:
        """Scores networks of this configuration on the evaluation split."""
        graphdef, _ = split(cost.abstract_model(model))
        return Evaluator(
            graphdef, task, self.run.data, self.mesh, self.run.eval.batch_size, self.run.seed
        )

    def stage_run(self, stage: Stage) -> StageRun:
        """Everything that the loop needs to train this stage."""
        config: StageConfig = getattr(self.run, stage.kind)
        optim = config.optim(self.steps_per_epoch)
        model = dataclasses.replace(stage.model, drop_path_rate=config.drop_path_rate)
        graphdef, own = split(cost.abstract_model(model))
        task = self.task(config.label_smoothing)
        if stage.kind == "selector":
            task = SelectorFitting(task=task)
        teacher, teacher_params = None, {}
        if config.distill_weight:
            dense = with_plan(self.run.model, "standard")
            teacher, names = split(cost.abstract_model(dense))
            teacher_params = {name: self.networks[stage.start][name] for name in names}
        setup = StepSetup(
            graphdef, task, make_optimizer(optim), learning_rate(optim), optim.ema_decay,
            self.run.seed, zlib.crc32(stage.name.encode()) >> 1, teacher, config.distill_weight,
        )  # fmt: skip
        start = self.networks.get(stage.start, {})
        missing = own.keys() - start.keys()

        def init():
            params = {name: start[name] for name in own if name in start}
            if missing:
                rngs = jax.random.key(self.run.seed)
                fresh = get_params(VisionTransformer(model, rngs=flax.nnx.Rngs(params=rngs)))
                params = {name: params.get(name, fresh[name]) for name in own}
            return init_state(setup, *split_trainable(params, stage.trainable), teacher_params)

        return StageRun(
            name=stage.name,
            total_steps=optim.steps,
            eval_steps=config.duration("eval", self.steps_per_epoch),
            checkpoint_steps=config.duration("checkpoint", self.steps_per_epoch),
            setup=setup,
            init=init,
            evaluator=self.evaluator(stage.model, task),
            evaluate_first=bool(start),
        )

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
        self.networks[stage.name] = self.networks.get(stage.start, {}) | trained_params(state)

    def compare(self, stages: list[Stage]) -> list[dict[str, Any]]:
        """The rows of the report: every network that has a place in it, scored and timed."""
        rows, contestants = [], []
        for stage in (s for s in stages if s.result):
            evaluator = self.evaluator(stage.model, self.task())
            params = self.networks[stage.name]
            own = {name: params[name] for name in split(cost.abstract_model(stage.model))[1]}
            own = shard(own, self.mesh)
            metrics, count = evaluator(own)
            budget = stage.result in ("tosa", "random", "previous")
            rows.append(
                {
                    "name": stage.result,
                    "keep_rate": _plain(stage.model.keep_rate) if budget else None,
                    "split": self.run.data.eval_split,
                    "count": count,
                    "metrics": metrics,
                    "gmacs": cost.gmacs(stage.model),
                }
            )
            contestants.append((evaluator, own))
        for row, speed in zip(rows, throughput(contestants), strict=True):
            row["img_per_sec"] = speed
        return rows

    def draw_tokens(self, stages: list[Stage]) -> np.ndarray | None:
        """The figure of selected tokens on the first test images; None where nothing selects."""
        tosa = next((s for s in stages if s.result == "tosa"), None)
        if tosa is None:
            return None
        evaluator = self.evaluator(tosa.model, self.task())
        names = split(cost.abstract_model(tosa.model))[1]
        model_params = {name: self.networks[tosa.name][name] for name in names}
        batch = next(iter(evaluator.batches()))
        selected = jax.jit(evaluator.selected)(model_params, batch)
        count = self.run.eval.figure_images
        layers = [
            i for i, kind in enumerate(tosa.model.plan)
            if kind != "standard" and tosa.model.group(i)[0]
        ]  # fmt: skip
        return figures.selected_tokens_figure(
            np.asarray(batch["image"])[:count],
            tuple(np.asarray(x)[:count] for x in selected),
            grid=tosa.model.grid,
            num_prefix_tokens=tosa.model.num_prefix_tokens,
            titles=["input"] + [f"layer {i + 1}" for i in layers],
            labels=[self.dataset.class_names[i] for i in np.asarray(batch["label"])[:count]],
        )


def _plain(keep_rate: Any) -> Any:
    """A single budget as a number."""
    if isinstance(keep_rate, tuple):
        return keep_rate[0] if len(keep_rate) == 1 else list(keep_rate)
    return keep_rate


def check_classes(run: RunConfig, dataset: DatasetFacts) -> None:
    """Raise a ConfigError if the head does not fit the data set."""
    if run.model.num_classes != dataset.num_classes:
        raise ConfigError(
            f"config.model.num_classes={run.model.num_classes}, but {run.data.name!r} has "
            f"{dataset.num_classes} classes: set it to that"
        )


def run_stages(run: RunConfig, workdir: Path) -> dict[str, Any]:
    """A whole run in its work directory; goes on where an earlier one stopped. Returns the report."""
    if (done := report.read_report(workdir)) is not None:
        return done
    stages = plan_stages(run)
    with catch_signals() as stop, MetricWriter(workdir) as writer:
        runner = Runner(run, workdir, stop)
        for stage in stages:
            runner.train(stage, writer)
        rows = runner.compare(stages)
        figure = runner.draw_tokens(stages)
        if figure is not None:
            figures.write_png(workdir / "selected_tokens.png", figure)
            writer.image("eval", 0, "selected_tokens", figure)
    result = {
        "config": to_json(run),
        "device": describe_device(),
        "versions": versions(),
        "stages": runner.facts,
        "results": rows,
    }
    report.write_report(workdir, result)
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
