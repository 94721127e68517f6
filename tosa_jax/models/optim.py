"""How parameters change: AdamW and its schedules, weight decay, rates and freezing by path, the moving average."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tosa_jax.models.params import Params

NO_DECAY = r"(bias|gamma|scale|running_mean|running_var|cls_token|dist_token|reg_token|pos_embed)$"
"""Paths without weight decay: biases, norms, layer scales, tokens and positions, as in DeiT (timm)."""


TASK_PARTS = ("decoder", "projection", "reference_projection", "text_decoder")
"""Modules of tasks' own networks that turn tokens into the prediction."""


HEAD = rf"^(head|head_dist|{'|'.join(TASK_PARTS)})/"
"""Paths of what turns tokens into the prediction, which may learn faster than the backbone."""


SCHEDULES = ("cosine", "polynomial")
"""How the learning rate falls after the warm-up: see `learning_rate`."""

PERIODS = ("update", "epoch")
"""How often the learning rate moves on: a value of `StageConfig.schedule_per`."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW (Loshchilov & Hutter 2019) over `steps` updates; the first `warmup_steps` rise linearly.

    Rates and norms are not negative, `b1`, `b2` and `ema_decay` in [0, 1).
    """

    steps: int
    learning_rate: float  # peak
    warmup_steps: int = 0
    warmup_learning_rate: float = 0.0  # where the warm-up starts
    min_learning_rate: float = 0.0  # where the schedule ends
    schedule: str = "cosine"  # a value of `SCHEDULES`
    schedule_power: float = 0.9  # of the polynomial
    schedule_period: int = 1  # updates that share a learning rate: 1, or those of an epoch
    head_lr_scale: float = 1.0  # the learning rate of `HEAD` over that of the backbone
    weight_decay: float = 0.05
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float = 0.0  # global norm of the gradient; 0: no clipping
    ema_decay: float = 0.0  # moving average of the parameters; 0: none


def learning_rate(config: OptimConfig) -> optax.Schedule:
    """Update count -> learning rate: a linear warm-up, and a cosine or (1 - share)^power down to `min_learning_rate`.

    As in timm's scheduler, the cosine counts from step 0, the warm-up included; the polynomial is that of BTS and
    NeWCRFs. With a `schedule_period` the rate stays what it was at the period's first update, as timm's does for an
    epoch. DeiT uses timm's scheduler so, an epoch late: its epochs 0 and 1 both have the first rate.
    """

    def rate(step):
        step = step // config.schedule_period * config.schedule_period
        share = jnp.minimum(step / max(config.steps, 1), 1.0)
        span = config.learning_rate - config.min_learning_rate
        left = {
            "cosine": (1 + jnp.cos(jnp.pi * share)) / 2,
            "polynomial": (1 - share) ** config.schedule_power,
        }[config.schedule]
        decayed = config.min_learning_rate + span * left
        climb = config.learning_rate - config.warmup_learning_rate
        warmup = config.warmup_learning_rate + climb * step / max(config.warmup_steps, 1)
        return jnp.where(step < config.warmup_steps, warmup, decayed)

    return rate


def decay_mask(params: Params) -> dict[str, bool]:
    """Which parameters decay, by path."""
    return {path: re.search(NO_DECAY, path) is None for path in params}


def make_optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """AdamW with the schedule, the decay mask and, if asked for, clipping by global norm and a rate for the head."""
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    adamw = optax.adamw(
        learning_rate(config),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    if config.head_lr_scale == 1:
        return optax.chain(clip, adamw)

    def scale_head(updates, params=None):
        return {
            path: x * config.head_lr_scale if re.search(HEAD, path) else x
            for path, x in updates.items()
        }

    return optax.chain(clip, adamw, optax.stateless(scale_head))


def split_trainable(params: Mapping[str, Any], *trainable: str) -> tuple[Params, Params]:
    """Parameters whose path matches all regular expressions `trainable`, and the frozen rest."""
    chosen = {
        path: x for path, x in params.items() if all(re.search(one, path) for one in trainable)
    }
    return chosen, {path: x for path, x in params.items() if path not in chosen}


def start_share(decay: float, updates: int) -> float:
    """Share in [0, 1] that the parameters before training have in their moving average after `updates`."""
    return decay**updates


def update_ema(ema: Params, params: Params, decay: float | jax.Array) -> Params:
    """`decay * ema + (1 - decay) * params`, in float32; an empty `ema` stays empty."""
    return {
        path: (decay * average + (1 - decay) * params[path].astype(jnp.float32))
        for path, average in ema.items()
    }


def global_norm(tree: Any) -> jax.Array:
    """Euclidean norm of all leaves together, in float32."""
    return jnp.sqrt(sum(square_sum(x) for x in jax.tree.leaves(tree)))


def square_sum(x: jax.Array) -> jax.Array:
    """Sum of the squares of an array, in float32."""
    return jnp.sum(jnp.square(x.astype(jnp.float32)))
