"""Parameter names and layouts of timm, DeiT, DINOv2, MAE, transformers and Google's JAX ViT -> this project's.

PyTorch's names first become timm's. Those are this project's attribute names, so only transposes remain. Sources:
timm `vision_transformer.py` (`checkpoint_filter_fn`, `_convert_dinov2`), facebookresearch/{deit, dinov2, mae},
transformers `models/{vit,deit,dinov2,dinov2_with_registers,dinov3_vit}` and its `conversion_mapping.py`;
facebookresearch/dinov3 and timm `eva.py` for DINOv3. CLIP and SigLIP are in `towers`.

Google's ViT (`.npz` files of ViT and AugReg; google-research/vision_transformer, `models_vit.py`) has Flax's layouts:
kernels are [in, out] as here, but heads and the sides of a patch are axes of their own.
"""

import math
import re
from typing import Any

import numpy as np

from tosa_jax.models.positions import resample_positions
from tosa_jax.models.vit_config import ViTConfig
from tosa_jax.models.weights import towers

Arrays = dict[str, np.ndarray]

# Parts of released files that only pretraining uses (DINOv2, MAE), and the tanh pooler that
# transformers adds to ViT and DeiT. Any other parameter that is left over is an error.
_UNUSED = re.compile(
    r"(?:embeddings\.)?(mask_token)$|(dino_head|ibot_head|decoder)\.|(pooler)\.dense\."
    r"|(decoder)_(?:embed|pos_embed|blocks|norm|pred)\b"
)

# The periods of rotary positions, which the model works out.
_BUFFER = re.compile(r"rope(_embed)?\.periods$")

_WRAPPER_PREFIX = re.compile(r"^(module\.|_orig_mod\.|backbone\.)+")
_HF_PREFIX = re.compile(
    r"^(vit|deit|dinov2_with_registers|dinov2|dpt)\."
    r"(?=embeddings\.|encoder\.|layers\.|layernorm\.|pooler\.)"
)

# transformers' names on the hub, and those of its modules from version 5 on.
_HF = [
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.(?:projection\.)?", "patch_embed.proj."),
    (r"^(?:encoder\.|model\.)?layers?\.(\d+)\.", r"blocks.\1."),
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
    (r"^(?:register|storage)_tokens$", "reg_token"),  # DINOv2, DINOv3
    (r"^linear_head\.", "head."),  # DINOv2 with its linear head
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # DINOv2: chunk, then the number among all blocks
    (r"\.mlp\.w12\.", ".mlp.fc1."),  # DINOv2's SwiGLU
    (r"\.mlp\.w3\.", ".mlp.fc2."),
    (r"\.gamma_([12])$", r".ls\1.gamma"),  # DeiT III
]

# Linear layers that transformers keeps apart and timm fuses, in timm's order.
_FUSED = [
    ("attn.qkv", ("attn.q", "attn.k", "attn.v")),
    ("mlp.fc1", ("mlp.gate_proj", "mlp.up_proj")),
    ("mlp.fc1", ("mlp.w1", "mlp.w2")),  # DINOv3's own
    ("mlp.fc1", ("mlp.fc1_g", "mlp.fc1_x")),  # timm's `eva.py`
]


