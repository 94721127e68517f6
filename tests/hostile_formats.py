"""The formats that `tests.hostile` damages: small whole files, how each is read, and files made to do harm.

A reader asserts what any result must hold: types, shapes, and where a format has checksums, the numbers themselves.
"""

import gzip
import io
import json
import os
import pickle
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from PIL import Image

GOLDEN = Path(__file__).parent / "golden"

Bytes = Callable[[bytes, np.random.Generator], bytes]


@dataclass(frozen=True)
class Format:
    """How files of one format are damaged and read.

    samples  whole files.
    read     reads a content; its folder is empty, or what `start` left there.
    share    of the cases, relative to the other formats.
    bombs    contents that are made to do harm, each tried once.
    mutate   damages a sample, with the general mutation to use; None: that one alone.
    is_json  whether values of a JSON text are changed too.
    start    what a child process does once.
    """

    samples: list[bytes]
    read: Callable[[bytes, Path], Any]
    share: float
    bombs: tuple[bytes, ...] = ()
    mutate: Callable[[bytes, np.random.Generator, Bytes], bytes] | None = None
    is_json: bool = False
    start: Callable[[Path], None] | None = None


def zeros(mebibytes: int, wbits: int) -> bytes:
    """A compressed stream of so many MiB of zeros, without the work of compressing them. Its checksum is wrong."""
    squeeze = zlib.compressobj(9, zlib.DEFLATED, wbits)
    first = squeeze.compress(bytes(2**20)) + squeeze.flush(zlib.Z_FULL_FLUSH)
    again = squeeze.compress(bytes(2**20)) + squeeze.flush(zlib.Z_FULL_FLUSH)
    return first + again * (mebibytes - 1) + squeeze.flush()


DEEP = (b"[" * 100_000, b'{"a":' * 50_000 + b"1" + b"}" * 50_000, b"1" * 10_000, b'"\xff"')
"""JSON texts that a reader may stumble over."""


# Images


def encoded(mode: str, form: str, **options: Any) -> bytes:
    """A picture of 24x17 pixels in a format of Pillow."""
    noise = np.random.default_rng(1).integers(0, 256, (17, 24, 4), np.uint8)
    noise[:8] = 90
    if mode == "I;16":
        image = Image.fromarray(noise[..., 0].astype(np.uint16) * 200)
    else:
        image = Image.fromarray(noise[..., :3]).convert(mode)
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width: int, height: int, data: bytes, extra: bytes = b"") -> bytes:
    """A grey PNG file with such pixels, compressed already."""
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")


def sealed_png(data: bytes, rng: np.random.Generator, change: Bytes) -> bytes:
    """A PNG file in which a chunk is damaged and its checksum right, or the bytes are."""
    if rng.random() < 0.4:
        return change(data, rng)
    chunks, at = [], 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    i = int(rng.integers(len(chunks)))
    chunks[i] = (chunks[i][0], change(chunks[i][1] or b"\0", rng))
    return data[:8] + b"".join(png_chunk(*chunk) for chunk in chunks)


def many_scans(width: int, height: int, scans: int) -> bytes:
    """A progressive JPEG file of so many scans, each over the whole picture."""
    data = encoded("L", "JPEG", progressive=True)
    start = data.index(b"\xff\xc2") + 5
    data = data[:start] + struct.pack(">HH", height, width) + data[start + 4 :]
    scan = data.rindex(b"\xff\xda")
    return data[:scan] + data[scan:-2] * scans + data[-2:]


def sized_jpeg(width: int, height: int) -> bytes:
    """A JPEG file whose header says another size than it has."""
    data = encoded("RGB", "JPEG")
    start = data.index(b"\xff\xc0") + 5
    return data[:start] + struct.pack(">HH", height, width) + data[start + 4 :]


