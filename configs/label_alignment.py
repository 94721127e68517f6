"""Mixing with and without labels that travel with tokens (TL-Align), on digits and on cluttered canvases.

    python -m tosa_jax.main --config=configs/label_alignment.py
    python -m tosa_jax.main --config=configs/label_alignment.py:mixing
    python -m tosa_jax.main --config=configs/label_alignment.py:clutter --config.data.source_dir=DIR

Both mix every batch by cutmix and draw the same boxes. `:mixing` takes the share of an image's pixels as the share of
its label; `:plain` mixes nothing. The dense network is trained, then ToSA and the dense network are fine-tuned.

`:clutter`, `:clutter_mixing` and `:clutter_plain` do so on the canvases of `configs/cluttered_fashion.py`, where an
item has a fifth of the pixels: a box often covers it, or holds none. They train the dense network alone. Patches of 14
pixels make 16 tokens. DIR holds Fashion-MNIST's four gz files. `results/label_alignment.py` compares the three.
"""

from digits import on_digits

from tosa_jax.config import default_config

VARIANTS = ("", "mixing", "plain", "clutter", "clutter_mixing", "clutter_plain")


def get_config(variant: str = ""):
    if variant not in VARIANTS:
        raise ValueError(
            f"configs/label_alignment.py has no variant {variant!r}; known: {', '.join(VARIANTS[1:])}"
        )
    config = default_config()
    config.log_steps = 100
    training = {
        "clip_norm": 1.0,
        "label_smoothing": 0.1,
        "cutmix": 0.0 if variant.endswith("plain") else 1.0,
        "align_labels": variant in ("", "clutter"),
    }
    if variant.startswith("clutter"):
        on_clutter(config, training)
    else:
        on_digits_in_stages(config, training)
    return config


def on_digits_in_stages(config, training):
    on_digits(config)
    config.model.update(image_size=8, patch_size=2, embed_dim=48, depth=4, num_heads=4)
    config.pretrain.update(
        epochs=40.0, warmup_epochs=3.0, learning_rate=2e-3, ema_decay=0.99, **training
    )
    config.selector.update(steps=60, learning_rate=1e-2, weight_decay=0.0)
    config.finetune.update(
        epochs=8.0, warmup_epochs=1.0, learning_rate=1e-3, ema_decay=0.98, **training
    )
    config.eval.update(controls=("dense",), figure_images=0)


def on_clutter(config, training):
    config.batch_size = 32
    config.model.update(
        image_size=56, patch_size=14, in_chans=1, num_classes=10, embed_dim=48, depth=4, num_heads=4
    )
    # Where attention is nearly uniform, labels arrive as the share of the area.
    config.model.update(init_std=0.12, plan="standard")
    config.data.update(name="cluttered_fashion_mnist/56-20000-4000", in_memory=True)
    config.inputs.update(mean=(0.18,), std=(0.31,))
    config.pretrain.update(
        steps=1000, warmup_steps=100, learning_rate=2e-3, ema_decay=0.99, **training
    )
    config.selector.steps = config.finetune.steps = 0
    config.eval.update(batch_size=200, figure_images=0)
