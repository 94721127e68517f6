"""DPT and Depth Anything as transformers stores them: names and layouts of the decoder, and what config.json states.

Sources: transformers `models/{dpt,depth_anything}`. Their backbones are a ViT and DINOv2, whose names are in `names`.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from tosa_jax.errors import WeightsError

Arrays = dict[str, np.ndarray]

# transformers counts fusions from the coarsest map on, this project the parts of every map from the finest on.
_NAMES = [
    (r"^neck\.reassemble_stage\.readout_projects\.(\d)\.0\.", r"reassemble.\1.readout."),
    (r"^neck\.reassemble_stage\.layers\.(\d)\.projection\.", r"reassemble.\1.proj."),
    (r"^neck\.reassemble_stage\.layers\.([01])\.resize\.", r"reassemble.\1.grow."),
    (r"^neck\.reassemble_stage\.layers\.(3)\.resize\.", r"reassemble.\1.shrink."),
    (r"^neck\.convs\.", "convs."),
    (r"^neck\.fusion_stage\.layers\.(\d)\.", lambda match: f"fusion.{3 - int(match[1])}."),
    (r"\.residual_layer(\d)\.convolution(\d)\.", r".residual\1.conv\2."),
    (r"^(fusion\.\d)\.projection\.", r"\1.proj."),
    (r"^head\.head\.([024])\.", lambda match: f"conv{1 + int(match[1]) // 2}."),
    (r"^head\.(conv[123])\.", r"\1."),
]
# The coarsest map has no finer one to be added to; its unit for that is in the files, and nothing reads it.
_UNREAD = "fusion.3.residual1."


def split_decoder(arrays: Arrays) -> tuple[Arrays, Arrays]:
    """The decoder's arrays under this project's paths and in its layouts, and all other arrays as they are.

    The decoder is empty unless the names are DPT's or Depth Anything's.
    """
    if not any(name.startswith("neck.") for name in arrays):
        return {}, arrays
    theirs = {name for name in arrays if name.startswith(("neck.", "head."))}
    decoder = {}
    for name in theirs:
        new = name
        for pattern, replacement in _NAMES:
            new = re.sub(pattern, replacement, new)
        if not new.startswith(_UNREAD):
            decoder |= _laid_out(f"decoder.{new}".replace(".", "/"), arrays[name])
    return decoder, {name: x for name, x in arrays.items() if name not in theirs}


def _laid_out(name: str, array: np.ndarray) -> Arrays:
    """One array of PyTorch under its path, in this project's layout.

    A convolution [out in h w] becomes [h w in out], or where it is 1x1 a linear layer [in out]; a transposed one
    [in out h w] becomes [in (h w out)]. The matrix of the readout [d 2d] is split in its halves.
    """
    path, _, last = name.rpartition("/")
    if last != "weight":
        return {name: array}
    if path.endswith("/readout"):
        patches, token = np.split(array.T, 2)
        return {f"{path}/kernel": patches, f"{path}_token/kernel": token}
    if path.endswith("/grow"):
        array = array.transpose(0, 2, 3, 1).reshape(len(array), -1)
    elif array.shape[2:] == (1, 1):
        array = array[:, :, 0, 0].T
    else:
        array = array.transpose(2, 3, 1, 0)
    return {f"{path}/kernel": array}


def decoder_fields(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Fields of `DepthConfig` that the names and shapes of a decoder tell; {} for a file without one."""
    if "neck.convs.0.weight" in arrays:
        convs = [arrays[f"neck.convs.{i}.weight"] for i in range(4)]
        project = any(".readout_projects." in name for name in arrays)
        return {
            "decoder": "dpt",
            "decoder_dim": convs[0].shape[0],
            "decoder_widths": tuple(x.shape[1] for x in convs),
            "readout": "project" if project else "ignore",
        }
    if not any(name.startswith("decoder/") for name in arrays):
        return {}
    return {"decoder": "dpt" if "decoder/convs/0/kernel" in arrays else "light"}


def depth_fields(path: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `DepthConfig` that the config.json of a DPT or Depth Anything states beside the backbone's.

    Raises WeightsError for a network that no decoder here computes: it says which field and value.
    """
    if config["model_type"] == "dpt":
        _refuse_unless(path, config, is_hybrid=(None, False), backbone_config=(None,))
        _refuse_unless(path, config, readout_type=(None, "project", "ignore"))
        _refuse_unless(path, config, add_projection=(None, False))
        _refuse_unless(path, config, use_batch_norm_in_fusion_residual=(None, False))
        fields = {"decoder_norm": False, "depth_estimation_type": "relative"}
        layers = config.get("backbone_out_indices") or (2, 5, 8, 11)
    else:
        backbone = config.get("backbone_config") or {}
        fields = {
            "decoder_norm": backbone.get("apply_layernorm", True),
            "depth_estimation_type": config.get("depth_estimation_type", "relative"),
        }
        if fields["depth_estimation_type"] == "metric":
            fields["max_depth"] = config.get("max_depth") or 1
        # The stages of DINOv2: the embedding, then every layer.
        stages = backbone.get("num_hidden_layers", 12) + 1
        named = [int(name.removeprefix("stage")) for name in backbone.get("out_features") or ()]
        indices = backbone.get("out_indices") or named or (9, 10, 11, 12)
        layers = (i % stages - 1 for i in indices)
    _refuse_unless(path, config, head_in_index=(None, -1))
    _refuse_unless(path, config, reassemble_factors=(None, [4, 2, 1, 0.5]))
    return fields | {"decoder_layers": tuple(layers)}


def _refuse_unless(path: str, config: Mapping[str, Any], **known: tuple[Any, ...]) -> None:
    for name, values in known.items():
        if config.get(name) not in values:
            said = config[name]
            said = said.get("model_type") if isinstance(said, Mapping) else said
            raise WeightsError(
                f"{path}: the config.json beside it says {name}={said!r}, which no decoder here computes; known: "
                f"{', '.join(map(repr, values))}"
            )
