"""Mixing with and without labels that travel with tokens (TL-Align), on the digits that scikit-learn bundles.

    python -m tosa_jax.main --config=configs/label_alignment.py
    python -m tosa_jax.main --config=configs/label_alignment.py:mixing

Both mix every batch by cutmix and draw the same boxes. `:mixing` takes the share of an image's pixels as the share of
its label; `:plain` mixes nothing. The dense network is trained, then ToSA and the dense network are fine-tuned.
`results/label_alignment.json` has the three side by side, three seeds.
"""

from digits import on_digits

from tosa_jax.config import default_config

VARIANTS = ("", "mixing", "plain")


def get_config(variant: str = ""):
    if variant not in VARIANTS:
        raise ValueError(
            f"configs/label_alignment.py has no variant {variant!r}; known: mixing, plain"
        )
    config = default_config()
    on_digits(config)
    config.log_steps = 100
    config.model.update(image_size=8, patch_size=2, embed_dim=48, depth=4, num_heads=4)
    training = {
        "clip_norm": 1.0,
        "label_smoothing": 0.1,
        "cutmix": 0.0 if variant == "plain" else 1.0,
        "align_labels": not variant,
    }
    config.pretrain.update(
        epochs=40.0, warmup_epochs=3.0, learning_rate=2e-3, ema_decay=0.99, **training
    )
    config.selector.update(steps=60, learning_rate=1e-2, weight_decay=0.0)
    config.finetune.update(
        epochs=8.0, warmup_epochs=1.0, learning_rate=1e-3, ema_decay=0.98, **training
    )
    config.eval.update(controls=("dense",), figure_images=0)
    return config
