"""Fits token selectors for a pretrained ViT on a folder of images, in minutes; no labels, the backbone is frozen.

    python -m tosa_jax.main --config=configs/fit_selectors.py:model=NAME,weights=FILE,images=DIR

NAME is one of timm's (`tosa_jax.VARIANTS`), FILE whatever `tosa_jax.load_pretrained` reads, DIR a folder of JPEG and
PNG files, in subfolders or not; a tenth of them is held out. The selectors are written to `selectors.safetensors` in
the work directory and load with `tosa_jax.load_pretrained(model, selectors=...)`.
"""

from tosa_jax.config import default_config


def get_config(arguments: str):
    parts = [pair.partition("=") for pair in arguments.split(",") if pair]
    given = {name: value for name, _, value in parts}
    unknown = given.keys() - {"model", "weights", "images"}
    if unknown or "model" not in given:
        raise ValueError(
            f"write configs/fit_selectors.py:model=NAME,weights=FILE,images=DIR (unknown: {sorted(unknown)})"
        )
    config = default_config(given["model"], weights=given.get("weights", ""))
    config.batch_size = 16
    config.log_steps = 20
    config.data.update(
        name="image_folder",
        source_dir=given.get("images", ""),
        eval_split="validation",
        augment="crop_flip",
        eval_resize="crop",
    )
    config.selector.update(steps=200, warmup_steps=20, learning_rate=3e-3, weight_decay=0.0)
    config.eval.batch_size = 16
    return config
