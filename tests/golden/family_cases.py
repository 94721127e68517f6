"""What the exactness of CLIP, SigLIP, DINOv3, EVA-02, DINOv2's classifiers is shown on: tiny networks, random weights.

Nothing here needs torch: weights come from NumPy by name and seed, so that the tests make the same ones as
`make_families.py` did and only names, shapes, configurations and results are stored.
"""

import numpy as np
from golden.pretrained_cases import random_weights

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
VISION = SIZES | {"intermediate_size": 80, "image_size": 32, "patch_size": 8}
TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
TEXT |= {"vocab_size": 20, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2}
DINOV3 = VISION | {"num_register_tokens": 4, "layerscale_value": 1.0}

CASES = {
    "CLIPModel": {"vision_config": VISION, "text_config": TEXT, "projection_dim": 12},
    "CLIPVisionModelWithProjection": VISION | {"projection_dim": 12, "hidden_act": "gelu"},
    "SiglipModel": {"vision_config": VISION, "text_config": TEXT},
    "SiglipVisionModel": VISION,
    "DINOv3ViTModel": DINOV3,
    "DINOv3ViTModel/gated": DINOV3 | {"use_gated_mlp": True, "hidden_act": "silu", "rope_theta": 30.0},
    "DINOv3ViTModel/7b": DINOV3 | {"use_gated_mlp": True, "hidden_act": "silu", "intermediate_size": 64,
                                   "query_bias": False, "value_bias": False},
    "Dinov2ForImageClassification": SIZES | {"image_size": 32, "patch_size": 8, "num_labels": 5},
    "Dinov2WithRegistersForImageClassification": SIZES | {"image_size": 32, "patch_size": 8, "num_labels": 5},
}  # fmt: skip
"""transformers' class, and fields of its configuration."""

TIMM_SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
TIMM_CASES = {
    "eva02_tiny_patch14_224": TIMM_SIZES | {"num_classes": 0},
    "eva02_base_patch14_224": TIMM_SIZES | {"num_classes": 5},
    "eva02_base_patch14_448/token": TIMM_SIZES | {"num_classes": 5, "global_pool": "token"},
    "eva02_base_patch16_clip_224": TIMM_SIZES | {"num_classes": 12},
}
"""timm's name, and what its `create_model` gets."""

WHOLE = {
    "vit_base_patch32_clip_quickgelu_224": (
        "CLIPVisionModelWithProjection",
        {},
        {"pos_resample": "bicubic"},
    ),
    "vit_base_patch16_siglip_224": ("SiglipVisionModel", {}, {"pos_resample": "bicubic"}),
    "vit_small_patch16_dinov3": ("DINOv3ViTModel", {"num_register_tokens": 4}, {}),
    "vit_small_plus_patch16_dinov3": (
        "DINOv3ViTModel",
        {"num_register_tokens": 4, "use_gated_mlp": True, "hidden_act": "silu"},
        {},
    ),
    "vit_small_patch14_dinov2": (
        "Dinov2ForImageClassification",
        {
            "hidden_size": 384,
            "num_attention_heads": 6,
            "image_size": 518,
            "patch_size": 14,
            "num_labels": 1000,
        },
        {"global_pool": "token_avg", "pos_resample": "bicubic"},
    ),
}
"""Released sizes, measured whole: the variant -> transformers' class, its fields, and fields of `create_model`.

transformers' defaults are the base CLIP and SigLIP and the small DINOv3.
"""

TIMM_WHOLE = {
    "eva02_small_patch14_224": ("eva02_small_patch14_224", {}, {}),
    "eva02_base_patch14_224": ("eva02_base_patch14_224", {}, {}),
    "eva02_base_patch16_clip_224": ("eva02_base_patch16_clip_224", {}, {}),
    "eva02_large_patch14_clip_224": ("eva02_large_patch14_clip_224", {}, {}),
    "eva02_large_patch14_clip_336": ("eva02_large_patch14_clip_336", {}, {}),
}
"""The same with timm's name and what its `create_model` gets."""

WHOLE_IMAGES = ((224, 224), (448, 224))
"""Height and width, beside the variant's own; both patches divide them."""

IMAGES = ((32, 32), (24, 48))
"""Height and width: the own size, and one that is no square."""


def weights_of(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """Random weights by name, float32."""
    return {name: np.asarray(x, np.float32) for name, x in random_weights(shapes).items()}


def image_of(size: tuple[int, int]) -> np.ndarray:
    """One normalised image [1 height width 3], float32."""
    return np.random.default_rng([0, *size]).standard_normal((1, *size, 3), np.float32)
