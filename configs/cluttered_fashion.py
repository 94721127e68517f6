"""A task where it matters which tokens are chosen: Fashion-MNIST items among pieces of others.

    python -m tosa_jax.main --config=configs/cluttered_fashion.py:items --config.data.source_dir=DIR
    python -m tosa_jax.main --config=configs/cluttered_fashion.py --config.data.source_dir=DIR --config.init_from=FROM

FROM is the work directory of the first command, runs/cluttered_fashion_items. DIR holds Fashion-MNIST's four gz files
(Debian: package dataset-fashion-mnist, /usr/share/datasets/fashion-mnist). 20,000 training and 4,000 test canvases of
56x56 pixels are drawn on the first run (`tosa_jax/data/synthetic/clutter.py`): 196 patches. The item to be classified
covers 14 to 25 % of a canvas, pieces of other items about a fifth. Half of the patches are black.

`:items` pretrains the model on single items of 49 patches of the same size: on the canvases it then only has to learn
to find them. Every control is fine-tuned as long as ToSA, at each of three keep rates
(results/selection/cluttered_fashion.json, results/selection.md).
"""

from tosa_jax.config import default_config


def get_config(variant: str = ""):
    if variant not in ("", "items"):
        raise ValueError(f"configs/cluttered_fashion.py has no variant {variant!r}; known: items")
    items = variant == "items"
    config = default_config()
    config.batch_size = 64 if items else 32
    config.log_steps = 100
    config.model.update(
        image_size=28 if items else 56,
        patch_size=4,
        in_chans=1,
        num_classes=10,
        embed_dim=64,
        depth=4,
        num_heads=2,
    )
    config.data.update(
        name="fashion_mnist" if items else "cluttered_fashion_mnist/56-20000-4000",
        augment="shift_flip",
        in_memory=True,
    )
    training = {"clip_norm": 1.0, "label_smoothing": 0.1, "checkpoint_epochs": 1.0}
    pretraining = {"learning_rate": 1e-3, "ema_decay": 0.999} | training
    if items:
        config.inputs.update(mean=(0.286,), std=(0.353,))
        config.pretrain.update(epochs=4.0, warmup_epochs=0.5, **pretraining)
        config.eval.batch_size = 100
        return config
    config.inputs.update(mean=(0.18,), std=(0.31,))
    config.pretrain.update(steps=5000, warmup_steps=200, **pretraining)
    config.selector.update(steps=200, warmup_steps=20, learning_rate=3e-3, weight_decay=0.0)
    config.finetune.update(
        steps=160, warmup_steps=20, learning_rate=3e-4, ema_decay=0.99, **training
    )
    config.data.eval_split = "test[:2000]"
    config.eval.update(
        batch_size=100,
        controls=("dense", "random", "previous", "class_attention", "skip"),
        keep_rates=(0.5, 0.3, 0.15),
    )
    return config