def read_image(content: bytes, _: Path) -> None:
    from tosa_jax.data.decoding import Preprocess

    for channels, rotate in ((3, True), (1, False)):
        form = Preprocess(image_size=16, channels=channels, exif_rotate=rotate)
        array = form.decode(content)
        assert array.shape == (16, 16, channels) and array.dtype == np.uint8


def read_depth(content: bytes, folder: Path) -> None:
    from tosa_jax.data.depth.maps import depth_of_png

    depth = depth_of_png(content, 1000.0)
    assert depth.ndim == 2 and depth.dtype == np.float32 and np.isfinite(depth).all()
    read_image(content, folder)


IMAGE_BOMBS = (
    sized_jpeg(65500, 65500),
    sized_jpeg(13000, 13000),
    many_scans(8000, 8000, 2000),
    png_of(2**31 - 1, 2**31 - 1, zlib.compress(b"")),
    png_of(100_000, 100_000, zeros(2000, 15)),
    png_of(13_000, 13_000, zeros(162, 15)),
    png_of(8, 8, zeros(3000, 15)),
    png_of(8, 8, zlib.compress(bytes(72)), png_chunk(b"zTXt", b"a\0\0" + zeros(2000, 15))),
    png_of(8, 8, zlib.compress(bytes(72)), png_chunk(b"iCCP", b"a\0\0" + zeros(2000, 15))),
    png_of(8, 8, zlib.compress(bytes(72)), png_chunk(b"zTXt", b"a\0\0" + zeros(1, 15)) * 500),
    b"P6 100000 100000 255\n",
    b"P5 13000 13000 65535\n" + bytes(100),
    b"GIF89a"
    + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0)
    + b","
    + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0),
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(touched) (w) file closefile\n%%EOF\n",
    b"",
    b"<html></html>",
)


def images() -> Format:
    samples = [
        encoded("RGB", "JPEG"), encoded("L", "JPEG", progressive=True), encoded("CMYK", "JPEG"),
        encoded("RGB", "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"),
    ]  # fmt: skip
    return Format(samples, read_image, 20, IMAGE_BOMBS)


def pngs() -> Format:
    forms = [encoded("RGB", "PNG"), encoded("P", "PNG", transparency=3), encoded("LA", "PNG")]
    return Format([*forms, encoded("1", "PNG")], read_image, 12, mutate=sealed_png)


def deep_pngs() -> Format:
    return Format([encoded("I;16", "PNG")], read_depth, 8, mutate=sealed_png)


def other_images() -> Format:
    samples = [
        encoded("RGB", "BMP"),
        encoded("RGB", "WEBP"),
        encoded("P", "GIF"),
        encoded("L", "PPM"),
    ]
    samples += [encoded("RGB", "TIFF", compression=x) for x in (None, "tiff_lzw", "jpeg")]
    return Format([*samples, encoded("I;16", "TIFF")], read_image, 10)


# Data sets


def idx_file(shape: tuple[int, ...]) -> bytes:
    """An IDX file of zeros."""
    return (
        b"\0\0\x08"
        + bytes([len(shape)])
        + struct.pack(f">{len(shape)}I", *shape)
        + bytes(int(np.prod(shape)))
    )


def read_idx_file(content: bytes, folder: Path) -> None:
    from tosa_jax.data.builders.idx import read_idx

    path = folder / ("a.gz" if content[:2] == b"\x1f\x8b" else "a")
    path.write_bytes(content)
    array = read_idx(path)
    assert array.dtype == np.uint8 and array.nbytes < 2**31


def idx() -> Format:
    samples = [idx_file((3, 5, 4)), idx_file((7,)), gzip.compress(idx_file((3, 5, 4)))]
    head = b"\x1f\x8b\x08\0\0\0\0\0\0\0"
    bombs = (
        gzip.compress(idx_file((2,))[:-2])[:-8] + b"",
        zeros(3000, 31),
        head + zeros(3000, -15),
        gzip.compress(b"\0\0\x08\x03" + struct.pack(">3I", 2**31, 1, 1) + bytes(100)),
        b"\0\0\x08\xff" + b"\xff" * 1020,
        b"\0\0\x08\xff" + b"\xff\xff\xff\xff" * 254 + bytes(4),
        b"\0\0\x08\x03" + struct.pack(">3I", 2**32 - 1, 2**32 - 1, 0),
    )
    return Format(samples, read_idx_file, 10, bombs)


