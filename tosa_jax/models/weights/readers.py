"""Reads weights as NumPy arrays from local files and folders, the hub, and checkpoints of runs.

No model is needed. The names are those of the file; `names` translates them.
"""

import math
import os
import tokenize
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from tosa_jax.errors import WeightsError
from tosa_jax.models.weights.digests import digest_arrays
from tosa_jax.models.weights.run_checkpoints import find_checkpoint, read_params, workdir_of
from tosa_jax.models.weights.torch_pickle import LEGACY_START, read_torch_file
from tosa_jax.paths import as_path, parse_json, write_atomically

_DIGEST = (
    "tosa_jax.sha256"  # its place in the metadata of a `.safetensors` that this project writes
)

MOST_INFLATED = 2**30
"""Bytes that an `.npz` may hold, whatever its own size; beyond them it may hold 16 times its size."""

_NPZ_DAMAGE = (ValueError, OSError, EOFError, KeyError, TypeError, NotImplementedError)
_NPZ_DAMAGE += (tokenize.TokenError, SyntaxError, RecursionError)  # of headers, which are Python's

# Files that a folder of transformers, timm or the hub may have, in order of preference.
_FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
)


@dataclass(frozen=True)
class WeightFile:
    """The contents of a file or folder of weights.

    path      of the file or folder, for messages.
    arrays    by their names in the file.
    under     key of the state dict in a `.pth`; "<stage>/<step>" of a checkpoint; else "".
    metadata  of a `.safetensors`; else {}.
    config    the config.json beside the file, or of the work directory; {} if there is none.
    """

    path: str
    arrays: dict[str, np.ndarray]
    under: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)


def read_weights(path: str | Path) -> WeightFile:
    """Reads a file, a folder of transformers or of a run, or `hf:owner/name[@revision][/file]`.

    The format of a file is told by its first bytes, not by its name.

    Raises WeightsError: the file does not exist, is damaged or holds no weights, or the hub cannot be reached.
    """
    path = fetch_from_hub(str(path)) if str(path).startswith("hf:") else Path(path).expanduser()
    if path.is_dir():
        for name in _FOLDER_FILES:
            if (path / name).exists():
                path = path / name
                break
        else:
            return _read_checkpoint(path)
    if not path.exists():
        raise WeightsError(
            f"{path} does not exist; give a .pth, .safetensors or .npz file, a work directory of a run, or "
            "hf:owner/name"
        )
    config = _read_json(path.parent / "config.json")
    if path.name.endswith(".index.json"):
        return _read_shards(path, config)
    kind = _kind(path)
    if kind == "torch":
        arrays, under = read_torch_file(path)
        return WeightFile(str(path), arrays, under, {}, config)
    arrays, metadata = (_read_npz(path), {}) if kind == "npz" else _read_safetensors(path)
    return WeightFile(str(path), arrays, "", metadata, config)


def _kind(path: Path) -> str:
    """The format of a file by its content: "torch", "npz" or "safetensors". Raises WeightsError for another one."""
    with open(path, "rb") as file:
        start = file.read(256)
    if not start:
        raise WeightsError(f"{path} is empty; get it again")
    if start.startswith(b"PK\x03\x04"):
        return "npz" if _holds_npy(path) else "torch"
    if start.startswith(LEGACY_START):
        return "torch"
    if start[8:9] == b"{":
        return "safetensors"
    text = start.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise WeightsError(
            f"{path} is a web page, not weights: its link may need a log-in, or be gone"
        )
    if text.startswith(b"version https://git-lfs"):
        raise WeightsError(
            f"{path} is a git-lfs pointer, not the weights; run `git lfs pull` in its repository"
        )
    if start[:1] == b"\x80":
        raise WeightsError(f"{path} is a pickle, but not one that torch.save wrote")
    raise WeightsError(
        f"{path} is neither a .pth, a .safetensors nor an .npz file (it starts with {start[:12]!r})"
    )


