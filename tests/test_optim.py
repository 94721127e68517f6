"""Learning rates, decay, freezing and averages, at named steps."""

import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from tosa_jax.cli.flags import parse
from tosa_jax.config import StageConfig, make_run_config
from tosa_jax.errors import ConfigError
from tosa_jax.models.factory import abstract_model
from tosa_jax.models.optim import (
    OptimConfig,
    decay_mask,
    learning_rate,
    make_optimizer,
    split_trainable,
    start_share,
    update_ema,
)
from tosa_jax.models.params import get_params
from tosa_jax.models.variants import variant_config


def test_schedule_warms_up_linearly_and_falls_as_a_cosine():
    config = OptimConfig(
        steps=100,
        learning_rate=1.0,
        warmup_steps=10,
        warmup_learning_rate=0.1,
        min_learning_rate=0.2,
    )
    rate = learning_rate(config)
    for step, value in {0: 0.1, 5: 0.55, 50: 0.6, 100: 0.2, 25: 0.2 + 0.4 * (1 + 0.5**0.5)}.items():
        assert float(rate(step)) == pytest.approx(value, abs=1e-6), step


@pytest.mark.parametrize("warmup", [0, 5])
def test_a_rate_per_epoch_is_that_of_timms_scheduler(warmup):
    """timm/scheduler/cosine_lr.py, `CosineLRScheduler._get_lr` of one cycle, at each epoch; updates in it share it."""
    epochs, per_epoch, peak, low, start = 30, 7, 1e-3, 1e-5, 1e-6
    stage = StageConfig(
        epochs=epochs, learning_rate=peak, min_learning_rate=low, schedule_per="epoch",
        warmup_epochs=warmup, warmup_learning_rate=start,
    )  # fmt: skip
    rate = learning_rate(stage.optim(per_epoch, 64))
    for epoch in range(epochs):
        expected = low + 0.5 * (peak - low) * (1 + math.cos(math.pi * epoch / epochs))
        if epoch < warmup:
            expected = start + epoch * (peak - start) / warmup
        for update in (0, 3, per_epoch - 1):
            found = float(rate(epoch * per_epoch + update))
            assert found == pytest.approx(expected, rel=1e-4), (epoch, update)


def test_the_polynomial_is_that_of_the_depth_recipes():
    """(base - end) (1 - step / total)^.9 + end, cleinc/bts and aliyun/NeWCRFs."""
    rate = learning_rate(
        OptimConfig(
            steps=100,
            learning_rate=2.0,
            min_learning_rate=0.2,
            warmup_steps=10,
            schedule="polynomial",
        )
    )
    for step, value in {
        5: 1.0,
        10: 1.8 * 0.9**0.9 + 0.2,
        50: 1.8 * 0.5**0.9 + 0.2,
        100: 0.2,
    }.items():
        assert float(rate(step)) == pytest.approx(value, abs=1e-6), step
    assert float(rate(101)) == pytest.approx(0.2)


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_head_and_decoder_have_a_learning_rate_of_their_own(clip_norm):
    names = ("blocks/0/attn/proj/kernel", "kinds/1/selector/conv1/kernel", "head/kernel",
             "head_dist/bias", "decoder/conv/kernel", "blocks/0/head/kernel")  # fmt: skip
    params = {name: jnp.ones((2, 2)) for name in names}
    grads = {name: jnp.full((2, 2), 0.5) for name in names}
    updates = {}
    for scale in (1.0, 10.0):
        config = OptimConfig(steps=10, learning_rate=1e-3, head_lr_scale=scale, clip_norm=clip_norm)
        optimizer = make_optimizer(config)
        updates[scale], _ = optimizer.update(grads, optimizer.init(params), params)
    ratios = {name: float((updates[10.0][name] / updates[1.0][name])[0, 0]) for name in names}
    expected = [1, 1, 10, 10, 10, 1]
    assert list(ratios.values()) == pytest.approx(expected)


