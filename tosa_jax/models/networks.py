"""Which network a configuration describes, and `create_model`: the front door."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from tosa_jax.models.depth import DepthTransformer
from tosa_jax.models.vit import VisionTransformer
from tosa_jax.models.vit_config import ViTConfig, check_choice, variant_config

NETWORKS: dict[str, type[VisionTransformer]] = {
    "classification": VisionTransformer,
    "depth": DepthTransformer,
}
"""The network of each task."""


def build(config: ViTConfig, *, rngs: nnx.Rngs) -> VisionTransformer:
    """The network of a configuration, with random weights."""
    return NETWORKS[config.task](config, rngs=rngs)


def network_config(task: str, name: str, **fields: Any) -> ViTConfig:
    """`variant_config` for the network of a task."""
    check_choice("task", task, NETWORKS)
    return variant_config(name, NETWORKS[task].config_class, **fields)


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
               None, without a plan, makes the plain dense network.
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
    if plan is None and keep_rate is not None:
        plan = "selective"
    return build(network_config(task, name, plan=plan, **fields), rngs=rngs)
