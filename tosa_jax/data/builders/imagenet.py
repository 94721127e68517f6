"""ImageNet (ILSVRC 2012) from its two tar files to TFDS's "imagenet2012", without TensorFlow.

Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge", IJCV 2015. Schema, class
order and validation labels are those of `tensorflow_datasets`. One difference: TFDS re-encodes 22
CMYK files and the PNG file that is called n02105855_2933.JPEG; here all bytes stay as they are.
"""

import re
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

import tensorflow_datasets as tfds

from tosa_jax.data.builders.shards import Item, Progress, Say, prepared_splits, write_set
from tosa_jax.errors import DataError

# TFDS's name; image-net.org's files and the numbers of images in them, by split.
NAME = "imagenet2012"
TARS = {"validation": "ILSVRC2012_img_val.tar", "train": "ILSVRC2012_img_train.tar"}
EXPECTED_COUNTS = {"train": 1_281_167, "validation": 50_000}

_VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
_AGAIN = "copy or download the file again"


def prepare_imagenet(
    data_dir: Path,
    source_dir: Path,
    *,
    expected_counts: Mapping[str, int] = EXPECTED_COUNTS,
    overwrite: bool = False,
    say: Say = print,
) -> Path:
    """Prepares the splits whose tar file is in `source_dir`; one of the two is enough.

    A split that is prepared already stays as it is, and shards that an earlier call completed are
    used. All tar files are listed, and their images counted, before anything is written.

    Returns:
      The version folder, data_dir/imagenet2012/5.1.0.
    Raises:
      DataError: no tar file there; one is broken, has an image of an unknown class, or not the
        expected number of images; the version folder holds a TFRecord copy; the disk is too small.
      OSError: `data_dir` cannot be written.
    """
    info = tfds.builder_cls(NAME)(data_dir=str(data_dir), file_format="array_record").info
    path = data_dir / NAME / str(info.version)
    if any(path.glob("*.tfrecord-*")):
        raise DataError(
            f"{path}: holds a TFRecord copy already; leave source_dir empty to convert that"
        )
    done = () if overwrite else prepared_splits(path)
    items = {}
    for split, file_name in TARS.items():
        tar = source_dir / file_name
        if split in done:
            say(f"{split}: complete already, {done[split].num_examples} images")
            continue
        if not tar.is_file():
            say(f"{split}: no {file_name} in {source_dir}, left out")
            continue
        items[split] = list_images(tar, split, info.features["label"].names, say)
        if len(items[split]) != expected_counts[split]:
            raise DataError(
                f"{tar}: {len(items[split])} images of "
                f"{len({item.label for item in items[split]})} classes, but "
                f"{expected_counts[split]} are expected; {_AGAIN}"
            )
    if not items and not done:
        raise DataError(
            f"{source_dir}: neither {' nor '.join(TARS.values())}; set source_dir to their folder"
        )
    write_set(path, info, items, say, overwrite=overwrite)
    return path


def list_images(tar: Path, split: str, class_names: list[str], say: Say) -> list[Item]:
    """The images in a "train" or "validation" tar file; only the headers are read.

    Raises:
      DataError: the file is no plain tar file or ends early, or an image has no known class.
    """
    labels = {name: i for i, name in enumerate(class_names)}
    find = _train_images if split == "train" else _validation_images
    progress = Progress(say, f"listing {tar.name}")
    mtime_ns = tar.stat().st_mtime_ns
    items = []
    try:
        with tarfile.open(tar, "r:") as archive:
            for name, label, offset, size in find(archive, labels):
                items.append(Item(name, label, str(tar), offset, size, mtime_ns))
                progress(f"{len(items)} images")
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{tar}: no plain tar file, or truncated ({error}); {_AGAIN}") from None
    except OSError as error:
        raise DataError(f"{tar}: cannot be read ({error.strerror or error})") from None
    return items


_Place = tuple[str, int, int, int]  # file name, label, offset in the outer tar file, size


def _train_images(archive: tarfile.TarFile, labels: Mapping[str, int]) -> Iterator[_Place]:
    """The images of the inner tar files, one a class, called n01440764.tar and so on."""
    for outer in _files(archive):
        class_tar = PurePosixPath(outer.name)
        if class_tar.suffix != ".tar" or class_tar.stem not in labels:
            raise DataError(f"{archive.name}: {outer.name} is not the tar file of a known class")
        # No copy: the inner tar file is read where it lies.
        with tarfile.open(fileobj=archive.extractfile(outer), mode="r:") as inner:
            for image in _files(inner):
                name = PurePosixPath(image.name).name
                if not name.startswith(f"{class_tar.stem}_"):
                    raise DataError(
                        f"{archive.name}: {image.name} in {outer.name} is not of that class"
                    )
                place = outer.offset_data + image.offset_data
                yield name, labels[class_tar.stem], place, image.size


def _validation_images(archive: tarfile.TarFile, labels: Mapping[str, int]) -> Iterator[_Place]:
    # One line an image, in the order of the numbers in the file names.
    text = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt").read_text()
    classes = text.split()
    for image in _files(archive):
        name = PurePosixPath(image.name).name
        match = _VALIDATION_NAME.fullmatch(name)
        if not match or not 1 <= int(match[1]) <= len(classes):
            raise DataError(f"{archive.name}: {image.name} is not a validation image of ImageNet")
        yield name, labels[classes[int(match[1]) - 1]], image.offset_data, image.size


def _files(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := archive.next()) is not None:
        archive.members.clear()  # it would keep the headers of all files in memory
        if member.isfile():
            yield member
