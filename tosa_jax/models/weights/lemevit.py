"""Names and layouts of LeMeViT's own repository -> this project's, and the network that such arrays are of.

Source: ViTAE-Transformer/LeMeViT, `models/lemevit.py`. It has released no weights; these are the names of the
checkpoints that its `main.py` writes (by timm's `CheckpointSaver`).
"""

import re
from typing import Any

from tosa_jax.models.lemevit_config import STAGES, LeMeViTConfig
from tosa_jax.models.weights.names import WRAPPER_PREFIX, Arrays
from tosa_jax.models.weights.renaming import rename

_RULES = [
    (r"^downsample_layers\.0\.0\.", "stem.0.conv."),
    (r"^downsample_layers\.0\.1\.", "stem.0.norm."),
    (r"^downsample_layers\.0\.3\.", "stem.1.conv."),
    (r"^downsample_layers\.0\.4\.", "stem.1.norm."),
    (r"^downsample_layers\.(\d+)\.0\.", r"stages.\1.downsample.conv."),
    (r"^downsample_layers\.(\d+)\.1\.", r"stages.\1.downsample.norm."),
    (r"^meta_token_downsample\.(\d+)\.0\.", r"stages.\1.meta_mlp.fc1."),
    (r"^meta_token_downsample\.(\d+)\.1\.", r"stages.\1.meta_mlp.norm1."),
    (r"^meta_token_downsample\.(\d+)\.3\.", r"stages.\1.meta_mlp.fc2."),
    (r"^meta_token_downsample\.(\d+)\.4\.", r"stages.\1.meta_mlp.norm2."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.attn\.qkv1\.", ".attn.image_qkv."),
    (r"\.attn\.qkv2\.", ".attn.meta_qkv."),
    (r"\.attn\.proj_x\.", ".attn.image_proj."),
    (r"\.attn\.proj_c\.", ".attn.meta_proj."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
    (r"^norm_c\.", "norm_meta."),
]

# PyTorch's batch norm counts batches, which only matters without a momentum.
_UNUSED = re.compile(r"\.num_batches_tracked$")


def is_theirs(arrays: Arrays) -> bool:
    """Whether the names are those of LeMeViT's repository."""
    return any("meta_token_downsample." in name for name in arrays)


def is_lemevit(arrays: Arrays) -> bool:
    """Whether arrays with this project's paths are those of a LeMeViT."""
    return "meta_tokens" in arrays


def to_ours(arrays: Arrays) -> Arrays:
    """Their names and layouts -> this project's: linear weights [out, in] and convolutions [out, in, 3, 3] turn."""
    ours = {}
    for name, array in arrays.items():
        if _UNUSED.search(name):
            continue
        *parents, last = rename(WRAPPER_PREFIX.sub("", name), _RULES).split(".")
        if last == "weight":
            last = "scale" if array.ndim == 1 else "kernel"
            array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
        ours["/".join([*parents, last])] = array
    return ours


def fields_of(arrays: Arrays) -> dict[str, Any]:
    """Fields of the `LeMeViTConfig` of arrays with this project's paths, all but `head_dim`, which no shape tells.

    Raises KeyError, with the path, if an array is missing.
    """
    stages = range(len(STAGES))
    numbers = [re.match(r"stages/(\d+)/blocks/(\d+)/norm1/scale$", name) for name in arrays]
    blocks = [(int(found[1]), int(found[2])) for found in numbers if found]
    widths = tuple(len(arrays[f"stages/{i}/meta_mlp/norm2/scale"]) for i in stages)
    hidden = arrays["stages/0/blocks/0/mlp/fc1/kernel"].shape[1]
    kernel = arrays.get("head/kernel")
    return {
        "architecture": LeMeViTConfig.architecture,
        "widths": widths,
        "depths": tuple(
            max((j for i, j in blocks if i == stage), default=-1) + 1 for stage in stages
        ),
        "mlp_ratio": hidden / widths[0],
        "meta_tokens": len(arrays["meta_tokens"]),
        "in_chans": arrays["stem/0/conv/kernel"].shape[2],
        "num_classes": 0 if kernel is None else kernel.shape[1],
    }
