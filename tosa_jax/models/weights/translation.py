"""A file's arrays under this project's names and in its layouts, whoever wrote the file."""

import math

import numpy as np

from tosa_jax.models.vit_config import ViTConfig
from tosa_jax.models.weights import lemevit, names, towers
from tosa_jax.models.weights.dpt import split_decoder

Arrays = names.Arrays

_KERNEL = "patch_embed/proj/kernel"


def to_ours(arrays: Arrays) -> tuple[Arrays, str]:
    """A file's arrays with the paths and layouts of this project, and a message on parts that were left out, or "".

    A head that reads `pre_logits`, a layer that no network here has, is left out with it.
    """
    if names.is_google(arrays):
        ours, unused = names.google_to_ours(arrays)
        left_out = {"the network does not have them": unused}
    elif any("/" in name for name in arrays):
        return arrays, ""
    elif lemevit.is_theirs(arrays):
        return lemevit.to_ours(arrays), ""
    else:
        decoder, arrays = split_decoder(arrays)
        arrays, texts = towers.without_texts(arrays)
        unused = []
        if towers.whose(arrays):
            arrays, texts = towers.tower_to_timm(arrays)
            arrays = names.fuse(arrays)
        else:
            arrays, unused = names.to_timm(arrays)
        left_out = {"only texts need them": texts, "only pretraining uses them": unused}
        ours = names.to_ours(arrays) | decoder
    lines = [f"left out, as {why}: {', '.join(parts)}" for why, parts in left_out.items() if parts]
    message = "; ".join(lines)
    if "pre_logits" in unused:
        ours = {name: x for name, x in ours.items() if not name.startswith(("head/", "head_dist/"))}
        message += " (and the head, which reads pre_logits)"
    return ours, message


def with_zero_biases(arrays: Arrays, config: ViTConfig) -> Arrays:
    """The arrays with biases of 0 where a file of a DINOv3 has none of queries, keys and values (timm)."""
    if config.rope != "dinov3" or not config.qkv_bias:
        return arrays
    kernels = {name: x for name, x in arrays.items() if name.endswith("/attn/qkv/kernel")}
    zeros = {
        name[: -len("kernel")] + "bias": np.zeros(x.shape[1], x.dtype)
        for name, x in kernels.items()
    }
    return zeros | arrays


def fit_channels(arrays: Arrays, config: ViTConfig) -> tuple[Arrays, str]:
    """The patch projection of RGB images for another number of channels, and a message, or "" where nothing changed.

    As timm's `adapt_input_conv`: for one channel the sum over the three, which gives a grey image the tokens of its RGB
    copy; else the three over and over, scaled by 3 / channels.
    """
    kernel, channels, area = arrays.get(_KERNEL), config.in_chans, config.patch_size**2
    if kernel is None or kernel.ndim != 2 or channels == 3 or len(kernel) != 3 * area:
        return arrays, ""
    rgb = np.asarray(kernel, np.float32).reshape(area, 3, -1)
    if channels == 1:
        fitted = rgb.sum(axis=1, keepdims=True)
    else:
        fitted = np.tile(rgb, (1, math.ceil(channels / 3), 1))[:, :channels] * (3 / channels)
    fitted = fitted.reshape(area * channels, -1)
    return arrays | {
        _KERNEL: fitted
    }, f"the patch projection of 3 channels was fitted to {channels}"
