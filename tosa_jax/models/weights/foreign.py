"""Writes parameters under the names of timm or of transformers, with the JSON files by which those read them.

The inverse of `translation`, by the same tables, for the networks that both sides have.
"""

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tosa_jax.errors import WeightsError
from tosa_jax.models.variants import VARIANTS
from tosa_jax.models.vit_config import ViTConfig
from tosa_jax.models.weights import names, towers
from tosa_jax.models.weights.preprocessing import Preprocessing
from tosa_jax.models.weights.renaming import inverse, rename
from tosa_jax.paths import write_atomically

Arrays = dict[str, np.ndarray]

_SIZES = ("embed_dim", "depth", "num_heads", "mlp_ratio", "patch_size", "in_chans")
_FORM = ("mlp", "mlp_norm", "attn_norm", "qkv_bias", "patch_bias", "norm_eps", "class_token", "reg_tokens", "distilled",
         "pre_norm", "pos_embed", "pos_embed_prefix", "rope")  # fmt: skip
_POOLS = ("token", "avg", "map")  # of `global_pool`, those that timm has too
_FILTERS = {"bilinear": 2, "bicubic": 3}  # PIL's numbers
_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu"}


def write_statements(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """Writes JSON files into a folder, each atomically."""
    for name, value in files.items():
        write_atomically(folder / name, json.dumps(value, indent=2).encode())


def to_timm(
    params: Arrays,
    config: ViTConfig,
    preprocessing: Preprocessing | None,
    class_names: tuple[str, ...],
) -> tuple[Arrays, dict[str, dict[str, Any]]]:
    """timm's arrays, and the config.json with which `timm.create_model("local-dir:FOLDER", pretrained=True)` makes
    the network.

    class_names  (): none are stated.

    Raises WeightsError for a network that no architecture of timm is, whatever its size.
    """
    base = _architecture(config)
    if config.task != "classification" or base is None or config.global_pool not in _POOLS:
        raise WeightsError("no architecture of timm is this network; leave names out to save it")
    args: dict[str, Any] = {name: getattr(config, name) for name in _SIZES}
    # timm makes the last norm by the pool when it builds the network, before it reads `global_pool` beside these.
    args["global_pool"] = config.global_pool
    if config.max_patches:
        args["pos_embed_grid_size"] = list(config.grid)
    else:
        args["img_size"] = list(config.image_shape)
    if config.layer_scale:
        args["init_values"] = config.layer_scale
    if config.rope:
        args["rope_temperature"] = config.rope_base
        if config.mlp == "swiglu":
            args["mlp_ratio"] = config.mlp_ratio / 2  # of both halves here, of one there
    elif config.mlp != "swiglu":
        args["act_layer"] = config.mlp  # SigLIPs of some sizes have another one in timm
    stated = {
        "architecture": base,
        "num_classes": config.num_classes,
        "num_features": config.embed_dim,
        "global_pool": config.global_pool,
        "model_args": args,
        "pretrained_cfg": _timm_cfg(config, preprocessing),
    }
    stated |= {"label_names": list(class_names)} if class_names else {}
    # timm has no words for these two, which are read here alone.
    stated |= {"projection": True} if config.projection else {}
    stated |= {"max_patches": config.max_patches} if config.max_patches else {}
    arrays = _plain(params, config)
    arrays = _as_eva(arrays, config) if config.rope else arrays
    arrays = _as_naflex(arrays, config) if config.max_patches else arrays
    return arrays, {"config.json": stated}


def _architecture(config: ViTConfig) -> str | None:
    """The variant of a ViT that differs from the network in sizes alone, the nearest one by sizes."""

    def form(of: ViTConfig) -> tuple[Any, ...]:
        return (
            *(getattr(of, name) for name in _FORM),
            bool(of.layer_scale),
            bool(of.max_patches),
            of.key_bias or not of.rope,  # without rotary positions it changes nothing
            of.global_pool == "map",
        )

    # Of a DINOv3 the one with biases of queries and values.
    variants = {
        name: of
        for name, of in VARIANTS.items()
        if name != "vit" and "architecture" not in of and ("dinov3" not in name or "qkvb" in name)
    }
    found = [(name, ViTConfig(**fields)) for name, fields in variants.items()]
    alike = [(name, of) for name, of in found if form(of) == form(config)]
    alike.sort(key=lambda x: -sum(getattr(x[1], size) == getattr(config, size) for size in _SIZES))
    return alike[0][0] if alike else None


def _timm_cfg(config: ViTConfig, known: Preprocessing | None) -> dict[str, Any]:
    stated = {
        "input_size": [config.in_chans, *config.image_shape],
        "num_classes": config.num_classes,
    }
    if known is None:
        return stated
    modes = {"crop": "center", "squash": "squash"}
    return stated | {
        "mean": list(known.mean), "std": list(known.std), "crop_pct": known.crop_pct,
        "interpolation": known.interpolation, "crop_mode": modes[known.resize],
    }  # fmt: skip


def _plain(params: Arrays, config: ViTConfig) -> Arrays:
    """timm's names and layouts (`names.to_ours` the other way round); what methods add is left out."""
    arrays = {}
    for path, x in params.items():
        if path.startswith("kinds/"):
            continue
        name = re.sub(r"(kernel|scale)$", "weight", path).replace("/", ".")
        if name == "patch_embed.proj.weight" and not config.max_patches:
            side = config.patch_size
            x = x.reshape(side, side, config.in_chans, -1).transpose(3, 2, 0, 1)
        arrays[name] = x.T if x.ndim == 2 else x
    return arrays


def _as_naflex(arrays: Arrays, config: ViTConfig) -> Arrays:
    """A network for images of any proportion under the names of timm's `naflexvit.py`."""
    out = dict(arrays)
    for part in ("weight", "bias"):
        out[f"embeds.proj.{part}"] = out.pop(f"patch_embed.proj.{part}")
    out["embeds.pos_embed"] = out.pop("pos_embed").reshape(1, *config.grid, -1)
    return out


def _as_eva(arrays: Arrays, config: ViTConfig) -> Arrays:
    """A DINOv3 or an EVA-02 under the names of timm's `eva.py`.

    There the tiny and small EVA-02 have the halves of a SwiGLU in one layer, the others in two; and those with a norm
    in the MLP have three kernels of queries, keys and values.
    """
    apart = config.mlp == "swiglu" and (config.mlp_norm or config.rope == "dinov3")
    out = {}
    for name, x in (names.take_apart(arrays, names.EVA_GATED) if apart else arrays).items():
        name = re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", name)
        if name.endswith("attn.qkv.bias"):
            query, _, value = np.split(x, 3)
            stem, of = name.removesuffix("qkv.bias"), "_proj.bias" if config.mlp_norm else "_bias"
            out |= {f"{stem}q{of}": query, f"{stem}v{of}": value}
        elif config.mlp_norm and ".attn.qkv." in name:
            parts = zip("qkv", np.split(x, 3), strict=True)
            out |= {name.replace(".qkv.", f".{part}_proj."): piece for part, piece in parts}
        else:
            out[name] = x
    return out


class _Kind(NamedTuple):
    """A network of transformers.

    model_type  of its config.json.
    name        of its classes: of `NAMEModel`, without a head.
    heads       (`global_pool`, what the model gives) -> what the class is called in place of "Model".
    form        fields of `ViTConfig` in which it differs from `_FORM_OF_ALL`; True for any value that is not 0.
    """

    model_type: str
    name: str
    heads: dict[tuple[str, str], str]
    form: dict[str, tuple[Any, ...]]


_FORM_OF_ALL: dict[str, tuple[Any, ...]] = {
    "class_token": (True,), "distilled": (False,), "reg_tokens": (False,), "layer_scale": (False,),
    "pre_norm": (False,), "patch_bias": (True,), "pos_embed": (True,), "pos_embed_prefix": (True,), "rope": (False,),
    "max_patches": (False,), "mlp_norm": (False,), "attn_norm": (False,),
    "mlp": ("gelu", "gelu_tanh", "quick_gelu"), "qkv_bias": (True, False),
}  # fmt: skip
_FEATURES = {("token", "features"): "Model"}
_LABELS = {("token", "logits"): "ForImageClassification"}
_DINOV2: dict[str, tuple[Any, ...]] = {
    "layer_scale": (True,),
    "mlp": ("gelu", "gelu_tanh", "quick_gelu", "swiglu"),
}
_DINOV2_HEADS = _FEATURES | {("token_avg", "logits"): "ForImageClassification"}
_SIGLIP: dict[str, tuple[Any, ...]] = {
    "class_token": (False,),
    "pos_embed_prefix": (True, False),
    "qkv_bias": (True,),
}
_SIGLIP_HEADS = {("map", "features"): "Model"}
_KINDS = (
    _Kind("vit", "ViT", _FEATURES | _LABELS, {}),
    _Kind(
        "deit",
        "DeiT",
        {("token", "logits"): "ForImageClassificationWithTeacher"},
        {"distilled": (True,)},
    ),
    _Kind(
        "dinov2_with_registers",
        "Dinov2WithRegisters",
        _DINOV2_HEADS,
        _DINOV2 | {"reg_tokens": (True,), "pos_embed_prefix": (False,)},
    ),
    _Kind("dinov2", "Dinov2", _DINOV2_HEADS, _DINOV2 | {"pos_embed_prefix": (True, False)}),
    _Kind(
        "clip_vision_model",
        "CLIPVision",
        _FEATURES | {("token", "projection"): "ModelWithProjection"},
        {"pre_norm": (True,), "patch_bias": (False,), "qkv_bias": (True,)},
    ),
    _Kind("siglip_vision_model", "SiglipVision", _SIGLIP_HEADS, _SIGLIP),
    _Kind(
        "siglip2_vision_model", "Siglip2Vision", _SIGLIP_HEADS, _SIGLIP | {"max_patches": (True,)}
    ),
    _Kind(
        "dinov3_vit",
        "DINOv3ViT",
        _FEATURES,
        {
            "reg_tokens": (True,),
            "layer_scale": (True,),
            "pos_embed": (False,),
            "pos_embed_prefix": (True, False),
            "rope": ("dinov3",),
            "mlp": ("gelu", "gelu_tanh", "quick_gelu", "swiglu"),
        },
    ),
)


def _lacks(kind: _Kind, config: ViTConfig) -> tuple[list[str], list[str]]:
    """What of a network transformers' one has not, as "field=value": of its form, and of its head."""
    given = {name: getattr(config, name) for name in _FORM_OF_ALL}
    form = _FORM_OF_ALL | kind.form
    lacks = [name for name, x in given.items() if x not in form[name] and bool(x) not in form[name]]
    height, width = config.image_shape
    if height != width and kind.model_type != "dinov3_vit":
        lacks.append("image_size")
    if kind.model_type.startswith("dinov2") and not _dinov2_ratio(config):
        lacks.append("mlp_ratio")
    head = [f"global_pool={config.global_pool!r} with num_classes={config.num_classes}"]
    known = (config.global_pool, _gives(config)) in kind.heads
    return [f"{name}={getattr(config, name)!r}" for name in lacks], [] if known else head


def _gives(config: ViTConfig) -> str:
    return "projection" if config.projection else "logits" if config.num_classes else "features"


def _dinov2_ratio(config: ViTConfig) -> int:
    """transformers' `mlp_ratio` of a DINOv2, a whole number, of which a SwiGLU has two thirds; 0: there is none."""
    for ratio in range(1, 17):
        hidden = ratio * config.embed_dim
        if config.mlp == "swiglu":
            hidden = 2 * ((int(hidden * 2 / 3) + 7) // 8 * 8)
        if hidden == config.mlp_dim:
            return ratio
    return 0


def _kind(config: ViTConfig) -> _Kind:
    """transformers' network that this one is. Raises WeightsError, naming what the nearest one lacks."""
    if config.task != "classification":
        raise WeightsError(
            f"networks for {config.task} are not written under transformers' names; leave names out to save it"
        )
    kind = min(_KINDS, key=lambda x: [len(lacks) for lacks in _lacks(x, config)])
    if lacks := [one for lacks in _lacks(kind, config) for one in lacks]:
        raise WeightsError(
            f"transformers has no such network: its {kind.name}Model, the nearest, has no {', '.join(lacks)}; use "
            "names='timm', or leave names out"
        )
    return kind


def to_hf(
    params: Arrays,
    config: ViTConfig,
    preprocessing: Preprocessing | None,
    class_names: tuple[str, ...],
) -> tuple[Arrays, dict[str, dict[str, Any]]]:
    """transformers' arrays, config.json and preprocessor_config.json: of a ViT, a distilled DeiT, a DINOv2 or DINOv3,
    and of the image towers of CLIP, SigLIP and SigLIP 2's NaFlex.

    Raises WeightsError for any other network, and for a projection with a bias.
    """
    kind = _kind(config)
    arrays = names.take_apart(_plain(params, config), names.QKV)
    if "vision" in kind.model_type:
        if config.projection and np.any(arrays["head.bias"]):
            raise WeightsError(
                "the projection has a bias (head/bias), which that of transformers' CLIP has not; use names='timm'"
            )
        arrays = towers.timm_to_tower(arrays)
    elif kind.model_type == "dinov3_vit":
        arrays = _as_dinov3(arrays, config)
    else:
        arrays = _as_vit(arrays, config, kind.model_type)
    files = {"config.json": _hf_config(config, kind, class_names)}
    if preprocessing is not None:
        files["preprocessor_config.json"] = _processor(config, preprocessing)
    return arrays, files


def _as_dinov3(arrays: Arrays, config: ViTConfig) -> Arrays:
    """transformers' names of a DINOv3 under timm's."""
    gated = config.mlp == "swiglu"
    apart = names.take_apart(arrays, names.HF_GATED if gated else names.HF_PLAIN)
    rules = inverse(names.HF_NAMES["dinov3"])
    out = {
        rename(name, rules): x
        for name, x in apart.items()
        if config.key_bias or not name.endswith(".attn.k.bias")
    }
    return out | {"embeddings.mask_token": np.zeros((1, 1, config.embed_dim), np.float32)}


def _as_vit(arrays: Arrays, config: ViTConfig, kind: str) -> Arrays:
    """transformers' names of a ViT, DeiT or DINOv2 under timm's."""
    dinov2 = kind.startswith("dinov2")
    gated = " gated" if config.mlp == "swiglu" else ""
    rules = inverse(names.HF_NAMES["dinov2" + gated if dinov2 else kind])
    base = f"{kind}." if config.num_classes else ""
    out = {}
    for name, x in arrays.items():
        out[("" if name.startswith(("head.", "head_dist.")) else base) + rename(name, rules)] = x
    if dinov2:
        out[f"{base}embeddings.mask_token"] = np.zeros((1, config.embed_dim), np.float32)
    if not config.pos_embed_prefix:  # here the class token has its position in itself
        where = f"{base}embeddings.position_embeddings"
        out[where] = np.pad(out[where], ((0, 0), (1, 0), (0, 0)))
    return out


def _hf_config(config: ViTConfig, kind: _Kind, class_names: tuple[str, ...]) -> dict[str, Any]:
    """transformers' config.json."""
    height, width = config.image_shape
    gated = config.mlp == "swiglu"
    gives = _gives(config)
    stated: dict[str, Any] = {
        "model_type": kind.model_type, "architectures": [kind.name + kind.heads[config.global_pool, gives]],
        "hidden_size": config.embed_dim, "num_hidden_layers": config.depth, "num_attention_heads": config.num_heads,
        "layer_norm_eps": config.norm_eps, "patch_size": config.patch_size, "num_channels": config.in_chans,
        "image_size": height if height == width else [height, width],
        "hidden_act": "silu" if gated else _ACTIVATIONS[config.mlp],
    }  # fmt: skip
    if config.max_patches:
        del stated["image_size"]
        stated["num_patches"] = math.prod(config.grid)
    if kind.model_type.startswith("dinov2"):
        stated |= {"mlp_ratio": _dinov2_ratio(config), "use_swiglu_ffn": gated}
    else:
        stated["intermediate_size"] = config.mlp_dim // 2 if gated else config.mlp_dim
    if config.layer_scale:
        stated["layerscale_value"] = config.layer_scale
    if config.reg_tokens:
        stated["num_register_tokens"] = config.reg_tokens
    if kind.model_type == "dinov3_vit":
        biases = {f"{part}_bias": config.qkv_bias for part in ("query", "key", "value")}
        biases["key_bias"] &= config.key_bias
        stated |= {"rope_theta": config.rope_base, "use_gated_mlp": gated, **biases}
    elif "vision" not in kind.model_type:
        stated["qkv_bias"] = config.qkv_bias
    if gives == "projection":
        stated["projection_dim"] = config.num_classes
    elif gives == "logits":
        labels = dict(enumerate(class_names or [f"LABEL_{i}" for i in range(config.num_classes)]))
        stated |= {"id2label": labels, "label2id": {name: i for i, name in labels.items()}}
    return stated


def _processor(config: ViTConfig, known: Preprocessing) -> dict[str, Any]:
    """transformers' preprocessor_config.json: of an image processor that crops, or of one for any proportion."""
    height, width = config.image_shape
    if config.max_patches:
        return {
            "image_processor_type": "Siglip2ImageProcessor", "do_resize": True, "do_rescale": True,
            "do_normalize": True, "do_convert_rgb": True, "rescale_factor": 1 / 255,
            "resample": _FILTERS[known.interpolation], "patch_size": config.patch_size,
            "max_num_patches": config.max_patches, "image_mean": list(known.mean), "image_std": list(known.std),
        }  # fmt: skip
    before = int(height / known.crop_pct)
    squash = {"height": before, "width": int(width / known.crop_pct)}
    return {
        "image_processor_type": "BitImageProcessor", "do_resize": True, "do_rescale": True, "do_normalize": True,
        "do_convert_rgb": True, "rescale_factor": 1 / 255, "resample": _FILTERS[known.interpolation],
        "size": {"shortest_edge": before} if known.resize == "crop" else squash,
        "do_center_crop": True, "crop_size": {"height": height, "width": width},
        "image_mean": list(known.mean), "image_std": list(known.std),
    }  # fmt: skip
