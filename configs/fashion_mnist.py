"""ToSA on Fashion-MNIST: 60,000 training and 10,000 test images, 28x28, grey, ten kinds of clothing.

    python -m tosa_jax.main --config=configs/fashion_mnist.py --config.data.source_dir=DIR
    python -m tosa_jax.main --config=configs/fashion_mnist.py:cpu --config.data.source_dir=DIR

DIR holds the four gz files (Debian: package dataset-fashion-mnist, /usr/share/datasets/fashion-mnist). Without
`source_dir`, TFDS's own prepared copy is read. The default has 196 patches of 2x2 pixels, DeiT's token count, and
is meant for an accelerator. `:cpu` has 49 patches of 4x4; its pretraining and six short fine-tunes take two cores
about an hour (`results/fashion_mnist_cpu.json`).
"""

from tosa_jax.config import default_config


def get_config(variant: str = ""):
    if variant not in ("", "cpu"):
        raise ValueError(f"configs/fashion_mnist.py has no variant {variant!r}; known: cpu")
    small = variant == "cpu"
    config = default_config()
    config.batch_size = 128 if small else 512
    config.log_steps = 100 if small else 50
    config.model.update(
        image_size=28,
        patch_size=4 if small else 2,
        in_chans=1,
        num_classes=10,
        embed_dim=64 if small else 192,
        depth=6 if small else 12,
        num_heads=4 if small else 3,
    )
    config.data.update(name="fashion_mnist", augment="shift_flip", in_memory=True)
    config.inputs.update(mean=(0.286,), std=(0.353,))
    config.pretrain.update(
        epochs=10.0 if small else 100.0,
        warmup_epochs=1.0 if small else 5.0,
        learning_rate=1e-3,
        clip_norm=1.0,
        ema_decay=0.999,
        drop_path_rate=0.0 if small else 0.1,
        label_smoothing=0.1,
        checkpoint_epochs=1.0,
    )
    config.selector.update(steps=300, warmup_steps=20, learning_rate=3e-3, weight_decay=0.0)
    config.finetune.update(
        epochs=1.0 if small else 10.0,
        warmup_steps=50,
        learning_rate=3e-4,
        clip_norm=1.0,
        ema_decay=0.99,
        drop_path_rate=0.0 if small else 0.1,
        label_smoothing=0.1,
        checkpoint_epochs=1.0,
    )
    config.eval.update(batch_size=500, controls=("dense", "random", "skip"), keep_rates=(0.5, 0.25))
    return config
