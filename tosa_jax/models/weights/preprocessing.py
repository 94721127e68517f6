"""How images were prepared for released weights: one table by family, and what a file states of itself."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from tosa_jax.errors import WeightsError
from tosa_jax.models.variants import HUB_NAMES
from tosa_jax.models.weights import statements
from tosa_jax.models.weights.names import is_google
from tosa_jax.models.weights.readers import WeightFile

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of ImageNet's red, green and blue in [0, 1]."""


class Preprocessing(NamedTuple):
    """What weights expect of an image.

    mean, std      of each channel's pixels in [0, 1]; one value serves all channels.
    crop_pct       share in (0, 1] of the resized short side that the central crop keeps.
    interpolation  of the resize: "bicubic" or "bilinear".
    resize         "crop", or "squash": both sides are resized, whatever the aspect ratio, before the crop.

    A network for images of any proportion (`ViTConfig.max_patches`) reads neither `crop_pct` nor `resize`.
    """

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    crop_pct: float = 0.875
    interpolation: str = "bicubic"
    resize: str = "crop"


@dataclass(frozen=True)
class Family:
    """Released weights that were evaluated alike.

    names      regular expression of the variants.
    crop_pct   by the smallest image side from which it holds, pixels.
    mean, std  as in `Preprocessing`; the defaults are ImageNet's.
    resize, interpolation   as there.
    """

    names: str
    crop_pct: dict[int, float]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    resize: str = "crop"
    interpolation: str = "bicubic"


CLIP_MEAN, CLIP_STD = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)

FAMILIES = {
    # facebookresearch/deit, `datasets.py`: int(size / .875) at every size, 438 at 384 pixels. Its published accuracies
    # are meant, 82.9 % at 384 included. timm 1.0 crops .9, and 1 at 384.
    "deit": Family(r"deit_", {0: 0.875}),
    # facebookresearch/deit, `README_revenge.md`: --eval-crop-ratio 1.0. Its accuracies are meant. timm 1.0 crops .9 at
    # 224 for the weights of ImageNet-1k.
    "deit3": Family(r"deit3_", {0: 1.0}),
    # facebookresearch/dinov2, `data/transforms.py`: 256 -> 224. timm 1.0, whose weights are for 518 pixels, takes the
    # whole there.
    "dinov2": Family(r"vit_.*dinov2", {0: 0.875, 384: 1.0}),
    # openai/CLIP, `clip.py`: the short side to the image size, then the centre; mlfoundations/open_clip and
    # baaivision/EVA too. timm 1.0 has .9 for some.
    "clip": Family(r"(vit|eva02)_.*clip", {0: 1.0}, CLIP_MEAN, CLIP_STD),
    # transformers, `Siglip2ImageProcessor`; timm 1.0 has "bicubic".
    "naflex": Family(r"naflexvit", {0: 1.0}, (0.5,), (0.5,), interpolation="bilinear"),
    # timm 1.0: pixels in [-1, 1]. big_vision and transformers squeeze the whole image into the square.
    "siglip": Family(r"vit_.*siglip", {0: 1.0}, (0.5,), (0.5,)),
    # timm 1.0, `eva.py`. facebookresearch/dinov3 and transformers squeeze the whole image into the square.
    "dinov3": Family(r"vit_.*dinov3", {0: 1.0}),
    # timm 1.0, `eva.py`: classifiers that were trained on ImageNet-22k's classes squeeze the whole image into the
    # square; the default weights at 448 pixels are such.
    "eva02 22k": Family(
        r"eva02_\w*_448(\.mim_\w*_ft_in22k|$)", {0: 1.0}, CLIP_MEAN, CLIP_STD, "squash"
    ),
    "eva02": Family(r"eva02_", {0: 0.9, 336: 1.0}, CLIP_MEAN, CLIP_STD),
    # timm 0.9, `data/config.py`: its defaults, as the network states none (`pretrained_cfg`).
    "lemevit": Family(r"lemevit_", {0: 0.875}),
    # timm 1.0, `vision_transformer.py`: pixels in [-1, 1]. Google's own code squeezes the whole image into the square;
    # timm's accuracies are meant.
    "augreg": Family(r"vit_", {0: 0.9, 384: 1.0}, (0.5,), (0.5,)),
    # facebookresearch/mae, `util/datasets.py`: 256 -> 224, and the whole above. Its files have AugReg's names.
    "mae": Family(r"(?!)", {0: 0.875, 225: 1.0}),
    # Any other network, as DeiT's.
    "": Family(r"", {0: 0.875}),
}
"""By name; the first whose expression matches the start of a variant's name. The sources differ: see each one."""


def preprocessing_of(name: str, image_size: int, file: WeightFile | None = None) -> Preprocessing:
    """The preprocessing of a variant's weights at an image size in pixels.

    name  a key of `VARIANTS` or `HUB_NAMES`, or any other: DeiT's.
    file  the weights: what they state themselves comes first, then the table.
    """
    name = HUB_NAMES.get(name, name)
    family = next(x for x in FAMILIES.values() if re.match(x.names, name))
    if file is not None and family is FAMILIES["augreg"] and _is_mae(file):
        family = FAMILIES["mae"]
    crop_pct = family.crop_pct[max(side for side in family.crop_pct if side <= image_size)]
    found = Preprocessing(family.mean, family.std, crop_pct, family.interpolation, family.resize)
    return found._replace(**(stated(file) if file is not None else {}))


