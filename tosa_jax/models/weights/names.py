"""Parameter names and layouts of timm, DeiT, DINOv2, MAE, transformers and Google's JAX ViT -> this project's.

PyTorch's names first become timm's. Those are this project's attribute names, so only transposes remain. Sources:
timm `vision_transformer.py` (`checkpoint_filter_fn`, `_convert_dinov2`), facebookresearch/{deit, dinov2, mae},
transformers `models/{vit,deit,dinov2,dinov2_with_registers,dinov3_vit}` and its `conversion_mapping.py`;
facebookresearch/dinov3, baaivision/EVA and timm `eva.py` for DINOv3 and EVA-02. CLIP and SigLIP are in `towers`.

Google's ViT (`.npz` files of ViT and AugReg; google-research/vision_transformer, `models_vit.py`) has Flax's layouts:
kernels are [in, out] as here, but heads and the sides of a patch are axes of their own.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from tosa_jax.models.positions import resample_positions
from tosa_jax.models.vit_config import ViTConfig
from tosa_jax.models.weights import towers
from tosa_jax.models.weights.renaming import rename

Arrays = dict[str, np.ndarray]

# Parts of released files that only pretraining uses (DINO, DINOv2, MAE, EVA-02), and the tanh layer that transformers
# adds to ViT and DeiT (pooler) and that Google's and timm's earlier files have before their head (pre_logits). Any
# other parameter that is left over is an error.
_UNUSED = re.compile(
    r"(?:embeddings\.)?(mask_token)$|(dino_head|ibot_head|decoder)\.|(pooler)\.dense\."
    r"|(lm_head)\.|(local_cls_norm)\.|(decoder)_(?:embed|pos_embed|blocks|norm|pred)\b|(head)\.(?:mlp|last_layer)\.|(pre_logits)[./]"
)

# Rotary positions, which the model works out.
_BUFFER = re.compile(r"(?:.*\.)?rope(?:_embed)?\.(?:periods|freqs_cos|freqs_sin)$")

WRAPPER_PREFIX = re.compile(r"^(module\.|_orig_mod\.|_fsdp_wrapped_module\.|backbone\.)+")
"""What wrappers of modules put before every name."""

_HF_PREFIX = re.compile(
    r"^(vit|deit|dinov2_with_registers|dinov2|dpt)\."
    r"(?=embeddings\.|encoder\.|layers\.|layernorm\.|pooler\.)"
)

# transformers' names on the hub, by family. Each table leads back too (`renaming.inverse`).
_HF_TOKENS = [
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
]
_HF_LAYERS = [
    *_HF_TOKENS,
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.attention\.query\.", ".attn.q."),
    (r"\.attention\.attention\.key\.", ".attn.k."),
    (r"\.attention\.attention\.value\.", ".attn.v."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"^layernorm\.", "norm."),
]
_HF_VIT = [
    *_HF_LAYERS,
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
]
_HF_HEAD = (r"^classifier\.", "head.")
HF_NAMES = {
    "vit": [*_HF_VIT, _HF_HEAD],
    "deit": [
        *_HF_VIT,
        (r"^cls_classifier\.", "head."),
        (r"^distillation_classifier\.", "head_dist."),
    ],
    "dinov2": [*_HF_LAYERS, _HF_HEAD],
    "dinov2 gated": [
        *_HF_LAYERS,
        (r"\.mlp\.weights_in\.", ".mlp.fc1."),
        (r"\.mlp\.weights_out\.", ".mlp.fc2."),
        _HF_HEAD,
    ],
    "dinov3": [
        *_HF_TOKENS,
        (r"^embeddings\.patch_embeddings\.", "patch_embed.proj."),
        (r"^layer\.(\d+)\.", r"blocks.\1."),
        (r"\.attention\.([qkv])_proj\.", r".attn.\1."),
        (r"\.attention\.o_proj\.", ".attn.proj."),
        (r"\.mlp\.down_proj\.", ".mlp.fc2."),
    ],
}
"""transformers' names -> timm's, where query, key and value are apart; and so are the halves of a DINOv3's MLP."""

# All of them, then those of transformers' modules from version 5 on.
_HF = [
    *dict.fromkeys(rule for rules in HF_NAMES.values() for rule in rules),
    (r"^(?:encoder\.|model\.)?layers?\.(\d+)\.", r"blocks.\1."),
    (r"\.attn\.([qkv])(?:uery|ey|alue)\.", r".attn.\1."),
]

