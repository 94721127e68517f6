"""Writes the records of a TFDS set's TFRecord files to ArrayRecord files beside them, without TensorFlow.

Each record of a TFRecord file is its length (uint64), a checksum of these 8 bytes (uint32), the data
and a checksum of the data (uint32), all little-endian. The checksums are CRC-32C, rotated by 15 bits
and increased by a constant ("masked"): https://www.tensorflow.org/tutorials/load_data/tfrecord. Both
are verified.
"""

import functools
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from tosa_jax.data.builders.prepared import open_prepared
from tosa_jax.data.builders.shards import Progress, Say, has_records, write_shard
from tosa_jax.errors import DataError

_POLYNOMIAL = 0x82F63B78  # Castagnoli's, bits reversed
_MASK_DELTA = 0xA282EAD8
_AGAIN = "copy the file again, or prepare the set again"


def convert(path: Path, *, overwrite: bool = False, say: Say = print) -> None:
    """Copies all splits of a version folder from TFRecord to ArrayRecord files.

    The TFRecord files stay, and remain the set's main format; the ArrayRecord files are used where
    records are read in any order. Files that an earlier call completed are kept, unless `overwrite`.
    The new format is added to dataset_info.json when all files are complete.

    Raises:
      DataError: a TFRecord file is missing or damaged, or has another number of records than
        dataset_info.json says.
      OSError: the folder cannot be written.
    """
    todo = [
        (split.name, Path(source), count)
        for split in open_prepared(path).info.splits.values()
        for source, count in _files(path, split)
    ]
    missing = [source for _, source, _ in todo if not source.is_file()]
    if missing:
        raise DataError(f"{missing[0]}: no such file, though dataset_info.json of the set names it")
    sizes = {source: source.stat().st_size for _, source, _ in todo}
    done_bytes, all_bytes = 0, sum(sizes.values())
    progress = Progress(say, "converting")
    for i, (_, source, count) in enumerate(todo, 1):
        target = source.with_name(source.name.replace(".tfrecord", ".array_record"))
        if overwrite or not has_records(target, count):
            write_shard(target, _counted(source, count))
        done_bytes += sizes[source]
        progress(f"{i} of {len(todo)} files", done_bytes, all_bytes)
    _add_format(path / "dataset_info.json")


def _files(path: Path, split: tfds.core.SplitInfo) -> Iterator[tuple[str, int]]:
    assert split.filename_template is not None, "prepared sets have one"
    template = split.filename_template.replace(data_dir=path, filetype_suffix="tfrecord")
    files = template.sharded_filepaths(len(split.shard_lengths))
    return zip(map(str, files), split.shard_lengths, strict=True)


def _counted(source: Path, count: int) -> Iterator[bytes]:
    found = 0
    for record in read_tfrecord(source):
        found += 1
        yield record
    if found != count:
        raise DataError(f"{source}: {found} records, but dataset_info.json says {count}; {_AGAIN}")


def _add_format(path: Path) -> None:
    info = json.loads(path.read_text())
    formats = info.setdefault("alternativeFileFormats", [])
    if "array_record" not in formats:
        formats.append("array_record")
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        unfinished.write_text(json.dumps(info, indent=2))
        os.replace(unfinished, path)


def read_tfrecord(path: Path) -> Iterator[bytes]:
    """Yields the data of each record of a TFRecord file.

    Raises:
      DataError: the file cannot be read or is cut short, or a checksum differs.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            while header := file.read(12):
                at = file.tell() - len(header)
                if len(header) < 12:
                    raise DataError(f"{path}: truncated at byte {at}; {_AGAIN}")
                length, check = struct.unpack("<QI", header)
                # Checked before the data is read: a wrong length could ask for any amount of memory.
                if check != masked_crc32c(header[:8]):
                    raise DataError(f"{path}: damaged length at byte {at}; {_AGAIN}")
                if at + 16 + length > size:
                    raise DataError(f"{path}: truncated in the record at byte {at}; {_AGAIN}")
                data = file.read(length)
                if struct.unpack("<I", file.read(4))[0] != masked_crc32c(data):
                    raise DataError(f"{path}: damaged record at byte {at}; {_AGAIN}")
                yield data
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def masked_crc32c(data: bytes) -> int:
    """TFRecord's checksum: CRC-32C, masked."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF


def crc32c(data: bytes) -> int:
    """CRC-32C of `data`, in NumPy, at about 200 MB/s a core.

    The checksum is linear. The register after two pieces of data is the XOR of that of the second
    piece, and that of the first piece advanced by as many zero bytes as the second has. So all pairs
    of bytes are looked up in a table at once; then neighbours are joined until one register is left.
    """
    if len(data) < 4:
        return _crc32c_short(data)
    # A register that starts as zero is not changed by leading zero bytes. One that starts as all
    # ones equals a zero register with the first four bytes inverted.
    front = len(data) % 2
    text = np.zeros(front + len(data), np.uint8)
    text[front:] = np.frombuffer(data, np.uint8)
    text[front : front + 4] ^= 0xFF
    crcs = _tables(0)[0][text.view("<u2")]
    level = 0
    while len(crcs) > 1:
        if len(crcs) % 2:
            crcs = np.concatenate([np.zeros(1, np.uint32), crcs])
        crcs = _advance(crcs[0::2], level) ^ crcs[1::2]
        level += 1
    return int(crcs[0]) ^ 0xFFFFFFFF


def _crc32c_short(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = int(_byte_table()[(crc ^ byte) & 0xFF]) ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def _advance(crcs: np.ndarray, level: int) -> np.ndarray:
    """Advances registers (uint32) by 2 << level zero bytes."""
    low, high = _tables(level)
    return low[crcs & 0xFFFF] ^ high[crcs >> 16]


@functools.cache
def _tables(level: int) -> tuple[np.ndarray, np.ndarray]:
    """`_advance` of every value of the low 16 bits, and of every value of the high 16 bits: uint32 [65536] each."""

    def advanced(registers: np.ndarray) -> np.ndarray:
        if level:  # two steps of half the length
            return _advance(_advance(registers, level - 1), level - 1)
        for _ in range(2):
            registers = _byte_table()[registers & 0xFF] ^ registers >> 8
        return registers

    values = np.arange(1 << 16, dtype=np.uint32)
    return advanced(values), advanced(values << 16)


@functools.cache
def _byte_table() -> np.ndarray:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, table >> 1 ^ np.uint32(_POLYNOMIAL), table >> 1)
    return table
