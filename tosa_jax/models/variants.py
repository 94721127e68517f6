"""The released networks by timm's names and the hub's, and what each differs in from the defaults of `ViTConfig`."""

import re
from collections.abc import Mapping
from typing import Any

from tosa_jax.models.lemevit_config import LeMeViTConfig
from tosa_jax.models.method import plan_named
from tosa_jax.models.plan_file import SUFFIX, read_plan
from tosa_jax.models.vit_config import STANDARD, ViTConfig, check, check_choice, plain_value


def _vit(size: str, patch: int = 16, image: int = 224, **fields) -> dict[str, Any]:
    sizes = {
        "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
        "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
        "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
        "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
        "so400m": {"embed_dim": 1152, "depth": 27, "num_heads": 16, "mlp_ratio": 3.7362},
        "huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16},
        "giant": {"embed_dim": 1536, "depth": 40, "num_heads": 24},
        "7b": {"embed_dim": 4096, "depth": 40, "num_heads": 32},
        "giantopt": {"embed_dim": 1536, "depth": 40, "num_heads": 16},
    }
    return sizes[size] | {"patch_size": patch, "image_size": image} | fields


def _dinov2(size: str, registers: int = 0) -> dict[str, Any]:
    # timm's ratio of the packed SwiGLU: 2 * 8/3, rounded so that the packed width is 8192 at 1536.
    swiglu = {"mlp": "swiglu", "mlp_ratio": 2.66667 * 2} if size == "giant" else {}
    registers_only = {"reg_tokens": registers, "pos_embed_prefix": False} if registers else {}
    return _vit(size, 14, 518, layer_scale=1e-5, **swiglu, **registers_only)


def _clip(size: str, patch: int, image: int = 224, **fields) -> dict[str, Any]:
    form = {"pre_norm": True, "patch_bias": False, "norm_eps": 1e-5}
    return _vit(size, patch, image, **_embedding(size), **form, **fields)


def _embedding(size: str) -> dict[str, Any]:
    """A head that projects to the space that images and texts share."""
    widths = {"base": 512, "large": 768, "huge": 1024}
    return {"num_classes": widths[size], "projection": True}


def _siglip(size: str, patch: int, image: int) -> dict[str, Any]:
    form = {"class_token": False, "global_pool": "map", "num_classes": 0}
    # As big_vision and transformers; timm has plain GELU for the older ones of them.
    return _vit(size, patch, image, mlp="gelu_tanh", **form)


def _naflex(size: str) -> dict[str, Any]:
    # Positions of 16x16 patches, and 256 patches an image in the preprocessing of transformers.
    form = {"max_patches": 256, "pos_resample": "bilinear_antialias"}
    return _siglip(size, 16, 256) | form


def _dinov3(size: str, **fields) -> dict[str, Any]:
    form = {"reg_tokens": 4, "pos_embed": False, "rope": "dinov3", "key_bias": False}
    form |= {"layer_scale": 1e-5, "norm_eps": 1e-5, "num_classes": 0}
    return _vit(size, 16, 256, **form, **fields)


