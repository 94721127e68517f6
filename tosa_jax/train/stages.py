"""Which stages a run has, in which order, and which rows its closing table has.

pretrain -> selector -> finetune, and a fine-tune for each control and budget
"""

import dataclasses
from dataclasses import dataclass

from tosa_jax.config import RunConfig, StageConfig
from tosa_jax.errors import ConfigError
from tosa_jax.models.factory import redundant
from tosa_jax.models.methods import LAYER_KINDS
from tosa_jax.models.vit_config import ViTConfig, with_plan
from tosa_jax.tasks import TASKS

BUDGETLESS = ("dense", "skip")
"""Rows whose cost does not depend on `keep_rate`."""


@dataclass(frozen=True)
class Stage:
    """One training stage.

    kind       "selector" where the selectors learn the maps; any other kind learns the task.
    config     durations, optimizer and augmentation; a section of the recipe, or what a task makes (`Task.plan`).
    model      the network as it runs in this stage, its plan included.
    start      name of the stage whose network it starts from; "" for random weights.
    trainable  regular expression of the parameter paths that are trained.
    """

    name: str
    kind: str
    model: ViTConfig
    start: str
    config: StageConfig
    trainable: str = "."


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
    dense = with_plan(run.model, "standard")
    stages, rows = [], []
    if run.has_stage("pretrain"):
        stages.append(Stage("pretrain", "pretrain", dense, "init", run.pretrain))
    trunk = selectors = "pretrain" if stages else "init"
    if not stages and not run.init_from:
        raise ConfigError(
            "there is nothing to start from: set --config.init_from=FILE (released weights), or give "
            "the stage pretrain epochs"
        )
    rows.append(Row("dense_pretrained", dense, trunk))
    fit = tuple(LAYER_KINDS[kind].fit_kind for kind in run.model.plan)
    if run.has_stage("selector") and "selective_fit" in fit:
        model = dataclasses.replace(run.model, plan=fit)
        stages.append(
            Stage("selector", "selector", model, trunk, run.selector, r"^kinds/\d+/selector/")
        )
        selectors = "selector"
    if not run.has_stage("finetune"):
        if selectors == "selector" or run.init_selectors:
            rows += [
                Row("tosa", dataclasses.replace(run.model, keep_rate=rate), selectors, rate)
                for rate in run.keep_rates
            ]
        return stages, rows
    elastic = bool(run.finetune.keep_rates)
    if elastic and "redundancy" in run.eval.controls:
        raise ConfigError(
            "eval.controls: 'redundancy' solves for a cost at each budget, and cannot stand beside fine-tuning "
            "that draws its budgets (finetune.keep_rates); leave one of them out"
        )
    candidates = [("tosa", run.keep_rates)]
    for control in run.eval.controls:
        candidates.append((control, run.keep_rates[: 1 if control in BUDGETLESS else None]))
    for name, rates in candidates:
        for i, rate in enumerate(rates):
            stage = "finetune" if name == "tosa" else f"finetune_{name}"
            of_budget = name not in BUDGETLESS and not elastic
            stage += f"_{rate}" if of_budget and (name != "tosa" or i) else ""
            kind = {"tosa": None, "dense": "standard"}.get(name, name)
            model = dataclasses.replace(run.model, keep_rate=rate)
            if name == "redundancy":
                model = redundant(model)
            elif kind:
                model = with_plan(model, kind)
            start = trunk if name in BUDGETLESS else selectors  # with what was fitted there
            if stage not in [s.name for s in stages]:
                stages.append(
                    Stage(
                        stage, "finetune", model, start, run.finetune, r"^(?!kinds/\d+/selector/)"
                    )
                )
            rows.append(Row(name, model, stage, None if name in BUDGETLESS else rate))
    return stages, rows


def uses_labels(run: RunConfig) -> bool:
    """Whether any stage learns from labels: fitting selectors needs none."""
    return run.has_stage("pretrain") or run.has_stage("finetune") or not run.has_stage("selector")
