"""Weight files for `tests.hostile`: small whole files, how they are read, and files made to do harm."""

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from tests.hostile_format import DEEP, GOLDEN, Bytes, Format, mutate_json, zeros


class Run:
    """Pickles as a call."""

    def __init__(self, function: Callable, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def torch_zip(data: bytes, *, storages: int = 1, **options: Any) -> bytes:
    """A `.pth` with this pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as archive:
        archive.writestr("archive/data.pkl", data)
        for i in range(storages):
            archive.writestr(f"archive/data/{i}", bytes(400))
    return file.getvalue()


def opcodes(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


def doubled(times: int) -> bytes:
    """A pickle of a tuple that holds itself twice, so many times over."""
    # Each time: put it into the memo, pop it, get it twice, and make a tuple of the two.
    return b")" + b"".join(bytes([0x71, i, 0x30, 0x68, i, 0x68, i, 0x86]) for i in range(times))


def sealed_zip(data: bytes, rng: np.random.Generator, change: Bytes) -> bytes:
    """A zip file in which an entry is damaged and its checksum right, or the bytes are."""
    if rng.random() < 0.4:
        return change(data, rng)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    name = (
        list(entries)[int(rng.integers(len(entries)))] if rng.random() < 0.5 else list(entries)[0]
    )
    entries[name] = change(entries[name] or b"\0", rng)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for key, content in entries.items():
            archive.writestr(key, content)
    return file.getvalue()


def pickle_bombs() -> list[bytes]:
    """Pickles that run code, or take more time or memory than they have bytes."""
    calls = [
        Run(os.system, "touch touched"),
        Run(eval, "1"),
        Run(open, "touched", "w"),
        Run(exec, "1"),
    ]
    return [
        *(pickle.dumps({"model": call}, 2) for call in calls),
        opcodes(b"}r\xff\xff\xff\x7f"),
        opcodes(b"\x8b\xff\xff\xff\x7f"),
        b"\x80\x04\x95" + b"\xff" * 7 + b"\x7f" + b"}.",
        b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f" + b"}.",
        opcodes(b"}", doubled(60), b"K\x01s"),
        opcodes(b"}X\x01\0\0\0a", doubled(60), b"s"),
        opcodes(doubled(60)),
        opcodes(b"(" * 100_000),
        opcodes(b"]" * 100_000 + b"a" * 99_999),
        opcodes(b"ccollections\nOrderedDict\n)Rq\0}X\x01\0\0\0ah\0sb"),
        b"",
        b".",
    ]


def read_weight_file(name: str, expected: Callable[[dict], bool]) -> Callable[[bytes, Path], None]:
    def read(content: bytes, folder: Path) -> None:
        from tosa_jax.models.weights.readers import read_weights

        (folder / name).write_bytes(content)
        file = read_weights(folder / name)
        for x in file.arrays.values():
            assert isinstance(x, np.ndarray) and x.size < 2**28
            np.asarray(x).sum(dtype=np.float64) if x.dtype.kind in "fiub" else None
        assert expected(file.arrays)

    return read


def pth() -> Format:
    sample = (GOLDEN / "torch_zip.pth").read_bytes()
    bombs = tuple(torch_zip(data) for data in pickle_bombs())
    lying = bytearray(torch_zip(b"}.", storages=2))
    at = lying.index(b"PK\x01\x02")
    lying[at + 20 : at + 28] = struct.pack("<II", 2**31, 2**31)
    bombs += (bytes(lying), torch_zip(bytes(2**20), compression=zipfile.ZIP_DEFLATED))
    read = read_weight_file("a.pth", lambda arrays: bool(arrays))
    return Format([sample], read, 9, bombs, mutate=sealed_zip)


def legacy_pth() -> Format:
    sample = (GOLDEN / "torch_legacy.pth").read_bytes()
    start = sample[: sample.index(b".", 14) + 1]
    bombs = tuple(start + b"\x80\x02M\xe9\x03.\x80\x02}." + data for data in pickle_bombs())
    return Format([sample], read_weight_file("a.pth", bool), 9, bombs)


def safetensor() -> Format:
    arrays = {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.ones(5, np.float16)}
    sample = safetensors.numpy.save(arrays, {"format": "pt"})

    def with_header(text: bytes) -> bytes:
        return struct.pack("<Q", len(text)) + text

    def change(data: bytes, rng: np.random.Generator, general: Bytes) -> bytes:
        if rng.random() < 0.5:
            return general(data, rng)
        length = struct.unpack("<Q", data[:8])[0]
        return with_header(mutate_json(data[8 : 8 + length], rng)) + data[8 + length :]

    entry = b'"shape":[1000000,1000000],"data_offsets":[0,4000000000000]}}'
    bombs = (
        struct.pack("<Q", 2**63) + b"{}",
        with_header(b'{"a":{"dtype":"F32",' + entry),
        with_header(b"{}"),
    )
    bombs += tuple(with_header(b'{"a":' + text) for text in DEEP)
    return Format(
        [sample], read_weight_file("a.safetensors", lambda _: True), 9, bombs, mutate=change
    )


def npz() -> Format:
    def saved(**arrays: np.ndarray) -> bytes:
        file = io.BytesIO()
        np.savez(file, **arrays)
        return file.getvalue()

    sample = saved(a=np.arange(12.0).reshape(3, 4), b=np.ones(5, np.float16))

    def header(text: str) -> bytes:
        return b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text.encode()

    def zipped(data: bytes, **options: Any) -> bytes:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", **options) as archive:
            archive.writestr("a.npy", data)
        return file.getvalue()

    text = "{'descr': '<f4', 'fortran_order': False, 'shape': (%s,), }"
    bomb = zipped(b"")
    at = bomb.index(b"PK\x01\x02")
    body = zeros(3000, -15)
    big = bytearray(bomb[:at] + body + bomb[at:])
    for place, offset in ((0, 8), (at + len(body), 10)):
        big[place + offset : place + offset + 2] = struct.pack("<H", 8)
        big[place + offset + 10 : place + offset + 18] = struct.pack("<II", len(body), 3000 * 2**20)
    big[-6:-2] = struct.pack("<I", at + len(body))
    objects = np.array([Run(open, "touched", "w")], dtype=object)
    bombs = (
        zipped(header(text % "1000000000000")),
        zipped(header(text % "300000000")),
        zipped(header(text % "-4")),
        zipped(header("(" * 9000)),
        zipped(header("[" * 5000 + "]" * 5000)),
        zipped(b"no array"),
        bytes(big),
        saved(a=objects),
        zipped(b""),
    )
    return Format([sample], read_weight_file("a.npz", lambda _: True), 9, bombs, mutate=sealed_zip)


def weights_config() -> Format:
    """The config.json beside weights of others."""
    vit = {
        "model_type": "vit",
        "hidden_act": "gelu",
        "num_attention_heads": 12,
        "layer_norm_eps": 1e-12,
    }
    timm = {
        "architecture": "vit_tiny_patch16_224",
        "pretrained_cfg": {"mean": [0.5], "std": [0.5], "crop_pct": 0.9},
    }
    clip = {"model_type": "clip", "vision_config": {"hidden_size": 768, "patch_size": 16}}
    depth = {
        "model_type": "depth_anything",
        "backbone_config": {"hidden_act": "gelu"},
        "max_depth": 10,
    }
    weights = safetensors.numpy.save({"cls_token": np.zeros((1, 1, 4), np.float32)})

    def start(folder: Path) -> None:
        (folder / "a.safetensors").write_bytes(weights)

    def read(content: bytes, folder: Path) -> None:
        from tosa_jax.models.vit_config import ViTConfig
        from tosa_jax.models.weights.checks import check_config
        from tosa_jax.models.weights.preprocessing import preprocessing_of
        from tosa_jax.models.weights.readers import read_weights

        (folder / "config.json").write_bytes(content)
        file = read_weights(folder / "a.safetensors")
        check_config(file, ViTConfig(), lambda line: None)
        found = preprocessing_of("vit_tiny_patch16_224", 224, file)
        assert 0 < found.crop_pct <= 1 and all(x > 0 for x in found.std)

    texts = [json.dumps(x).encode() for x in (vit, timm, clip, depth)]
    return Format(texts, read, 6, DEEP, is_json=True, start=start)