def _eva02(size: str, image: int) -> dict[str, Any]:
    fields = _vit(size, 14, image, global_pool="avg", key_bias=False, mlp="swiglu")
    width = fields["embed_dim"]
    fields |= {"mlp_ratio": 2 * (width * 8 // 3) / width, "mlp_norm": size in ("base", "large")}
    # What is of 224 pixels was trained to predict masked patches, and has no classes.
    fields |= {"num_classes": 0} if image == 224 else {}
    return fields | {"rope": "eva02", "rope_base": 1e4}


def _eva02_clip(size: str, patch: int, image: int) -> dict[str, Any]:
    form = {"patch_size": patch, "attn_norm": True, "global_pool": "token"}
    return _eva02(size, image) | form | _embedding(size)


_GATED = {"mlp": "swiglu", "mlp_ratio": 8.0}  # both halves of 4 times the width
_QUICK = {"mlp": "quick_gelu"}

_DEIT3 = {"layer_scale": 1e-6, "pos_embed_prefix": False}

ARCHITECTURES: Mapping[str, type[ViTConfig]] = {
    config.architecture: config for config in (ViTConfig, LeMeViTConfig)
}
"""The configuration of each kind of network, which `factory.MODEL_CLASSES` makes a model of."""


def _lemevit(widths: tuple[int, ...], depths: tuple[int, ...]) -> dict[str, Any]:
    return {"architecture": LeMeViTConfig.architecture, "widths": widths, "depths": depths}


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
    # Radford et al. 2021 (CLIP; "quickgelu" is OpenAI's own), Ilharco et al. 2021 (OpenCLIP). The head is the
    # projection to the space that images and texts share.
    **{
        f"vit_{s}_patch{p}_clip_{quick}{i}": _clip(s, p, i, **(_QUICK if quick else {}))
        for s, p, i in (
            ("base", 32, 224),
            ("base", 16, 224),
            ("large", 14, 224),
            ("large", 14, 336),
            ("huge", 14, 224),
        )
        for quick in ("", "quickgelu_")
    },
    # Zhai et al. 2023 (SigLIP); Tschannen et al. 2025 (SigLIP 2) has the same networks at fixed sizes.
    **{
        f"vit_{s}_patch{p}_siglip_{i}": _siglip(s, p, i)
        for s, p, sides in (
            ("base", 32, (256,)),
            ("base", 16, (224, 256, 384, 512)),
            ("large", 16, (256, 384, 512)),
            ("so400m", 14, (224, 378)),
            ("so400m", 16, (256, 384, 512)),
            ("giantopt", 16, (256, 384)),
        )
        for i in sides
    },
    # Tschannen et al. 2025 (SigLIP 2, NaFlex): images of any proportion.
    **{f"naflexvit_{s}_patch16_siglip": _naflex(s) for s in ("base", "so400m")},
    # Simeoni et al. 2025 (DINOv3). timm's files without biases of queries and values are read like those with ("qkvb").
    **{
        f"vit_{s}_patch16_dinov3{biases}": _dinov3(size, **fields)
        for s, size, fields in (
            ("small", "small", {}),
            ("small_plus", "small", _GATED),
            ("base", "base", {}),
            ("large", "large", {}),
            ("huge_plus", "huge", _GATED | {"num_heads": 20}),
            ("7b", "7b", {"mlp": "swiglu", "mlp_ratio": 4.0}),
        )
        for biases in ("", "_qkvb")
        if s != "7b" or not biases  # it has none of queries, keys and values
    },
    # Fang et al. 2023 (EVA-02).
    **{
        f"eva02_{s}_patch14_{i}": _eva02(s, i)
        for s, sides in (
            ("tiny", (224, 336)),
            ("small", (224, 336)),
            ("base", (224, 448)),
            ("large", (224, 448)),
        )
        for i in sides
    },
    # Sun et al. 2023 (EVA-CLIP), its towers of EVA-02's form.
    **{
        f"eva02_{s}_patch{p}_clip_{i}": _eva02_clip(s, p, i)
        for s, p, i in (("base", 16, 224), ("large", 14, 224), ("large", 14, 336))
    },
    # Jiang et al. 2024 (LeMeViT), by the names of its own repository.
    "lemevit_tiny": _lemevit((64, 64, 128, 192, 320), (1, 2, 2, 8, 2)),
    "lemevit_small": _lemevit((96, 96, 192, 320, 384), (1, 2, 2, 6, 2)),
    "lemevit_base": _lemevit((96, 96, 192, 384, 512), (2, 4, 4, 18, 4)),
    # Any size, through the fields of ViTConfig.
    "vit": {},
}
"""timm's name -> the fields in which a network differs from the defaults of its configuration: `ViTConfig`, or that
of the `architecture` among them."""


HUB_NAMES: Mapping[str, str] = {
    **{f"facebook/deit-{s}-patch16-224": f"deit_{s}_patch16_224" for s in ("tiny", "small", "base")},
    "facebook/deit-base-patch16-384": "deit_base_patch16_384",
    **{f"facebook/deit-{s}-distilled-patch16-224": f"deit_{s}_distilled_patch16_224"
       for s in ("tiny", "small", "base")},
    "google/vit-base-patch16-224": "vit_base_patch16_224",
    "google/vit-large-patch16-224": "vit_large_patch16_224",
    **{f"facebook/dinov2-{s}": f"vit_{s}_patch14_dinov2" for s in ("small", "base", "large", "giant")},
    **{f"facebook/dinov2-with-registers-{s}": f"vit_{s}_patch14_reg4_dinov2"
       for s in ("small", "base", "large", "giant")},
    "openai/clip-vit-base-patch32": "vit_base_patch32_clip_quickgelu_224",
    "openai/clip-vit-base-patch16": "vit_base_patch16_clip_quickgelu_224",
    "openai/clip-vit-large-patch14": "vit_large_patch14_clip_quickgelu_224",
    "openai/clip-vit-large-patch14-336": "vit_large_patch14_clip_quickgelu_336",
    "laion/CLIP-ViT-B-32-laion2B-s34B-b79K": "vit_base_patch32_clip_224",
    "laion/CLIP-ViT-B-16-laion2B-s34B-b88K": "vit_base_patch16_clip_224",
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": "vit_huge_patch14_clip_224",
    **{f"google/siglip-{end}": f"vit_{ours}"
       for end, ours in (("base-patch16-224", "base_patch16_siglip_224"),
                         ("base-patch16-256", "base_patch16_siglip_256"),
                         ("base-patch16-384", "base_patch16_siglip_384"),
                         ("base-patch16-512", "base_patch16_siglip_512"),
                         ("large-patch16-256", "large_patch16_siglip_256"),
                         ("large-patch16-384", "large_patch16_siglip_384"),
                         ("so400m-patch14-224", "so400m_patch14_siglip_224"),
                         ("so400m-patch14-384", "so400m_patch14_siglip_378"))},
    **{f"google/siglip2-{size}-patch{patch}-{side}": f"vit_{name}_patch{patch}_siglip_{side}"
       for size, name, patch, sides in (("base", "base", 32, (256,)), ("base", "base", 16, (224, 256, 384, 512)),
                                        ("large", "large", 16, (256, 384, 512)),
                                        ("so400m", "so400m", 14, (224,)), ("so400m", "so400m", 16, (256, 384, 512)),
                                        ("giant-opt", "giantopt", 16, (256, 384)))
       for side in sides},
    **{f"google/siglip2-{s}-patch16-naflex": f"naflexvit_{s}_patch16_siglip" for s in ("base", "so400m")},
    **{f"facebook/dinov3-vit{size}16-pretrain-lvd1689m": f"vit_{name}_patch16_dinov3"
       for size, name in (("s", "small"), ("splus", "small_plus"), ("b", "base"), ("l", "large"),
                          ("hplus", "huge_plus"), ("7b", "7b"))},
    # Of 384 pixels the patches of 14 cover 378.
    "google/siglip2-so400m-patch14-384": "vit_so400m_patch14_siglip_378",
    "facebook/dinov3-vitl16-pretrain-sat493m": "vit_large_patch16_dinov3",
    "facebook/dinov3-vit7b16-pretrain-sat493m": "vit_7b_patch16_dinov3",
}  # fmt: skip
"""The name of a repository on Hugging Face's hub -> timm's name of the network that it holds."""


# timm's default weights of each network: the part of the repository's name after the dot (timm 1.0.28).
_TAGS = [
    (r"deit3?_", "fb_in1k"),
    (r"vit_base_patch16_224$", "augreg2_in21k_ft_in1k"),
    (r"vit_(tiny|small|large)_patch16_224$", "augreg_in21k_ft_in1k"),
    (r"vit_.*dinov2", "lvd142m"),
    (
        r"vit_.*clip_quickgelu",
        "openai",
    ),  # OpenAI's own, of which these names are; timm has others first for some
    (r"vit_.*clip", "laion2b_ft_in12k_in1k"),
    (r"(naflex)?vit_.*siglip", "v2_webli"),
    (r"vit_.*dinov3", "lvd1689m"),
    (r"eva02_.*clip", "merged2b"),
    (r"eva02_.*_224", "mim_in22k"),
    (r"eva02_.*_336", "mim_in22k_ft_in1k"),
    (r"eva02_.*_448", "mim_in22k_ft_in22k_in1k"),
]


def hub_repository(name: str) -> str:
    """The repository on the hub, "owner/name", with the weights that timm loads for a name, with or without its tag.

    A key of `HUB_NAMES` is a repository itself. Raises ConfigError for an unknown name.
    """
    if name in HUB_NAMES:
        return name
    variant, _, tag = name.partition(".")
    check_choice("model name", variant, VARIANTS)
    tag = tag or next((tag for pattern, tag in _TAGS if re.match(pattern, variant)), "")
    check(bool(tag), f"no weights belong to the name {name!r}: pass pretrained=FILE")
    return f"timm/{variant.replace('_quickgelu', '')}.{tag}"


def architecture_of(name: str, fields: Mapping[str, Any]) -> str:
    """A key of `ARCHITECTURES`: what `fields` state, else the variant of a name. Raises ConfigError: no such name."""
    given = fields.get("architecture", variant(name).get("architecture", ViTConfig.architecture))
    check_choice("architecture", given, ARCHITECTURES)
    return given


def variant(name: str) -> Mapping[str, Any]:
    """The fields in `VARIANTS` of timm's name, with or without its tag, or of the hub's. Raises ConfigError."""
    name = HUB_NAMES.get(name, name)
    name = name.partition(".")[0] if name.partition(".")[0] in VARIANTS else name
    check_choice("model name", name, VARIANTS)
    return VARIANTS[name]


def variant_config(
    name: str, config_class: type[ViTConfig] | None = None, **fields: Any
) -> ViTConfig:
    """The configuration of a released variant (timm's or the hub's names), or of "vit", with `fields` on top.

    A `plan` may also be the name of a layer kind, which then takes every second layer, or all where it needs no other;
    or the path of a plan file (`models/plan_file.py`), whose keep rates and options then come before those in `fields`.
    With an `image_size` a network for images of any proportion is one for images of that size, unless `max_patches` is
    given too. With another `num_classes` than its own a CLIP is a classifier: its head is no `projection`.
    A tag of timm's ("deit_small_patch16_224.fb_in1k") names weights and changes nothing here.

    config_class  of a task's network; None: the one in `ARCHITECTURES`.

    Raises ConfigError, naming what is known, for an unknown name or field, and as `read_plan`.
    """
    own = variant(name)
    merged = with_given(own, fields)
    if merged.get("projection") and merged["num_classes"] != own.get("num_classes"):
        merged["projection"] = fields.get("projection", False) and name == "vit"
    config_class = config_class or ARCHITECTURES[architecture_of(name, fields)]
    return config_class(**with_plan(merged))


def with_given(network: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a network with others that were given: an `image_size` alone ends `max_patches`."""
    one_size = {"max_patches": 0} if network.get("max_patches") and "image_size" in fields else {}
    return {**network, **one_size, **fields}


def with_plan(fields: Mapping[str, Any]) -> dict[str, Any]:
    """`fields` of a configuration with the plan that their `plan` names, as in `variant_config`; `depth` is read."""
    plan = fields.get("plan") or ()
    plan = () if plan == STANDARD else plan  # at any depth
    if not isinstance(plan, str):
        return {**fields, "plan": plan}
    if plan.endswith(SUFFIX):
        return {**fields, **read_plan(plan)}
    depth = plain_value("depth", fields.get("depth", ViTConfig.depth), int)
    return {**fields, "plan": plan_named(plan, depth)}
