"""Budgets: solved for a cost, and drawn anew at each update of fine-tuning."""

import dataclasses
import json

import numpy as np
import pytest
from small import small_model, small_run

from tosa_jax.cost import gmacs
from tosa_jax.errors import ConfigError
from tosa_jax.models.networks import network_config
from tosa_jax.run_plan import plan_stages
from tosa_jax.stages import run_stages
from tosa_jax.train import Updates


@pytest.mark.parametrize(
    "fields",
    [{}, {"plan": "redundancy", "budget": "linear"}, {"plan": "selective", "bypass": "shared"}],
)
def test_the_solved_keep_rate_is_the_largest_within_the_budget(fields):
    name = "deit_tiny_patch16_224"
    fields = {"plan": "selective"} | fields
    config = network_config("classification", name, budget_gmacs=1.05, **fields)
    assert gmacs(config) <= 1.05
    one_more = config.keep_rate + 1 / config.num_patches
    assert gmacs(dataclasses.replace(config, keep_rate=one_more)) > 1.05


def test_a_budget_without_a_plan_makes_every_second_layer_selective():
    dense = gmacs(small_model().config)
    model = small_model(budget_gmacs=0.9 * dense)
    assert model.config.plan == ("standard", "selective") * 2
    assert 0.8 * dense < gmacs(model.config) <= 0.9 * dense


def test_a_budget_that_cannot_be_met_says_what_can():
    with pytest.raises(ConfigError, match=r"costs from 0\.000 to"):
        small_model(plan="redundancy", budget_gmacs=1e-9)
    assert small_model(budget_gmacs=99.0).config.keep_rate == 1.0


def elastic_run(data_dir, **finetune):
    finetune = {"steps": 8, "keep_rates": (1.0, 0.5, 0.25), "eval_steps": 0} | finetune
    return small_run(
        data_dir,
        pretrain={"steps": 2},
        selector={"steps": 2},
        finetune=finetune,
        eval={"controls": ("dense", "random"), "figure_images": 0},
    )


def test_one_stage_serves_every_budget(digits_dir):
    run = elastic_run(digits_dir)
    stages, rows = plan_stages(run)
    assert [s.name for s in stages] == [
        "pretrain", "selector", "finetune", "finetune_dense", "finetune_random"
    ]  # fmt: skip
    assert [(r.name, r.network, r.model.keep_rate) for r in rows if r.name == "tosa"] == [
        ("tosa", "finetune", 1.0), ("tosa", "finetune", 0.5), ("tosa", "finetune", 0.25)
    ]  # fmt: skip
    assert sum(r.network == "finetune_random" for r in rows) == 3


def test_updates_draw_their_budgets_alike_after_a_restart(digits_dir, tmp_path, monkeypatch):
    drawn = []
    draw = Updates.drawn

    def spy(self, step):
        drawn.append((self.setups[0].stage_id, step, draw(self, step)))
        return drawn[-1][2]

    monkeypatch.setattr(Updates, "drawn", spy)
    run = elastic_run(digits_dir)
    result = run_stages(run, tmp_path)
    by_stage = {}
    for stage, step, budget in drawn:
        by_stage.setdefault(stage, {})[step] = budget
    elastic = [budgets for budgets in by_stage.values() if set(budgets.values()) - {0}]
    assert len(elastic) == 2 and all(len(set(b.values())) == 3 for b in elastic)
    assert all(spied == draw_again(run, stage, step) for stage, step, spied in drawn if spied)
    scores = [(r["name"], r["keep_rate"], r["gmacs"]) for r in result["results"]]
    costs = [gmac for name, _, gmac in scores if name == "tosa"]
    assert len(costs) == 3 and costs == sorted(costs, reverse=True)
    assert json.loads((tmp_path / "report.json").read_text())["results"] == result["results"]


def draw_again(run, stage, step):
    """By the definition: from seed, stage and step alone."""
    return int(np.random.default_rng([run.seed, stage, step]).integers(3))


def test_only_fine_tuning_draws_budgets(digits_dir):
    with pytest.raises(ConfigError, match="only fine-tuning"):
        small_run(digits_dir, pretrain={"steps": 2, "keep_rates": (0.5,)})
    with pytest.raises(ConfigError, match="not in"):
        elastic_run(digits_dir, keep_rates=(1.5,))
