"""Reads weights as NumPy arrays from local files and folders, the hub, and checkpoints of runs.

No model is needed. The names are those of the file; `names` translates them.
"""

import json
import math
import os
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from tosa_jax.errors import WeightsError
from tosa_jax.models.weights import hub
from tosa_jax.models.weights.digests import digest_arrays
from tosa_jax.models.weights.run_checkpoints import find_checkpoint, read_params, workdir_of
from tosa_jax.models.weights.torch_pickle import CHOICES, LEGACY_START, read_torch_file
from tosa_jax.paths import as_path, parse_json, write_atomically

_DIGEST = (
    "tosa_jax.sha256"  # its place in the metadata of a `.safetensors` that this project writes
)

MOST_INFLATED = 2**30
"""Bytes that an `.npz` may hold, whatever its own size; beyond them it may hold 16 times its size."""

_NPZ_DAMAGE = (ValueError, OSError, EOFError, KeyError, TypeError)
_NPZ_DAMAGE += (RuntimeError,)  # of zipfile: a part is encrypted, or compressed in another way
_NPZ_DAMAGE += (tokenize.TokenError, SyntaxError)  # of headers, which are Python's


@dataclass(frozen=True)
class WeightFile:
    """The contents of a file or folder of weights.

    path          of the file or folder, for messages.
    arrays        by their names in the file.
    under         key of the state dict in a `.pth`; "<stage>/<step>" of a checkpoint; else "".
    metadata      of a `.safetensors`; else {}.
    config        the config.json beside the file, or of the work directory; {} if there is none.
    preprocessor  the preprocessor_config.json of transformers beside the file; {} if there is none.
    """

    path: str
    arrays: dict[str, np.ndarray]
    under: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    preprocessor: dict[str, Any] = field(default_factory=dict)


def read_weights(
    source: "str | os.PathLike | Mapping[str, Any] | WeightFile",
    *,
    checkpoint_key: str | None = None,
    prefix: str = "",
) -> WeightFile:
    """Reads a file, a folder of transformers or of a run, `hf:owner/name[@revision][/file]`, or arrays by name.

    checkpoint_key  which of several networks in a training checkpoint: "ema", "teacher", "student", "model" (not
                    averaged) or any other key of it; None: `torch_pickle.WRAPPERS` says which comes first.
    prefix          only arrays whose names start with it, without it.

    The format of a file is told by its first bytes, not by its name.

    Raises WeightsError: the file does not exist, is damaged or holds no weights, or none of that key or prefix; or the
    hub cannot be reached.
    """
    if isinstance(source, WeightFile):
        file = source
    elif isinstance(source, Mapping):
        file = WeightFile("the mapping", {name: _host_array(x) for name, x in source.items()})
    else:
        file = _read_path(source, checkpoint_key)
    if checkpoint_key is None:
        return _of_one_network(_narrowed(file, prefix), None)
    return _narrowed(_of_one_network(file, checkpoint_key), prefix)


def _read_path(source: str | os.PathLike, checkpoint_key: str | None) -> WeightFile:
    path = hub.fetch(str(source)) if hub.is_address(str(source)) else Path(source).expanduser()
    if path.is_dir():
        for name in hub.WEIGHT_FILES:
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
    config, preprocessor = (read_json(path.parent / name) for name in hub.STATEMENTS)
    arrays, under, metadata = _read_arrays(path, checkpoint_key)
    return WeightFile(str(path), arrays, under, metadata, config, preprocessor)


def _read_arrays(
    path: Path, checkpoint_key: str | None = None
) -> tuple[dict[str, np.ndarray], str, dict[str, str]]:
    """The arrays of a file, the key that they were under, and its metadata."""
    if path.name.endswith(".index.json"):
        return _read_shards(path), "", {}
    kind = _kind(path)
    if kind == "torch":
        return *read_torch_file(path, checkpoint_key), {}
    arrays, metadata = (_read_npz(path), {}) if kind == "npz" else _read_safetensors(path)
    return arrays, "", metadata


