"""ImageNet (ILSVRC 2012) from its two tar files to TFDS's "imagenet2012", without TensorFlow.

Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge", IJCV 2015. Features, class
order and validation labels are those of `tensorflow_datasets`. One difference: TFDS re-encodes 22
CMYK files and n02105855_2933.JPEG, which is a PNG file; here all files keep their bytes.
"""

import re
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

import tensorflow_datasets as tfds

from tosa_jax.data.builders.shards import Item, Progress, Say
from tosa_jax.data.builders.stock import prepare_stock, stock_info
from tosa_jax.errors import DataError

# TFDS's name of the set; for each split image-net.org's tar file and its number of images.
NAME = "imagenet2012"
TARS = {"validation": "ILSVRC2012_img_val.tar", "train": "ILSVRC2012_img_train.tar"}
CONTENT = " and ".join(TARS.values())
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

    A split that is prepared already stays as it is, and shards that a stopped call completed are
    used. All tar files are listed, and their images counted, before anything is written.

    Args:
      expected_counts: Number of images by split.
      overwrite: Make prepared splits again.
    Returns:
      The version folder, data_dir/imagenet2012/5.1.0.
    Raises:
      DataError: there is no tar file; one is broken, has an image of an unknown class, or not the
        expected number of images; the version folder has a TFRecord copy; the disk is too small.
      OSError: `data_dir` cannot be written.
    """
    info, path = stock_info(NAME, data_dir)
    class_names = dict(info.features.items())["label"].names  # pyright: ignore

    def find(split: str) -> list[Item]:
        tar = source_dir / TARS[split]
        if not tar.is_file():
            say(f"{split}: no {tar.name} in {source_dir}, left out")
            return []
        items = list_images(tar, split, class_names, say)
        if len(items) != expected_counts[split]:
            raise DataError(
                f"{tar}: {len(items)} images of {len({item.label for item in items})} classes, but "
                f"{expected_counts[split]} are expected; {_AGAIN}"
            )
        return items

    nothing = f"{source_dir}: neither {' nor '.join(TARS.values())}; set source_dir to their folder"
    return prepare_stock(info, path, TARS, find, nothing=nothing, overwrite=overwrite, say=say)


def list_images(tar: Path, split: str, class_names: list[str], say: Say) -> list[Item]:
    """Lists the images in the tar file of "train" or "validation". Only headers are read.

    Raises:
      DataError: the file is no uncompressed tar file or is cut short, or an image has no known class.
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
    """The images of the training file: it holds one tar file a class, n01440764.tar and so on."""
    for outer in _files(archive):
        class_tar = PurePosixPath(outer.name)
        if class_tar.suffix != ".tar" or class_tar.stem not in labels:
            raise DataError(f"{archive.name}: {outer.name} is not the tar file of a known class")
        # The inner tar file is read in place, not copied.
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
    # A line for each image, in the order of the numbers in the file names.
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
        archive.members.clear()  # pyright: ignore  # else all headers stay in memory
        if member.isfile():
            yield member
