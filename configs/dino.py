r"""Pretraining without labels on the digits that scikit-learn bundles: DINO, and DenseDINO with reference tokens.

    python -m tosa_jax.main --config=configs/dino.py
    python -m tosa_jax.main --config=configs/dino.py:dense

`:dense` adds two reference tokens for each pair of crops. Scores are those of frozen features with the labels of the
training split: nearest neighbours and a linear classifier. The backbone then starts any other run:

    python -m tosa_jax.main --config=configs/digits.py --config.init_from=runs/dino \
        --config.model.embed_dim=32 --config.model.depth=3 --config.model.num_heads=2

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
        image_size=8, patch_size=2, in_chans=1, embed_dim=32, depth=3, num_heads=2, init_std=0.15
    )  # fmt: skip
    config.model.update(
        prototypes=64,
        head_hidden=64,
        head_bottleneck=32,
        reference_points=2 if variant == "dense" else 0,
    )
    # A small crop of so small an image shows four patches: there is none.
    config.task.update(
        local_crops=0,
        global_scale=(0.4, 1.0),
        flip=False,
        jitter_strength=0.3,
        solarise=0.0,
        teacher_temperature=0.025,
        warmup_teacher_temperature=0.015,
        warmup_teacher_steps=200,
        centre_momentum=0.5,
        momentum=0.98,
    )
    config.data.update(name="digits", in_memory=True)
    config.inputs.update(mean=(0.30,), std=(0.37,))
    config.pretrain.update(
        steps=900, warmup_steps=50, learning_rate=1e-3, clip_norm=3.0, ema_decay=0.98
    )
    config.eval.update(batch_size=120, figure_images=0)
    return config
