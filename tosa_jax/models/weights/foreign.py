"""Writes parameters under the names of timm or of transformers, with the JSON files by which those read them.

The inverse of `translation`, for the networks that both sides have.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from tosa_jax.errors import WeightsError
from tosa_jax.models.variants import VARIANTS
from tosa_jax.models.vit_config import ViTConfig
from tosa_jax.models.weights.preprocessing import Preprocessing
from tosa_jax.paths import write_atomically

Arrays = dict[str, np.ndarray]

_SIZES = ("embed_dim", "depth", "num_heads", "mlp_ratio", "patch_size", "in_chans")
_FORM = ("mlp", "mlp_norm", "qkv_bias", "patch_bias", "norm_eps", "class_token", "reg_tokens", "distilled", "pre_norm",
         "pos_embed", "pos_embed_prefix", "rope")  # fmt: skip
_POOLS = {"token": "token", "avg": "avg", "map": "map"}  # timm's `global_pool`
_FILTERS = {"bilinear": 2, "bicubic": 3}  # PIL's numbers
_HF = [
    (r"^cls_token$", "embeddings.cls_token"),
    (r"^dist_token$", "embeddings.distillation_token"),
    (r"^reg_token$", "embeddings.register_tokens"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^blocks\.(\d+)\.", r"encoder.layer.\1."),
    (r"\.attn\.([qkv])\.", lambda m: f".attention.attention.{_PARTS[m[1]]}."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1"),
    (r"^norm\.", "layernorm."),
]
_PARTS = {"q": "query", "k": "key", "v": "value"}
_HF_VIT = [
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
]
_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu"}


def write_statements(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """Writes JSON files into a folder, each atomically."""
    for name, value in files.items():
        write_atomically(folder / name, json.dumps(value, indent=2).encode())


def to_timm(
    params: Arrays, config: ViTConfig, preprocessing: Preprocessing | None, names: tuple[str, ...]
) -> tuple[Arrays, dict[str, dict[str, Any]]]:
    """timm's arrays, and the config.json with which `timm.create_model("local-dir:FOLDER", pretrained=True)` makes
    the network.

    names  of the classes; (): none are stated.

    Raises WeightsError for a network that no architecture of timm is, whatever its size.
    """
    base = _architecture(config)
    if config.task != "classification" or base is None or config.global_pool not in _POOLS:
        raise WeightsError("no architecture of timm is this network; leave names out to save it")
    args: dict[str, Any] = {name: getattr(config, name) for name in _SIZES}
    # timm makes the last norm by the pool when it builds the network, before it reads `global_pool` beside these.
    args |= {"img_size": list(config.image_shape), "global_pool": _POOLS[config.global_pool]}
    if config.layer_scale:
        args["init_values"] = config.layer_scale
    if config.rope and config.mlp == "swiglu":
        args["mlp_ratio"] = config.mlp_ratio / 2  # of both halves here, of one there
    stated = {
        "architecture": base,
        "num_classes": config.num_classes,
        "num_features": config.embed_dim,
        "global_pool": _POOLS[config.global_pool],
        "model_args": args,
        "pretrained_cfg": _timm_cfg(config, preprocessing),
    }
    stated |= {"label_names": list(names)} if names else {}
    arrays = _plain(params, config)
    arrays = _as_eva(arrays, config) if config.rope else arrays
    return arrays, {"config.json": stated}


def _architecture(config: ViTConfig) -> str | None:
    """The variant that differs from the network in sizes alone, the nearest one by sizes."""

    def form(of: ViTConfig) -> tuple[Any, ...]:
        return (
            *(getattr(of, name) for name in _FORM),
            (of.rope_base, of.key_bias) if of.rope else (),
            bool(of.layer_scale),
            of.global_pool == "map",
        )

    # Of a DINOv3 the one with biases of queries and values.
    variants = {
        name: of
        for name, of in VARIANTS.items()
        if name != "vit" and ("dinov3" not in name or "qkvb" in name)
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
        if name == "patch_embed.proj.weight":
            side = config.patch_size
            x = x.reshape(side, side, config.in_chans, -1).transpose(3, 2, 0, 1)
        arrays[name] = x.T if x.ndim == 2 else x
    return arrays


def _as_eva(arrays: Arrays, config: ViTConfig) -> Arrays:
    """A DINOv3 or an EVA-02 under the names of timm's `eva.py`.

    There the tiny and small EVA-02 have the halves of a SwiGLU in one layer, the others in two; and those with a norm
    in the MLP have three kernels of queries, keys and values.
    """
    apart = config.mlp == "swiglu" and (config.mlp_norm or config.rope == "dinov3")
    out = {}
    for name, x in arrays.items():
        name = re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", name)
        if name.endswith("attn.qkv.bias"):
            query, _, value = np.split(x, 3)
            stem, of = name.removesuffix("qkv.bias"), "_proj.bias" if config.mlp_norm else "_bias"
            out |= {f"{stem}q{of}": query, f"{stem}v{of}": value}
        elif config.mlp_norm and ".attn.qkv." in name:
            parts = zip("qkv", np.split(x, 3), strict=True)
            out |= {name.replace(".qkv.", f".{part}_proj."): piece for part, piece in parts}
        elif apart and ".mlp.fc1." in name:
            gate, up = np.split(x, 2)
            out |= {name.replace("fc1", "fc1_g"): gate, name.replace("fc1", "fc1_x"): up}
        else:
            out[name] = x
    return out


def to_hf(
    params: Arrays, config: ViTConfig, preprocessing: Preprocessing | None, names: tuple[str, ...]
) -> tuple[Arrays, dict[str, dict[str, Any]]]:
    """transformers' arrays, config.json and preprocessor_config.json, of a ViT, a distilled DeiT or a DINOv2.

    Raises WeightsError for any other network.
    """
    kind, base, head = _model_type(config)
    arrays: Arrays = {}
    for name, x in _plain(params, config).items():
        if ".attn.qkv." in name:
            for part, piece in zip("qkv", np.split(x, 3), strict=True):
                arrays[_hf_name(name.replace(".qkv.", f".{part}."), kind, base)] = piece
        else:
            arrays[_hf_name(name, kind, base)] = x
    if kind.startswith("dinov2"):
        width = config.embed_dim
        arrays[f"{base}embeddings.mask_token"] = np.zeros((1, width), np.float32)
        if not config.pos_embed_prefix:  # here the class token has its position in itself
            where = f"{base}embeddings.position_embeddings"
            nothing = np.zeros((1, 1, width), arrays[where].dtype)
            arrays[where] = np.concatenate([nothing, arrays[where]], axis=1)
        if config.mlp == "swiglu":
            arrays = {
                name.replace(".mlp.fc1.", ".mlp.weights_in.").replace(
                    ".mlp.fc2.", ".mlp.weights_out."
                ): x
                for name, x in arrays.items()
            }
    stated: dict[str, Any] = {
        "model_type": kind, "architectures": [head], "hidden_size": config.embed_dim,
        "num_hidden_layers": config.depth, "num_attention_heads": config.num_heads,
        "layer_norm_eps": config.norm_eps, "patch_size": config.patch_size, "num_channels": config.in_chans,
        "image_size": config.image_shape[0], "qkv_bias": config.qkv_bias,
        "hidden_act": _ACTIVATIONS.get(config.mlp, "gelu"),
    }  # fmt: skip
    if kind.startswith("dinov2"):
        stated |= {
            "mlp_ratio": 4,
            "layerscale_value": config.layer_scale,
            "use_swiglu_ffn": config.mlp == "swiglu",
        }
        stated |= {"num_register_tokens": config.reg_tokens} if config.reg_tokens else {}
    else:
        stated["intermediate_size"] = config.mlp_dim
    if config.num_classes:
        labels = dict(enumerate(names or [f"LABEL_{i}" for i in range(config.num_classes)]))
        stated |= {"id2label": labels, "label2id": {name: i for i, name in labels.items()}}
    files = {"config.json": stated}
    if preprocessing is not None:
        files["preprocessor_config.json"] = _processor(config, preprocessing)
    return arrays, files


def _hf_name(name: str, kind: str, base: str) -> str:
    heads = {"head.": "cls_classifier." if kind == "deit" else "classifier."}
    heads["head_dist."] = "distillation_classifier."
    for start, theirs in heads.items():
        if name.startswith(start):
            return name.replace(start, theirs)
    for pattern, replacement in _HF + ([] if kind.startswith("dinov2") else _HF_VIT):
        name = re.sub(pattern, replacement, name)
    return base + name


def _model_type(config: ViTConfig) -> tuple[str, str, str]:
    """transformers' `model_type`, what its names begin with, and its class."""
    dino = bool(config.layer_scale)
    pool, classes = config.global_pool, config.num_classes
    known = (
        config.task == "classification" and config.class_token and config.pos_embed and not config.rope
        and not config.pre_norm and config.patch_bias and config.image_shape[0] == config.image_shape[1]
        and (pool == ("token_avg" if dino else "token") or (not classes and pool == "token"))
        and (dino or (config.mlp != "swiglu" and not config.reg_tokens and config.pos_embed_prefix))
        and not (dino and (config.distilled or (config.mlp != "swiglu" and config.mlp_ratio != 4)))
    )  # fmt: skip
    if not known:
        raise WeightsError(
            "transformers has no such network among ViT, DeiT and DINOv2, which are written: use names='timm'"
        )
    if dino:
        kind = "dinov2_with_registers" if config.reg_tokens else "dinov2"
        name = "Dinov2WithRegisters" if config.reg_tokens else "Dinov2"
    else:
        kind, name = ("deit", "DeiT") if config.distilled else ("vit", "ViT")
    if not classes:
        return kind, "", f"{name}Model"
    head = "ForImageClassificationWithTeacher" if config.distilled else "ForImageClassification"
    return kind, f"{kind}.", name + head


def _processor(config: ViTConfig, known: Preprocessing) -> dict[str, Any]:
    """transformers' preprocessor_config.json of an image processor that crops."""
    height, width = config.image_shape
    before = int(height / known.crop_pct)
    squash = {"height": before, "width": int(width / known.crop_pct)}
    return {
        "image_processor_type": "BitImageProcessor", "do_resize": True, "do_rescale": True, "do_normalize": True,
        "do_convert_rgb": True, "rescale_factor": 1 / 255, "resample": _FILTERS[known.interpolation],
        "size": {"shortest_edge": before} if known.resize == "crop" else squash,
        "do_center_crop": True, "crop_size": {"height": height, "width": width},
        "image_mean": list(known.mean), "image_std": list(known.std),
    }  # fmt: skip
