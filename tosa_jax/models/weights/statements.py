"""What a file, and the JSON files beside it, state of a network: its configuration, image size, grid, and classes."""

from collections.abc import Mapping, Sequence
from typing import Any

from tosa_jax.errors import WeightsError
from tosa_jax.models.variants import VARIANTS
from tosa_jax.models.weights.readers import WeightFile
from tosa_jax.paths import parse_json

WEIGHTS_FORMAT = "tosa_jax weights"
"""Under "format" in the metadata of what `save_weights` writes. Of another file the keys below mean nothing."""

PREDICTOR = "predictor"
"""Key in a weights file's metadata under which `inference.loading.save` states all that a `Predictor` needs."""

MODEL, TASK = "model", "task"
"""Keys in the metadata of what `save_weights` writes: the whole configuration as JSON, and the task."""

PREPROCESSING = "preprocessing"
"""The key there of the fields of `Preprocessing` as JSON, where they are known."""

CLASS_NAMES = "class_names"
"""The key there of the classes' names as a JSON list, where they are known."""


def has_own(file: WeightFile, key: str) -> bool:
    """Whether this project wrote the file, with that key in its metadata. Other projects use such keys too."""
    return file.metadata.get("format") == WEIGHTS_FORMAT and key in file.metadata


def own_value(file: WeightFile, key: str, kind: type) -> Any:
    """What this project wrote under a key of the file's metadata, a JSON value of type `kind`; None if it did not.

    Raises WeightsError: it is another value.
    """
    if not has_own(file, key):
        return None
    try:
        value = parse_json(file.metadata[key])
    except ValueError:
        value = None
    return _of_kind(file, key, value, kind)


def _of_kind(file: WeightFile, key: str, value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise WeightsError(
            f"{file.path}: what states its {key} is of an unknown form; make it again"
        )
    return value


def tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    """JSON's fields as configurations have them: with tuples in place of lists."""
    return {name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()}


def own_network(file: WeightFile) -> tuple[str, dict[str, Any]] | None:
    """Task and fields of the configuration, as this project's own files and work directories state them all.

    None: another project's file, or one of an earlier version that states less.

    Raises WeightsError: what they state is of an unknown form.
    """
    if has_own(file, PREDICTOR):
        said = own_value(file, PREDICTOR, dict)
    elif has_own(file, MODEL):
        said = file.metadata | {MODEL: own_value(file, MODEL, dict)}
    elif "inputs" in file.config and MODEL in file.config:  # a run's
        said = file.config
    else:
        return None
    return said.get(TASK, "classification"), tuples(_of_kind(file, MODEL, said.get(MODEL), dict))


def vision_config(file: WeightFile) -> dict[str, Any]:
    """The config.json of transformers of the image network: that of a tower, or of a depth network's backbone."""
    inner = file.config.get("vision_config") or file.config.get("backbone_config")
    return dict(inner if isinstance(inner, Mapping) else file.config)


def timm_config(file: WeightFile) -> dict[str, Any]:
    """timm's `pretrained_cfg` of the config.json beside a file, with what stands beside it; {} if it is not timm's."""
    if "architecture" not in file.config and "pretrained_cfg" not in file.config:
        return {}
    return file.config | file.config.get("pretrained_cfg", {})


def architecture(file: WeightFile) -> str:
    """timm's name of the network in the config.json beside a file, a key of `VARIANTS`; "" if none is stated."""
    name = str(file.config.get("architecture", "")).split(".")[0]
    return name if name in VARIANTS else ""


_FAMILIES = {
    "vit": "vit_augreg", "vit_mae": "mae", "deit": "deit_", "dinov2": "vit_dinov2", "clip": "vit_clip",
    "dinov2_with_registers": "vit_dinov2", "clip_vision_model": "vit_clip", "siglip": "vit_siglip",
    "siglip_vision_model": "vit_siglip", "siglip2": "naflexvit", "siglip2_vision_model": "naflexvit",
    "dinov3_vit": "vit_dinov3", "depth_anything": "vit_dinov2",
}  # fmt: skip


def family(file: WeightFile) -> str:
    """A name that `preprocessing.FAMILIES` knows, by transformers' `model_type`; "" if none is stated."""
    return _FAMILIES.get(str(file.config.get("model_type", "")), "")


def trained_size(file: WeightFile) -> tuple[int, int] | None:
    """Height and width of the images that the positions are for, pixels; None if nothing states them."""
    if own := own_network(file):
        return _sides(own[1].get("image_size"))
    if timm := timm_config(file):
        size = timm.get("input_size")
        given = (timm.get("model_args") or {}).get("img_size")
        return _sides(given) or (_sides(size[-2:]) if isinstance(size, Sequence) else None)
    return _sides(vision_config(file).get("image_size"))


def prepared_size(file: WeightFile) -> tuple[int, int] | None:
    """Height and width of what the preprocessing beside a file makes of images, pixels; None if nothing states them."""
    said = file.preprocessor
    cropped = said.get("do_center_crop") and said.get("crop_size")
    return _sides(cropped or (said.get("size") if said.get("do_resize", True) else None))


def most_patches(file: WeightFile) -> int:
    """Patches that an image of any proportion becomes at most, as the files of transformers' SigLIP 2 state it, and
    those that this project writes for timm; 0: they do not.

    Raises WeightsError: what they state is of an unknown form.
    """
    for said, name in (
        (file.preprocessor, "max_num_patches"),
        (vision_config(file), "num_patches"),
        (file.config, "max_patches"),
    ):
        if name in said:
            return _of_kind(file, name, said[name], int)
    return 0


def stated_grid(file: WeightFile, patch_size: int) -> tuple[int, int] | None:
    """Rows and columns of the patches that the file's positions are for; None if nothing states them."""
    if (square := file.arrays.get("embeds.pos_embed")) is not None and square.ndim == 4:
        return square.shape[1], square.shape[2]  # timm's NaFlex
    size = trained_size(file)
    return None if size is None else (size[0] // patch_size or 1, size[1] // patch_size or 1)


def _sides(size: Any) -> tuple[int, int] | None:
    """(height, width) of the ways in which files state a size; None for one that states no two sides."""
    if isinstance(size, Mapping):
        size = (size.get("height"), size.get("width"))
    if isinstance(size, int):
        return size, size
    if isinstance(size, list | tuple) and len(size) == 2 and all(isinstance(x, int) for x in size):
        return size[0], size[1]
    return None


def class_names(file: WeightFile, num_classes: int) -> tuple[str, ...] | None:
    """The names of a head's classes, as `label_names` of timm or `id2label` of transformers state them.

    None: nothing states them, they are only numbered ("LABEL_0"), or they are for another number of classes.
    """
    if said := own_value(file, PREDICTOR, dict):
        found = said.get(CLASS_NAMES) or ()
    elif said := own_value(file, CLASS_NAMES, list):
        found = said
    elif timm := timm_config(file):
        found = timm.get("label_names") or ()
    else:
        labels = file.config.get("id2label") or {}
        found = [labels[key] for key in sorted(labels, key=int)] if _counted(labels) else ()
    names = tuple(map(str, found))
    generic = names == tuple(f"LABEL_{i}" for i in range(len(names)))
    return None if generic or len(names) != num_classes else names


def _counted(labels: Any) -> bool:
    return isinstance(labels, Mapping) and all(str(key).isdigit() for key in labels)
