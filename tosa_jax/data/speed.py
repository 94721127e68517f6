"""How fast the input of training is: images/s a core, beside a straightforward pipeline's.

    python -m tosa_jax.data.speed --images=DIR
    python -m tosa_jax.data.speed --rooms

writes its figures as JSON. `--images` is a folder of image files; without one, 200 JPEGs of
500 x 375 are made from scikit-learn's two photographs, noise and stripes. `--rooms` times the
renderer of rooms instead.

Rates are by the processor time of one thread, so that other programs on the machine hardly count.
"""

import argparse
import functools
import io
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance
from sklearn.datasets import load_sample_images

from tosa_jax.data import randaugment
from tosa_jax.data.builders import num_examples, open_builder
from tosa_jax.data.decoding import open_image
from tosa_jax.data.pipeline import DataConfig
from tosa_jax.data.settings import example_kind
from tosa_jax.data.sources import Encoded
from tosa_jax.data.synthetic.rooms import render_room
from tosa_jax.data.transforms import crop_flip, deit, draw_crop, random_resized_crop

Step = Callable[[object, np.random.Generator], object]

_SIZE = (500, 375)
_FILLED = {"resample": Image.Resampling.BICUBIC, "fillcolor": randaugment.FILL}


def reference_example(encoded: bytes, image_size: int, rng: np.random.Generator) -> np.ndarray:
    """DeiT's augmentation with plain PIL calls and the draws of `transforms.deit`.

    The measure of both speed and pixels. Returns uint8 [image_size, image_size, 3].
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
    """One operation of RandAugment as PIL offers it."""
    matrices = {
        "ShearX": (1, argument, 0, 0, 1, 0),
        "ShearY": (1, 0, 0, argument, 1, 0),
        "TranslateX": (1, 0, argument * image.width, 0, 1, 0),
        "TranslateY": (1, 0, 0, 0, 1, argument * image.height),
    }
    if name in matrices:
        return image.transform(image.size, Image.Transform.AFFINE, matrices[name], **_FILLED)
    if name == "Sharpness":
        return ImageEnhance.Sharpness(image).enhance(argument)
    return randaugment.OPERATIONS[name](image, argument)


def example(encoded: bytes, image_size: int, rng: np.random.Generator) -> np.ndarray:
    """The project's own: what `train_batches` does with augment="deit"."""
    return np.asarray(deit(open_image(encoded, channels=3), image_size, rng))


def copies(
    encoded: bytes, image_size: int, rng: np.random.Generator, repeats: int
) -> list[np.ndarray]:
    """What `train_batches` does with repeated augmentation: one decoding, each copy drawn anew."""
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
    """Rows {"step", "images_per_second_per_core", "milliseconds"} for each part and for the whole.

    Every part is timed on every image in each round, in turn with the others; the best time of
    each image counts, since other programs only ever slow it down. Steps: decode, crop (and flip),
    randaugment, whole, reference (the straightforward pipeline) and, with more than one, repeated
    (whole, when each image is decoded once for `repeats` copies). "whole" has more: "speedup" over
    the reference; the pixel difference to it under the same draws ("mean_difference",
    "difference_99th_percentile"). With `accelerator_rate` in images/s, "cores" keep such an
    accelerator fed: by "repeated" where there is one, else by "whole".
    """
    opened = [open_image(image, channels=3) for image in images]
    small = [
        random_resized_crop(image, image_size, np.random.default_rng(i))
        for i, image in enumerate(opened)
    ]
    steps: dict[str, tuple[Step, Sequence]] = {
        "decode": (lambda image, rng: open_image(image, channels=3), images),
        "crop": (lambda image, rng: crop_flip(image, image_size, rng), opened),
        "randaugment": (randaugment.rand_augment, small),
        "whole": (lambda image, rng: example(image, image_size, rng), images),
        "reference": (lambda image, rng: reference_example(image, image_size, rng), images),
    }
    if repeats > 1:
        steps["repeated"] = (lambda image, rng: copies(image, image_size, rng, repeats), images)
    times = {name: np.full(len(images), np.inf) for name in steps}
    for _ in range(rounds):
        for i in range(len(images)):
            for name, (step, inputs) in steps.items():
                # Each round and each pipeline draws the same.
                rng = np.random.default_rng((seed, i))
                times[name][i] = min(times[name][i], _seconds(step, inputs[i], rng))
    best = {name: float(seconds.mean()) for name, seconds in times.items()}
    if repeats > 1:
        best["repeated"] /= repeats
    rows = [
        {
            "step": name,
            "images_per_second_per_core": round(1 / seconds, 1),
            "milliseconds": round(1000 * seconds, 3),
        }
        for name, seconds in best.items()
    ]
    by_step = {row["step"]: row for row in rows}
    by_step["whole"]["speedup"] = round(best["reference"] / best["whole"], 3)
    by_step["whole"] |= difference(images, image_size=image_size, seed=seed)
    if accelerator_rate:
        used = "repeated" if repeats > 1 else "whole"
        by_step[used]["cores"] = math.ceil(accelerator_rate * best[used])
    return rows


def difference(
    images: Sequence[bytes], *, image_size: int = 224, seed: int = 0
) -> dict[str, float]:
    """|pixel difference| of `example` to `reference_example` under the same draws, grey levels."""
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
    """`measure` on the first `count` images of a config's training split, with its size and repeats.

    The parts are those of augment="deit", whichever the config has. Raises as `open_dataset`.
    """
    builder = open_builder(config.name, config.data_dir, config.source_dir)
    num_examples(builder, config.train_split, "train_split")  # checks the split
    kind = example_kind(config, builder, config.train_split, train=True)
    source = Encoded(str(builder.data_path), config.train_split, kind)
    images = [source[i]["image"] for i in range(min(count, len(source)))]
    return measure(images, image_size=config.image_size, repeats=config.repeats, **kwargs)


def measure_rooms(*, count: int = 200, rounds: int = 3) -> list[dict]:
    """Rows {"size", "images_per_second_per_core", "milliseconds"} of rendering `count` rooms.

    As in `measure`, the best time of each room counts. At 480x640 a tenth of them is enough.
    """
    rows = []
    for (height, width), number in (((128, 160), count), ((480, 640), -(-count // 10))):
        times = np.full(number, np.inf)
        render = functools.partial(_render, height, width)
        for i in np.tile(np.arange(number), rounds):
            times[i] = min(times[i], _seconds(render, (0, int(i)), None))
        rows.append(
            {
                "size": f"{height}x{width}",
                "images_per_second_per_core": round(float(1 / times.mean()), 1),
                "milliseconds": round(float(1000 * times.mean()), 3),
            }
        )
    return rows


def _render(height: int, width: int, seed: tuple[int, int], rng: None) -> None:
    del rng  # the seed decides
    render_room(seed, height, width)


def _seconds(step: Step, image: object, rng: np.random.Generator | None) -> float:
    start = time.thread_time()
    step(image, rng)
    return time.thread_time() - start


def sample_jpegs(count: int = 200, *, seed: int = 0, quality: int = 90) -> list[bytes]:
    """JPEGs of 500 x 375: crops of scikit-learn's two photographs."""
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
    """JPEGs of 500 x 375 of colour noise, and of stripes of one and two pixels."""
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