# The original repositories, where they differ from timm.
_ORIGINAL = [
    (r"^embeds\.(?=proj\.)", "patch_embed."),  # timm's NaFlex
    (r"^embeds\.", ""),
    (r"^(?:register|storage)_tokens$", "reg_token"),  # DINOv2, DINOv3
    (r"^linear_head\.", "head."),  # DINOv2 with its linear head
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # DINOv2: chunk, then the number among all blocks
    (r"\.mlp\.w12\.", ".mlp.fc1."),  # DINOv2's SwiGLU
    (r"\.mlp\.w3\.", ".mlp.fc2."),
    (r"\.mlp\.ffn_ln\.", ".mlp.norm."),  # EVA-02
    (r"\.attn\.inner_attn_ln\.", ".attn.norm."),  # EVA-02-CLIP
    (r"\.attn\.([qkv])_proj\.", r".attn.\1."),  # EVA-02's base and large, and timm's of these
    (r"\.gamma_([12])$", r".ls\1.gamma"),  # DeiT III
]

Fused = tuple[str, tuple[str, ...]]
"""A linear layer of timm's, and those that another keeps apart, in timm's order."""

QKV: Fused = ("attn.qkv", ("attn.q", "attn.k", "attn.v"))
HF_GATED: Fused = ("mlp.fc1", ("mlp.gate_proj", "mlp.up_proj"))
HF_PLAIN: Fused = ("mlp.fc1", ("mlp.up_proj",))  # of transformers' DINOv3 without gates
EVA_GATED: Fused = ("mlp.fc1", ("mlp.fc1_g", "mlp.fc1_x"))  # timm's `eva.py`
_FUSED = [
    QKV,
    HF_GATED,
    HF_PLAIN,
    EVA_GATED,
    ("mlp.fc1", ("mlp.w1", "mlp.w2")),
]  # last: DINOv3's and EVA-02's own


# Google's ViT and AugReg; big_vision counts the parts of a layer anew, and has heads that pool by attention.
_GOOGLE_PREFIX = re.compile(r"^(opt/target/|params/)?(img/)?")
_GOOGLE_UNUSED = re.compile(r"(?:opt/target/|params/)?(txt|t|b|pre_logits|opt/state|step)(?:/|$)")
_GOOGLE = [
    (r"^cls$", "cls_token"),
    (r"^embedding/", "patch_embed/proj/"),
    (r"^(?:Transformer/posembed_input/)?pos_embedding$", "pos_embed"),
    (r"^Transformer/encoder_norm/", "norm/"),
    (r"^Transformer/encoderblock_(\d+)/", r"blocks/\1/"),
    (r"^(blocks/\d+)/LayerNorm_0/", r"\1/norm1/"),
    (r"^(blocks/\d+)/LayerNorm_[12]/", r"\1/norm2/"),
    (r"/MultiHeadDotProductAttention_[01]/out/", "/attn/proj/"),
    (r"/MultiHeadDotProductAttention_[01]/", "/attn/"),
    (r"/MlpBlock_\d/Dense_0/", "/mlp/fc1/"),
    (r"/MlpBlock_\d/Dense_1/", "/mlp/fc2/"),
    (r"^MAPHead_0/probe$", "attn_pool/latent"),
    (r"^MAPHead_0/LayerNorm_0/", "attn_pool/norm/"),
    (r"^MAPHead_0/attn/", "attn_pool/"),
    (r"^MAPHead_0/", "attn_pool/"),
]
_GOOGLE_QUERY = re.compile(
    r"Transformer/encoderblock_0/MultiHeadDotProductAttention_([01])/query/kernel$"
)
_STACKED = re.compile(r"Transformer/encoderblock/")


def is_hugging_face(arrays: Arrays) -> bool:
    """Whether the names are transformers', of ViT, DeiT or a DINO."""
    ends = ("embeddings.position_embeddings", "embeddings.register_tokens")
    return any(name.endswith(ends) for name in arrays)


