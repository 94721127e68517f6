"""Labels written as text: canvases with several items of Fashion-MNIST, named by a decoder that reads the ViT's tokens.

    python -m tosa_jax.main --config=configs/next_token.py --config.data.source_dir=DIR
    python -m tosa_jax.main --config=configs/next_token.py:cpu --config.data.source_dir=DIR
    python -m tosa_jax.main --config=configs/next_token.py:cpu_head --config.data.source_dir=DIR

DIR holds the four gz files (Debian: package dataset-fashion-mnist, /usr/share/datasets/fashion-mnist). The canvases are
drawn on the first run (`tosa_jax/data/synthetic/several.py`): 1 to 9 items on 84x84 pixels, in `:cpu` 1 to 4 on 56x56.
`:head` and `:cpu_head` train the same backbone with a plain head, a sigmoid for each label (task "multi_label").
`results/next_token.py` compares the two on a CPU, where patches of 14 pixels make 16 tokens. The default, 441 patches,
is meant for an accelerator and was not run.
"""

from tosa_jax.config import default_config

LABELS = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def get_config(variant: str = ""):
    if variant not in ("", "cpu", "head", "cpu_head"):
        raise ValueError(
            f"configs/next_token.py has no variant {variant!r}; known: cpu, head, cpu_head"
        )
    small, plain = variant.startswith("cpu"), variant.endswith("head")
    config = default_config(task="multi_label" if plain else "next_token")
    config.batch_size = 32 if small else 256
    config.log_steps = 100
    config.model.update(
        image_size=56 if small else 84,
        patch_size=14 if small else 4,
        in_chans=1,
        embed_dim=64 if small else 192,
        depth=4 if small else 12,
        num_heads=4 if small else 3,
    )
    if plain:
        config.model.num_classes = len(LABELS)
    else:
        config.model.update(
            labels=LABELS,
            decoder_dim=64 if small else 192,
            decoder_depth=1 if small else 2,
            decoder_heads=4 if small else 3,
        )
        config.task.labels_per_image = 4 if small else 9
    config.data.update(
        name=f"several_fashion_mnist/{'56-4-20000-2000' if small else '84-9-60000-5000'}",
        in_memory=True,
    )
    config.inputs.update(mean=(0.14,), std=(0.27,))
    training = {"clip_norm": 1.0, "checkpoint_epochs": 1.0}
    config.pretrain.update(
        epochs=0.0 if small else 60.0,
        steps=2000 if small else 0,
        warmup_steps=100,
        learning_rate=2e-3 if small else 1e-3,
        ema_decay=0.99 if small else 0.999,
        **training,
    )
    config.selector.update(steps=200, warmup_steps=20, learning_rate=3e-3, weight_decay=0.0)
    config.finetune.update(
        steps=160 if small else 2000,
        warmup_steps=20,
        learning_rate=3e-4,
        ema_decay=0.99,
        **training,
    )
    config.eval.batch_size = 200
    return config
