"""Token methods trained by one recipe at equal multiply-adds, each from the same dense network, seed by seed."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax

from tosa_jax.config import RunConfig, StageConfig
from tosa_jax.distributed.messages import say
from tosa_jax.errors import ConfigError
from tosa_jax.models.factory import control_config
from tosa_jax.models.method import DENSE, is_fitted
from tosa_jax.models.vit_config import ViTConfig
from tosa_jax.models.weights.run_checkpoints import stage_folder
from tosa_jax.tasks import TASKS
from tosa_jax.train.runner import run_stages
from tosa_jax.train.workdir import open_workdir


class Study:
    """A recipe that is trained with one network after the other, each in a work directory of its own.

    For each seed the dense network is pretrained once, as the recipe says, and fine-tuned as long as the others;
    without pretraining all start from `init_from`, which is not scored if it has no head. Every other network starts
    from the pretrained one: its selectors are fitted, where it has any, and it is fine-tuned. What is finished is read
    from its work directory, and what was stopped goes on there.

    run     the recipe; its plan, its keep rates and its controls do not count.
    seeds   how many: 0, 1, ...
    folder  `folder/seed<N>/<network>` are the work directories.

    Raises ConfigError: the recipe does not fine-tune, or has nothing to start from.
    """

    def __init__(self, run: RunConfig, seeds: int, folder: Path) -> None:
        if not run.has_stage("finetune"):
            raise ConfigError("the recipe must fine-tune: give it config.finetune.epochs or .steps")
        if not (run.has_stage("pretrain") or run.init_from):
            raise ConfigError(
                "there is nothing to start from: the recipe must pretrain, or set --config.init_from=FILE"
            )
        self.run = dataclasses.replace(
            run,
            finetune=dataclasses.replace(run.finetune, keep_rates=()),
            eval=dataclasses.replace(run.eval, controls=(), keep_rates=(), figure_images=0),
        )
        self.seeds, self.folder = seeds, folder
        self.dense = control_config(run.model, DENSE)
        task = TASKS[run.task]
        self.metric, self.lower_is_better = task.best_metric, task.lower_is_better

    def baselines(self) -> dict[str, Any]:
        """The dense network before and after fine-tuning, as rows; and the images on which all rows are scored.

        There are no rows from before where the head is random then.
        """
        reports = [self._report(seed, DENSE, self._dense_run(seed)) for seed in range(self.seeds)]
        scored = reports[0][0]
        return {
            "split": scored["split"],
            "count": scored["count"],
            "pretrained": [rows[0]["metrics"] for rows in reports if rows[0]["metrics"]],
            "finetuned": [rows[-1]["metrics"] for rows in reports],
        }

    def metrics(self, name: str, network: ViTConfig) -> list[dict[str, float]]:
        """What the trained network gives, a mapping for each seed."""
        return [
            self._report(seed, name, self._run(seed, network))[-1]["metrics"]
            for seed in range(self.seeds)
        ]

    def _dense_run(self, seed: int) -> RunConfig:
        return dataclasses.replace(self.run, seed=seed, model=self.dense, selector=StageConfig())

    def _run(self, seed: int, network: ViTConfig) -> RunConfig:
        start = self.run.init_from
        if self.run.has_stage("pretrain"):
            start = str(stage_folder(self._workdir(seed, DENSE), "pretrain"))
        return dataclasses.replace(
            self.run,
            seed=seed,
            model=network,
            init_from=start,
            pretrain=StageConfig(),
            selector=self.run.selector if is_fitted(network.plan) else StageConfig(),
        )

    def _workdir(self, seed: int, name: str) -> Path:
        return self.folder.absolute() / f"seed{seed}" / re.sub(r"[^\w.-]+", "_", name)

    def _report(self, seed: int, name: str, run: RunConfig) -> list[dict[str, Any]]:
        say(f"seed {seed}: {name}")
        with open_workdir(self._workdir(seed, name), run) as workdir:
            results = run_stages(run, workdir, timed=False)["results"]  # `compare --time` does
        jax.clear_caches()  # no other network runs these programs
        return results