def resampling_of(arrays: Arrays, fields: Mapping[str, Any]) -> tuple[str, str] | None:
    """How the code that the names are of resamples these positions (`pos_resample`), and whose code that is.

    fields  of the network's `ViTConfig`.

    None for names that say nothing of it, such as timm's and DeiT's.
    """
    if not fields["pos_embed"]:
        return None
    if tower := towers.whose(arrays):
        if towers.is_naflex(arrays):
            return "bilinear_antialias", tower
        return ("bicubic" if tower == "transformers" else "bicubic_antialias"), tower
    if "dpt.embeddings.position_embeddings" in arrays:
        return "bilinear", "transformers"
    if is_hugging_face(arrays):
        return "bicubic_antialias" if fields["reg_tokens"] else "bicubic", "transformers"
    if fields["layer_scale"] and "mask_token" in arrays:  # timm's files of DINOv2 have none
        return "bicubic_antialias" if fields["reg_tokens"] else "bicubic_offset", "Facebook's hub"
    return None


def to_timm(arrays: Arrays) -> tuple[Arrays, list[str]]:
    """The same arrays under timm's names; and the parts left out that only pretraining uses."""
    rules = _HF if is_hugging_face(arrays) else _ORIGINAL
    renamed, unused = {}, set()
    for name, array in arrays.items():
        name = _HF_PREFIX.sub("", WRAPPER_PREFIX.sub("", name))
        if match := _UNUSED.match(name):
            unused.update(filter(None, match.groups()))
            continue
        if _BUFFER.match(name):
            continue
        renamed[rename(name, rules)] = array
    if "embeds.pos_embed" in arrays:  # rows and columns are two axes there
        renamed["pos_embed"] = renamed["pos_embed"].reshape(1, -1, renamed["pos_embed"].shape[-1])
    return fuse(with_key_biases(renamed)), sorted(unused)


def with_key_biases(arrays: Arrays) -> Arrays:
    """timm's names, in which a bias that the keys alone do not have is 0 there.

    transformers has biases of queries and values for DINOv3, timm the same beside the whole kernel (EVA-02 has three
    kernels too), and Facebook's code a mask for the bias of all three.
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


def take_apart(arrays: Arrays, layer: Fused) -> Arrays:
    """The linear layers that `fuse` joins to this one."""
    whole, parts = layer
    apart = {}
    for name, array in arrays.items():
        if f".{whole}." in name:
            pieces = zip(parts, np.split(array, len(parts)), strict=True)
            apart |= {name.replace(f".{whole}.", f".{part}."): piece for part, piece in pieces}
        else:
            apart[name] = array
    return apart


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


def fit_positions(
    arrays: Arrays, config: ViTConfig, stated: tuple[int, int] | None = None
) -> tuple[Arrays, str]:
    """Fits "pos_embed" [1, n, d] to the model. Returns the arrays, and a message if it was resampled, else "".

    stated  rows and columns of the patches, as the file says; None: it says nothing of them.

    A grid of another size is resampled by `config.pos_resample`. Positions of prefix tokens that
    the model has no place for are added to the tokens themselves, and positions that only the model
    has are zeros. Neither changes what is computed. Where nothing fits, arrays stay as they are, and the caller
    compares shapes.
    """
    name = "pos_embed"
    if name not in arrays or arrays[name].ndim != 3:
        return arrays, ""
    positions = arrays[name]
    found = _prefix_and_grid(positions.shape[1], config, stated)
    if found is None:
        return arrays, ""
    prefix, old, guess = found
    tokens = ["cls_token"] * config.class_token + ["dist_token"] * config.distilled
    tokens += ["reg_token"] * bool(config.reg_tokens)
    head, patches = positions[:, :prefix], positions[:, prefix:]
    patches = resample_positions(patches, config.grid, config.pos_resample, old)
    new = dict(arrays)
    if config.pos_embed_prefix:
        zeros = np.zeros((1, config.num_prefix_tokens - prefix, positions.shape[2]), head.dtype)
        patches = np.concatenate([head, zeros, patches], axis=1)
    else:
        for i, token in enumerate(tokens[:prefix]):
            if token in new:
                new[token] = new[token] + head[:, i : i + 1]
    new[name] = patches
    (above, across), (rows, columns) = old, config.grid
    if old == config.grid:
        return new, guess
    done = f"positions resampled from {above}x{across} to {rows}x{columns} ({config.pos_resample})"
    return new, f"{done}; {guess}" if guess else done


def prefix_counts(config: ViTConfig) -> list[int]:
    """How many prefix tokens may have positions in a file, the model's own number first."""
    own = config.num_prefix_tokens if config.pos_embed_prefix else 0
    return list(dict.fromkeys([own, config.class_token + config.distilled, 0]))


