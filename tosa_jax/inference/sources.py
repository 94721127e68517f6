"""A network ready to be run: from the work directory of a run, released weights, or one file that says all.

Each comes with its preprocessing, its task's options and class names: the arguments of a `Predictor`.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypedDict

import jax
from flax import nnx

from tosa_jax.config import RunConfig, as_tuples, from_json
from tosa_jax.data import class_names as names_of
from tosa_jax.data.decoding import Preprocess
from tosa_jax.errors import ConfigError, UserError, WeightsError, WorkdirError
from tosa_jax.models import cost
from tosa_jax.models.factory import NETWORKS, build, network_config
from tosa_jax.models.params import Params, get_params, set_params, split
from tosa_jax.models.vit import VisionTransformer
from tosa_jax.models.vit_config import ViTConfig, check
from tosa_jax.models.weights.load import pretrained_params, save_weights, selector_params
from tosa_jax.models.weights.readers import read_weights
from tosa_jax.tasks import TASKS

KeepRate = float | tuple[float, ...] | None
"""Share of patches in (0, 1] that selective layers take: one, or one a selection; None: as the network was trained."""
Say = Callable[[str], None]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the red, green and blue of ImageNet's pixels in [0, 1], as DeiT (timm) and DINOv2 normalise them."""

_METADATA = "predictor"  # the key, in a file of weights, of what is no weight


class Network(TypedDict):
    """A model and what it takes and means.

    form         how pictures become arrays.
    mean, std    of each channel's pixels in [0, 1].
    options      the task's own fields, those of a recipe's section `task`.
    class_names  one a class; None: ImageNet's for 1000 classes, else numbers.
    """

    model: VisionTransformer
    form: Preprocess
    mean: tuple[float, ...]
    std: tuple[float, ...]
    options: Any
    class_names: Sequence[str] | None


def from_workdir(workdir: Path, keep_rate: KeepRate, say: Say) -> Network:
    """What a run left in its work directory, or started from where it trains nothing.

    Raises WorkdirError (no run is there), WeightsError (it has no checkpoint yet), ConfigError (`keep_rate`).
    """
    run = read_run(workdir)
    config = with_keep_rate(run.model, keep_rate)
    if any((workdir / "checkpoints").glob("*/*/state")):
        params = _load(config, workdir, None, say)
    elif run.init_from:
        params = _load(config, run.init_from, run.init_selectors, say)
    else:
        raise WeightsError(f"{workdir} holds no checkpoint yet: let its run come to one first")
    names = workdir / names_of.FILE
    return Network(
        model=_model(config, params),
        form=preprocess_of("", config) if config.resizes else run.data.preprocess,
        mean=run.inputs.mean,
        std=run.inputs.std,
        options=run.options,
        class_names=names_of.readable(names_of.read_names(names)) if names.exists() else None,
    )


def from_pretrained(
    name: str,
    weights: str | Path,
    selectors: str | Path | None,
    keep_rate: KeepRate,
    class_names: Sequence[str] | None,
    say: Say,
    *,
    task: str = "classification",
    **fields: Any,
) -> Network:
    """A released network and the preprocessing that it was published with.

    Raises ConfigError (unknown name or field), WeightsError (missing, damaged or other weights).
    """
    if class_names is not None:
        fields["num_classes"] = len(class_names)
    if selectors or keep_rate is not None:
        fields = {"plan": "selective"} | fields
    config = with_keep_rate(network_config(task, name, **fields), keep_rate)
    if not selectors and "selective" in config.plan:
        say("no selectors were given: tokens are chosen by the map of the layer before")
    halves = _is_augreg(name)
    return Network(
        model=_model(config, _load(config, weights, selectors, say)),
        form=preprocess_of(name, config),
        mean=(0.5,) if halves else IMAGENET_MEAN,
        std=(0.5,) if halves else IMAGENET_STD,
        options=TASKS[task].options(),
        class_names=class_names,
    )


