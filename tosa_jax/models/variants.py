"""The released networks by timm's names, and what each one differs in from the defaults of `ViTConfig`."""

from collections.abc import Mapping
from typing import Any

from tosa_jax.models.method import plan_named
from tosa_jax.models.vit_config import ViTConfig, check_choice


def _vit(size: str, patch: int = 16, image: int = 224, **fields) -> dict[str, Any]:
    sizes = {
        "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
        "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
        "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
        "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
        "giant": {"embed_dim": 1536, "depth": 40, "num_heads": 24},
    }
    return sizes[size] | {"patch_size": patch, "image_size": image} | fields


def _dinov2(size: str, registers: int = 0) -> dict[str, Any]:
    # timm's ratio of the packed SwiGLU: 2 * 8/3, rounded so that the packed width is 8192 at 1536.
    swiglu = {"mlp": "swiglu", "mlp_ratio": 2.66667 * 2} if size == "giant" else {}
    registers_only = {"reg_tokens": registers, "pos_embed_prefix": False} if registers else {}
    return _vit(size, 14, 518, layer_scale=1e-5, **swiglu, **registers_only)


_DEIT3 = {"layer_scale": 1e-6, "pos_embed_prefix": False}

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    # Touvron et al. 2021, "Training data-efficient image transformers" (DeiT).
    "deit_tiny_patch16_224": _vit("tiny"),
    "deit_small_patch16_224": _vit("small"),
    "deit_base_patch16_224": _vit("base"),
    "deit_base_patch16_384": _vit("base", image=384),
    "deit_tiny_distilled_patch16_224": _vit("tiny", distilled=True),
    "deit_small_distilled_patch16_224": _vit("small", distilled=True),
    "deit_base_distilled_patch16_224": _vit("base", distilled=True),
    "deit_base_distilled_patch16_384": _vit("base", image=384, distilled=True),
    # Touvron et al. 2022, "DeiT III".
    "deit3_small_patch16_224": _vit("small", **_DEIT3),
    "deit3_base_patch16_224": _vit("base", **_DEIT3),
    "deit3_large_patch16_224": _vit("large", **_DEIT3),
    # Steiner et al. 2021 (AugReg); He et al. 2021 (MAE) uses the same shapes.
    "vit_tiny_patch16_224": _vit("tiny"),
    "vit_small_patch16_224": _vit("small"),
    "vit_base_patch16_224": _vit("base"),
    "vit_large_patch16_224": _vit("large"),
    # Oquab et al. 2023 (DINOv2); Darcet et al. 2023 (registers).
    **{f"vit_{s}_patch14_dinov2": _dinov2(s) for s in ("small", "base", "large", "giant")},
    **{f"vit_{s}_patch14_reg4_dinov2": _dinov2(s, 4) for s in ("small", "base", "large", "giant")},
    # Any size, through the fields of ViTConfig.
    "vit": {},
}
"""timm's name -> the fields of `ViTConfig` in which a released network differs from the defaults."""


def variant_config(
    name: str, config_class: type[ViTConfig] = ViTConfig, **fields: Any
) -> ViTConfig:
    """The configuration of a released variant (timm's names), or of "vit", with `fields` on top.

    A `plan` may also be the name of a layer kind, which then takes every second layer, or all where it needs no other.
    Raises ConfigError, naming what is known, for an unknown name or field.
    """
    check_choice("model name", name, VARIANTS)
    merged: dict[str, Any] = {**VARIANTS[name], **fields}
    plan = merged.get("plan") or ()
    if isinstance(plan, str):
        plan = plan_named(plan, merged.get("depth", ViTConfig.depth))
    merged["plan"] = plan
    return config_class(**merged)