@pytest.mark.parametrize(("batch_size", "peak"), [(1024, 1e-3), (256, 2.5e-4)])
def test_the_deit_recipe_has_its_published_numbers(batch_size, peak):
    """facebookresearch/deit: 5e-4 per 512, warm-up 5 epochs from 1e-6, cosine over 300 to 1e-5."""
    root = str(Path(__file__).parents[1])
    config, _ = parse("", [f"--config={root}/configs/deit_s.py:scratch"])
    config.batch_size = batch_size
    run = make_run_config(config)
    per_epoch = 1_281_167 // batch_size
    optim = run.pretrain.optim(per_epoch, batch_size)
    rate = learning_rate(optim)
    assert optim.steps == 300 * per_epoch and optim.warmup_steps == 5 * per_epoch
    assert optim.ema_decay == 0.99996 and optim.weight_decay == 0.05
    expected = {
        0: 1e-6,
        2.5: (1e-6 + peak) / 2,
        100: 1e-5 + (peak - 1e-5) * 0.75,
        150: (peak + 1e-5) / 2,
        300: 1e-5,
    }
    for epoch, value in expected.items():
        assert float(rate(int(epoch * per_epoch))) == pytest.approx(value, rel=2e-3), epoch


def test_biases_norms_tokens_and_positions_do_not_decay():
    config = variant_config(
        "deit_tiny_distilled_patch16_224", layer_scale=0.1, reg_tokens=1, plan="selective"
    )
    mask = decay_mask(get_params(abstract_model(config)))
    assert {"cls_token", "dist_token", "reg_token", "pos_embed"} <= mask.keys()
    assert not any(decays for name, decays in mask.items() if not name.endswith("kernel"))
    assert all(decays for name, decays in mask.items() if name.endswith("kernel"))


def test_clipping_bounds_the_update_and_decay_pulls_kernels_only():
    params = {"a/kernel": jnp.full(3, 2.0), "a/bias": jnp.full(3, 2.0)}
    zeros = {name: jnp.zeros(3) for name in params}
    config = OptimConfig(steps=10, learning_rate=0.1, weight_decay=0.5, clip_norm=1.0)
    optimizer = make_optimizer(config)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    np.testing.assert_allclose(updates["a/kernel"], -0.1 * 0.5 * 2.0, rtol=1e-6)
    np.testing.assert_allclose(updates["a/bias"], 0.0)
    huge = {name: jnp.full(3, 1e6) for name in params}
    _, state = optimizer.update(huge, optimizer.init(params), params)
    first_moment = state[1][0].mu["a/bias"]
    assert float(first_moment[0]) == pytest.approx(0.1 / 6**0.5, rel=1e-4)


def test_freezing_goes_by_path():
    params = {"blocks/0/x": 1, "kinds/1/selector/conv1/kernel": 2, "head/kernel": 3}
    chosen, frozen = split_trainable(params, r"^kinds/\d+/selector/")
    assert chosen == {"kinds/1/selector/conv1/kernel": 2}
    assert frozen.keys() == {"blocks/0/x", "head/kernel"}


def test_average_follows_with_its_decay():
    ema = update_ema({"a": jnp.array(1.0)}, {"a": jnp.array(3.0)}, 0.75)
    assert float(ema["a"]) == 1.5
    assert update_ema({}, {"a": jnp.array(3.0)}, 0.0) == {}


def test_the_start_fades_from_the_average_of_every_stage_of_the_deit_recipe():
    """With DeiT's own .99996 it would keep 22 % over 30 epochs; over its 300 it keeps none."""
    root = str(Path(__file__).parents[1])
    assert start_share(0.99996, 30 * 1251) == pytest.approx(0.223, abs=1e-3)
    for variant in ("", ":scratch", ":384"):
        run = make_run_config(parse("", [f"--config={root}/configs/deit_s.py{variant}"])[0])
        for stage in filter(run.has_stage, ("pretrain", "finetune")):
            optim = getattr(run, stage).optim(1_281_167 // run.batch_size, run.batch_size)
            assert start_share(optim.ema_decay, optim.steps) < 1e-6, (variant, stage)


def test_the_share_of_the_start_is_what_the_updates_leave():
    ema = {"a": jnp.array(1.0)}
    for _ in range(20):
        ema = update_ema(ema, {"a": jnp.array(0.0)}, 0.9)
    assert float(ema["a"]) == pytest.approx(start_share(0.9, 20), rel=1e-5)


def test_durations_are_in_epochs_or_in_steps():
    stage = StageConfig(epochs=2.5, warmup_steps=7)
    assert (stage.duration("", 100), stage.duration("warmup", 100)) == (250, 7)
    with pytest.raises(ConfigError, match="epochs or steps, not both"):
        StageConfig(epochs=1.0, steps=1)
    with pytest.raises(ConfigError, match="warm-up has 300 steps"):
        StageConfig(epochs=1.0, warmup_epochs=3.0).optim(100, 64)
