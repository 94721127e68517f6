"""Measures the training input: images/s a core, beside a pipeline of plain PIL calls.

    python -m tosa_jax.data.speed --images=DIR
    python -m tosa_jax.data.speed --rooms

It prints its figures as JSON. `--images` is a folder of image files. Without it, the images are 200
JPEGs of 500 x 375 cut from scikit-learn's two photographs, and 20 of noise and stripes. `--rooms`
times the renderer of rooms instead.

Times are processor times of one thread, so that other programs on the machine matter little.
"""

import argparse
import functools
import io
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance
from sklearn.datasets import load_sample_images

from tosa_jax.data import randaugment
from tosa_jax.data.decoding import open_image
from tosa_jax.data.pipeline import open_dataset
from tosa_jax.data.settings import DataConfig
from tosa_jax.data.synthetic.rooms import render_room
from tosa_jax.data.transforms import crop_flip, deit, draw_crop, random_resized_crop

Step = Callable[[Any, np.random.Generator], object]

_SIZE = (500, 375)  # width and height of the JPEGs that are made, pixels


def reference_example(encoded: bytes, image_size: int, rng: np.random.Generator) -> np.ndarray:
    """DeiT's augmentation in plain PIL calls, with the draws of `transforms.deit`.

    `example` is compared with it in speed and in pixels. Returns uint8 [image_size, image_size, 3].
    """
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    image = image.crop(draw_crop(*image.size, rng))
    image = image.resize((image_size, image_size), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for name, argument in randaugment.draw_operations(rng):
        image = reference_operation(image, name, argument)
    return np.asarray(image)


def reference_operation(image: Image.Image, name: str, argument: int | float) -> Image.Image:
    """One operation of RandAugment, in PIL's own implementation."""
    matrices = {
        "ShearX": (1, argument, 0, 0, 1, 0),
        "ShearY": (1, 0, 0, argument, 1, 0),
        "TranslateX": (1, 0, argument * image.width, 0, 1, 0),
        "TranslateY": (1, 0, 0, 0, 1, argument * image.height),
    }
    if name in matrices:
        return image.transform(
            image.size,
            Image.Transform.AFFINE,
            matrices[name],
            Image.Resampling.BICUBIC,
            fillcolor=randaugment.FILL,
        )
    if name == "Sharpness":
        return ImageEnhance.Sharpness(image).enhance(argument)
    return randaugment.OPERATIONS[name](image, argument)


def example(encoded: bytes, image_size: int, rng: np.random.Generator) -> np.ndarray:
    """This project's way: what `train_batches` does with augment="deit". Returns as `reference_example`."""
    return np.asarray(deit(open_image(encoded, channels=3), image_size, rng))


def copies(
    encoded: bytes, image_size: int, rng: np.random.Generator, repeats: int
) -> list[np.ndarray]:
    """Repeated augmentation as in `train_batches`: decoded once, each copy augmented anew."""
    image = open_image(encoded, channels=3)
    return [np.asarray(deit(image, image_size, rng)) for _ in range(repeats)]


def measure(
    images: Sequence[bytes],
    *,
    image_size: int = 224,
    repeats: int = 1,
    rounds: int = 5,
    accelerator_rate: float = 0.0,
    seed: int = 0,
) -> list[dict]:
    """Times the parts of the input pipeline and the whole of it.

    In each round every part handles every image, and the parts take turns. The shortest time of an
    image counts: other programs can only add to it.

    Args:
      images: Encoded images.
      image_size: Side of the augmented square, pixels.
      repeats: Copies of an image for the part "repeated".
      accelerator_rate: Images/s that an accelerator takes; 0: unknown.
    Returns:
      Rows {"step", "images_per_second_per_core", "milliseconds"} of the steps decode, crop (with
      flip), randaugment, whole (all three), reference (plain PIL) and, if `repeats` is above 1,
      repeated (whole, each image decoded once for `repeats` copies). The row of "whole" has also
      "speedup" over the reference, and the pixel `difference` to it. With `accelerator_rate`, the
      row of "repeated", or else of "whole", has "cores": how many keep the accelerator busy.
    """
    opened = [open_image(image, channels=3) for image in images]
    small = [
        random_resized_crop(image, image_size, np.random.default_rng(i))
        for i, image in enumerate(opened)
    ]
    steps: dict[str, tuple[Step, Sequence[Any]]] = {
        "decode": (lambda image, rng: open_image(image, channels=3), images),
        "crop": (lambda image, rng: crop_flip(image, image_size, rng), opened),
        "randaugment": (randaugment.rand_augment, small),
        "whole": (lambda image, rng: example(image, image_size, rng), images),
        "reference": (lambda image, rng: reference_example(image, image_size, rng), images),
    }
    if repeats > 1:
        steps["repeated"] = (lambda image, rng: copies(image, image_size, rng, repeats), images)
    times = _shortest_times(steps, len(images), rounds, seed)
    best = {name: float(seconds.mean()) for name, seconds in times.items()}
    if repeats > 1:
        best["repeated"] /= repeats
    rows = [{"step": name} | _rates(seconds) for name, seconds in best.items()]
    by_step = {row["step"]: row for row in rows}
    by_step["whole"]["speedup"] = round(best["reference"] / best["whole"], 3)
    by_step["whole"] |= difference(images, image_size=image_size, seed=seed)
    if accelerator_rate:
        used = "repeated" if repeats > 1 else "whole"
        by_step[used]["cores"] = math.ceil(accelerator_rate * best[used])
    return rows


def _shortest_times(
    steps: dict[str, tuple[Step, Sequence[Any]]], count: int, rounds: int, seed: int
) -> dict[str, np.ndarray]:
    """Seconds of each step for each image, the shortest of some rounds."""
    times = {name: np.full(count, np.inf) for name in steps}
    for _ in range(rounds):
        for i in range(count):
            for name, (step, inputs) in steps.items():
                # The same draws in each round and in both pipelines.
                rng = np.random.default_rng((seed, i))
                start = time.thread_time()
                step(inputs[i], rng)
                times[name][i] = min(times[name][i], time.thread_time() - start)
    return times


def _rates(seconds: float) -> dict[str, Any]:
    return {
        "images_per_second_per_core": round(1 / seconds, 1),
        "milliseconds": round(1000 * seconds, 3),
    }


def difference(
    images: Sequence[bytes], *, image_size: int = 224, seed: int = 0
) -> dict[str, float]:
    """Absolute difference of pixels between `example` and `reference_example` with the same draws.

    Returns {"mean_difference", "difference_99th_percentile"} in grey levels of 0..255.
    """
    counts = np.zeros(256, np.int64)
    for i, image in enumerate(images):
        ours = example(image, image_size, np.random.default_rng((seed, i)))
        theirs = reference_example(image, image_size, np.random.default_rng((seed, i)))
        counts += np.bincount(np.abs(ours.astype(int) - theirs).ravel(), minlength=256)
    shares = np.cumsum(counts) / counts.sum()
    return {
        "mean_difference": round(float(counts @ np.arange(256) / counts.sum()), 5),
        "difference_99th_percentile": int(np.argmax(shares >= 0.99)),
    }


def measure_config(config: DataConfig, *, count: int = 200, **kwargs) -> list[dict]:
    """`measure` for the first `count` images of a config's training split, with its size and repeats.

    The augmentation is "deit", whatever the config says. `kwargs` go to `measure`. Raises
    ConfigError and DataError as `open_dataset` and `Dataset.train_batches`.
    """
    images = open_dataset(config).encoded_images(config.train_split, count)
    height, _ = config.size
    return measure(images, image_size=height, repeats=config.repeats, **kwargs)


def measure_rooms(*, count: int = 200, rounds: int = 3) -> list[dict]:
    """Times the rendering of `count` rooms of 128x160 pixels, and of a tenth as many of 480x640.

    Returns rows {"size", "images_per_second_per_core", "milliseconds"}. As in `measure`, the
    shortest time of each room counts.
    """
    rows = []
    for (height, width), number in (((128, 160), count), ((480, 640), -(-count // 10))):
        times = np.full(number, np.inf)
        for i in list(range(number)) * rounds:
            start = time.thread_time()
            render_room((0, i), height, width)
            times[i] = min(times[i], time.thread_time() - start)
        rows.append({"size": f"{height}x{width}"} | _rates(float(times.mean())))
    return rows


def sample_jpegs(count: int = 200, *, seed: int = 0, quality: int = 90) -> list[bytes]:
    """JPEG files of 500 x 375 pixels, cut from scikit-learn's two photographs."""
    rng = np.random.default_rng(seed)
    photos = [Image.fromarray(image) for image in load_sample_images().images]
    images = []
    for i in range(count):
        photo = photos[i % len(photos)]
        width = int(photo.height * _SIZE[0] / _SIZE[1] * rng.uniform(0.7, 1))
        height = width * _SIZE[1] // _SIZE[0]
        left = int(rng.integers(photo.width - width + 1))
        top = int(rng.integers(photo.height - height + 1))
        box = (left, top, left + width, top + height)
        images.append(_jpeg(photo.resize(_SIZE, Image.Resampling.BICUBIC, box=box), quality))
    return images


def high_frequency_jpegs(count: int = 20, *, seed: int = 0, quality: int = 95) -> list[bytes]:
    """JPEG files of 500 x 375 pixels: colour noise and stripes one or two pixels wide, in turn."""
    rng = np.random.default_rng(seed)
    images = []
    for i in range(count):
        pixels = rng.integers(0, 256, (_SIZE[1], _SIZE[0], 3), dtype=np.uint8)
        if i % 2:
            rows, columns = np.mgrid[: _SIZE[1], : _SIZE[0]]
            stripes = (rows * int(rng.integers(2)) + columns) // (1 + i // 2 % 2) % 2
            pixels = np.repeat((255 * stripes).astype(np.uint8)[..., None], 3, axis=2)
        images.append(_jpeg(Image.fromarray(pixels), quality))
    return images


def _jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()


def main() -> None:
    """Prints the figures as JSON."""
    parser = argparse.ArgumentParser(description="Measures the training input on one core.")
    parser.add_argument("--images", type=Path, help="folder of image files")
    parser.add_argument("--rooms", action="store_true", help="time the renderer of rooms")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=1, help="copies of each image; DeiT's is 3")
    parser.add_argument("--accelerator_rate", type=float, default=2500.0, help="images/s to feed")
    args = parser.parse_args()
    run = functools.partial(
        measure,
        repeats=args.repeats,
        rounds=args.rounds,
        accelerator_rate=args.accelerator_rate,
    )
    if args.rooms:
        figures = {"rooms": measure_rooms(rounds=args.rounds)}
    elif args.images:
        files = sorted(path for path in args.images.rglob("*") if path.is_file())
        figures = {"images": run([path.read_bytes() for path in files])}
    else:
        figures = {
            "photographs": run(sample_jpegs()),
            "high_frequency": run(high_frequency_jpegs()),
        }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
