"""Traces of steps, and the share of the devices' peak that a run says it uses."""

import json

import jax
import pytest
from small import SIZES, small_run

from tosa_jax.config import profile_range
from tosa_jax.distributed.preemption import StopRequest
from tosa_jax.errors import ConfigError
from tosa_jax.models import cost
from tosa_jax.models.factory import abstract_model
from tosa_jax.models.variants import variant_config
from tosa_jax.train import loop
from tosa_jax.train.metric_writer import MetricWriter
from tosa_jax.train.runner import Runner
from tosa_jax.train.stages import plan_stages


@pytest.mark.parametrize("text", ["100", "5:5", "6:5", "-1:3", "a:b", "1:2:3"])
def test_ranges_that_are_none(text):
    with pytest.raises(ConfigError, match="profile_steps=.*FIRST < END"):
        profile_range(text)


def test_ranges():
    assert profile_range("100:105") == range(100, 105)
    assert not profile_range("")
    with pytest.raises(ConfigError, match="profile_steps='x'"):
        small_run("nowhere", profile_steps="x")


def traced_steps(folder):
    """Numbers of the steps in the one trace under `folder`, as XProf reads them."""
    (path,) = folder.glob("plugins/profile/*/*.xplane.pb")
    data = jax.profiler.ProfileData.from_file(str(path))
    events = (event for plane in data.planes for line in plane.lines for event in line.events)
    return {dict(event.stats).get("step_num") for event in events if event.name == "train"}


def test_a_run_traces_the_steps_asked_for_and_tells_its_utilisation(
    digits_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr(loop, "peak_flops", lambda devices: 1e9 * len(devices))
    run = small_run(
        digits_dir,
        pretrain={"steps": 9},
        batch_size=32,
        accumulate=2,
        log_steps=1,
        profile_steps="3:5",
    )
    (stage,), _ = plan_stages(run)
    runner = Runner(run, tmp_path, StopRequest())
    with MetricWriter(tmp_path) as writer:
        runner.train(stage, writer)
    assert traced_steps(tmp_path / "profile/pretrain") == {3, 4}
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rates = [(r["perf/mfu"], r["perf/img_per_sec"]) for r in records if r.get("perf/mfu")]
    flops = 6 * cost.macs(abstract_model(stage.model))
    assert rates and all(mfu == pytest.approx(rate * flops / 8e9) for mfu, rate in rates)


def test_training_counts_the_backward_pass_only_where_gradients_go():
    dense = abstract_model(variant_config("vit", **SIZES))
    assert cost.training_macs(dense) == 3 * cost.macs(dense)
    tosa = abstract_model(variant_config("vit", plan="selective", **SIZES))
    selectors = 2 * (2 * 2 * 4 * 17**2)  # two of them: 2 * heads * hidden * tokens**2
    assert cost.training_macs(tosa) == 3 * cost.macs(tosa) - 2 * selectors
    assert cost.training_macs(tosa, "selectors") == cost.macs(tosa) + 2 * selectors
    assert cost.training_macs(tosa, "head") == cost.macs(tosa) + 2 * 16 * 10
