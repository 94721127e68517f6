"""Loads a model with its preprocessing, task options and class names: the arguments of a `Predictor`.

The sources are the work directory of a run, released weights, and a file of `Predictor.save`.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypedDict

import jax
from flax import nnx

from tosa_jax.config import InputConfig, RunConfig, as_tuples, build_section, from_json
from tosa_jax.data import class_names as names_of
from tosa_jax.data.decoding import Preprocess
from tosa_jax.distributed.devices import computes_in
from tosa_jax.errors import ConfigError, UserError, WeightsError, WorkdirError
from tosa_jax.models.factory import abstract_model, build, structure
from tosa_jax.models.method import MAIN, METHODS, is_fitted, method_of
from tosa_jax.models.params import Params, get_params, set_params
from tosa_jax.models.vit import VisionTransformer
from tosa_jax.models.vit_config import ViTConfig
from tosa_jax.models.weights.load import pretrained_params, save_weights, selector_params
from tosa_jax.models.weights.preprocessing import PREDICTOR, Preprocessing, preprocessing_of
from tosa_jax.models.weights.readers import WeightFile, read_weights
from tosa_jax.models.weights.run_checkpoints import has_checkpoint
from tosa_jax.paths import parse_json
from tosa_jax.tasks import TASKS, model_config

KeepRate = float | tuple[float, ...] | None
"""Share of patches in (0, 1] that selective layers process: one, or one a selection; None: as in training."""

OnMessage = Callable[[str], None]


class LoadedModel(TypedDict):
    """A model and everything needed to use it.

    model        with its parameters on the default device.
    form         how images of any size become the model's input arrays.
    mean, std    of each channel's pixels in [0, 1], for normalisation.
    options      the task's options: the section `task` of a recipe.
    task         a key of `TASKS`.
    class_names  one a class; None: ImageNet's for 1000 classes, else numbers.
    """

    model: VisionTransformer
    form: Preprocess
    mean: tuple[float, ...]
    std: tuple[float, ...]
    options: Any
    task: str
    class_names: Sequence[str] | None


def from_workdir(workdir: Path, keep_rate: KeepRate, on_message: OnMessage) -> LoadedModel:
    """Loads the model of a run from its work directory; if the run trains nothing, from the weights that it evaluates.

    Raises WorkdirError (not a work directory), WeightsError (no checkpoint yet), ConfigError (`keep_rate`).
    """
    run = read_run(workdir)
    config = on_this_device(with_keep_rate(run.model, keep_rate), on_message)
    if has_checkpoint(workdir):
        params = _load(config, workdir, None, on_message)
    elif run.init_from:
        params = _load(config, run.init_from, run.init_selectors, on_message)
    else:
        raise WeightsError(f"{workdir} holds no checkpoint yet: wait until its run has written one")
    names = workdir / names_of.FILE
    return LoadedModel(
        model=_model(config, params),
        form=form_of(config, Preprocessing()) if config.resizes else run.data.preprocess,
        mean=run.inputs.mean,
        std=run.inputs.std,
        options=run.options,
        task=run.task,
        class_names=names_of.readable(names_of.read_names(names)) if names.exists() else None,
    )


def from_pretrained(
    name: str,
    weights: str | Path,
    selectors: str | Path | None,
    keep_rate: KeepRate,
    class_names: Sequence[str] | None,
    on_message: OnMessage,
    *,
    task: str = "classification",
    **fields: Any,
) -> LoadedModel:
    """Loads released weights, with the preprocessing that they expect (`preprocessing_of`).

    The arguments are those of `Predictor.from_pretrained`.

    Raises ConfigError (unknown name or field), WeightsError (missing, damaged or other weights).
    """
    if class_names is not None:
        fields["num_classes"] = len(class_names)
    if selectors or keep_rate is not None:
        fields = {"plan": METHODS[MAIN].plan} | fields
    config = with_keep_rate(model_config(task, name, **fields), keep_rate)
    config = on_this_device(config, on_message)
    if not selectors and is_fitted(config.plan):
        on_message("no selectors were given: tokens are chosen by the map of the layer before")
    file = read_weights(weights)
    published = preprocessing_of(name, max(config.image_shape), file)
    return LoadedModel(
        model=_model(config, _load(config, file, selectors, on_message)),
        form=form_of(config, published),
        mean=published.mean,
        std=published.std,
        options=TASKS[task].options(),
        task=task,
        class_names=class_names,
    )


def from_weights(path: str | Path, keep_rate: KeepRate, on_message: OnMessage) -> LoadedModel:
    """Loads a file of `save`. Raises WeightsError for any other file: it has no model configuration."""
    file = read_weights(path)
    text = file.metadata.get(PREDICTOR)
    if text is None:
        raise WeightsError(
            f"{path} has no model configuration: name the variant too (--model=NAME, or "
            "Predictor.from_pretrained)"
        )
    try:
        said = _described(text)
    except (ValueError, TypeError, KeyError, AttributeError, ConfigError) as error:
        raise WeightsError(
            f"{path} describes no model that this version knows ({type(error).__name__}: {error})"
        ) from error
    config = said.pop("config")
    config = on_this_device(with_keep_rate(config, keep_rate), on_message)
    params = _load(config, file, None, on_message)
    return LoadedModel(model=_model(config, params), **said)


def _described(text: str) -> dict[str, Any]:
    """What the text of `save` says of a model: its `config`, and the other fields of `LoadedModel`, checked."""
    said = as_tuples(parse_json(text))
    task = said.get("task", "classification")  # older files have none: they are all classifiers
    config = TASKS[task].model_class.config_class(**said["model"])
    inputs = build_section(InputConfig, "inputs", {name: said[name] for name in ("mean", "std")})
    names = said["class_names"]
    if names is not None and not (
        len(names) == config.num_classes and all(isinstance(x, str) for x in names)
    ):
        raise ValueError("its class names are not those of its classes")
    return {
        "config": config,
        "form": Preprocess(**said["form"]),
        "mean": inputs.mean,
        "std": inputs.std,
        "options": build_section(TASKS[task].options, "options", said.get("options", {})),
        "task": task,
        "class_names": names,
    }


def save(network: LoadedModel, path: str | Path) -> None:
    """Writes a model with its preprocessing, options and class names to one `.safetensors` file, for `from_weights`."""
    said = {**network, "model": network["model"].config.to_fields()}
    said |= {name: dataclasses.asdict(network[name]) for name in ("form", "options")}
    save_weights(network["model"], path, metadata={PREDICTOR: json.dumps(said)})


def form_of(config: ViTConfig, published: Preprocessing) -> Preprocess:
    """How images become a model's arrays: the short side is resized, then the centre is cropped.

    A model that accepts images of any size gets them in their own. Raises ConfigError if the model takes images of one
    size that is not square.
    """
    if config.resizes:
        return Preprocess(image_size=None, channels=config.in_chans)
    size = config.image_size
    if not isinstance(size, int):
        raise ConfigError(
            f"image_size={size} is not square: give `form`, which makes such arrays of images"
        )
    return Preprocess(
        image_size=size,
        channels=config.in_chans,
        resize="crop",
        crop_pct=published.crop_pct,
        interpolation=published.interpolation,
    )


def with_keep_rate(config: ViTConfig, keep_rate: KeepRate) -> ViTConfig:
    """The configuration with another keep rate; None: unchanged. Raises ConfigError if no layer selects tokens."""
    if keep_rate is None:
        return config
    if not any(method_of(kind).has_budget for kind in config.plan):
        raise ConfigError(
            f"keep_rate={keep_rate} was given, but no layer of this model selects tokens: its plan is all standard"
        )
    return dataclasses.replace(config, keep_rate=keep_rate)


def on_this_device(config: ViTConfig, on_message: OnMessage) -> ViTConfig:
    """The configuration, which computes in float32 where the device cannot compute in its type; a message says so."""
    if computes_in(config.dtype):
        return config
    on_message(f"this device does not compute in {config.dtype}: float32 is taken")
    return dataclasses.replace(config, dtype="float32")


def read_run(workdir: Path) -> RunConfig:
    """The configuration of the run in a work directory. Raises WorkdirError if it cannot be read."""
    path = workdir / "config.json"
    if not path.exists():
        raise WorkdirError(
            f"{workdir} is not the work directory of a run (it has no config.json); python -m tosa_jax.main makes one"
        )
    try:
        return from_json(parse_json(path.read_text(encoding="utf-8")))
    except (ValueError, OSError, UserError) as error:
        raise WorkdirError(f"{path} cannot be read ({error})") from error


def _load(
    config: ViTConfig,
    weights: str | Path | WeightFile,
    selectors: str | Path | None,
    on_message: OnMessage,
) -> Params:
    """Parameters from files; those that no file has are initialised at random, as for training."""
    abstract = abstract_model(config)
    params = pretrained_params(abstract, weights, on_message=on_message)
    if selectors:
        params |= selector_params(abstract, selectors)
    if get_params(abstract).keys() - params.keys():
        return get_params(build(config, rngs=nnx.Rngs(0))) | params
    return params


def _model(config: ViTConfig, params: Params) -> VisionTransformer:
    return set_params(structure(config).graphdef, jax.device_put(dict(params)))
