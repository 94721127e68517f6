"""Builds the model that a configuration describes: with random weights, as shapes alone, for another size or cost."""

import bisect
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

from flax import nnx

from tosa_jax.errors import ConfigError
from tosa_jax.models.lemevit import LeMeViT
from tosa_jax.models.method import MAIN, METHODS, control_plan, layer_kinds
from tosa_jax.models.params import Params, get_params, set_params, split
from tosa_jax.models.plan import layer_specs
from tosa_jax.models.tracing import abstract
from tosa_jax.models.vit import VisionTransformer
from tosa_jax.models.vit_config import ViTConfig

MODEL_CLASSES: dict[type[ViTConfig], type[VisionTransformer]] = {
    model.config_class: model for model in (VisionTransformer, LeMeViT)
}
"""The model of each class of configurations; `tasks.registry.register` adds those of tasks."""


def build(config: ViTConfig, *, rngs: nnx.Rngs) -> VisionTransformer:
    """The model of a configuration, with random weights. Raises ConfigError: its plan is not possible."""
    return MODEL_CLASSES[type(config)](config, rngs=rngs)


@functools.lru_cache(maxsize=64)
def abstract_model(config: ViTConfig) -> VisionTransformer:
    """The model with shapes for arrays: nothing is allocated. Raises ConfigError as `build`.

    All callers share it, because making one takes a while. Do not change it.
    """
    return abstract(lambda rngs: build(config, rngs=rngs))


class Structure(NamedTuple):
    """A model without its numbers.

    graphdef  what `set_params` makes a model of.
    shapes    shape and dtype of each parameter, by path.
    """

    graphdef: nnx.GraphDef[VisionTransformer]
    shapes: Params

    def select(self, params: Mapping[str, Any]) -> Params:
        """The model's own of more parameters. Raises KeyError if one is missing."""
        return {path: params[path] for path in self.shapes}


@functools.lru_cache(maxsize=64)
def structure(config: ViTConfig) -> Structure:
    """The structure of the model of a configuration, made once. Raises ConfigError as `build`."""
    return Structure(*split(abstract_model(config)))


def with_image_size(model: VisionTransformer, size: int | tuple[int, int]) -> VisionTransformer:
    """The same network made for images of another size in pixels: the side of a square, or (height, width).

    Positions are resampled, and `keep_rate` is the share of the patches that such images have; called directly on
    images of another size, a depth network selects as many tokens as of images of its own. A network for images of any
    proportion becomes one for images of this size, without padding.

    Raises ConfigError: the patch does not divide the size, or the plan is not possible there.
    """
    config = dataclasses.replace(model.config, image_size=size, max_patches=0)
    if config == model.config:
        return model
    positions = model.positions(config.image_shape)
    graphdef, _ = split(abstract(lambda rngs: build(config, rngs=rngs)))
    moved = {} if positions is None else {"pos_embed": positions}
    resized = set_params(graphdef, get_params(model) | moved)
    resized.gather_params, resized.preprocessing = model.gather_params, model.preprocessing
    return resized


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


def control_config(config: ViTConfig, name: str) -> ViTConfig:
    """The network of the method `name` that stands beside `config` as a control; for `MAIN` that network itself.

    Raises ConfigError where a control that must have as many GMACs cannot save as much.
    """
    if name == MAIN:
        return config
    method = METHODS[name]
    plan = control_plan(config.plan, name)
    if not method.equal_gmacs:
        return dataclasses.replace(config, plan=plan, **method.fields)
    control = dataclasses.replace(config, plan=plan, keep_rate=1.0, **method.fields)
    return with_budget(control, _gmacs(config))


def _gmacs(config: ViTConfig) -> float:
    """What an image costs. Of a network with the same blocks only the layer kinds are made anew, for their counts."""
    model = abstract_model(dataclasses.replace(config, keep_rate=1.0))
    specs, known = layer_specs(config), layer_kinds()

    def make(rngs: nnx.Rngs):
        parts = zip(config.plan, specs, strict=True)
        return nnx.List(known[name](config, spec, rngs=rngs) for name, spec in parts)

    def macs(kinds: Any) -> int:
        parts = zip(kinds, model.blocks, strict=True)
        return sum(kind.block_macs(block) + kind.own_macs(block) for kind, block in parts)

    return (model.macs() - macs(model.kinds) + macs(abstract(make))) / 1e9
