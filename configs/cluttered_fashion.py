"""A task where it should matter which tokens are chosen: Fashion-MNIST items among pieces of others.

    python -m tosa_jax.main --config=configs/cluttered_fashion.py --config.data.source_dir=DIR [--config.seed=1]

DIR holds Fashion-MNIST's four gz files (Debian: package dataset-fashion-mnist, /usr/share/datasets/fashion-mnist).
20,000 training and 4,000 test canvases of 56x56 pixels are drawn on the first run (`tosa_jax/data/clutter.py`): 196
patches. The item to be named fills 6 to 25 % of a canvas, pieces of others about a third, and two fifths of the patches
are black. What `random`, `previous` and `skip` lose here is what selection is worth; where the whole image is the item
they lose little (`results/fashion_mnist_cpu.json`). Every control is fine-tuned as long as ToSA, at each of three
budgets: eleven fine-tunes, nearly as long as pretraining; `--config.eval.keep_rates="(0.3,)"` makes five.
"""

from tosa_jax.config import default_config


def get_config():
    config = default_config()
    config.batch_size = 64
    config.log_steps = 100
    config.model.update(
        image_size=56,
        patch_size=4,
        in_chans=1,
        num_classes=10,
        embed_dim=96,
        depth=6,
        num_heads=4,
    )
    config.data.update(
        name="cluttered_fashion_mnist/56-20000-4000", augment="shift_flip", in_memory=True
    )
    config.inputs.update(mean=(0.228,), std=(0.329,))
    training = {
        "clip_norm": 1.0,
        "label_smoothing": 0.1,
        "checkpoint_epochs": 1.0,
    }
    # Many passes over few canvases, each time moved: a network this small learns slowly what stands out.
    config.pretrain.update(
        epochs=12.0, warmup_epochs=1.0, learning_rate=1e-3, ema_decay=0.999, **training
    )
    config.selector.update(steps=300, warmup_steps=20, learning_rate=3e-3, weight_decay=0.0)
    config.finetune.update(
        epochs=1.0, warmup_steps=50, learning_rate=3e-4, ema_decay=0.99, **training
    )
    config.eval.update(
        batch_size=200,
        controls=("dense", "random", "previous", "skip"),
        keep_rates=(0.5, 0.3, 0.15),
    )
    return config
