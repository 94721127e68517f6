"""Writes a trained model as programs that run without this package: StableHLO by `jax.export`, weights, a statement.

`docs/export.md` describes the folder, and how another program reads it.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export as jax_export

from tosa_jax.data.decoding import Preprocess
from tosa_jax.distributed.devices import versions
from tosa_jax.errors import ConfigError
from tosa_jax.inference.predictor import Predictor
from tosa_jax.models.params import Params, split
from tosa_jax.models.plan import layer_specs
from tosa_jax.models.vit import VisionTransformer
from tosa_jax.models.vit_config import ViTConfig, check, plain_value
from tosa_jax.models.weights.digests import write_digests
from tosa_jax.ops.platforms import plain
from tosa_jax.paths import is_remote, write_atomically
from tosa_jax.tasks import TASKS

PLATFORMS = ("cpu", "cuda", "tpu")
"""What programs are written for, by JAX's names."""

WEIGHTS, STATEMENT = "model.safetensors", "config.json"
"""Files of the folder, beside PLATFORM.jax_export and digests.json."""

_FORMAT, _VERSION = "tosa_jax export", 1

_OF_XLA = ("LayoutConstraint",)
"""Custom calls that XLA itself defines, and whose form `jax.export` does not know to be stable."""


Outputs = dict[str, Any]
"""`predictions` of the network by name, `selected` where tokens are selected, and `tokens` where they are wanted."""


def export(
    model: VisionTransformer | Predictor,
    folder: str | Path,
    *,
    batch: int | None = None,
    platforms: str | Sequence[str] = PLATFORMS,
    tokens: bool = False,
    name: str = "",
) -> None:
    """Writes a model to a new folder, as programs that JAX runs without this package.

    A program takes the weights, arrays by name as in model.safetensors, and images as `Predictor.prepare` makes them,
    uint8 [b, height, width, channels] of the model's own size; they are normalised in the program. It returns a
    dictionary: `logits`, `features` or `depth`, float32, and `selected`, a tuple of int32 [b, s], where tokens are
    selected. config.json states all that and how images are prepared. A folder is written whole or not at all.

    model      a `Predictor`, or a model, which is then prepared for as `Predictor(model)` does it.
    folder     must not exist.
    batch      how many images a program takes; None: any number, and each number is compiled at its first use.
    platforms  some of `PLATFORMS`; a device of that kind need not be there. The program for "cuda" has no kernels of
               this package, whose form JAX does not promise to read later.
    tokens     whether `tokens`, float [b, n, d] after the final norm, is returned too.
    name       of the model, for the statement; "": the folder's.

    Raises ConfigError: the folder exists or is in a bucket, an unknown platform, a batch below 1, a float16 network
    for a CPU, a model for images of any proportion (`ViTConfig.max_patches`).
    """
    predictor = model if isinstance(model, Predictor) else Predictor(model)
    names = (platforms,) if isinstance(platforms, str) else tuple(platforms)
    check(
        not predictor.config.max_patches,
        "a program is for images of one size, and this model takes images of any proportion: load it with "
        "image_size=(height, width) (--image_size)",
    )
    target = _new_folder(folder)
    _check_platforms(names, predictor.config)
    size = None if batch is None else _at_least_one(batch)
    programs = _programs(predictor, size, names, tokens)
    stated = _statement(predictor, programs, name or target.name)
    with _written_whole(target) as temporary:
        predictor.save(temporary / WEIGHTS)
        for platform, program in programs.items():
            write_atomically(temporary / _file(platform), bytes(program.serialize()))
        write_atomically(temporary / STATEMENT, json.dumps(stated, indent=1).encode())
        write_digests(temporary)


def plain_function(predictor: Predictor, *, tokens: bool = False) -> Callable[[jax.Array], Outputs]:
    """The network with its weights inside, of JAX's own operations alone: what converters to other formats read.

    Returns a function of images, uint8 [b, height, width, c], which gives what an exported program does.
    """
    forward, (_, params) = _forward(predictor, tokens), split(predictor.model)

    def function(images: jax.Array) -> Outputs:
        with plain():
            return forward(params, images)

    return function


def _file(platform: str) -> str:
    return f"{platform}.jax_export"


def _new_folder(folder: str | Path) -> Path:
    """The path of a folder that is not there yet. Raises ConfigError."""
    check(not is_remote(folder), f"{folder} is in a bucket: export to a local folder, and copy it")
    target = Path(folder).expanduser().absolute()
    check(not os.path.lexists(target), f"{folder} exists: name a folder that does not")
    above = next(path for path in target.parents if path.exists())
    check(above.is_dir(), f"{folder} cannot be made: {above} is a file")
    return target


def _at_least_one(batch: Any) -> int:
    number = plain_value("batch", batch, int)
    check(number >= 1, f"batch={batch} must be at least 1, or None for any number of images")
    return number


def _check_platforms(names: tuple[str, ...], config: ViTConfig) -> None:
    check(len(names) > 0, "platforms is empty: name some of " + ", ".join(PLATFORMS))
    for platform in names:
        check(
            platform in PLATFORMS,
            f"platforms={platform!r} is unknown; known: cpu, cuda (NVIDIA GPUs), tpu",
        )
    check(
        config.dtype != "float16" or "cpu" not in names,
        "platforms has 'cpu', which does not multiply matrices of float16: leave it out, or load the model with "
        "dtype='bfloat16' or 'float32'",
    )


