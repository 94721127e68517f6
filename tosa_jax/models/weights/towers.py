"""Image towers of networks for images and texts: CLIP and SigLIP as transformers stores them, and OpenCLIP -> timm.

OpenCLIP has some towers of timm's, EVA-02's and SigLIP's among them, under "visual.trunk."; EVA's authors have theirs
under "visual.".

Sources: transformers `models/{clip,siglip}`; openai/CLIP `model.py` and mlfoundations/open_clip `transformer.py`; timm
`vision_transformer.py` and `attention_pool.py`, whose names the results have. The tower of texts is left out.
"""

import re
from collections.abc import Mapping

import numpy as np

from tosa_jax.models.weights.renaming import inverse, rename

Arrays = dict[str, np.ndarray]

_TEXT = re.compile(
    r"(text_model|text_projection|logit_scale|logit_bias|transformer|token_embedding|ln_final|positional_embedding"
    r"|input_resolution|context_length|vocab_size)(\.|$)"
)
_BUFFER = re.compile(r"embeddings\.position_ids$")

_TRANSFORMERS = [
    (r"^vision_model\.", ""),
    (r"^embeddings\.class_embedding$", "cls_token"),
    (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^post_layernorm\.", "norm."),
    (r"^encoder\.layers\.(\d+)\.", r"blocks.\1."),
    (r"\.layer_norm([12])\.", r".norm\1."),
    (r"\.self_attn\.([qkv])_proj\.", r".attn.\1."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
    (r"^visual_projection\.", "head."),
    (r"^head\.probe$", "attn_pool.latent"),
    (r"^head\.attention\.in_proj_", "attn_pool.qkv."),
    (r"^head\.attention\.out_proj\.", "attn_pool.proj."),
    (r"^head\.layernorm\.", "attn_pool.norm."),
    (r"^head\.mlp\.", "attn_pool.mlp."),
]
_OPENCLIP = [
    (r"^visual\.", ""),
    (r"^class_embedding$", "cls_token"),
    (r"^positional_embedding$", "pos_embed"),
    (r"^conv1\.", "patch_embed.proj."),
    (r"^ln_pre\.", "norm_pre."),
    (r"^ln_post\.", "norm."),
    (r"^transformer\.resblocks\.(\d+)\.", r"blocks.\1."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.attn\.in_proj_", ".attn.qkv."),
    (r"\.attn\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
]


def whose(arrays: Mapping[str, np.ndarray]) -> str:
    """ "transformers" or "OpenCLIP", if these are the names of a tower there; else ""."""
    if any(name.endswith("embeddings.position_embedding.weight") for name in arrays):
        return "transformers"
    return "OpenCLIP" if "visual.class_embedding" in arrays or _prefix_of_timm(arrays) else ""


def _prefix_of_timm(arrays: Mapping[str, np.ndarray]) -> str:
    """What stands before the names of a tower that are timm's, or nearly; "" if there is none."""
    prefixes = ("visual.trunk.", "visual.")
    found = (x for x in prefixes if any(name.startswith(f"{x}blocks.") for name in arrays))
    return next(found, "")


def without_texts(arrays: Arrays) -> tuple[Arrays, list[str]]:
    """A tower that has timm's names, or nearly, without what stands before them; and the parts left out.

    Other arrays stay as they are. So does what such a tower has beside timm's network, which then fits no model.
    """
    prefix = _prefix_of_timm(arrays)
    if not prefix:
        return arrays, []
    tower = {name.removeprefix(prefix): x for name, x in arrays.items() if name[:7] == "visual."}
    return tower, sorted({name.partition(".")[0] for name in arrays} - {"visual"})


def is_naflex(arrays: Mapping[str, np.ndarray]) -> bool:
    """Whether it is the tower of transformers' `Siglip2Model`, which takes patches and projects them by a matrix."""
    return any(
        name.endswith("embeddings.patch_embedding.weight") and x.ndim == 2
        for name, x in arrays.items()
    )


def tower_to_timm(arrays: Arrays) -> tuple[Arrays, list[str]]:
    """The image tower's arrays under timm's names, and the names of the parts left out.

    Query, key and value of the layers of transformers stay apart. The projection becomes a head whose bias is 0.
    """
    transformers = whose(arrays) == "transformers"
    rules = _TRANSFORMERS if transformers else _OPENCLIP
    renamed, unused = {}, set()
    for name, array in arrays.items():
        if match := _TEXT.match(name):
            unused.add(match[1])
            continue
        if _BUFFER.search(name):
            continue
        renamed[rename(name, rules)] = array
    for name in {"cls_token", "pos_embed"} & renamed.keys():
        array = renamed[name]
        renamed[name] = array.reshape(1, -1, array.shape[-1])
    if not transformers and "proj" in renamed:
        renamed["head.weight"] = renamed.pop("proj").T
    if "head.weight" in renamed:
        weight = renamed["head.weight"]
        renamed.setdefault("head.bias", np.zeros(len(weight), weight.dtype))
    for part in {"attn_pool.qkv.weight", "attn_pool.qkv.bias"} & renamed.keys():
        whole = renamed.pop(part)
        query, key_value = np.split(whole, [len(whole) // 3])
        renamed[part.replace("qkv", "q")], renamed[part.replace("qkv", "kv")] = query, key_value
    return renamed, sorted(unused)


def timm_to_tower(arrays: Arrays) -> Arrays:
    """`tower_to_timm` the other way round, to transformers' names; the projection loses its bias."""
    whole = {name: x for name, x in arrays.items() if name != "head.bias"}
    for part in ("weight", "bias"):
        names = [f"attn_pool.{layer}.{part}" for layer in ("q", "kv")]
        if all(name in whole for name in names):
            whole[f"attn_pool.qkv.{part}"] = np.concatenate([whole.pop(name) for name in names])
    rules, renamed = inverse(_TRANSFORMERS), {}
    for name, x in whole.items():
        prefix = "" if name.startswith("head.") else "vision_model."
        x = {"cls_token": x.reshape(-1), "pos_embed": x[0]}.get(name, x)
        renamed[prefix + rename(name, rules)] = x
    return renamed
