"""Tasks by name, and `create_model`: the model of a task by timm's name."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax.numpy as jnp
from flax import nnx

from tosa_jax.models.factory import MODEL_CLASSES, build, with_budget
from tosa_jax.models.method import MAIN, METHODS
from tosa_jax.models.options import OPTIONS
from tosa_jax.models.plan_file import SUFFIX
from tosa_jax.models.variants import (
    ARCHITECTURES,
    architecture_of,
    hub_repository,
    variant_config,
    with_given,
)
from tosa_jax.models.vit import VisionTransformer
from tosa_jax.models.vit_config import STANDARD, ViTConfig, check, check_choice
from tosa_jax.models.weights.architecture import network_of
from tosa_jax.models.weights.load import Weights, load_pretrained
from tosa_jax.models.weights.preprocessing import preprocessing_of
from tosa_jax.models.weights.readers import WeightFile, read_weights
from tosa_jax.tasks.task import Task

TASKS: dict[str, type[Task]] = {}
"""By the value of `config.task.name`."""

AnyTask = TypeVar("AnyTask", bound=type[Task])


def register(name: str) -> Callable[[AnyTask], AnyTask]:
    """Class decorator: `name` in a recipe's `task.name`, and in `create_model(task=...)`, means this task."""

    def add(task: AnyTask) -> AnyTask:
        TASKS[name] = task
        MODEL_CLASSES[task.model_class.config_class] = task.model_class
        return task

    return add


def config_class(task: str, architecture: str) -> type[ViTConfig]:
    """The configuration of a task's network of an architecture, a key of `ARCHITECTURES`.

    A task without a network of its own takes every architecture.

    Raises ConfigError: no such task, or its network is of another architecture.
    """
    check_choice("task", task, TASKS)
    check_choice("architecture", architecture, ARCHITECTURES)
    own = TASKS[task].model_class.config_class
    if own is ViTConfig:
        return ARCHITECTURES[architecture]
    check(
        architecture == own.architecture,
        f"task={task!r} has no network of the architecture {architecture!r}: it reads the tokens of a "
        f"{own.architecture!r}; name another network, or task='classification'",
    )
    return own


def model_config(task: str, name: str, **fields: Any) -> ViTConfig:
    """`variant_config` for the model of a task, with the `keep_rate` that `budget_gmacs` asks for.

    Raises ConfigError: no such task, or what `variant_config` and `with_budget` raise.
    """
    config = variant_config(name, config_class(task, architecture_of(name, fields)), **fields)
    return with_budget(config, config.budget_gmacs) if config.budget_gmacs else config


def create_model(
    name: str,
    *,
    keep_rate: float | tuple[float, ...] | None = None,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    task: str = "classification",
    plan: tuple[str, ...] | str | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs | None = None,
    pretrained: bool | Weights = False,
    on_message: Callable[[str], None] = print,
    **fields: Any,
) -> VisionTransformer:
    """A model by timm's name or the hub's, or "vit" with sizes of your own; random weights, initialised as DeiT or, for
    a LeMeViT, as in its repository.

    pretrained weights to load, as in `load_pretrained`; True: from the hub, what timm loads for that name (a tag may
               follow: "deit_small_patch16_224.fb_in1k"). The network is as the files state it, unless told otherwise.
    keep_rate  share in (0, 1] of the patches that selective layers take: one number, or one a selection.
               None, without a plan and `budget_gmacs`, makes the dense model.
    num_classes of the head; 0: the model has none and gives `Output.features`. By default the variant's own: 1000 for
               most, the width of the projection for CLIP, 0 for SigLIP and DINOv3.
    image_size pixels: the side of a square, or (height, width); by default the variant's own.
    task       a key of `TASKS`: "classification", or "depth", which has a decoder and does not read `num_classes`.
    plan       a layer kind for each layer; the name of one for every second layer; or a file of
               `python -m tosa_jax.budget`, which has the keep rates too. By default every second layer is selective.
    fields     any field of `ViTConfig`, for depth of `DepthConfig`, and for a LeMeViT of `LeMeViTConfig`.
    rngs       of the random weights; None: `nnx.Rngs(0)`.
    on_message gets a line for everything of `pretrained` that was changed, left out or guessed.

    `model.preprocessing` says how images are prepared for these weights.
    Raises ConfigError (one line, with what is known) for unknown names and sizes that do not fit, WeightsError for
    weights that cannot be read or do not fit.

    >>> model = create_model("vit", embed_dim=32, depth=2, num_heads=2, image_size=8, patch_size=4,
    ...                      num_classes=10, keep_rate=0.5, rngs=nnx.Rngs(0))
    >>> out = model(jnp.zeros((1, 8, 8, 3)))
    >>> out.logits.shape, [s.shape for s in out.selected]
    ((1, 10), [(1, 3)])
    """
    given = {"num_classes": num_classes, "image_size": image_size, "keep_rate": keep_rate}
    fields |= {"dtype": dtype, "param_dtype": param_dtype}
    fields |= {field: value for field, value in given.items() if value is not None}
    _check_rates(plan, keep_rate)
    file, base = None, name
    if pretrained is not False:
        file = read_weights(f"hf:{hub_repository(name)}" if pretrained is True else pretrained)
        stated = _stated_fields(task, name, file, on_message)
        fields, base = with_given(stated, fields), "vit"
    wants_fewer = keep_rate is not None or fields.get("budget_gmacs")
    if plan is None and wants_fewer and set(fields.get("plan") or (STANDARD,)) == {STANDARD}:
        plan = METHODS[MAIN].plan
    fields |= {} if plan is None else {"plan": plan}
    config = model_config(task, base, **fields)
    model = build(config, rngs=rngs or nnx.Rngs(0))
    if name != "vit":
        model.preprocessing = preprocessing_of(name, max(config.image_shape), file)
    return model if file is None else load_pretrained(model, file, on_message=on_message)


def _check_rates(plan: Any, keep_rate: Any) -> None:
    """Raise a ConfigError if a plan file and a keep rate are both given."""
    check(
        keep_rate is None or not (isinstance(plan, str) and plan.endswith(SUFFIX)),
        f"plan={plan!r} is a file that has keep rates: leave out keep_rate",
    )


def _stated_fields(
    task: str, name: str, file: WeightFile, on_message: Callable[[str], None]
) -> dict[str, Any]:
    """The fields of the configuration of a task's model that a file states of its network."""
    stated = network_of(file, name.partition(".")[0], on_message)[1]
    known = config_class(task, stated.get("architecture", ViTConfig.architecture))
    return {field: x for field, x in stated.items() if hasattr(known, field) or field in OPTIONS}
