"""Reads PyTorch's `.pth` files as NumPy arrays, without PyTorch and without running code from the file.

A `.pth` is a pickle of dictionaries whose tensors refer to storages of raw bytes. Since PyTorch 1.6 pickle and
storages are entries of a zip file; before, they followed each other in a plain file, which timm still writes. A machine
for two dozen opcodes and a dozen names reads the pickle. It calls nothing, so no code of a file is ever run, and it
takes no more memory than the file has bytes, times a constant.

Source of the formats: torch/serialization.py and torch/_utils.py of PyTorch, pickletools.py of Python.
"""

import io
import mmap
import pickle
import pickletools
import struct
import sys
import zipfile
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
CHOICES = {"ema": EMA_KEYS, "model": ("model", "state_dict")}  # one choice for several keys
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
    RuntimeError,  # of zipfile: a part is encrypted, or compressed in a way that it does not know
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


class _Known(NamedTuple):
    """One of the names that a pickle may refer to; what a call of it gives is decided here, and nothing is run."""

    module: str
    name: str


class _Ignored:
    """What a training checkpoint holds beside tensors, with nothing of it."""

    def update(self, items: Any) -> None:
        """Takes entries."""

    extend = update


# Settings, devices, paths and single numbers in training checkpoints.
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


_TENSORS = ("_rebuild_tensor", "_rebuild_tensor_v2")
_KNOWN = {
    *(_Known(*names) for names in _HARMLESS),
    _Known("collections", "OrderedDict"),
    _Known("torch", "Size"),
    *(_Known("torch._utils", name) for name in (*_TENSORS, "_rebuild_parameter")),
    *(_Known(module, name) for module in ("torch", "torch.storage") for name in _DTYPES),
}

_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NUMBERS = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT")
_TEXTS = ("UNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINUNICODE", "STRING", "BINSTRING")
_TEXTS += ("SHORT_BINSTRING", "BINBYTES", "BINBYTES8", "SHORT_BINBYTES")