def from_weights(path: str | Path, keep_rate: KeepRate, say: Say) -> Network:
    """What `save` wrote. Raises WeightsError for any other file: it does not say of which network its weights are."""
    text = read_weights(path).metadata.get(_METADATA)
    if text is None:
        raise WeightsError(
            f"{path} does not say which network its weights are of: name the variant too (--model=NAME, or "
            "Predictor.from_pretrained)"
        )
    said = as_tuples(json.loads(text))
    task = said.pop("task", "classification")  # files of before there was depth do not say
    options = TASKS[task].options(**said.pop("options", {}))
    config = with_keep_rate(NETWORKS[task].config_class(**said.pop("model")), keep_rate)
    params, form = _load(config, path, None, say), Preprocess(**said.pop("form"))
    return Network(model=_model(config, params), form=form, options=options, **said)


def save(network: Network, path: str | Path) -> None:
    """Writes a network and what belongs to it to one `.safetensors` file, for `from_weights`."""
    config = dataclasses.asdict(network["model"].config)
    config |= {name: str(config[name]) for name in ("dtype", "param_dtype")}
    said = {**network, "task": network["model"].config.task, "model": config}
    said |= {name: dataclasses.asdict(network[name]) for name in ("form", "options")}
    save_weights(network["model"], path, metadata={_METADATA: json.dumps(said)})


def preprocess_of(name: str, config: ViTConfig) -> Preprocess:
    """How the weights of a variant were evaluated: the short side resized, bicubic, and the centre cropped.

    Images of a network that takes any size keep theirs.

    The share kept is .875 as in DeiT's code (facebookresearch/deit), .9 for AugReg's `vit_*` (timm), and all of it from
    384 pixels on (both).

    Raises ConfigError: the network takes images of one size, which is no square.
    """
    if config.resizes:
        return Preprocess(image_size=None, channels=config.in_chans)
    size = config.image_size
    check(
        isinstance(size, int),
        f"image_size={size} is no square: say how pictures become such arrays (form)",
    )
    crop_pct = 1.0 if size >= 384 else 0.9 if _is_augreg(name) else 0.875
    return Preprocess(image_size=size, channels=config.in_chans, resize="crop", crop_pct=crop_pct)


def _is_augreg(name: str) -> bool:
    """Steiner et al. 2021, whose inputs are in [-1, 1]; timm names them vit_<size>_patch16."""
    return name.startswith("vit_") and "dinov2" not in name


def with_keep_rate(config: ViTConfig, keep_rate: KeepRate) -> ViTConfig:
    """The same network at another budget; None leaves it. Raises ConfigError if nothing in it selects."""
    if keep_rate is None:
        return config
    if set(config.plan) <= {"standard", "skip"}:
        raise ConfigError(
            f"keep_rate={keep_rate} was given, but no layer of this network selects: its plan is all standard"
        )
    return dataclasses.replace(config, keep_rate=keep_rate)


def read_run(workdir: Path) -> RunConfig:
    """The configuration of the run in a work directory. Raises WorkdirError if there is none to read."""
    path = workdir / "config.json"
    if not path.exists():
        raise WorkdirError(
            f"{workdir} is not the work directory of a run (it has no config.json); python -m tosa_jax.main makes one"
        )
    try:
        return from_json(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, OSError, UserError) as error:
        raise WorkdirError(f"{path} cannot be read ({error})") from error


def _load(config: ViTConfig, path: str | Path, selectors: str | Path | None, say: Say) -> Params:
    """Parameters from files; random ones, as for training, where no file has them."""
    abstract = cost.abstract_model(config)
    params = pretrained_params(abstract, path, on_message=say)
    if selectors:
        params |= selector_params(abstract, selectors)
    if get_params(abstract).keys() - params.keys():
        return get_params(build(config, rngs=nnx.Rngs(0))) | params
    return params


def _model(config: ViTConfig, params: Params) -> VisionTransformer:
    return set_params(split(cost.abstract_model(config))[0], jax.device_put(dict(params)))
