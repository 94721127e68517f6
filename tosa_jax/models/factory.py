"""Which network a configuration describes, and `create_model`: the front door."""

import bisect
import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx

from tosa_jax.errors import ConfigError
from tosa_jax.models.depth import DepthTransformer
from tosa_jax.models.params import get_params, set_params, split
from tosa_jax.models.vit import VisionTransformer
from tosa_jax.models.vit_config import ViTConfig, alternate, check_choice, variant_config

NETWORKS: dict[str, type[VisionTransformer]] = {
    "classification": VisionTransformer,
    "depth": DepthTransformer,
}
"""The network of each task."""


def build(config: ViTConfig, *, rngs: nnx.Rngs) -> VisionTransformer:
    """The network of a configuration, with random weights. Raises ConfigError: its plan is not possible."""
    return NETWORKS[config.task](config, rngs=rngs)


def with_image_size(model: VisionTransformer, size: tuple[int, int]) -> VisionTransformer:
    """The same network made for images of (height, width) pixels.

    Positions are resampled, and `keep_rate` is the share of the patches that such images have; called directly on
    images of another size, a network selects as many tokens as of images of its own.

    Raises ConfigError: the network takes no other size, or its plan is not possible there.
    """
    if size == model.config.image_shape:
        return model
    positions = model.positions(size)
    config = dataclasses.replace(model.config, image_size=size)
    graphdef, _ = split(nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0))))
    resized = set_params(graphdef, get_params(model) | {"pos_embed": positions})
    resized.gather = model.gather
    return resized


def network_config(task: str, name: str, **fields: Any) -> ViTConfig:
    """`variant_config` for the network of a task, with the `keep_rate` that `budget_gmacs` asks for.

    Raises ConfigError: no such task, or what `variant_config` and `with_budget` raise.
    """
    check_choice("task", task, NETWORKS)
    config = variant_config(name, NETWORKS[task].config_class, **fields)
    return with_budget(config, config.budget_gmacs) if config.budget_gmacs else config


def with_budget(config: ViTConfig, gmacs: float) -> ViTConfig:
    """The network with the largest `keep_rate` (one for all selections, or their mean) within `gmacs` an image.

    Raises ConfigError where no keep_rate is, naming the range that can be had.
    """

    def cost_of(keep_rate: float) -> float:
        return _gmacs(dataclasses.replace(config, keep_rate=keep_rate))

    def reaches(patches: int) -> bool:
        try:
            cost_of(patches / config.num_patches)
        except ConfigError:
            return False
        return True

    every = range(1, config.num_patches + 1)
    least = every[bisect.bisect_left(every, True, key=reaches)]
    cheapest, dearest = cost_of(least / config.num_patches), cost_of(1.0)
    if gmacs < cheapest:
        raise ConfigError(
            f"budget_gmacs={gmacs:g} cannot be met: with this plan an image costs from {cheapest:.3f} to "
            f"{dearest:.3f} GMACs"
        )
    fitting = range(least, config.num_patches + 1)
    place = bisect.bisect_right(fitting, gmacs, key=lambda p: cost_of(p / config.num_patches))
    return dataclasses.replace(config, keep_rate=fitting[place - 1] / config.num_patches)


def redundant(config: ViTConfig) -> ViTConfig:
    """The rival of a network that selects: redundancy in every layer, budgets falling with depth, at most its GMACs.

    Raises ConfigError where redundancy cannot save as much.
    """
    plan = alternate("redundancy", config.depth, period=0)
    # It has a bypass of its own, and counts that fall from layer to layer cannot be scanned.
    own = {"bypass": "", "redundancy_weight": 0.0, "scan_layers": False}
    rival = dataclasses.replace(config, plan=plan, keep_rate=1.0, budget="linear", **own)
    return with_budget(rival, _gmacs(config))


def _gmacs(config: ViTConfig) -> float:
    return nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0))).macs() / 1e9


def create_model(
    name: str,
    *,
    keep_rate: float | tuple[float, ...] | None = None,
    num_classes: int = 1000,
    image_size: int | tuple[int, int] | None = None,
    task: str = "classification",
    plan: tuple[str, ...] | str | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
    **fields: Any,
) -> VisionTransformer:
    """A model by timm's name, or "vit" with sizes of your own; random weights, initialised as DeiT.

    keep_rate  share in (0, 1] of the patches that selective layers take: one number, or one a selection.
               None, without a plan and `budget_gmacs`, makes the plain dense network.
    image_size pixels: the side of a square, or (height, width); by default the variant's own.
    task       "classification", or "depth": a decoder instead of the head (`num_classes` is not read).
    plan       a layer kind for each layer, or the name of one for every second layer; by default every second
               layer is selective.
    fields     any field of `ViTConfig`, and for depth of `DepthConfig`.

    Raises ConfigError (one line, with what is known) for unknown names and sizes that do not fit.

    >>> model = create_model("vit", embed_dim=32, depth=2, num_heads=2, image_size=8, patch_size=4,
    ...                      num_classes=10, keep_rate=0.5, rngs=nnx.Rngs(0))
    >>> out = model(jnp.zeros((1, 8, 8, 3)))
    >>> out.logits.shape, [s.shape for s in out.selected]
    ((1, 10), [(1, 3)])
    """
    fields |= {"num_classes": num_classes, "dtype": dtype, "param_dtype": param_dtype}
    if image_size is not None:
        fields["image_size"] = image_size
    if keep_rate is not None:
        fields["keep_rate"] = keep_rate
    if plan is None and (keep_rate is not None or fields.get("budget_gmacs")):
        plan = "selective"
    return build(network_config(task, name, plan=plan, **fields), rngs=rngs)