class _Machine:
    """Carries out the opcodes of a pickle that containers, numbers, texts and tensors need, in time linear in its size.

    `pickle` itself would reserve memory by the numbers in the file, hash keys without an end, and run what it names.

    storages  those that the pickle refers to, by key.

    Raises WeightsError for a pickle that names anything but `_KNOWN`; any of `_DAMAGE` for one that is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, _Storage] = {}

    def load(self, file: io.BytesIO | mmap.mmap) -> Any:
        """The value of the pickle that begins here; the file is left at its end."""
        stream: Any = file  # `genops` only reads, by bytes and by lines
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name == "STOP":
                return self.stack.pop()
            self.step(opcode.name, argument)
        raise EOFError("it ends too early")

    def step(self, name: str, argument: Any) -> None:
        """Carries out one opcode."""
        push, pop = self.stack.append, self.stack.pop
        if name in _CONSTANTS:
            push(_CONSTANTS[name])
        elif name in _NUMBERS or name in _TEXTS:
            push(argument)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if argument is None else argument] = self.stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            push(self.memo[argument])
        elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
            push({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[name]())
        elif name == "MARK":
            push(_MARK)
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            push(tuple(reversed([pop() for _ in range(int(name[-1]))])))
        elif name in ("TUPLE", "LIST", "DICT"):
            items = self.to_mark()
            push(_mapping(items) if name == "DICT" else {"TUPLE": tuple, "LIST": list}[name](items))
        elif name in ("APPEND", "APPENDS"):
            items = [pop()] if name == "APPEND" else self.to_mark()
            self.stack[-1].extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = [pop(), pop()][::-1] if name == "SETITEM" else self.to_mark()
            self.stack[-1].update(_mapping(items))
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            parts = argument.split(" ", 1) if name == "GLOBAL" else [pop(), pop()][::-1]
            push(self.known(*parts))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments = pop()
            push(_called(pop(), arguments))
        elif name == "BUILD":
            pop()  # attributes, as the `_metadata` of a state dict
        elif name == "BINPERSID":
            push(self.storage(pop()))
        elif name not in ("PROTO", "FRAME"):
            raise pickle.UnpicklingError(f"weights have no use for the opcode {name}")

    def to_mark(self) -> list[Any]:
        """Takes what lies above the last mark, and the mark, off the stack."""
        at = len(self.stack) - 1 - self.stack[::-1].index(_MARK)
        items, self.stack[at:] = self.stack[at + 1 :], []
        return items

    def known(self, module: str, name: str) -> _Known:
        """A name that is known. Raises WeightsError for any other."""
        found = _Known(module, name)
        if found not in _KNOWN:
            raise WeightsError(
                f"{self.path} asks to run {module[:80]}.{name[:80]} when it is read, which weights do not need; "
                "nothing was run. If you trust the file, save its state dict alone, as .safetensors"
            )
        return found

    def storage(self, pid: Any) -> _Storage:
        """The storage that a tensor refers to."""
        kind, dtype, key, _, _, *view = pid
        if kind != "storage" or not isinstance(key, str) or (view and view[0] is not None):
            raise pickle.UnpicklingError("unknown reference to a storage")
        self.storages[key] = storage = _Storage(key, np.dtype(_DTYPES[dtype.name]))
        return storage


def _mapping(items: list[Any]) -> dict:
    """Keys and values in turn as a dictionary; entries whose key is neither text nor number are left out."""
    return {
        key: value
        for key, value in zip(items[::2], items[1::2], strict=True)
        if isinstance(key, str | int | float)
    }


def _called(what: Any, arguments: tuple) -> Any:
    """What a call of a known name gives."""
    if not isinstance(what, _Known):
        raise pickle.UnpicklingError("a call of what is no function")
    match what.name:
        case "OrderedDict":
            pairs = arguments[0] if arguments else ()
            return _mapping([part for pair in pairs for part in pair])
        case "Size":
            return tuple(arguments[0])
        case "_rebuild_parameter":
            return arguments[0]
        case name if name in _TENSORS:
            storage, offset, shape, strides = arguments[:4]
            numbers = (offset, *shape, *strides)
            if not isinstance(storage, _Storage) or not all(type(n) is int for n in numbers):
                raise pickle.UnpicklingError("a tensor without a storage and a shape")
            return _Tensor(storage, offset, tuple(shape), tuple(strides))
    return _Ignored()


def read_torch_file(
    path: Path, checkpoint_key: str | None = None
) -> tuple[dict[str, np.ndarray], str]:
    """The tensors of a `.pth` by name, and the key under which they were, or "".

    checkpoint_key  the key to take, or one of `CHOICES`, if the file has it; None: the first of `WRAPPERS`.

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
        if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
            raise WeightsError(
                f"{path} is damaged (its parts are larger than the file); get it again"
            )
        root = pickles[0].removesuffix("data.pkl")
        swap = False
        if f"{root}byteorder" in archive.namelist():
            swap = archive.read(f"{root}byteorder") != sys.byteorder.encode()
        # Read at once: so its checksum is compared before anything is unpickled.
        tree = _Machine(path).load(io.BytesIO(archive.read(pickles[0])))

        def read(storage: _Storage) -> np.ndarray:
            array = np.frombuffer(archive.read(f"{root}data/{storage.key}"), storage.dtype)
            return array.byteswap() if swap else array

        return _arrays(path, tree, read, checkpoint_key)


def _read_legacy(path: Path, checkpoint_key: str | None) -> tuple[dict[str, np.ndarray], str]:
    size = path.stat().st_size
    # Mapped: a number in the file cannot make a read ask for more memory than the file has bytes.
    with open(path, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as file:
        if _Machine(path).load(file) != LEGACY_MAGIC:
            raise WeightsError(f"{path} is a pickle, but not one that torch.save wrote")
        _Machine(path).load(file)  # version of the protocol
        facts = _Machine(path).load(file)
        swap = facts.get("little_endian", True) != (sys.byteorder == "little")
        machine = _Machine(path)
        tree = machine.load(file)
        places = {}
        for key in _Machine(path).load(file):
            start = file.tell() + 8
            count = int.from_bytes(file.read(8), sys.byteorder)
            end = start + count * machine.storages[key].dtype.itemsize
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
        chosen_keys = CHOICES.get(checkpoint_key, (checkpoint_key,)) if checkpoint_key else ()
        for key in (*chosen_keys, *WRAPPERS):
            if isinstance(tree.get(key), Mapping):
                chosen, wrapper = tree[key], key
                break
    named = chosen.items() if isinstance(chosen, Mapping) else ()
    tensors = {str(name): value for name, value in named if isinstance(value, _Tensor)}
    if not tensors:
        found = list(tree)[:8] if isinstance(tree, Mapping) else [type(tree).__name__]
        raise WeightsError(
            f"{path} holds no state dict, only: {', '.join(str(x)[:80] for x in found)}"
        )
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
