"""What a model costs, by arithmetic: multiply-adds and parameters. Each layer kind counts its own."""

import math

import jax
from flax import nnx

from tosa_jax.models.batch_norm import RunningStatistic
from tosa_jax.models.factory import abstract_model
from tosa_jax.models.vit import VisionTransformer
from tosa_jax.models.vit_config import ViTConfig


def macs(model: VisionTransformer) -> int:
    """Multiply-adds of one example's forward pass: patch projection, layers, selectors, head.

    Norms, softmax and element-wise operations do not count, as is usual. The model may be abstract.
    """
    return model.macs()


def macs_by_part(model: VisionTransformer) -> dict[str, int]:
    """`macs` by part: "backbone", "selection" (what layer kinds do beside running blocks), "head" (or decoder)."""
    selection = sum(
        kind.own_macs(block) for kind, block in zip(model.kinds, model.blocks, strict=True)
    )
    head = model.head_macs()
    return {"backbone": macs(model) - selection - head, "selection": selection, "head": head}


def gmacs(config: ViTConfig) -> float:
    """Multiply-adds / 1e9 of one example's forward pass through a network of this configuration."""
    return macs(abstract_model(config)) / 1e9


def num_params(model: VisionTransformer) -> int:
    """Number of parameters, selectors included; running statistics are not trained and do not count."""
    trained = nnx.All(nnx.Param, nnx.Not(RunningStatistic))
    return sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(model, trained)))


def training_macs(model: VisionTransformer, part: str = "network") -> int:
    """Multiply-adds of one training example: the forward pass, and twice as much for the part that is trained.

    part  "network": everything but the selectors; or the "selectors" alone; or the "head" alone (or decoder).

    What is computed again to save memory does not count.
    """
    forward = macs(model)
    selectors = sum(kind.selector_macs() for kind in model.kinds)
    trained = {"network": forward - selectors, "selectors": selectors, "head": model.head_macs()}
    return forward + 2 * trained[part]
