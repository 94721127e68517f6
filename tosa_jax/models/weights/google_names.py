"""Parameter names and layouts of Google's JAX ViT (AugReg's and ViT's `.npz` files) -> this project's.

Source: google-research/vision_transformer (`models_vit.py`), which Flax's attention gives its shapes.
Kernels are [in, out] there as here; only heads and the sides of a patch are axes of their own.
"""

import re
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]

_RULES = [
    (r"^cls$", "cls_token"),
    (r"^embedding/", "patch_embed/proj/"),
    (r"^Transformer/posembed_input/pos_embedding$", "pos_embed"),
    (r"^Transformer/encoder_norm/", "norm/"),
    (r"^Transformer/encoderblock_(\d+)/", r"blocks/\1/"),
    (r"/LayerNorm_0/", "/norm1/"),
    (r"/LayerNorm_2/", "/norm2/"),
    (r"/MultiHeadDotProductAttention_1/out/", "/attn/proj/"),
    (r"/MultiHeadDotProductAttention_1/", "/attn/"),
    (r"/MlpBlock_3/Dense_0/", "/mlp/fc1/"),
    (r"/MlpBlock_3/Dense_1/", "/mlp/fc2/"),
]
_QUERY = "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel"


def is_google(arrays: Arrays) -> bool:
    """Whether the names are those of Google's ViT."""
    return _QUERY in arrays


def stated_by(arrays: Arrays) -> dict[str, Any]:
    """Fields of `ViTConfig` that the shapes say: the number of heads, which ours leave open."""
    return {"num_heads": arrays[_QUERY].shape[-2]}


def to_ours(arrays: Arrays) -> Arrays:
    """This project's paths and layouts.

    query, key, value  kernels [d h dh] -> [d (h dh)], biases [h dh] -> [(h dh)], then the three
                       side by side: qkv, [d (3 h dh)] and [(3 h dh)].
    out                kernel [h dh d] -> [(h dh) d].
    embedding          kernel [p p c d] -> [(p p c) d].
    """
    ours: Arrays = {}
    for name, array in arrays.items():
        for pattern, replacement in _RULES:
            name = re.sub(pattern, replacement, name)
        if re.search(r"/attn/(query|key|value)/", name):
            array = array.reshape(*array.shape[:-2], -1)
        elif name.endswith(("/attn/proj/kernel", "patch_embed/proj/kernel")):
            array = array.reshape(-1, array.shape[-1])
        ours[name] = array
    for query in [name for name in ours if "/attn/query/" in name]:
        parts = [query.replace("/query/", f"/{part}/") for part in ("query", "key", "value")]
        if all(part in ours for part in parts):
            joined = np.concatenate([ours.pop(part) for part in parts], axis=-1)
            ours[query.replace("/query/", "/qkv/")] = joined
    return ours
