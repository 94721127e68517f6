r"""Pretraining without labels on the digits that scikit-learn bundles: DINO, and DenseDINO with reference tokens.

    python -m tosa_jax.main --config=configs/dino.py
    python -m tosa_jax.main --config=configs/dino.py:dense

`:dense` adds two reference tokens for each pair of crops. Scores are those of frozen features with the labels of the
training split: nearest neighbours and a linear classifier. The backbone then starts any other run:

    python -m tosa_jax.main --config=configs/digits.py --config.init_from=runs/dino \
        --config.model.embed_dim=48 --config.model.depth=4

`results/dino.py` runs both with several seeds beside the random backbones that they start from.
"""

from tosa_jax.config import default_config


def get_config(variant: str = ""):
    if variant not in ("", "dense"):
        raise ValueError(f"configs/dino.py has no variant {variant!r}; known: dense")
    config = default_config(task="dino")
    config.batch_size = 64
    config.log_steps = 100
    config.model.update(
        image_size=8, patch_size=2, in_chans=1, embed_dim=48, depth=4, num_heads=4
    )  # fmt: skip
    config.model.update(
        prototypes=256,
        head_hidden=128,
        head_bottleneck=32,
        reference_points=2 if variant == "dense" else 0,
    )
    config.task.update(
        local_crops=2,
        local_size=4,
        global_scale=(0.5, 1.0),
        local_scale=(0.2, 0.5),
        flip=False,
        solarise=0.0,
        momentum=0.99,
    )
    config.data.update(name="digits", in_memory=True)
    config.inputs.update(mean=(0.30,), std=(0.37,))
    config.pretrain.update(
        steps=600, warmup_steps=60, learning_rate=1e-3, clip_norm=3.0, ema_decay=0.99
    )
    config.eval.update(batch_size=120, figure_images=0)
    return config
