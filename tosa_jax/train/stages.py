"""Which stages a run has, in which order, and which rows its closing table has.

pretrain -> selector -> finetune, and a fine-tune for each control and budget
"""

import dataclasses
from dataclasses import dataclass

from tosa_jax.config import RunConfig, StageConfig
from tosa_jax.errors import ConfigError
from tosa_jax.models.factory import control_config
from tosa_jax.models.method import DENSE, MAIN, METHODS, fitted_paths, fitting_plan, is_fitted
from tosa_jax.models.vit_config import ViTConfig
from tosa_jax.tasks import TASKS

DENSE_PRETRAINED = f"{DENSE}_pretrained"
"""Name of the row of the dense network before it is fine-tuned."""


@dataclass(frozen=True)
class Stage:
    """One training stage.

    kind       "selector" where the selectors learn the maps; any other kind learns the task.
    config     durations, optimizer and augmentation; a section of the recipe, or what a task makes (`Task.plan`).
    model      the network as it runs in this stage, its plan included.
    start      name of the stage whose network it starts from; "" for random weights.
    trainable  regular expression of the parameter paths that are trained.
    row        name of the method that is trained: `MAIN`, `DENSE` or a control's.
    keep_rate  the budget that it is trained for; None if it has none or draws them.
    """

    name: str
    kind: str
    model: ViTConfig
    start: str
    config: StageConfig
    trainable: str = "."
    row: str = DENSE
    keep_rate: float | tuple[float, ...] | None = None


@dataclass(frozen=True)
class Row:
    """A row of the closing table: the network that a stage left, run as `model`.

    keep_rate  the budget that it stands beside others at; None if its cost does not depend on one.
    """

    name: str
    model: ViTConfig
    network: str
    keep_rate: float | tuple[float, ...] | None = None


def plan_stages(run: RunConfig) -> tuple[list[Stage], list[Row]]:
    """The stages of a run in order, and the rows of its report, as the task extends them (`Task.plan`).

    Raises ConfigError: no stage makes a network to start from, and `init_from` names none.
    """
    return TASKS[run.task].plan(run, *recipe_stages(run))


def recipe_stages(run: RunConfig) -> tuple[list[Stage], list[Row]]:
    """Those that the recipe asks for. The network "init" is what `init_from` holds.

    Raises ConfigError: no stage makes a network to start from, and `init_from` names none.
    """
    dense = control_config(run.model, DENSE)
    stages, rows = [], []
    if run.has_stage("pretrain"):
        stages.append(Stage("pretrain", "pretrain", dense, "init", run.pretrain))
    trunk = selectors = "pretrain" if stages else "init"
    if not stages and not run.init_from:
        raise ConfigError(
            "there is nothing to start from: set --config.init_from=FILE (released weights), or give "
            "the stage pretrain epochs"
        )
    rows.append(Row(DENSE_PRETRAINED, dense, trunk))
    if run.has_stage("selector") and is_fitted(run.model.plan):
        model = dataclasses.replace(run.model, plan=fitting_plan(run.model.plan))
        trainable = fitted_paths(model.plan)
        stages.append(Stage("selector", "selector", model, trunk, run.selector, trainable, MAIN))
        selectors = "selector"
    if not run.has_stage("finetune"):
        if selectors == "selector" or run.init_selectors:
            rows += [
                Row(MAIN, dataclasses.replace(run.model, keep_rate=rate), selectors, rate)
                for rate in run.keep_rates
            ]
        return stages, rows
    elastic = bool(run.finetune.keep_rates)
    solved = [name for name in run.eval.controls if METHODS[name].equal_gmacs]
    if elastic and solved:
        raise ConfigError(
            f"eval.controls: {solved[0]!r} solves for a cost at each budget, and cannot stand beside fine-tuning "
            "that draws its budgets (finetune.keep_rates); leave one of them out"
        )
    for name in (MAIN, *run.eval.controls):
        has_budget = METHODS[name].has_budget
        for i, rate in enumerate(run.keep_rates if has_budget else run.keep_rates[:1]):
            stage = "finetune" if name == MAIN else f"finetune_{name}"
            budget = rate if has_budget and not elastic else None
            stage += f"_{rate}" if budget is not None and (name != MAIN or i) else ""
            model = control_config(dataclasses.replace(run.model, keep_rate=rate), name)
            start = selectors if has_budget else trunk  # with what was fitted there
            if stage not in [s.name for s in stages]:
                trainable = f"^(?!{fitted_paths(model.plan)})"
                stages.append(
                    Stage(stage, "finetune", model, start, run.finetune, trainable, name, budget)
                )
            rows.append(Row(name, model, stage, rate if has_budget else None))
    return stages, rows


def uses_labels(run: RunConfig) -> bool:
    """Whether any stage learns from labels: fitting selectors needs none."""
    return run.has_stage("pretrain") or run.has_stage("finetune") or not run.has_stage("selector")