def frame(data: bytes) -> bytes:
    """A record of a TFRecord file."""
    from tosa_jax.data.builders.tfrecord import masked_crc32c

    length = struct.pack("<Q", len(data))
    ends = [struct.pack("<I", masked_crc32c(part)) for part in (length, data)]
    return length + ends[0] + data + ends[1]


def tfrecord() -> Format:
    records = [bytes([i]) * (5 * i) for i in range(6)]

    def read(content: bytes, folder: Path) -> None:
        from tosa_jax.data.builders.tfrecord import read_tfrecord

        (folder / "a").write_bytes(content)
        found = list(read_tfrecord(folder / "a"))
        # A mutation may copy or drop whole records: what is read is one of them, and nothing else.
        assert all(record in records for record in found)

    length = struct.pack("<Q", 2**62)
    bomb = length + frame(b"")[8:12]
    from tosa_jax.data.builders.tfrecord import masked_crc32c

    claims = length + struct.pack("<I", masked_crc32c(length))
    return Format([b"".join(map(frame, records))], read, 10, (bomb, claims, b""))


def read_split(folder: Path) -> None:
    """Reads both splits of the set of digits below a folder."""
    from tosa_jax.data.builders.prepared import open_prepared
    from tosa_jax.data.labelled import LabelledImages
    from tosa_jax.data.pipeline import DataConfig, Dataset
    from tosa_jax.data.sources import Encoded, EvalExamples

    builder = open_prepared(folder)
    config = DataConfig(name="digits", data_dir=str(folder), image_size=8, channels=1)
    dataset = Dataset(config, builder)
    for split in ("train", "test"):
        count = dataset.num_examples(split)
        kind = dataset.split_kind(split, train=False)
        assert isinstance(kind, LabelledImages)
        source = EvalExamples(Encoded(builder, split, kind), 2)
        assert len(source) - count in (0, 1)
        for i in range(min(len(source), 8)):
            example = source[i]
            assert example["image"].shape == (8, 8, 1) and 0 <= example["label"] < len(
                dataset.facts.class_names
            )


def small_set(folder: Path) -> None:
    """Eight digits in each split, prepared in this folder."""
    import tensorflow_datasets as tfds

    from tosa_jax.data.builders import shards
    from tosa_jax.data.builders.folders import FolderSet, prepare_folder

    raw = folder / "raw"
    raw.mkdir(parents=True)
    items = []
    for i in range(8):
        pixels = np.full((8, 8), 30 * i, np.uint8)
        Image.fromarray(pixels).save(raw / f"{i}.png")
        items.append(
            shards.Item(
                f"{i}.png", i % 3, str(raw / f"{i}.png"), 0, (raw / f"{i}.png").stat().st_size, 0
            )
        )
    features = {
        "image": tfds.features.Image(shape=(8, 8, 1)),
        "label": tfds.features.ClassLabel(names=list("abc")),
    }

    def encode(item: Any, files: list[bytes]) -> dict:
        return {"image": files[0], "label": item.label}

    found = FolderSet(
        "digits", "Digits.", features, {"train": items[:6], "test": items[6:]}, encode
    )
    path = prepare_folder(
        found, folder, raw, max_bytes=None, overwrite=False, say=lambda line: None
    )
    path.rename(folder / "set")


