"""Parameter names and layouts of timm, DeiT, DINOv2, MAE and transformers -> this project's.

Everything becomes timm's names first; those are this project's attribute names, so that the last
step is a table of transposes. Sources: timm `vision_transformer.py` (`checkpoint_filter_fn`,
`_convert_dinov2`), facebookresearch/{deit, dinov2, mae}, transformers
`models/{vit,deit,dinov2,dinov2_with_registers}` and its `conversion_mapping.py`.
"""

import math
import re

import numpy as np

from tosa_jax.models.positions import resample_positions
from tosa_jax.models.vit_config import ViTConfig

Arrays = dict[str, np.ndarray]

# Parts of released files that no classifier or backbone uses: DINOv2's and MAE's training
# leftovers, and the tanh pooler that transformers adds to ViT and DeiT. Anything else that is left
# over is an error.
_UNUSED = re.compile(
    r"(?:embeddings\.)?(mask_token)$|(dino_head|ibot_head|decoder)\.|(pooler)\.dense\."
    r"|(decoder)_(?:embed|pos_embed|blocks|norm|pred)\b"
)

_WRAPPER_PREFIX = re.compile(r"^(module\.|_orig_mod\.|backbone\.)+")
_HF_PREFIX = re.compile(
    r"^(vit|deit|dinov2_with_registers|dinov2)\."
    r"(?=embeddings\.|encoder\.|layers\.|layernorm\.|pooler\.)"
)

# transformers' names on the hub, and those of its modules from version 5 on.
_HF = [
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(?:encoder\.)?layers?\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.([qkv])_proj\.", r".attn.\1."),
    (r"\.attn\.([qkv])(?:uery|ey|alue)\.", r".attn.\1."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.(?:weights_out|down_proj)\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"^layernorm\.", "norm."),
    (r"^(?:cls_)?classifier\.", "head."),
    (r"^distillation_classifier\.", "head_dist."),
]

# The original repositories, where they differ from timm.
_ORIGINAL = [
    (r"^register_tokens$", "reg_token"),  # DINOv2
    (
        r"^blocks\.\d+\.(\d+)\.",
        r"blocks.\1.",
    ),  # DINOv2's chunks of blocks; the second number counts all
    (r"\.mlp\.w12\.", ".mlp.fc1."),  # DINOv2's SwiGLU
    (r"\.mlp\.w3\.", ".mlp.fc2."),
    (r"\.gamma_([12])$", r".ls\1.gamma"),  # DeiT III
]

# Linear layers that transformers keeps apart and timm fuses, in timm's order.
_FUSED = [
    ("attn.qkv", ("attn.q", "attn.k", "attn.v")),
    ("mlp.fc1", ("mlp.gate_proj", "mlp.up_proj")),
]


def is_hugging_face(arrays: Arrays) -> bool:
    """Whether the names are transformers'."""
    return any(name.endswith("embeddings.position_embeddings") for name in arrays)


def resampling_of(arrays: Arrays, config: ViTConfig) -> str | None:
    """How transformers resamples these positions; None for the names of others."""
    if not is_hugging_face(arrays):
        return None
    return "bicubic_antialias" if config.reg_tokens else "bicubic"


def to_timm(arrays: Arrays) -> tuple[Arrays, list[str]]:
    """The same arrays under timm's names; and the parts left out that only pretraining uses."""
    rules = _HF if is_hugging_face(arrays) else _ORIGINAL
    renamed, unused = {}, set()
    for name, array in arrays.items():
        name = _HF_PREFIX.sub("", _WRAPPER_PREFIX.sub("", name))
        if match := _UNUSED.match(name):
            unused.add(match[match.lastindex])
            continue
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = array
    return _fuse(renamed), sorted(unused)


def _fuse(arrays: Arrays) -> Arrays:
    """Joins the linear layers of `_FUSED` along their outputs."""
    fused = dict(arrays)
    for whole, parts in _FUSED:
        firsts = [name for name in arrays if f".{parts[0]}." in name]
        for first in firsts:
            names = [first.replace(f".{parts[0]}.", f".{part}.") for part in parts]
            if all(name in fused for name in names):
                joined = [fused.pop(name) for name in names]
                fused[first.replace(f".{parts[0]}.", f".{whole}.")] = np.concatenate(joined)
    return fused


def to_ours(arrays: Arrays) -> Arrays:
    """timm's names and layouts -> this project's paths (`models/params.py`) and layouts.

    A linear weight [out, in] is transposed, the patch convolution [d, c, p, p] becomes [(p p c), d]
    (`layers.PatchEmbed`); nothing else moves.
    """
    ours = {}
    for name, array in arrays.items():
        *parents, last = name.split(".")
        if last == "weight" and array.ndim == 1:
            last = "scale"
        elif last == "weight" and array.ndim == 2:
            last, array = "kernel", array.T
        elif last == "weight" and array.ndim == 4:
            last = "kernel"
            array = array.transpose(2, 3, 1, 0).reshape(-1, array.shape[0])
        ours["/".join([*parents, last])] = array
    return ours


def fit_positions(arrays: Arrays, config: ViTConfig) -> tuple[Arrays, str]:
    """Positions, and prefix tokens with them, as the model holds them; and what was resampled.

    A grid of another size is resampled as `config.pos_resample` says. Positions of prefix tokens
    are added to those tokens if the model has none for them, and are zeros if only the model has
    them: both compute the same.
    """
    name = "pos_embed"
    if name not in arrays or arrays[name].ndim != 3:
        return arrays, ""
    positions = arrays[name]
    count, wanted = positions.shape[1], config.num_patches
    own = wanted + (config.num_prefix_tokens if config.pos_embed_prefix else 0)
    if count == own:
        return arrays, ""
    tokens = (
        ["cls_token"] + ["dist_token"] * config.distilled + ["reg_token"] * bool(config.reg_tokens)
    )
    known = {0, 1 + config.distilled} | (
        {config.num_prefix_tokens} if config.pos_embed_prefix else set()
    )
    prefix = [k for k in sorted(known) if count > k and math.isqrt(count - k) ** 2 == count - k]
    if not prefix:  # another number of prefix tokens: the caller compares shapes
        return arrays, ""
    head, patches = positions[:, : prefix[0]], positions[:, prefix[0] :]
    side = math.isqrt(patches.shape[1])
    patches = resample_positions(patches, config.grid, config.pos_resample)
    new = dict(arrays)
    if config.pos_embed_prefix:
        zeros = np.zeros(
            (1, config.num_prefix_tokens - head.shape[1], positions.shape[2]), head.dtype
        )
        patches = np.concatenate([head, zeros, patches], axis=1)
    else:
        for i, token in enumerate(tokens[: head.shape[1]]):
            if token in new:
                new[token] = new[token] + head[:, i : i + 1]
    new[name] = patches
    moved = (side, side) != config.grid
    rows, columns = config.grid
    done = f"positions resampled from {side}x{side} to {rows}x{columns} ({config.pos_resample})"
    return new, done if moved else ""
