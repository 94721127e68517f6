"""ToSA on the handwritten digits that scikit-learn bundles: every stage, offline, on two cores in minutes.

    python -m tosa_jax.main --config=configs/digits.py

1437 training and 360 test images of 8x8 pixels; a ViT of 64 patches... see `results/digits.json` for what it reaches.
"""

from tosa_jax.config import default_config


def get_config():
    config = default_config()
    config.batch_size = 128
    config.log_steps = 50
    config.model.update(
        image_size=8,
        patch_size=2,
        in_chans=1,
        num_classes=10,
        embed_dim=64,
        depth=6,
        num_heads=4,
        mlp_ratio=4.0,
    )
    config.data.name = "digits"
    config.data.augment = "shift_rotate"
    config.data.in_memory = True
    config.inputs.mean = (0.30,)
    config.inputs.std = (0.37,)
    config.pretrain.update(
        epochs=60, learning_rate=2e-3, warmup_epochs=3, clip_norm=1.0, ema_decay=0.99,
        label_smoothing=0.1,
    )
    config.selector.update(steps=100, learning_rate=1e-2, weight_decay=0.0)
    config.finetune.update(epochs=10, learning_rate=3e-4, clip_norm=1.0, ema_decay=0.98)
    config.eval.batch_size = 120
    config.eval.controls = ("dense", "random", "previous", "skip")
    return config
