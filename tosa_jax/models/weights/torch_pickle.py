"""Reads PyTorch's `.pth` files as NumPy arrays, without PyTorch and without running code from the file.

A `.pth` is a pickle of dictionaries whose tensors refer to storages of raw bytes. Since PyTorch 1.6 pickle and
storages are entries of a zip file; before, they followed each other in a plain file, which timm still writes. The
unpickler accepts a dozen names. Any other name is an error, so no code of a file is ever run.

Source of the formats: torch/serialization.py and torch/_utils.py of PyTorch.
"""

import io
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from tosa_jax.errors import WeightsError

# A file of the older form begins with this number, and so with these bytes, its pickle.
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_START = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"

# Keys under which published files keep the state dict. The first that is there is taken: where a file also holds
# averaged weights, those are the published ones.
EMA_KEYS = ("model_ema", "state_dict_ema", "ema")
WRAPPERS = (*EMA_KEYS, "model", "state_dict", "teacher", "student")

_DTYPES = {
    "FloatStorage": np.float32, "DoubleStorage": np.float64, "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16, "LongStorage": np.int64, "IntStorage": np.int32,
    "ShortStorage": np.int16, "CharStorage": np.int8, "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}  # fmt: skip


# Errors that unpickling, unzipping and rebuilding raise on damaged bytes.
_DAMAGE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    OSError,
    EOFError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    OverflowError,
    MemoryError,
    RecursionError,
    NotImplementedError,
)


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype


