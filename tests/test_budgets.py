"""Budgets: solved for a cost, and drawn anew at each update of fine-tuning."""

import dataclasses
import json

import pytest
from small import SIZES, small_model, small_run

from tosa_jax.errors import ConfigError
from tosa_jax.models.cost import gmacs
from tosa_jax.tasks import model_config
from tosa_jax.train import loop
from tosa_jax.train.loop import compile_fitting, draw_keep_rate
from tosa_jax.train.runner import run_stages
from tosa_jax.train.stages import plan_stages

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.mark.parametrize(
    "fields",
    [{}, {"plan": "redundancy", "budget": "linear"}, {"plan": "selective", "bypass": "shared"}],
)
def test_the_solved_keep_rate_is_the_largest_within_the_budget(fields):
    fields = SIZES | {"image_size": 32, "embed_dim": 128, "plan": "selective"} | fields
    budget = 0.85 * gmacs(model_config("classification", "vit", **fields | {"plan": "standard"}))
    config = model_config("classification", "vit", budget_gmacs=budget, **fields)
    assert gmacs(config) <= budget
    one_more = config.keep_rate + 1 / config.num_patches
    assert gmacs(dataclasses.replace(config, keep_rate=one_more)) > budget


def test_a_budget_without_a_plan_makes_every_second_layer_selective():
    dense = gmacs(small_model().config)
    model = small_model(budget_gmacs=0.9 * dense)
    assert model.config.plan == ("standard", "selective") * 2
    assert 0.8 * dense < gmacs(model.config) <= 0.9 * dense


def test_a_budget_that_cannot_be_met_says_what_can():
    with pytest.raises(ConfigError, match=r"costs from 0\.000 to"):
        small_model(plan="redundancy", budget_gmacs=1e-9)
    assert small_model(budget_gmacs=99.0).config.keep_rate == 1.0


def redundancy_run(data_dir, keep_rates=(0.7, 0.5), **model):
    return small_run(
        data_dir,
        model=model,
        pretrain={"steps": 2},
        finetune={"steps": 2},
        eval={"controls": ("redundancy",), "keep_rates": keep_rates, "figure_images": 0},
    )


def test_redundancy_stands_beside_tosa_at_its_cost(digits_dir):
    run = redundancy_run(digits_dir, image_size=32, embed_dim=128, bypass="shared")
    stages, rows = plan_stages(run)
    assert [s.name for s in stages[-2:]] == ["finetune_redundancy_0.7", "finetune_redundancy_0.5"]
    of_name = {name: [r for r in rows if r.name == name] for name in ("tosa", "redundancy")}
    for tosa, redundant in zip(*of_name.values(), strict=True):
        assert redundant.keep_rate == tosa.keep_rate == tosa.model.keep_rate
        assert 0.98 * gmacs(tosa.model) < gmacs(redundant.model) <= gmacs(tosa.model)
        assert set(redundant.model.plan) == {"redundancy"} and redundant.model.budget == "linear"
    assert [row.keep_rate for row in rows] == [None, 0.7, 0.5, 0.7, 0.5]


def test_redundancy_is_fine_tuned_and_reported_at_the_budgets_of_tosa(digits_dir, tmp_path):
    results = run_stages(redundancy_run(digits_dir, keep_rates=(0.5,)), tmp_path)["results"]
    cost = {(row["name"], row["keep_rate"]): row["gmacs"] for row in results}
    assert list(cost)[1:] == [("tosa", 0.5), ("redundancy", 0.5)]
    assert cost["redundancy", 0.5] <= cost["tosa", 0.5]
    assert all(0 < row["metrics"]["acc1"] < 1 for row in results)


def test_redundancy_cannot_draw_its_budgets(digits_dir):
    with pytest.raises(ConfigError, match="'redundancy' gets the GMACs of ToSA at one keep rate"):
        plan_stages(elastic_run(digits_dir, controls=("redundancy",)))


def elastic_run(data_dir, controls=("dense", "random"), **finetune):
    finetune = {"steps": 8, "keep_rates": (1.0, 0.5, 0.25), "eval_steps": 0} | finetune
    return small_run(
        data_dir,
        pretrain={"steps": 2},
        selector={"steps": 2},
        finetune=finetune,
        eval={"controls": controls, "figure_images": 0},
    )


def test_one_stage_serves_every_budget(digits_dir):
    run = elastic_run(digits_dir)
    stages, rows = plan_stages(run)
    assert [s.name for s in stages] == [
        "pretrain", "selector", "finetune", "finetune_dense", "finetune_random"
    ]  # fmt: skip
    assert [(r.name, r.stage, r.model.keep_rate) for r in rows if r.name == "tosa"] == [
        ("tosa", "finetune", 1.0), ("tosa", "finetune", 0.5), ("tosa", "finetune", 0.25)
    ]  # fmt: skip
    assert sum(r.stage == "finetune_random" for r in rows) == 3


def test_updates_draw_each_budget_once_in_turn_and_alike_after_a_restart():
    def draws(seed=0, stage_id=7, first=0):
        return [draw_keep_rate(seed, stage_id, step, 3) for step in range(first, 30)]

    assert draws(first=10) == draws()[10:]
    rounds = [tuple(draws()[i : i + 3]) for i in range(0, 30, 3)]
    assert all(sorted(drawn) == [0, 1, 2] for drawn in rounds) and len(set(rounds)) > 3
    assert draws() != draws(seed=1) and draws() != draws(stage_id=8)


def test_an_elastic_run_trains_and_scores_every_budget(digits_dir, tmp_path, monkeypatch):
    compiled = []

    def spy(step, state, batch, batch_size):
        compiled.append(step)
        return compile_fitting(step, state, batch, batch_size)

    monkeypatch.setattr(loop, "compile_fitting", spy)
    fields = {"steps": 4, "keep_rates": (1.0, 0.5), "controls": ()}
    result = run_stages(elastic_run(digits_dir, **fields), tmp_path)
    assert len(compiled) == 1 + 1 + 2  # pretraining, selectors, and once for each budget
    scores = [(r["name"], r["keep_rate"], r["gmacs"]) for r in result["results"]]
    costs = [gmac for name, _, gmac in scores if name == "tosa"]
    assert len(costs) == 2 and costs == sorted(costs, reverse=True)
    assert json.loads((tmp_path / "report.json").read_text())["results"] == result["results"]


def test_only_fine_tuning_draws_budgets(digits_dir):
    with pytest.raises(ConfigError, match="only fine-tuning"):
        small_run(digits_dir, pretrain={"steps": 2, "keep_rates": (0.5,)})
    with pytest.raises(ConfigError, match="not in"):
        elastic_run(digits_dir, keep_rates=(1.5,))