def _is_mae(file: WeightFile) -> bool:
    """Whether a file under an AugReg name is MAE's: fine-tuned (it has fc_norm), or pretrained (no head)."""
    if is_google(file.arrays):
        return False
    if file.config.get("model_type") == "vit_mae":
        return True
    parts = {re.split("[./]", name)[0] for name in file.arrays}
    released = "blocks/0/norm1/scale" not in file.arrays  # else a file of this project, of any task
    return "fc_norm" in parts or (released and "cls_token" in parts and "head" not in parts)


def stated(file: WeightFile) -> dict[str, Any]:
    """The fields of `Preprocessing` that a file states, in its metadata, the config.json of timm or of a run, or the
    preprocessor_config.json of transformers.

    A run's, and that of a `Predictor`, state no crop where images are not cropped.

    Raises WeightsError: what it states is of an unknown form.
    """
    try:
        found = _said(file)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise WeightsError(f"{_unknown(file)} ({type(error).__name__}: {error})") from error
    for name in ("mean", "std"):
        values = found.get(name, (1.0,))
        lowest = 0.0 if name == "std" else -math.inf
        numbers = isinstance(values, tuple) and all(type(x) in (int, float) for x in values)
        if not numbers or not all(lowest < x < math.inf for x in values):
            raise WeightsError(f"{_unknown(file)} ({name}={values!r})")
    crop = found.get("crop_pct", 1)
    if type(crop) not in (int, float) or not 0 < crop <= 1:
        raise WeightsError(f"{_unknown(file)} (crop_pct={crop!r})")
    if (way := found.get("interpolation", "bicubic")) not in ("bicubic", "bilinear"):
        raise WeightsError(f"{_unknown(file)} (interpolation={way!r})")
    return found


def _unknown(file: WeightFile) -> str:
    return f"{file.path}: what it or the config.json beside it says of images is of an unknown form"


def _said(file: WeightFile) -> dict[str, Any]:
    if statements.has_own(file, statements.PREDICTOR):
        said = statements.own_value(file, statements.PREDICTOR, dict)
        form = said["form"]
        said |= form if form["resize"] in _RESIZES else {}
        said = {name: x for name, x in said.items() if name != "resize" or x in _RESIZES}
    elif statements.has_own(file, statements.PREPROCESSING):
        said = statements.own_value(file, statements.PREPROCESSING, dict)
    elif "inputs" in file.config:
        data = file.config["data"]
        names = ("crop_pct", "interpolation", "resize")
        cropped = {name: data.get(f"eval_{name}") for name in names}
        said = file.config["inputs"] | (cropped if data["eval_resize"] in _RESIZES else {})
    elif file.preprocessor:
        said = _of_transformers(file)
    else:
        said = file.config | file.config.get("pretrained_cfg", {})
        said = said | {"resize": _CROP_MODES.get(said.get("crop_mode", ""))}
    found = {name: said[name] for name in Preprocessing._fields if said.get(name)}
    if found.get("interpolation") not in (None, "bicubic", "bilinear"):
        del found["interpolation"]
    return statements.tuples(found)


_RESIZES = ("crop", "squash")
_CROP_MODES = {"center": "crop", "squash": "squash"}  # timm's `crop_mode`
_PIL_FILTERS = {2: "bilinear", 3: "bicubic"}  # transformers' `resample`


def _of_transformers(file: WeightFile) -> dict[str, Any]:
    """The fields of `Preprocessing` that a preprocessor_config.json of transformers states."""
    said, kept = file.preprocessor, statements.prepared_size(file)
    fields: dict[str, Any] = {"mean": (0.0,), "std": (1.0,)}
    if said.get("do_normalize", True):
        fields = {"mean": said.get("image_mean"), "std": said.get("image_std")}
    if "max_num_patches" in said:
        return fields | {"interpolation": _PIL_FILTERS.get(said.get("resample", 2))}
    if kept is None or not said.get("do_resize", True):
        return fields
    size = said.get("size")
    if isinstance(size, Mapping):
        short = "shortest_edge" in size
        before = (
            size["shortest_edge"] if short else min(size.get("height", 0), size.get("width", 0))
        )
    else:  # earlier versions: of CLIP the short side, else both
        kind = said.get("image_processor_type") or said.get("feature_extractor_type") or ""
        short, before = "CLIP" in kind, size
    fields["interpolation"] = _PIL_FILTERS.get(said.get("resample", 0))
    if isinstance(before, int) and before >= min(kept):
        fields |= {"resize": "crop" if short else "squash", "crop_pct": _share(min(kept), before)}
    return fields


def _share(kept: int, before: int) -> float:
    """The share of `before` pixels that `kept` are, such that int(kept / share) is `before` again."""
    share = kept / before
    return share if int(kept / share) == before else math.nextafter(share, 0.0)
