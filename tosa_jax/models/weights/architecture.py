"""The network that a file of weights is for: what it states, and what the shapes of its arrays tell.

Shapes tell sizes and parts. They do not tell the number of heads, the variant of GELU, LayerNorm's epsilon or rotary
positions: those are stated by a config.json, by this project's own files, or follow from timm's name of the network.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tosa_jax.errors import WeightsError
from tosa_jax.models.variants import HUB_NAMES, VARIANTS, architecture_of
from tosa_jax.models.weights import lemevit, names, statements, towers
from tosa_jax.models.weights.checks import stated_fields
from tosa_jax.models.weights.readers import WeightFile
from tosa_jax.models.weights.translation import to_ours

Say = Callable[[str], None]


def network_of(file: WeightFile, name: str = "", say: Say = print) -> tuple[str, dict[str, Any]]:
    """The task and the fields of the configuration of the network that a file holds.

    name  a key of `VARIANTS` or `HUB_NAMES`; "": the file states its network, or its own name begins with timm's, which
          is said as a guess.

    Raises WeightsError: nothing states the network, or the name is of another architecture.
    """
    if own := statements.own_network(file):
        return own
    base = HUB_NAMES.get(name, name) or statements.architecture(file)
    arrays, _ = to_ours(file.arrays)
    architecture = "lemevit" if lemevit.is_lemevit(arrays) else "vit"
    if base and architecture_of(base, {}) != architecture:
        raise WeightsError(
            f"{file.path} does not hold the parameters of {base!r}: its arrays are those of another architecture, "
            f"{architecture!r}"
        )
    if architecture == "lemevit":
        return "classification", _lemevit_fields(file, arrays)
    stated = stated_fields(file)
    if not base and "norm_eps" not in stated:
        base = _guessed(file, say)
    variant = dict(VARIANTS.get(base, {}))
    fields = variant | stated | _shapes(file, arrays, variant)
    if towers.is_naflex(file.arrays) or variant.get("max_patches"):
        stated_most = statements.most_patches(file) or variant.get("max_patches")
        fields["max_patches"] = stated_most or arrays["pos_embed"].shape[1]
    fields |= _positions(file, arrays, fields) | _head(file, arrays, variant, say)
    if fields.get("rope") == "dinov3" and not fields.get("qkv_bias", True):
        fields["qkv_bias"] = True  # timm's files without biases are read as such with zeros
    resampling = names.resampling_of(file.arrays, fields)
    fields |= {"pos_resample": resampling[0]} if resampling else {}
    return "depth" if "decoder" in stated else "classification", fields


def _lemevit_fields(file: WeightFile, arrays: names.Arrays) -> dict[str, Any]:
    try:
        return lemevit.fields_of(arrays)
    except (KeyError, IndexError) as error:
        raise WeightsError(f"{file.path} holds no whole LeMeViT (no {error})") from error


def num_classes_of(file: WeightFile) -> int:
    """Outputs of the head that a file holds; 0 if it has none."""
    kernel = to_ours(file.arrays)[0].get("head/kernel")
    return 0 if kernel is None else int(kernel.shape[-1])


def _guessed(file: WeightFile, say: Say) -> str:
    """timm's name at the start of a file's own name."""
    stem = re.split(r"[-.]", Path(file.path).name)[0]
    found = stem if stem in VARIANTS else ""
    if not found:
        raise WeightsError(
            f"{file.path} does not state its network: name it (--model=NAME, or name='deit_small_patch16_224' of "
            "tosa_jax.load)"
        )
    say(f"{file.path}: nothing states its network, {found} is a guess from its name")
    return found


def _shapes(file: WeightFile, arrays: names.Arrays, variant: dict[str, Any]) -> dict[str, Any]:
    """Sizes and parts of the layers."""
    try:
        width = arrays["blocks/0/norm1/scale"].shape[0]
        hidden, out = (arrays[f"blocks/0/mlp/fc{i}/kernel"].shape for i in (1, 2))
    except (KeyError, IndexError) as error:
        raise WeightsError(f"{file.path} holds no ViT that is known here (no {error})") from error
    layers = {int(m[1]) for name in arrays if (m := re.match(r"blocks/(\d+)/", name))}
    gated = hidden[1] == 2 * out[0]
    fields: dict[str, Any] = {
        "embed_dim": width,
        "depth": max(layers) + 1,
        "mlp_ratio": _ratio(hidden[1], width),
        "mlp_norm": "blocks/0/mlp/norm/scale" in arrays,
        "attn_norm": "blocks/0/attn/norm/scale" in arrays,
        "qkv_bias": "blocks/0/attn/qkv/bias" in arrays,
        "patch_bias": "patch_embed/proj/bias" in arrays,
        "class_token": "cls_token" in arrays,
        "distilled": "dist_token" in arrays,
        "reg_tokens": arrays["reg_token"].shape[1] if "reg_token" in arrays else 0,
        "pre_norm": "norm_pre/scale" in arrays,
        "pos_embed": "pos_embed" in arrays,
    }
    has_scale = "blocks/0/ls1/gamma" in arrays
    fields["layer_scale"] = (variant.get("layer_scale") or 1e-5) if has_scale else 0.0
    if gated:
        fields["mlp"] = "swiglu"
    return fields | _patch(file, arrays)


def _ratio(hidden: int, width: int) -> float:
    """The ratio that `ViTConfig.mlp_dim` makes exactly this width of: it rounds down."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _patch(file: WeightFile, arrays: names.Arrays) -> dict[str, Any]:
    """Patch size and channels: the only array with four axes at the start of the network states both."""
    for name, x in file.arrays.items():
        if x.ndim == 4 and re.search(r"patch_embed|(^|/)embedding/kernel$|visual\.conv1\.", name):
            side, channels = (x.shape[0], x.shape[2]) if "/" in name else (x.shape[2], x.shape[1])
            return {"patch_size": int(side), "in_chans": int(channels)}
    patch = stated_fields(file).get("patch_size")  # this project's own files state it
    rows = len(arrays["patch_embed/proj/kernel"]) if patch else 0
    return {"in_chans": rows // patch**2} if patch else {}


def _positions(file: WeightFile, arrays: names.Arrays, fields: dict[str, Any]) -> dict[str, Any]:
    """Image size, and whether prefix tokens have positions.

    The size is what the preprocessing makes of images, if it is stated. A depth network takes images of any size, and
    has that of its positions.
    """
    patch = fields.get("patch_size", 16)
    size = statements.trained_size(file)
    if fields.get("max_patches"):
        size = None  # of no network that takes images of any proportion
    elif "decoder" not in fields:
        size = statements.prepared_size(file) or size
    found: dict[str, Any] = {}
    if "pos_embed" in arrays:
        count = arrays["pos_embed"].shape[1] if arrays["pos_embed"].ndim == 3 else 0
        tokens = fields["class_token"] + fields["distilled"]
        prefix, grid = _split(
            count, tokens, fields["reg_tokens"], statements.stated_grid(file, patch)
        )
        found["pos_embed_prefix"] = prefix == tokens + fields["reg_tokens"]
        size = size or (grid[0] * patch, grid[1] * patch)
    if size is not None:
        covered = tuple(max(side // patch, 1) * patch for side in size)
        found["image_size"] = covered
    return found


def _split(
    count: int, tokens: int, registers: int, stated: tuple[int, int] | None
) -> tuple[int, tuple[int, int]]:
    """How many of `count` positions are prefix tokens', and the grid of the others: as stated, else a square."""
    numbers = sorted({tokens + registers, tokens, 0}, reverse=True)
    if stated is not None and count - math.prod(stated) in numbers:
        return count - math.prod(stated), stated
    for prefix in numbers:
        side = math.isqrt(max(count - prefix, 0))
        if side and side * side == count - prefix:
            return prefix, (side, side)
    raise WeightsError(f"its {count} positions are no square, and nothing states their grid")


def _head(
    file: WeightFile, arrays: names.Arrays, variant: dict[str, Any], say: Say
) -> dict[str, Any]:
    """What the head reads and how many classes it has; 0 where the file has no head.

    Raises WeightsError: timm's head reads the mean of normalised patches, which no network here computes.
    """
    kernel: np.ndarray | None = arrays.get("head/kernel")
    width = arrays["blocks/0/norm1/scale"].shape[0]
    pool = "token" if "cls_token" in arrays else "avg"
    if "attn_pool/latent" in arrays:
        pool = "map"
    elif kernel is not None and kernel.shape[0] == 2 * width:
        pool = "token_avg"
    elif "fc_norm/scale" in arrays:
        pool = "avg"
    classes = 0 if kernel is None else int(kernel.shape[1])
    if statements.timm_config(file).get("global_pool") == "avg" and pool == "token":
        if classes:
            raise WeightsError(
                f"{file.path} classifies the mean of its normalised patches (global_pool='avg' without fc_norm), which "
                "no network here computes; pass num_classes=0 for features"
            )
        say(f"{file.path}: timm's features are the mean of the patches, those here the class token")
    embeds = variant.get("projection", False) and classes == variant.get("num_classes")
    states_so = bool(towers.whose(file.arrays)) or file.config.get("projection") is True
    embeds = embeds or (states_so and classes > 0)
    return {"global_pool": pool, "num_classes": classes, "projection": embeds}
