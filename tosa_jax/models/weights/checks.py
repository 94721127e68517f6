"""Checks that a file's parameters fit a model, and that both compute the same function."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from tosa_jax.errors import WeightsError
from tosa_jax.models.variants import VARIANTS, variant_config
from tosa_jax.models.vit_config import ViTConfig
from tosa_jax.models.weights import statements
from tosa_jax.models.weights.dpt import decoder_fields, depth_fields
from tosa_jax.models.weights.names import google_fields, is_google
from tosa_jax.models.weights.readers import WeightFile
from tosa_jax.paths import parse_json

# transformers' `hidden_act` -> `ViTConfig.mlp`.
_ACTIVATIONS = {
    **dict.fromkeys(("gelu", "gelu_python"), "gelu"),
    "quick_gelu": "quick_gelu",
    **dict.fromkeys(
        ("gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh"),
        "gelu_tanh",
    ),
}
# LayerNorm's epsilon where a config.json leaves it out, by `model_type`.
_DEFAULT_EPS = {"vit": 1e-12, "deit": 1e-12, "vit_mae": 1e-12, "dpt": 1e-12}
_DEFAULT_EPS |= {"dinov2": 1e-6, "dinov2_with_registers": 1e-6, "dinov3_vit": 1e-5}
_DEFAULT_EPS |= {"clip_vision_model": 1e-5, "siglip_vision_model": 1e-6}
_DEFAULT_EPS |= {"siglip2_vision_model": 1e-6}
# What else a config.json may leave out, where it is not as in ViT.
_DEFAULTS = {
    "clip_vision_model": {"hidden_act": "quick_gelu", "patch_size": 32},
    "siglip_vision_model": {"hidden_act": "gelu_pytorch_tanh"},
    "siglip2_vision_model": {"hidden_act": "gelu_pytorch_tanh"},
}
# `model_type` of a network for images and texts -> that of its image tower, `vision_config` in its config.json.
_TOWERS = {
    "clip": "clip_vision_model",
    "siglip": "siglip_vision_model",
    "siglip2": "siglip2_vision_model",
}


def check_fit(path: str, arrays: Mapping[str, np.ndarray], own: Mapping[str, Any]) -> None:
    """Raise a WeightsError that lists names missing, left over or of another shape, if any are."""
    shapes = {
        f"{name} (file {list(arrays[name].shape)}, model {list(own[name].shape)})"
        for name in arrays.keys() & own.keys()
        if arrays[name].shape != own[name].shape
    }
    faults = {
        "missing": own.keys() - arrays.keys(),
        "left over": arrays.keys() - own.keys(),
        "of another shape": shapes,
    }
    lines = [f"{what}: {_listed(names)}" for what, names in faults.items() if names]
    if lines:
        raise WeightsError(
            f"{path} does not fit the model; {'; '.join(lines)}. Is it the right variant?"
        )


def stored_as(
    path: str, arrays: Mapping[str, np.ndarray], own: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """The arrays in the dtypes of the model's. Raises WeightsError for values that are not finite in either dtype."""
    check_finite(path, arrays)
    stored = {}
    with np.errstate(over="ignore", invalid="ignore"):
        for name, x in arrays.items():
            stored[name] = np.asarray(x).astype(own[name].dtype)
            if not np.isfinite(stored[name]).all():
                raise WeightsError(
                    f"{path}: {name} holds numbers too large for {own[name].dtype}; set param_dtype='float32'"
                )
    return stored