def of_set(name: str, share: float, **options: Any) -> Callable[[], Format]:
    """The format of one file of a prepared set; the others are whole."""

    def make() -> Format:
        with tempfile.TemporaryDirectory() as folder:
            # Another process: the threads that ArrayRecord starts are not there in the children of this one.
            if (pid := os.fork()) == 0:
                small_set(Path(folder) / "a")
                os._exit(0)
            os.waitpid(pid, 0)
            found = (Path(folder) / "a/set").iterdir()
            files = {p.name: p.read_bytes() for p in found if p.is_file()}
        name_of = next(x for x in files if x.startswith(name))

        def start(own: Path) -> None:
            for other, data in files.items():
                (own / other).write_bytes(data)

        def read(content: bytes, own: Path) -> None:
            (own / name_of).write_bytes(content)
            read_split(own)

        return Format([files[name_of]], read, share, start=start, **options)

    return make


def imports(name: bytes) -> bytes:
    """The features of a set that name a module of someone else's."""
    text = {"pythonClassName": name.decode(), "featuresDict": {"features": {}}}
    return json.dumps(text).encode()


def hdf5() -> Format:
    import h5py

    from tosa_jax.data.builders import nyu

    def written(**arrays: np.ndarray) -> bytes:
        file = io.BytesIO()
        with h5py.File(file, "w") as f:
            for key, x in arrays.items():
                f.create_dataset(key, data=x, compression="gzip" if x.size > 1000 else None)
        return file.getvalue()

    def claims(shape: tuple[int, ...], dtype: Any = np.uint8) -> bytes:
        file = io.BytesIO()
        with h5py.File(file, "w") as f:
            f.create_dataset("rgb", shape, dtype, chunks=tuple(min(n, 64) for n in shape))
            f["depth"] = np.zeros((480, 640), np.float32)
        return file.getvalue()

    def linked() -> bytes:
        file = io.BytesIO()
        with h5py.File(file, "w") as f:
            f["rgb"] = h5py.ExternalLink("/etc/hostname", "/rgb")
            f.create_dataset(
                "depth", (480, 640), np.float32, external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)]
            )
        return file.getvalue()

    rgb, depth = np.zeros((3, 480, 640), np.uint8), np.ones((480, 640), np.float32)
    outside = io.BytesIO()
    with h5py.File(outside, "w") as f:
        f["rgb"] = rgb
        f.create_dataset(
            "depth", (480, 640), np.float32, external=[("/dev/zero", 0, 480 * 640 * 4)]
        )
    bombs = (claims((10**6, 10**6, 10**3)), claims((3, 10**5, 10**5)), linked(), outside.getvalue())
    bombs += (claims((3, 480, 640), "S100"), claims((3, 480, 640), h5py.string_dtype()), b"")

    def read(content: bytes, _: Path) -> None:
        from tosa_jax.data.builders.shards import Item

        found = nyu._example(Item("a", 0, "a.h5", 0, 0, 0), [content])
        assert found["depth"].shape == (480, 640) and found["depth"].dtype == np.float16

    small = written(rgb=np.zeros((3, 4, 6), np.uint8), depth=np.ones((4, 6), np.float32))
    return Format([written(rgb=rgb, depth=depth), small], read, 3, bombs)


# Weights


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
        from tests.hostile import mutate_json

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


# What runs write


def run_config() -> dict[str, Any]:
    """The configuration of a small run, as config.json has it."""
    from tosa_jax.config import default_config, make_run_config, to_json

    config = default_config()
    config.model.update(
        embed_dim=16, depth=2, num_heads=2, image_size=8, patch_size=2, in_chans=1, num_classes=3
    )
    config.data.update(name="digits", data_dir="unused")
    config.inputs.update(mean=(0.3,), std=(0.4,))
    config.pretrain.update(steps=4)
    return json.loads(json.dumps(to_json(make_run_config(config))))


def config_json() -> Format:
    def read(content: bytes, folder: Path) -> None:
        from tosa_jax.config import RunConfig
        from tosa_jax.inference.loading import read_run

        (folder / "config.json").write_bytes(content)
        assert isinstance(read_run(folder), RunConfig)

    text = json.dumps(run_config()).encode()
    return Format([text], read, 8, DEEP, is_json=True)


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