class _Tensor(NamedTuple):
    """A tensor as the pickle describes it: a strided view of a storage, which is read later."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Ignored:
    """Takes the place of what training checkpoints hold beside tensors (`_HARMLESS`), and keeps none of it."""

    def __init__(self, *args: Any, **fields: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, name: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """Takes an element of what would be a list or a set."""

    add = append


# Settings, devices, paths and single numbers in training checkpoints. Nothing of these names is ever imported or run.
_HARMLESS = {
    *(("argparse", "Namespace"), ("types", "SimpleNamespace"), ("torch", "device")),
    *(("collections", "defaultdict"), ("collections", "Counter"), ("collections", "deque")),
    *(("pathlib", "PosixPath"), ("pathlib", "WindowsPath"), ("pathlib", "PurePosixPath")),
    *(("datetime", "datetime"), ("datetime", "timedelta"), ("_codecs", "encode")),
    *((module, name) for module in ("numpy.core.multiarray", "numpy._core.multiarray")
      for name in ("scalar", "_reconstruct")),
    *(("numpy", name) for name in ("dtype", "ndarray")),
    *(("torch", f"{kind}{bits}") for kind in ("float", "int") for bits in (16, 32, 64)),
    *(("torch", name) for name in ("bfloat16", "bool", "int8", "uint8")),
    *((module, name) for module in ("builtins", "__builtin__")
      for name in ("int", "long", "unicode", "float", "bool", "str", "list", "dict", "set", "slice", "complex")),
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    """Rebuilds tensors, containers and numbers. Raises WeightsError for a file that asks for anything else."""

    def __init__(self, file: io.BufferedIOBase, path: Path) -> None:
        super().__init__(file, encoding="utf-8")
        self._path = path
        self.storages: dict[str, _Storage] = {}  # those that the pickle refers to, by key

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.storage") and name in _DTYPES:
            return name
        # New functions at each look-up, because a pickle can set attributes of the objects that it gets.
        known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch", "Size"): lambda sizes: tuple(sizes),
            ("torch._utils", "_rebuild_tensor"): lambda *parts: _Tensor(*parts[:4]),
            ("torch._utils", "_rebuild_tensor_v2"): lambda *parts: _Tensor(*parts[:4]),
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
        }
        if (module, name) in known:
            return known[module, name]
        if (module, name) in _HARMLESS:
            return type(name, (_Ignored,), {})
        raise WeightsError(
            f"{self._path} asks to run {module}.{name} when it is read, which weights do not need; "
            "nothing was run. If you trust the file, save its state dict alone, as .safetensors"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, _, *view = pid
        if kind != "storage" or (view and view[0] is not None):
            raise pickle.UnpicklingError(f"unknown reference {pid!r}")
        self.storages[key] = storage = _Storage(key, np.dtype(_DTYPES[dtype]))
        return storage


def read_torch_file(
    path: Path, checkpoint_key: str | None = None
) -> tuple[dict[str, np.ndarray], str]:
    """The tensors of a `.pth` by name, and the key under which they were, or "".

    checkpoint_key  the key to take, "ema" for any of `EMA_KEYS`, if the file has it; None: the first of `WRAPPERS`.

    Arrays keep the dtype of the file (bfloat16 is that of ml_dtypes) and may be read-only. Other tensors, such as an
    optimizer's, are not read.

    Raises WeightsError: the file is damaged, asks for code, or holds no tensors.
    """
    try:
        if zipfile.is_zipfile(path):
            return _read_zip(path, checkpoint_key)
        return _read_legacy(path, checkpoint_key)
    except WeightsError:
        raise
    except _DAMAGE as error:
        reason = str(error).splitlines()[0][:120] if str(error) else "it ends too early"
        raise WeightsError(
            f"{path} is damaged or cut short ({type(error).__name__}: {reason}); get it again"
        ) from error


def _read_zip(path: Path, checkpoint_key: str | None) -> tuple[dict[str, np.ndarray], str]:
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if name.split("/")[-1] == "data.pkl"]
        if not pickles:
            raise WeightsError(f"{path} is a zip file, but not one that torch.save wrote")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            # Refused because a small file could then ask for any amount of memory.
            raise WeightsError(f"{path} is a compressed zip file, which torch.save does not write")
        root = pickles[0].removesuffix("data.pkl")
        swap = False
        if f"{root}byteorder" in archive.namelist():
            swap = archive.read(f"{root}byteorder") != sys.byteorder.encode()
        # Read at once: so its checksum is compared before anything is unpickled.
        tree = _Unpickler(io.BytesIO(archive.read(pickles[0])), path).load()

        def read(storage: _Storage) -> np.ndarray:
            array = np.frombuffer(archive.read(f"{root}data/{storage.key}"), storage.dtype)
            return array.byteswap() if swap else array

        return _arrays(path, tree, read, checkpoint_key)


def _read_legacy(path: Path, checkpoint_key: str | None) -> tuple[dict[str, np.ndarray], str]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        if _Unpickler(file, path).load() != LEGACY_MAGIC:
            raise WeightsError(f"{path} is a pickle, but not one that torch.save wrote")
        _Unpickler(file, path).load()  # version of the protocol
        facts = _Unpickler(file, path).load()
        swap = facts.get("little_endian", True) != (sys.byteorder == "little")
        unpickler = _Unpickler(file, path)
        tree = unpickler.load()
        places = {}
        for key in _Unpickler(file, path).load():
            start = file.tell() + 8
            count = int.from_bytes(file.read(8), sys.byteorder)
            end = start + count * unpickler.storages[key].dtype.itemsize
            if end > size:
                raise EOFError("bytes are missing at its end")
            places[key] = (start, count)
            file.seek(end)

        def read(storage: _Storage) -> np.ndarray:
            start, count = places[storage.key]
            array = np.fromfile(path, storage.dtype, count, offset=start)
            return array.byteswap() if swap else array

        return _arrays(path, tree, read, checkpoint_key)


def _arrays(
    path: Path,
    tree: Any,
    read: Callable[[_Storage], np.ndarray],
    checkpoint_key: str | None,
) -> tuple[dict[str, np.ndarray], str]:
    """The state dict of an unpickled tree with its storages read."""
    chosen, wrapper = tree, ""
    if isinstance(tree, Mapping):
        chosen_keys = (checkpoint_key,) if checkpoint_key else ()
        for key in (*(EMA_KEYS if checkpoint_key == "ema" else chosen_keys), *WRAPPERS):
            if isinstance(tree.get(key), Mapping):
                chosen, wrapper = tree[key], key
                break
    named = chosen.items() if isinstance(chosen, Mapping) else ()
    tensors = {name: value for name, value in named if isinstance(value, _Tensor)}
    if not tensors:
        found = list(tree)[:8] if isinstance(tree, Mapping) else [type(tree).__name__]
        raise WeightsError(f"{path} holds no state dict, only: {', '.join(map(str, found))}")
    contents = {storage: read(storage) for storage in {x.storage for x in tensors.values()}}
    return {name: _view(contents[x.storage], x) for name, x in tensors.items()}, wrapper


def _view(content: np.ndarray, tensor: _Tensor) -> np.ndarray:
    """A tensor as a strided view of its storage. Raises ValueError if a damaged file asks for values outside it."""
    offset, shape, strides = tensor.offset, tuple(tensor.shape), tuple(tensor.strides)
    count = int(np.prod(shape, dtype=object)) if shape else 1
    last = offset + sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
    lowest = min((offset, *shape, *strides))
    if lowest < 0 or count > len(content) or (count and last >= len(content)):
        raise ValueError(f"a tensor {list(shape)} lies outside its {len(content)} values")
    bytes_strides = tuple(step * content.itemsize for step in strides)
    return np.lib.stride_tricks.as_strided(content[offset:], shape, bytes_strides, writeable=False)