def _forward(predictor: Predictor, tokens: bool) -> Callable[[Params, jax.Array], Outputs]:
    """The network as a function of its weights and of images."""

    def forward(weights: Params, images: jax.Array) -> Outputs:
        out = predictor.output(weights, images, tokens=tokens)
        found: Outputs = dict(out.predictions)
        found |= {"selected": out.selected} if out.selected else {}
        return found | ({"tokens": out.tokens} if tokens else {})

    return forward


def _programs(
    predictor: Predictor, batch: int | None, names: tuple[str, ...], tokens: bool
) -> dict[str, jax_export.Exported]:
    """A program for each platform: in one for several JAX would lower the kernels of each for all."""
    config = predictor.config
    height, width = config.image_shape
    size = jax_export.symbolic_shape("b")[0] if batch is None else batch
    images = jax.ShapeDtypeStruct((size, height, width, config.in_chans), np.uint8)
    _, params = split(predictor.model)
    weights = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in params.items()}
    allowed = [jax_export.DisabledSafetyCheck.custom_call(name) for name in _OF_XLA]
    # Two functions: of one, JAX would use the trace of the first form for the second.
    with_kernels, without = (jax.jit(_forward(predictor, tokens)) for _ in range(2))

    def exported(platform: str) -> jax_export.Exported:
        fields: dict[str, Any] = {"platforms": [platform], "disabled_checks": allowed}
        if platform != "cuda":
            return jax_export.export(with_kernels, **fields)(weights, images)
        with plain():
            return jax_export.export(without, **fields)(weights, images)

    with _without_paths():
        return {platform: exported(platform) for platform in names}


@contextlib.contextmanager
def _without_paths() -> Iterator[None]:
    """Programs that are lowered in this context do not hold the paths of the source files of this machine."""
    config: Any = jax.config  # its fields are made at run time
    name = "jax_traceback_in_locations_limit"
    before = config.jax_traceback_in_locations_limit
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, before)


@contextlib.contextmanager
def _written_whole(target: Path) -> Iterator[Path]:
    """A folder beside `target` to write into, which becomes `target` if nothing fails, and else is removed."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process of the same number that was killed
    temporary.mkdir(parents=True)
    try:
        yield temporary
        try:
            temporary.rename(target)
        except OSError as error:
            if not target.exists():
                raise
            raise ConfigError(
                f"{target} was made by another program meanwhile: name another folder"
            ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _statement(
    predictor: Predictor, programs: Mapping[str, jax_export.Exported], name: str
) -> dict[str, Any]:
    """What config.json says: everything that a reader needs who does not have this package."""
    config, program = predictor.config, next(iter(programs.values()))
    _, images = program.in_tree.unflatten(program.in_avals)[0]
    outputs = program.out_tree.unflatten(program.out_avals)
    units = TASKS[predictor.task_name].units(config)
    described = jax.tree.map(_array, outputs)
    for output, unit in units.items():
        described[output]["unit"] = unit
    return {
        "format": _FORMAT, "version": _VERSION, "name": name, "task": predictor.task_name,
        "programs": {platform: _file(platform) for platform in programs}, "weights": WEIGHTS,
        "images": _array(images), "outputs": described,
        "preprocessing": _preprocessing(predictor.form, predictor.task, config),
        "class_names": list(predictor.class_names), "layers": _layers(config),
        "gmacs": predictor.model.macs() / 1e9, "dtype": str(config.dtype),
        "calling_convention": program.calling_convention_version,
        "versions": {"tosa_jax": version("tosa-jax"), **versions()},
    }  # fmt: skip


def _array(x: Any) -> dict[str, Any]:
    """Shape and dtype of an array; a size that is open has a letter."""
    shape = [size if isinstance(size, int) else str(size) for size in x.shape]
    return {"shape": shape, "dtype": str(x.dtype)}


_MODES = {"squeeze": "squash", "squash": "squash", "crop": "center"}  # timm's words


def _preprocessing(form: Preprocess, task: Any, config: ViTConfig) -> dict[str, Any]:
    """How images are prepared, in timm's words; `crop_mode` null: they come at the program's size."""
    height, width = config.image_shape
    said = {
        "input_size": [config.in_chans, height, width], "mean": list(task.mean), "std": list(task.std),
        "normalised_in_program": True, "exif_rotate": form.exif_rotate,
    }  # fmt: skip
    if form.image_size is None:
        return said | {"crop_mode": None}
    whole = form.resize == "squeeze"
    return said | {
        "crop_mode": _MODES[form.resize],
        "crop_pct": 1.0 if whole else form.crop_pct,
        "interpolation": "bilinear" if whole else form.interpolation,
    }


def _layers(config: ViTConfig) -> list[dict[str, Any]]:
    """The plan: of each layer its kind, and how many tokens reach it, stay after its choice, and leave it.

    Empty for a network in which no layer kinds of a plan run.
    """
    if not config.has_plan:
        return []
    return [
        {"kind": kind, "tokens_in": spec.count_in, "tokens": spec.count, "tokens_out": spec.count_out}
        for kind, spec in zip(config.plan, layer_specs(config), strict=True)
    ]  # fmt: skip