def report_json() -> Format:
    facts = {
        "steps": 4,
        "seconds": 1.5,
        "after": {"acc1": 0.5, "loss": 1.0},
        "row": "dense",
        "keep_rate": None,
    }
    rows = [
        {
            "name": name,
            "keep_rate": rate,
            "split": "test",
            "count": 9,
            "metrics": {"acc1": 0.5},
            "gmacs": 0.1,
        }
        for name, rate in (("dense", None), ("tosa", 0.5), ("random", [0.5, 0.25]))
    ]
    for row in rows:
        row["img_per_sec"] = 10.0
    report = {
        "config": run_config(),
        "device": "cpu",
        "versions": {"jax": "1"},
        "stages": {"pretrain": facts},
    }

    def read(content: bytes, folder: Path) -> None:
        from tosa_jax.reporting import page, report

        (folder / "report.json").write_bytes(content)
        found = report.read_report(folder)
        assert found is not None
        table = report.format_table(found)
        assert table.count("\n") < 100
        page.write_page(folder, found)

    text = json.dumps(report | {"results": rows}).encode()
    # Read once before anything is watched: matplotlib looks for fonts the first time.
    return Format([text], read, 1, DEEP, is_json=True, start=lambda folder: read(text, folder))


def metrics_jsonl() -> Format:
    records = [
        {
            "stage": "pretrain",
            "step": i,
            "train/loss": 1.0 / (1 + i),
            "val/acc1": 0.5,
            "perf/img_per_sec": None,
        }
        for i in range(6)
    ]

    def change(data: bytes, rng: np.random.Generator, general: Bytes) -> bytes:
        from tests.hostile import mutate_json

        lines = data.splitlines()
        i = int(rng.integers(len(lines)))
        lines[i] = mutate_json(lines[i], rng) if rng.random() < 0.7 else general(lines[i], rng)
        return b"\n".join(lines) + b"\n"

    def read(content: bytes, folder: Path) -> None:
        from tosa_jax.reporting import page
        from tosa_jax.train.metric_writer import MetricWriter

        (folder / "metrics.jsonl").write_bytes(content)
        page.write_page(folder, {"results": [], "stages": {}})
        with MetricWriter(folder) as writer:
            writer.truncate("pretrain", 3)

    text = b"".join(json.dumps(record).encode() + b"\n" for record in records)
    bombs = tuple(text + bomb + b"\n" for bomb in DEEP)
    start = lambda folder: read(text, folder)  # noqa: E731  # matplotlib looks for fonts
    return Format([text], read, 0.5, bombs, mutate=change, start=start)


def config_flags() -> Format:
    from tosa_jax.config import default_config
    from tosa_jax.reporting.page import flat_lines

    fields = [line.replace(" = ", "=", 1) for line in flat_lines(default_config().to_dict())]

    def change(data: bytes, rng: np.random.Generator, general: Bytes) -> bytes:
        from tests.hostile import _VALUES

        line = fields[int(rng.integers(len(fields)))]
        name, _, value = line.partition("=")
        draw = rng.random()
        if draw < 0.4:
            value = str(_VALUES[int(rng.integers(len(_VALUES)))])
        elif draw < 0.6:
            value = repr(
                tuple(
                    _VALUES[int(i)] for i in rng.integers(len(_VALUES), size=int(rng.integers(4)))
                )
            )
        elif draw < 0.9:
            value = general(value.encode() or b"0", rng).decode("latin-1")
        else:
            name = general(name.encode(), rng).decode("latin-1")
        return f"{name}={value}".replace("\0", "").encode()

    def start(folder: Path) -> None:
        text = "from tosa_jax.config import default_config\n\n\ndef get_config():\n    config = default_config()\n"
        text += (
            "    config.data.name = 'digits'\n    config.pretrain.steps = 4\n    return config\n"
        )
        (folder / "recipe.py").write_text(text)

    def read(content: bytes, folder: Path) -> None:
        from tosa_jax.cli import flags
        from tosa_jax.config import make_run_config
        from tosa_jax.train.stages import plan_stages

        config, _ = flags.parse("", [f"--config={folder / 'recipe.py'}", f"--{content.decode()}"])
        run = make_run_config(config)
        stages, rows = plan_stages(run)
        assert stages and rows and run.batch_size >= 1 and run.model.num_tokens >= 1
        optim = run.pretrain.optim(10, run.batch_size)
        assert optim.steps >= optim.warmup_steps

    harm = (
        "10" * 5000,
        "(" * 5000,
        "(" * 100 + ")" * 100,
        "__import__('os').system('touch touched')",
        "1e999",
        "9" * 40,
    )
    names = (
        "model.depth",
        "seed",
        "inputs.mean",
        "model.keep_rate",
        "data.workers",
        "init_from",
        "pretrain.epochs",
    )
    bombs = tuple(f"config.{name}={value}".encode() for name in names for value in harm)
    return Format([b""], read, 5, bombs, mutate=change, start=start)


