"""ToSA on the handwritten digits that scikit-learn bundles: every stage, offline, on two cores in minutes.

    launch/local.sh
    python -m tosa_jax.main --config=configs/digits.py

1437 training and 360 test images of 8x8 pixels, cut into 16 patches. Accuracies of three seeds and run times:
`results/digits.json`. This fine-tunes the controls of the method too:

    --config.eval.controls="('dense', 'random', 'previous', 'skip')"
"""

from tosa_jax.config import default_config


def on_digits(config):
    """Sets the data, and what goes with them."""
    config.batch_size = 64
    config.model.update(in_chans=1, num_classes=10)
    config.data.update(name="digits", augment="shift", in_memory=True)
    config.inputs.update(mean=(0.30,), std=(0.37,))
    config.eval.batch_size = 120


def get_config():
    config = default_config()
    on_digits(config)
    config.log_steps = 100
    config.model.update(image_size=8, patch_size=2, embed_dim=64, depth=6, num_heads=4)
    config.pretrain.update(
        epochs=80.0,
        warmup_epochs=5.0,
        learning_rate=2e-3,
        clip_norm=1.0,
        ema_decay=0.99,
        label_smoothing=0.1,
        # A model that was trained with dropped layers loses less when tokens bypass layers.
        drop_path_rate=0.2,
    )
    config.selector.update(steps=150, learning_rate=1e-2, weight_decay=0.0)
    config.finetune.update(
        epochs=40.0,
        warmup_epochs=1.0,
        learning_rate=2e-3,
        clip_norm=1.0,
        ema_decay=0.99,
        label_smoothing=0.1,
        drop_path_rate=0.1,
    )
    config.eval.controls = ("dense",)
    return config
