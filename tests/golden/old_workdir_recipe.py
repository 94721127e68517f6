"""Recipe of the run in old_workdir/."""

from tosa_jax.config import default_config


def get_config():
    config = default_config()
    config.update(batch_size=16, log_steps=2)
    config.model.update(
        embed_dim=8,
        depth=2,
        num_heads=2,
        mlp_ratio=2.0,
        image_size=8,
        patch_size=2,
        in_chans=1,
        num_classes=10,
        keep_rate=(0.5,),
    )
    config.data.update(name="digits", augment="shift", in_memory=True)
    config.inputs.update(mean=(0.3,), std=(0.4,))
    config.eval.update(batch_size=360, figure_images=1)
    config.pretrain.update(steps=4, ema_decay=0.5)
    config.selector.update(steps=4)
    config.finetune.update(steps=4)
    return config