def _host_array(value: Any) -> np.ndarray:
    """An array of NumPy, JAX or PyTorch as NumPy's."""
    if hasattr(value, "detach"):  # PyTorch's: NumPy has no bfloat16, and a gradient is in the way
        value = value.detach().cpu()
        value = value.float() if "bfloat16" in str(value.dtype) else value
    return np.asarray(value)


_NETWORKS = ("teacher", "student")


def _of_one_network(file: WeightFile, checkpoint_key: str | None) -> WeightFile:
    """Of a training checkpoint of DINOv2, whose names begin with the network's, one network: the teacher by default.

    What else it holds, such as the state of its losses, is left out.
    """
    starts = {name.split(".")[0] for name in file.arrays}
    if checkpoint_key is None or file.under in CHOICES.get(checkpoint_key, (checkpoint_key,)):
        chosen = next((name for name in _NETWORKS if name in starts), None)
    elif checkpoint_key in starts:
        chosen = checkpoint_key
    else:
        raise WeightsError(
            f"{file.path} holds no {checkpoint_key!r}: its names begin with {', '.join(sorted(starts)[:8])}"
        )
    if chosen is None:
        return file
    start = f"{chosen}."
    arrays = {n[len(start) :]: x for n, x in file.arrays.items() if n.startswith(start)}
    return replace(file, arrays=arrays, under=chosen)


def _narrowed(file: WeightFile, prefix: str) -> WeightFile:
    """The arrays whose names start with `prefix`, without it. Raises WeightsError: there are none."""
    if not prefix:
        return file
    arrays = {n[len(prefix) :]: x for n, x in file.arrays.items() if n.startswith(prefix)}
    if not arrays:
        some = ", ".join(sorted(file.arrays)[:4])
        raise WeightsError(
            f"{file.path} has no names that begin with {prefix!r}; it has {some}, ..."
        )
    return replace(file, arrays=arrays)


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
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError):
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


def _read_shards(index: Path) -> dict[str, np.ndarray]:
    """The arrays of all files that an index of transformers names."""
    names = read_json(index).get("weight_map", {})
    if not names:
        raise WeightsError(f"{index} names no files of weights (weight_map)")
    arrays: dict[str, np.ndarray] = {}
    for name in sorted(set(names.values())):
        shard = index.parent / Path(name).name
        if not shard.exists():
            raise WeightsError(f"{index} names {name}, which is not beside it")
        arrays |= _read_arrays(shard)[0]
    return arrays


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; {} if there is no such file, or if it holds another JSON value.

    Raises WeightsError: the file is no JSON.
    """
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

    Raises WeightsError: the path is that of a folder.
    """
    path = as_path(path)
    if path.is_dir():
        raise WeightsError(
            f"{path} is a folder: name the file to write, for example {path / 'model.safetensors'}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    contiguous = {name: np.ascontiguousarray(x).reshape(x.shape) for name, x in arrays.items()}
    metadata = metadata | {_DIGEST: digest_arrays(contiguous, metadata)}
    write_atomically(path, _in_order(safetensors.numpy.save(contiguous, metadata)))


def _in_order(data: bytes) -> bytes:
    """A `.safetensors` with its header in the order of names: safetensors writes metadata in another one each time."""
    end = 8 + int.from_bytes(data[:8], "little")
    said = json.dumps(json.loads(data[8:end]), ensure_ascii=False, sort_keys=True).encode()
    header = said + b" " * (-len(said) % 8)  # the arrays begin at a multiple of 8
    return len(header).to_bytes(8, "little") + header + data[end:]


def _read_checkpoint(folder: Path) -> WeightFile:
    checkpoint = find_checkpoint(folder)
    if checkpoint is None:
        raise WeightsError(
            f"{folder} is a folder without {hub.WEIGHT_FILES[0]}, {hub.WEIGHT_FILES[2]} or "
            "checkpoints of a run"
        )
    name = f"{checkpoint.parent.name}/{checkpoint.name}"
    said = read_json(workdir_of(checkpoint) / "config.json")
    return WeightFile(str(checkpoint), read_params(checkpoint), name, {}, said)