def in_child(make: Callable[[], bytes]) -> bytes:
    """What a function returns, called in another process: JAX's threads are not there in the children of this one."""
    end, pipe = os.pipe()
    if (pid := os.fork()) == 0:
        with open(pipe, "wb") as file:
            file.write(make())
        os._exit(0)
    os.close(pipe)
    with open(end, "rb") as file:
        data = file.read()
    os.waitpid(pid, 0)
    return data


def tiny_model() -> Any:
    """A network with selectors."""
    from flax import nnx

    from tosa_jax.tasks import create_model

    sizes = {"embed_dim": 8, "depth": 2, "num_heads": 2, "image_size": 8, "patch_size": 4}
    return create_model("vit", **sizes, num_classes=3, keep_rate=0.5, rngs=nnx.Rngs(0))


def saved_model(*, selectors: bool) -> Callable[[], Format]:
    """The format of what the project says in the header of its own weight files: of selectors, or of a `Predictor`."""

    def write(path: Path) -> None:
        from tosa_jax.data.decoding import Preprocess
        from tosa_jax.inference import loading
        from tosa_jax.models.weights.load import save_selectors

        model = tiny_model()
        if selectors:
            return save_selectors(model, path)
        form = Preprocess(image_size=8, channels=3)
        from tosa_jax.tasks.classification import Classification

        loading.save(
            loading.LoadedModel(
                model=model,
                form=form,
                mean=(0.5,),
                std=(0.5,),
                options=Classification.options(),
                task="classification",
                class_names=("a", "b", "c"),
            ),
            path,
        )
        return None

    def header() -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder) / "a.safetensors")
            with safetensors.safe_open(Path(folder) / "a.safetensors", "numpy") as file:
                metadata = dict(file.metadata())
        metadata.pop("tosa_jax.sha256")
        return json.dumps(metadata).encode()

    def start(folder: Path) -> None:
        write(folder / "whole.safetensors")
        read(sample, folder)

    def change(data: bytes, rng: np.random.Generator, general: Bytes) -> bytes:
        from tests.hostile import mutate_json

        metadata = json.loads(data)
        if "tosa_jax.predictor" in metadata or rng.random() < 0.5:
            name = max(metadata, key=lambda name: len(metadata[name]))
            text = metadata[name].encode()
            try:
                changed = mutate_json(text, rng) if rng.random() < 0.7 else general(text, rng)
            except ValueError:
                changed = general(text, rng)
            return json.dumps(metadata | {name: changed.decode("latin-1")}).encode()
        return mutate_json(data, rng)

    def read(content: bytes, folder: Path) -> None:
        from tosa_jax.inference import loading
        from tosa_jax.models.weights.load import selector_params
        from tosa_jax.models.weights.readers import read_weights, write_safetensors

        metadata = {str(name): str(x) for name, x in json.loads(content).items()}
        arrays = read_weights(folder / "whole.safetensors").arrays
        write_safetensors(folder / "a.safetensors", arrays, metadata)
        if selectors:
            found = selector_params(tiny_model(), folder / "a.safetensors")
            assert found.keys() == arrays.keys()
        else:
            found = loading.from_weights(folder / "a.safetensors", None, lambda line: None)
            assert found["model"].config.num_classes == 3

    sample = b""

    def make() -> Format:
        nonlocal sample
        sample = in_child(header)
        return Format([sample], read, 0.3, mutate=change, start=start)

    return make


