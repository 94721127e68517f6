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
from tosa_jax.models.factory import abstract_model, build, structure, with_budget
from tosa_jax.models.method import MAIN, METHODS, is_fitted, method_of
from tosa_jax.models.params import Params, get_params, set_params
from tosa_jax.models.variants import variant_config, with_given, with_plan
from tosa_jax.models.vit import VisionTransformer
from tosa_jax.models.vit_config import STANDARD, ViTConfig, check_fields
from tosa_jax.models.weights import statements
from tosa_jax.models.weights.architecture import network_of, num_classes_of
from tosa_jax.models.weights.load import Weights, pretrained_params, save_weights, selector_params
from tosa_jax.models.weights.preprocessing import Preprocessing, preprocessing_of, stated
from tosa_jax.models.weights.readers import WeightFile, read_weights
from tosa_jax.models.weights.run_checkpoints import FOLDER, has_checkpoint
from tosa_jax.models.weights.statements import PREDICTOR
from tosa_jax.paths import parse_json
from tosa_jax.tasks import TASKS, config_class, model_config

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


def from_workdir(
    workdir: Path, keep_rate: KeepRate, on_message: OnMessage, **fields: Any
) -> LoadedModel:
    """Loads the model of a run from its work directory; if the run trains nothing, from the weights that it evaluates.

    fields  of the model's configuration, other than the run's.

    Raises WorkdirError (not a work directory), WeightsError (no checkpoint yet), ConfigError (`keep_rate`, `fields`).
    """
    run = read_run(workdir)
    config = _with_fields(run.model, keep_rate, fields)
    config = on_this_device(config, on_message)
    form = form_of(config, Preprocessing()) if config.resizes else run.data.preprocess
    form = _form_with(form, config, fields)
    if has_checkpoint(workdir):
        params = _load(config, workdir, None, on_message)
    elif run.init_from:
        params = _load(config, run.init_from, run.init_selectors, on_message)
    else:
        raise WeightsError(f"{workdir} holds no checkpoint yet: wait until its run has written one")
    names = None
    if "num_classes" not in config.unused and (listed := workdir / names_of.FILE).exists():
        names = names_of.readable(names_of.read_names(listed))
    return LoadedModel(
        model=_model(config, params),
        form=form,
        mean=run.inputs.mean,
        std=run.inputs.std,
        options=run.options,
        task=run.task,
        class_names=names,
    )


def from_pretrained(
    name: str,
    weights: Weights,
    selectors: str | Path | None,
    keep_rate: KeepRate,
    class_names: Sequence[str] | None,
    on_message: OnMessage,
    *,
    task: str = "classification",
    **fields: Any,
) -> LoadedModel:
    """Loads released weights into the variant of a name, with the preprocessing that they expect (`preprocessing_of`).

    The arguments are those of `Predictor.from_pretrained`.

    Raises ConfigError (unknown name or field), WeightsError (missing, damaged or other weights).
    """
    variant_config(name)  # an unknown name is told before a file is read
    file = read_weights(weights)
    if class_names is not None:
        fields["num_classes"] = len(class_names)
    elif task == "classification":
        fields = {"num_classes": num_classes_of(file)} | fields
    return _from_file(file, name, selectors, keep_rate, class_names, on_message, task, fields)


def load(
    source: Weights,
    name: str,
    selectors: str | Path | None,
    keep_rate: KeepRate,
    class_names: Sequence[str] | None,
    on_message: OnMessage,
    *,
    checkpoint_key: str | None = None,
    prefix: str = "",
    **fields: Any,
) -> LoadedModel:
    """Loads a network with all that its files state: configuration, classes, preprocessing.

    The arguments are those of `inference.predictor.load`.

    Raises ConfigError (unknown name or field), WeightsError (missing, damaged, or nothing states the network).
    """
    if isinstance(source, str | Path) and is_workdir(folder := Path(source).expanduser()):
        return from_workdir(folder, keep_rate, on_message, **fields)
    file = read_weights(source, checkpoint_key=checkpoint_key, prefix=prefix)
    if statements.has_own(file, PREDICTOR):
        return _from_statement(file, keep_rate, on_message, **fields)
    task, network = network_of(file, name, on_message)
    task = fields.pop("task", task)
    if class_names is not None:
        fields["num_classes"] = len(class_names)
    family = name or statements.architecture(file) or statements.family(file)
    if not stated(file).keys() & {"mean", "crop_pct"}:
        known = "how its family is" if family else "ImageNet's mean and DeiT's crop are"
        on_message(f"{file.path}: nothing states how images are prepared; {known} a guess")
    return _from_file(
        file, "vit", selectors, keep_rate, class_names, on_message, task,
        with_given(network, fields), family,
    )  # fmt: skip


def is_workdir(path: Path) -> bool:
    """Whether a path is the work directory of a run."""
    return path.is_dir() and (path / "config.json").exists() and (path / FOLDER).is_dir()