def _holds_npy(path: Path) -> bool:
    """Whether a zip file holds `.npy` files alone. False for a broken one, whose fault `read_torch_file` names."""
    try:
        with zipfile.ZipFile(path) as archive:
            return all(name.endswith(".npy") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return False


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            claimed = sum(entry.file_size for entry in entries)
            # Zeros are deflated to a thousandth: a small file could ask for any amount of memory.
            if claimed > max(MOST_INFLATED, 16 * path.stat().st_size):
                raise ValueError(f"it would become {claimed / 2**30:.1f} GiB")
            arrays = {x.filename.removesuffix(".npy"): _read_npy(archive, x) for x in entries}
    except (*_NPZ_DAMAGE, zipfile.BadZipFile, zlib.error) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise WeightsError(
            f"{path} is damaged or holds more than numbers ({reason}); get it again"
        ) from error
    # NumPy has no bfloat16: it stores such an array as two bytes an element, without a type.
    return {
        name: x.view(ml_dtypes.bfloat16) if x.dtype == np.dtype("V2") else x
        for name, x in arrays.items()
    }


def _read_npy(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> np.ndarray:
    """An array of an `.npz` file. Raises ValueError: its header says another size than it has, or objects."""
    with archive.open(entry) as file:
        version = np.lib.format.read_magic(file)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        if version not in read_header:
            raise ValueError(f"{entry.filename} has a form {version} that is not known")
        shape, fortran_order, dtype = read_header[version](file)
        if dtype.hasobject:
            raise ValueError(f"{entry.filename} holds objects")
        left = entry.file_size - file.tell()
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != left:
            raise ValueError(f"{entry.filename} has {left} bytes for {dtype} {list(shape)[:8]}")
        data = file.read()
    array = np.frombuffer(data, dtype) if left else np.empty(math.prod(shape), dtype)
    return array.reshape(shape, order="F" if fortran_order else "C")


def _read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    try:
        with safetensors.safe_open(path, "numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}
            metadata = dict(file.metadata() or {})
    except (safetensors.SafetensorError, OSError, TypeError) as error:
        reason = str(error).splitlines()[0][:160]
        raise WeightsError(f"{path} is damaged or cut short ({reason}); get it again") from error
    written = metadata.pop(_DIGEST, None)  # files of other projects have none
    if written is not None and written != digest_arrays(arrays, metadata):
        raise WeightsError(f"{path} is damaged (it does not fit its digest); get or make it again")
    return arrays, metadata


def _read_shards(index: Path, config: dict[str, Any]) -> WeightFile:
    """The arrays of all files that an index of transformers names."""
    arrays = {}
    for name in sorted(set(_read_json(index).get("weight_map", {}).values())):
        shard = index.parent / Path(name).name
        if not shard.exists():
            raise WeightsError(f"{index} names {name}, which is not beside it")
        arrays |= _read_safetensors(shard)[0]
    return WeightFile(str(index), arrays, "", {}, config)


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; {} if there is no such file, or if it holds another JSON value."""
    if not path.exists():
        return {}
    try:
        value = parse_json(path.read_bytes())
    except (ValueError, OSError) as error:
        raise WeightsError(f"{path} is no JSON ({error})") from error
    return value if isinstance(value, dict) else {}


def write_safetensors(
    path: str | os.PathLike, arrays: dict[str, np.ndarray], metadata: dict[str, str]
) -> None:
    """Writes a `.safetensors` file atomically, and makes its folder if there is none.

    A digest of the arrays and the metadata is added to the metadata; `read_weights` compares it.
    """
    path = as_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    contiguous = {name: np.ascontiguousarray(x).reshape(x.shape) for name, x in arrays.items()}
    metadata = metadata | {_DIGEST: digest_arrays(contiguous, metadata)}
    write_atomically(path, safetensors.numpy.save(contiguous, metadata))


def fetch_from_hub(address: str) -> Path:
    """Downloads `hf:owner/name[@revision][/file]` and returns the path of the local copy.

    The repository's config.json is downloaded too, if there is one. Without a file name this takes model.safetensors,
    else its index with all shards, else pytorch_model.bin.

    Raises WeightsError: huggingface_hub is not installed, no network, no such repository or file.
    """
    owner, _, rest = address.removeprefix("hf:").partition("/")
    name, _, file = rest.partition("/")
    name, _, revision = name.partition("@")
    if not owner or not name:
        raise WeightsError(f"{address!r} is not hf:owner/name or hf:owner/name/file")
    try:
        import huggingface_hub  # pyright: ignore[reportMissingImports]
        from huggingface_hub.errors import (  # pyright: ignore[reportMissingImports]
            EntryNotFoundError,
            LocalEntryNotFoundError,
        )
    except ImportError as error:
        raise WeightsError(
            f"{address} needs the package huggingface_hub, which is not installed: "
            "pip install huggingface_hub, or download the file and give its path"
        ) from error

    def fetch(wanted: str) -> Path | None:
        try:
            return Path(
                huggingface_hub.hf_hub_download(
                    f"{owner}/{name}", wanted, revision=revision or None
                )
            )
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError):
                raise
            return None

    try:
        fetch("config.json")
        for wanted in [file] if file else _FOLDER_FILES:
            if (path := fetch(wanted)) is not None:
                if wanted.endswith(".index.json"):
                    for shard in set(_read_json(path).get("weight_map", {}).values()):
                        fetch(shard)
                return path
    except WeightsError:
        raise
    except Exception as error:  # the hub's client has changed its HTTP library, and so the errors
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise WeightsError(
            f"{address} cannot be had from the hub ({reason}); check the name and the network, or "
            "download the file and give its path"
        ) from error
    raise WeightsError(f"{address}: the repository holds no {file or ' or '.join(_FOLDER_FILES)}")


def _read_checkpoint(folder: Path) -> WeightFile:
    checkpoint = find_checkpoint(folder)
    if checkpoint is None:
        raise WeightsError(
            f"{folder} is a folder without {_FOLDER_FILES[0]}, {_FOLDER_FILES[2]} or "
            "checkpoints of a run"
        )
    name = f"{checkpoint.parent.name}/{checkpoint.name}"
    said = _read_json(workdir_of(checkpoint) / "config.json")
    return WeightFile(str(checkpoint), read_params(checkpoint), name, {}, said)