def checkpoint() -> Format:
    """A checkpoint without digests, as earlier versions wrote it: Orbax's own files are read as they are."""
    import shutil

    golden = next((GOLDEN / "old_workdir/checkpoints/pretrain").iterdir())
    files = [path for path in sorted(golden.rglob("*")) if path.is_file()]
    samples = [f"{x.relative_to(golden)}\n".encode() + x.read_bytes() for x in files]

    def start(folder: Path) -> None:
        shutil.copytree(golden, folder / "w/checkpoints/pretrain/1")
        read(samples[0], folder)

    def change(data: bytes, rng: np.random.Generator, general: Bytes) -> bytes:
        from tests.hostile import mutate_json

        name, _, content = data.partition(b"\n")
        if content.startswith(b"{") and rng.random() < 0.7:
            try:
                return name + b"\n" + mutate_json(content, rng)
            except ValueError:
                pass
        return name + b"\n" + general(content or b"\0", rng)

    def read(content: bytes, folder: Path) -> None:
        from tosa_jax.models.weights.readers import read_weights
        from tosa_jax.models.weights.run_checkpoints import recorded_run
        from tosa_jax.train.checkpoints import read_scores

        name, _, data = content.partition(b"\n")
        path = folder / "w/checkpoints/pretrain/1" / name.decode()
        whole = path.read_bytes()
        path.write_bytes(data)
        try:
            recorded_run(folder / "w")
            read_scores(folder / "w/checkpoints/pretrain")
            arrays = read_weights(folder / "w").arrays
            assert arrays and sum(x.nbytes for x in arrays.values()) < 2**24
        finally:
            path.write_bytes(whole)

    return Format(samples, read, 0.3, mutate=change, start=start)


def class_names() -> Format:
    def read(content: bytes, folder: Path) -> None:
        from tosa_jax.data.class_names import read_names

        (folder / "classes.txt").write_bytes(content)
        assert isinstance(read_names(folder / "classes.txt"), tuple)

    return Format(["digit 0\ndigit 1\nzwölf\n".encode()], read, 2)


MAKERS: dict[str, Callable[[], Format]] = {
    "jpeg": images,
    "png": pngs,
    "png16": deep_pngs,
    "other images": other_images,
    "idx": idx,
    "tfrecord": tfrecord,
    "arrayrecord": of_set("digits-train", 2),
    "dataset_info": of_set("dataset_info", 1, is_json=True, bombs=DEEP),
    "features": of_set(
        "features", 1, is_json=True, bombs=(*DEEP, imports(b"antigravity.X"), imports(b"this.X"))
    ),
    "hdf5": hdf5,
    "pth": pth,
    "pth legacy": legacy_pth,
    "safetensors": safetensor,
    "npz": npz,
    "selectors": saved_model(selectors=True),
    "predictor": saved_model(selectors=False),
    "checkpoint": checkpoint,
    "config.json": config_json,
    "weights config": weights_config,
    "report": report_json,
    "metrics": metrics_jsonl,
    "flags": config_flags,
    "classes": class_names,
}


def make(folder: Path, names: list[str]) -> dict[str, Format]:
    """The formats of these names."""
    folder.mkdir(parents=True)
    return {name: MAKERS[name]() for name in names}