def check_finite(path: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Raise a WeightsError that counts the values that are no finite numbers, if any are."""
    faults = {}
    for name, x in arrays.items():
        x = np.asarray(x)
        finite = np.isfinite(x if x.dtype.kind in "fiub" else x.astype(np.float32))
        if not finite.all():
            faults[name] = finite.size - int(finite.sum())
    if faults:
        raise WeightsError(
            f"{path} holds {sum(faults.values())} values that are not finite, in {_listed(faults)}: its training "
            "failed, or it is damaged"
        )


def _listed(names: Iterable[str], most: int = 8) -> str:
    """At most `most` names in order, then a count."""
    names = sorted(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def stated_fields(file: WeightFile) -> dict[str, Any]:
    """The `ViTConfig.silent_fields` that the file, its metadata or the config.json beside it state.

    Raises WeightsError for an activation or a decoder that no model here has, and for texts of an unknown form.
    """
    try:
        return _stated_fields(file)
    except (TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise WeightsError(
            f"{file.path}: what it or the config.json beside it says of the network is of an unknown form "
            f"({type(error).__name__}: {error}); get it again"
        ) from error


def _stated_fields(file: WeightFile) -> dict[str, Any]:
    if is_google(file.arrays):
        return google_fields(file.arrays)
    decoder = decoder_fields(file.arrays)
    if file.metadata.get("format") == statements.WEIGHTS_FORMAT:
        return decoder | statements.tuples(parse_json(file.metadata.get("fields", "{}")))
    config = file.config
    if config.get("architecture") in VARIANTS:  # timm's folders
        silent = variant_config(config["architecture"]).silent_fields
        given = config.get("model_args") or {}  # what differs from the architecture
        if "rope_temperature" in given:
            given = given | {"rope_base": given["rope_temperature"]}
        return silent | {name: given[name] for name in silent.keys() & given.keys()}
    if config.get("model_type") == "depth_anything":
        backbone = {"model_type": "dinov2", **(config.get("backbone_config") or {})}
        return decoder | _transformers_fields(file.path, backbone) | depth_fields(file.path, config)
    if config.get("model_type") == "dpt":
        return decoder | depth_fields(file.path, config) | _transformers_fields(file.path, config)
    return decoder | _transformers_fields(file.path, config)


def _transformers_fields(path: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the config.json of a ViT of transformers states; {} for that of another model."""
    if tower := _TOWERS.get(config.get("model_type", "")):
        config = {**config.get("vision_config", {}), "model_type": tower}
    if config.get("model_type") not in _DEFAULT_EPS:
        return {}
    config = {**_DEFAULTS.get(config["model_type"], {}), **config}
    # transformers writes every field; the defaults are those of its versions that did not.
    activation = config.get("hidden_act", "gelu")
    gated = config.get("use_swiglu_ffn") or (config.get("use_gated_mlp") and activation == "silu")
    if not gated and (activation not in _ACTIVATIONS or config.get("use_gated_mlp")):
        raise WeightsError(
            f"{path}: the config.json beside it says hidden_act={activation!r}, which no model "
            f"here computes; known: {', '.join(_ACTIVATIONS)}, and silu in a gated MLP"
        )
    rotary = {}
    if config["model_type"] == "dinov3_vit":
        rotary = {"rope": "dinov3", "rope_base": config.get("rope_theta", 100.0)}
        rotary |= {"key_bias": config.get("key_bias", False)}
    return rotary | {
        "num_heads": config.get("num_attention_heads", 12),
        "mlp": "swiglu" if gated else _ACTIVATIONS[activation],
        "norm_eps": config.get("layer_norm_eps", _DEFAULT_EPS[config["model_type"]]),
        "patch_size": config.get("patch_size", 16),
    }


def check_config(file: WeightFile, config: ViTConfig, say: Callable[[str], None]) -> None:
    """Raise a WeightsError that names the fields to pass, where a file states another function.

    Two LayerNorm epsilons of at most 1e-5 are a message only: activations have a variance near 1. So are two ranges of
    depth: a decoder may start another's training.
    """
    own = config.silent_fields
    stated = {name: value for name, value in stated_fields(file).items() if name in own}
    for name, value in stated.items():
        if isinstance(value, int | float) != isinstance(own[name], int | float):
            raise WeightsError(
                f"{file.path}: what it or the config.json beside it says is of an unknown form ({name}={value!r}); "
                "get it again"
            )
    differing = {name: value for name, value in stated.items() if value != own[name]}
    if (most := differing.pop("max_depth", None)) is not None:
        say(
            f"trained with max_depth={most:g}, the model has {own['max_depth']:g}: its depths are "
            f"scaled by that; pass max_depth={most:g} to create_model for the same"
        )
    eps = differing.get("norm_eps")
    if eps is not None and max(eps, config.norm_eps) <= 1e-5:
        del differing["norm_eps"]
        say(
            f"trained with norm_eps={eps:g}, the model has {config.norm_eps:g}: outputs may differ "
            f"in the last digits; pass norm_eps={eps:g} to create_model for the same"
        )
    if differing:
        has = ", ".join(f"{name}={own[name]!r}" for name in differing)
        wants = ", ".join(f"{name}={value!r}" for name, value in differing.items())
        raise WeightsError(
            f"{file.path} is for another network than the model: pass {wants} to create_model (it "
            f"has {has})"
        )