def _from_file(
    file: WeightFile,
    name: str,
    selectors: str | Path | None,
    keep_rate: KeepRate,
    class_names: Sequence[str] | None,
    on_message: OnMessage,
    task: str,
    fields: dict[str, Any],
    family: str = "",
) -> LoadedModel:
    """The network of a variant with `fields`, with a file's weights.

    family  timm's name of the network, for the preprocessing that the file does not state; "": `name`.
    """
    wants_fewer = selectors or keep_rate is not None or fields.get("budget_gmacs")
    if wants_fewer and set(fields.get("plan") or (STANDARD,)) == {STANDARD}:
        fields = fields | {"plan": METHODS[MAIN].plan}
    config = with_keep_rate(model_config(task, name, **fields), keep_rate)
    config = on_this_device(config, on_message)
    if not selectors and is_fitted(config.plan) and not _has_selectors(file):
        on_message("no selectors were given: tokens are chosen by the map of the layer before")
    published = preprocessing_of(family or name, max(config.image_shape), file)
    if class_names is None and (names := statements.class_names(file, config.num_classes)):
        class_names = names_of.readable(names)
    model = _model(config, _load(config, file, selectors, on_message))
    if len(published.mean) == 3 and config.in_chans != 3:
        on_message(f"{file.path}: of mean and std of RGB their mean is a guess for other channels")
        averaged = {name: (sum(getattr(published, name)) / 3,) for name in ("mean", "std")}
        published = published._replace(**averaged)
    model.preprocessing = published
    return LoadedModel(
        model=model,
        form=form_of(config, published),
        mean=published.mean,
        std=published.std,
        options=TASKS[task].options(),
        task=task,
        class_names=class_names,
    )


def _has_selectors(file: WeightFile) -> bool:
    return any(name.startswith("kinds/") for name in file.arrays)


def from_weights(path: str | Path, keep_rate: KeepRate, on_message: OnMessage) -> LoadedModel:
    """Loads a file of `save`. Raises WeightsError for any other file: it has no model configuration."""
    file = read_weights(path)
    if not statements.has_own(file, PREDICTOR):
        raise WeightsError(
            f"{path} has no model configuration: name the variant too (--model=NAME, or "
            "Predictor.from_pretrained), or use tosa_jax.load, which reads what lies beside it"
        )
    return _from_statement(file, keep_rate, on_message)


def _with_fields(config: ViTConfig, keep_rate: KeepRate, fields: dict[str, Any]) -> ViTConfig:
    """The configuration with other values for some fields. Raises ConfigError for fields that it does not have."""
    if not fields:
        return with_keep_rate(config, keep_rate)
    check_fields(config, fields)
    fields = with_given({"max_patches": config.max_patches}, fields)
    changed = with_plan({"plan": config.plan, **fields, "depth": config.depth})
    del changed["depth"]
    changed |= {} if keep_rate is None else {"keep_rate": keep_rate}
    config = dataclasses.replace(config, **changed)
    return with_budget(config, config.budget_gmacs) if fields.get("budget_gmacs") else config


def _form_with(form: Preprocess, config: ViTConfig, fields: dict[str, Any]) -> Preprocess:
    """The preprocessing of a model that was made with other values for some fields of its configuration."""
    if form.max_patches or fields.get("image_size") or fields.get("max_patches"):
        return dataclasses.replace(form, **_sizes_of(config))
    return form


def _sizes_of(config: ViTConfig) -> dict[str, Any]:
    """The fields of `Preprocess` that say how large images become for a model that does not take any size."""
    if config.max_patches:
        most = {"max_patches": config.max_patches, "patch_size": config.patch_size}
        return {"image_size": None} | most
    return {"image_size": config.image_size, "max_patches": 0, "patch_size": 0}


def _from_statement(
    file: WeightFile, keep_rate: KeepRate, on_message: OnMessage, **fields: Any
) -> LoadedModel:
    try:
        said = _described(file.metadata[PREDICTOR])
    except (ValueError, TypeError, KeyError, AttributeError, ConfigError) as error:
        raise WeightsError(
            f"{file.path} describes no model that this version knows ({type(error).__name__}: {error})"
        ) from error
    config = _with_fields(said.pop("config"), keep_rate, fields)
    config = on_this_device(config, on_message)
    said["form"] = _form_with(said["form"], config, fields)
    params = _load(config, file, None, on_message)
    return LoadedModel(model=_model(config, params), **said)


def _described(text: str) -> dict[str, Any]:
    """What the text of `save` says of a model: its `config`, and the other fields of `LoadedModel`, checked."""
    said = as_tuples(parse_json(text))
    task = said.get("task", "classification")  # older files have none: they are all classifiers
    network = config_class(task, said["model"].get("architecture", ViTConfig.architecture))
    config = network(**said["model"])
    inputs = build_section(InputConfig, "inputs", {name: said[name] for name in ("mean", "std")})
    names = said["class_names"]
    classes = 0 if "num_classes" in config.unused else config.num_classes
    if names is not None and not (len(names) == classes and all(isinstance(x, str) for x in names)):
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
    """How images become a model's arrays: they are resized and cropped as `published` says.

    A model that accepts images of any size gets them in their own, one with `max_patches` in their own proportion.
    """
    if config.resizes:
        return Preprocess(image_size=None, channels=config.in_chans)
    return Preprocess(
        **_sizes_of(config),
        channels=config.in_chans,
        resize=published.resize,
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
    weights: Weights,
    selectors: str | Path | None,
    on_message: OnMessage,
) -> Params:
    """Parameters from files; selectors that no file has choose by the map of the layer before.

    Raises WeightsError where any other part is in no file: training may start with a random head, prediction may not.
    """
    abstract = abstract_model(config)
    said: list[str] = []
    params = pretrained_params(abstract, weights, on_message=said.append)
    if selectors:
        params |= selector_params(abstract, selectors)
    missing = get_params(abstract).keys() - params.keys()
    if random := {name.split("/")[0] for name in missing if not name.startswith("kinds/")}:
        why = next((line for line in said if "untrained" in line), said[-1] if said else "")
        raise WeightsError(
            f"{' and '.join(sorted(random))} would be random, so that no prediction means anything: {why}. Give the "
            "weights' own number of classes (num_classes, --classes), or num_classes=0 for features"
        )
    for line in said:
        on_message(line)
    return get_params(build(config, rngs=nnx.Rngs(0))) | params if missing else params


def _model(config: ViTConfig, params: Params) -> VisionTransformer:
    return set_params(structure(config).graphdef, jax.device_put(dict(params)))