def _prefix_and_grid(
    count: int, config: ViTConfig, stated: tuple[int, int] | None
) -> tuple[int, tuple[int, int], str] | None:
    """Prefix tokens and grid of `count` positions, and what is guessed of them, if anything is; None: nothing fits.

    What is stated comes first. Without a statement, as many positions as the model's are its own grid, unless that is
    no square and the file's may be one: released networks are trained on squares.
    """
    for prefix in prefix_counts(config):
        patches = count - prefix
        if stated is not None and patches == math.prod(stated):
            return prefix, stated, ""
    for prefix in prefix_counts(config):
        patches = count - prefix
        side = math.isqrt(max(patches, 0))
        if patches > 0 and side * side == patches:
            no_square = config.grid[0] != config.grid[1]
            guess = f"the file does not state its grid, {side}x{side} is a guess"
            return (
                prefix,
                (side, side),
                guess if no_square and patches == config.num_patches else "",
            )
        if prefix == prefix_counts(config)[0] and patches == config.num_patches:
            rows, columns = config.grid
            return (
                prefix,
                config.grid,
                f"the file does not state its grid, {rows}x{columns} is a guess",
            )
    return None


def is_google(arrays: Arrays) -> bool:
    """Whether the names are those of Google's ViT or of big_vision."""
    return _google_query(arrays) is not None


def _google_query(arrays: Arrays) -> re.Match | None:
    return next((m for name in arrays if (m := _GOOGLE_QUERY.search(_unstacked(name)))), None)


def _unstacked(name: str) -> str:
    """The name of the first layer, where a file has all layers in one array (big_vision's `scan`)."""
    return _STACKED.sub("Transformer/encoderblock_0/", name)


def google_fields(arrays: Arrays) -> dict[str, Any]:
    """Fields of `ViTConfig` that the file states as this project's shapes do not: heads, and big_vision's own GELU."""
    query = _google_query(arrays)
    assert query is not None, "is_google"
    kernel = next(x for name, x in arrays.items() if _unstacked(name) == query.string)
    big_vision = {"mlp": "gelu_tanh"} if query[1] == "0" else {}
    return {"num_heads": kernel.shape[-2]} | big_vision


def google_to_ours(arrays: Arrays) -> tuple[Arrays, list[str]]:
    """Google's names and layouts -> this project's paths and layouts, and the parts left out.

    query, key, value  kernels [d h dh] -> [d (h dh)], biases [h dh] -> [(h dh)], then the three
                       side by side: qkv, [d (3 h dh)] and [(3 h dh)]. Of a head that pools by attention q, and
                       key and value side by side.
    out                kernel [h dh d] -> [(h dh) d].
    embedding          kernel [p p c d] -> [(p p c) d].

    Left out are the tower of texts (`txt/`, `t`, `b`), what only training has, and `pre_logits`.
    """
    ours: Arrays = {}
    unused: set[str] = set()
    for name, array in _layers_apart(arrays).items():
        if left_out := _GOOGLE_UNUSED.match(name):
            unused.add(left_out[1])
            continue
        name = rename(_GOOGLE_PREFIX.sub("", name), _GOOGLE)
        if re.search(r"/(query|key|value)/", name):
            array = array.reshape(*array.shape[:-2], -1)
        elif re.search(r"(attn|attn_pool)/proj/kernel$|patch_embed/proj/kernel$", name):
            array = array.reshape(-1, array.shape[-1])
        elif name in ("pos_embed", "attn_pool/latent"):
            array = array.reshape(1, -1, array.shape[-1])
        ours[name] = array
    for query in [name for name in ours if "/query/" in name]:
        parts = [query.replace("/query/", f"/{part}/") for part in ("query", "key", "value")]
        if not all(part in ours for part in parts):
            continue
        q, k, v = (ours.pop(part) for part in parts)
        if query.startswith("attn_pool/"):
            ours[query.replace("/query/", "/q/")] = q
            ours[query.replace("/query/", "/kv/")] = np.concatenate([k, v], axis=-1)
        else:
            ours[query.replace("/query/", "/qkv/")] = np.concatenate([q, k, v], axis=-1)
    return ours, sorted(unused)


def _layers_apart(arrays: Arrays) -> Arrays:
    """The arrays with an array a layer, where a file has those of all layers in one."""
    apart: Arrays = {}
    for name, array in arrays.items():
        if _STACKED.search(name):
            for i, part in enumerate(array):
                apart[_STACKED.sub(f"Transformer/encoderblock_{i}/", name)] = part
        else:
            apart[name] = array
    return apart