_GOOGLE = [
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
_GOOGLE_QUERY = "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel"


def is_hugging_face(arrays: Arrays) -> bool:
    """Whether the names are transformers', of ViT, DeiT or a DINO."""
    ends = ("embeddings.position_embeddings", "embeddings.register_tokens")
    return any(name.endswith(ends) for name in arrays)


def resampling_of(arrays: Arrays, config: ViTConfig) -> tuple[str, str] | None:
    """How the code that the names are of resamples these positions (`pos_resample`), and whose code that is.

    None for names that say nothing of it, such as timm's and DeiT's.
    """
    if not config.pos_embed:
        return None
    if tower := towers.whose(arrays):
        return ("bicubic" if tower == "transformers" else "bicubic_antialias"), tower
    if "dpt.embeddings.position_embeddings" in arrays:
        return "bilinear", "transformers"
    if is_hugging_face(arrays):
        return "bicubic_antialias" if config.reg_tokens else "bicubic", "transformers"
    if config.layer_scale and "mask_token" in arrays:  # timm's files of DINOv2 have none
        return "bicubic_antialias" if config.reg_tokens else "bicubic_offset", "Facebook's hub"
    return None


def to_timm(arrays: Arrays) -> tuple[Arrays, list[str]]:
    """The same arrays under timm's names; and the parts left out that only pretraining uses."""
    rules = _HF if is_hugging_face(arrays) else _ORIGINAL
    renamed, unused = {}, set()
    for name, array in arrays.items():
        name = _HF_PREFIX.sub("", _WRAPPER_PREFIX.sub("", name))
        if match := _UNUSED.match(name):
            unused.update(filter(None, match.groups()))
            continue
        if _BUFFER.match(name):
            continue
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = array
    return fuse(with_key_biases(renamed)), sorted(unused)


def with_key_biases(arrays: Arrays) -> Arrays:
    """timm's names, in which a bias that the keys alone do not have is 0 there.

    transformers has biases of queries and values for DINOv3, timm the same beside the whole kernel, and Facebook's
    code a mask for the bias of all three.
    """
    done = dict(arrays)
    for name, array in arrays.items():
        stem, _, last = name.rpartition(".")
        if last == "q_bias" and f"{stem}.v_bias" in done:
            parts = done.pop(name), np.zeros_like(array), done.pop(f"{stem}.v_bias")
            done[f"{stem}.qkv.bias"] = np.concatenate(parts)
            done.pop(f"{stem}.k_bias", None)
        elif name.endswith(".attn.q.bias"):
            done.setdefault(name.replace(".q.", ".k."), np.zeros_like(array))
        elif last == "bias_mask":
            mask = done.pop(name)
            bias = done.get(f"{stem}.bias", np.zeros_like(mask))
            done[f"{stem}.bias"] = np.where(np.arange(len(mask)) // (len(mask) // 3) == 1, 0, bias)
    return done


def fuse(arrays: Arrays) -> Arrays:
    """Joins the linear layers of `_FUSED` along their outputs; what is left of `up_proj` is a layer of its own."""
    fused = dict(arrays)
    for whole, parts in _FUSED:
        firsts = [name for name in arrays if f".{parts[0]}." in name]
        for first in firsts:
            names = [first.replace(f".{parts[0]}.", f".{part}.") for part in parts]
            if all(name in fused for name in names):
                joined = [fused.pop(name) for name in names]
                fused[first.replace(f".{parts[0]}.", f".{whole}.")] = np.concatenate(joined)
    return {name.replace(".mlp.up_proj.", ".mlp.fc1."): array for name, array in fused.items()}


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
    """Fits "pos_embed" [1, n, d] to the model. Returns the arrays, and a message if it was resampled, else "".

    A grid of another size is resampled by `config.pos_resample`. Positions of prefix tokens that
    the model has no place for are added to the tokens themselves, and positions that only the model
    has are zeros. Neither changes what is computed.
    """
    name = "pos_embed"
    if name not in arrays or arrays[name].ndim != 3:
        return arrays, ""
    positions = arrays[name]
    count, wanted = positions.shape[1], config.num_patches
    own = wanted + (config.num_prefix_tokens if config.pos_embed_prefix else 0)
    if count == own:
        return arrays, ""
    tokens = ["cls_token"] * config.class_token + ["dist_token"] * config.distilled
    tokens += ["reg_token"] * bool(config.reg_tokens)
    known = {0, config.class_token + config.distilled} | (
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


def is_google(arrays: Arrays) -> bool:
    """Whether the names are those of Google's ViT."""
    return _GOOGLE_QUERY in arrays


def google_fields(arrays: Arrays) -> dict[str, Any]:
    """Fields of `ViTConfig` that the shapes state: the number of heads, which this project's shapes do not."""
    return {"num_heads": arrays[_GOOGLE_QUERY].shape[-2]}


def google_to_ours(arrays: Arrays) -> Arrays:
    """Google's names and layouts -> this project's paths and layouts.

    query, key, value  kernels [d h dh] -> [d (h dh)], biases [h dh] -> [(h dh)], then the three
                       side by side: qkv, [d (3 h dh)] and [(3 h dh)].
    out                kernel [h dh d] -> [(h dh) d].
    embedding          kernel [p p c d] -> [(p p c) d].
    """
    ours: Arrays = {}
    for name, array in arrays.items():
        for pattern, replacement in _GOOGLE:
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
