"""Which stages a run has, in which order, and which rows its closing table has.

pretrain -> selector -> finetune, and one more fine-tuning for each control and keep rate
"""

import dataclasses
from dataclasses import dataclass

from tosa_jax.config import RunConfig, StageConfig
from tosa_jax.errors import ConfigError
from tosa_jax.models.factory import control_config
from tosa_jax.models.method import DENSE, MAIN, METHODS, fitted_paths, fitting_plan, is_fitted
from tosa_jax.models.vit_config import ViTConfig
from tosa_jax.tasks import TASKS

KeepRate = float | tuple[float, ...] | None
"""One share of the patches for all selections, or one for each; None: it does not apply."""

INIT = "init"
"""Stands for a stage that is not trained: what `init_from` and `init_selectors` hold."""

SELECTOR = "selector"
"""The stage that fits selectors, and its kind."""

DENSE_PRETRAINED = f"{DENSE}_pretrained"
"""Name of the row of the dense model before it is fine-tuned."""


@dataclass(frozen=True)
class Stage:
    """One training stage.

    kind       `SELECTOR` where the selectors learn the maps; any other kind learns the task.
    config     durations, optimizer and augmentation: a section of the recipe, or what a task makes (`Task.plan`).
    model      configuration of the model in this stage, its plan included.
    start      name of the stage whose parameters it starts from, or `INIT`; parameters missing there are random.
    trainable  regular expression of the parameter paths that are trained, if those of `config` match them too.
    row        name of the method that is trained: `MAIN`, `DENSE` or a control's.
    keep_rate  what it is trained for; None if the model selects nothing, or updates draw their keep rate.
    """

    name: str
    kind: str
    model: ViTConfig
    start: str
    config: StageConfig
    trainable: str = "."
    row: str = DENSE
    keep_rate: KeepRate = None


@dataclass(frozen=True)
class Row:
    """A row of the closing table: a stage's parameters in a model of the configuration `model`.

    stage      name of the stage, or `INIT`.
    keep_rate  what the row is compared at; None if the model's cost does not depend on one.
    """

    name: str
    model: ViTConfig
    stage: str
    keep_rate: KeepRate = None


def plan_stages(run: RunConfig) -> tuple[list[Stage], list[Row]]:
    """The stages of a run in order, and the rows of its report, as the task extends them (`Task.plan`).

    Raises ConfigError: there is nothing to start from, or controls and fine-tuning do not go together.
    """
    return TASKS[run.task].plan(run, *recipe_stages(run))


def recipe_stages(run: RunConfig) -> tuple[list[Stage], list[Row]]:
    """The stages and rows that the recipe asks for. Raises ConfigError as `plan_stages`."""
    if not run.model.has_plan:
        _check_no_methods(run)
    dense = control_config(run.model, DENSE)
    stages, rows = [], []
    if run.has_stage("pretrain"):
        stages.append(Stage("pretrain", "pretrain", dense, INIT, run.pretrain))
    start = selectors = trunk(run)
    if not stages and not run.init_from:
        raise ConfigError(
            "there is nothing to start from: set --config.init_from=FILE (released weights), or give "
            "the stage pretrain epochs"
        )
    rows.append(Row(DENSE_PRETRAINED, dense, start))
    if run.has_stage(SELECTOR) and is_fitted(run.model.plan):
        model = dataclasses.replace(run.model, plan=fitting_plan(run.model.plan))
        trainable = fitted_paths(model.plan)
        stages.append(Stage(SELECTOR, SELECTOR, model, start, run.selector, trainable, MAIN))
        selectors = SELECTOR
    if not run.has_stage("finetune"):
        if selectors == SELECTOR or run.init_selectors:
            rows += [
                Row(MAIN, dataclasses.replace(run.model, keep_rate=rate), selectors, rate)
                for rate in run.keep_rates
            ]
        return stages, rows
    elastic = bool(run.finetune.keep_rates)
    solved = [name for name in run.eval.controls if METHODS[name].equal_gmacs]
    if elastic and solved:
        raise ConfigError(
            f"eval.controls: {solved[0]!r} gets the GMACs of ToSA at one keep rate, and cannot stand beside "
            "fine-tuning that draws its keep rates (finetune.keep_rates); leave one of them out"
        )
    for name in (MAIN if run.model.has_plan else DENSE, *run.eval.controls):
        has_budget = METHODS[name].has_budget
        for i, rate in enumerate(run.keep_rates if has_budget else run.keep_rates[:1]):
            stage = "finetune" if name == MAIN else f"finetune_{name}"
            trained_for = rate if has_budget and not elastic else None
            stage += f"_{rate}" if trained_for is not None and (name != MAIN or i) else ""
            model = control_config(dataclasses.replace(run.model, keep_rate=rate), name)
            parent = selectors if has_budget else start  # with what was fitted there
            if stage not in [s.name for s in stages]:
                trainable = f"^(?!{fitted_paths(model.plan)})"
                stages.append(
                    Stage(
                        stage, "finetune", model, parent, run.finetune, trainable, name, trained_for
                    )
                )
            rows.append(Row(name, model, stage, rate if has_budget else None))
    return stages, rows


def _check_no_methods(run: RunConfig) -> None:
    """Raise a ConfigError for a field of the run that is for methods, of which none runs in its network."""
    asked = {
        "the stage selector": run.has_stage(SELECTOR),
        "init_selectors": run.init_selectors,
        "eval.controls": run.eval.controls,
        "eval.keep_rates": run.eval.keep_rates,
        "finetune.keep_rates": run.finetune.keep_rates,
    }
    for name, given in asked.items():
        if given:
            raise ConfigError(
                f"{name}: no method runs in a {run.model.architecture!r}; leave it out of the recipe"
            )


def trunk(run: RunConfig) -> str:
    """The stage that leaves the dense model from which the others start, or `INIT`."""
    return "pretrain" if run.has_stage("pretrain") else INIT


def uses_labels(run: RunConfig) -> bool:
    """Whether any stage learns from labels: fitting selectors needs none."""
    return run.has_stage("pretrain") or run.has_stage("finetune") or not run.has_stage("selector")
