"""Depth of rendered rooms on a frozen DINOv2-S: the decoder alone is trained, for minutes, on two cores.

    python -m tosa_jax.main --config=configs/frozen_rooms.py --config.init_from=dinov2_vits14_pretrain.pth
    python -m tosa_jax.compare --config=configs/frozen_rooms.py --config.init_from=FILE --methods redundancy tome

For a depth encoder of your own that is to be cheaper and not trained again: name its data, its `init_from` and its
model here. `finetune.trainable` is a regular expression of the parameters that are trained; all others keep their
values and have no state in the optimizer. Rooms have 84x112 pixels, 48 patches. Errors of several methods, with tokens
computed once for each (`results/frozen_rooms.py`): `results/compare_frozen_rooms.md`.
"""

from tosa_jax.config import default_config


def get_config():
    config = default_config("vit_small_patch14_dinov2", task="depth")
    config.batch_size = 16
    config.log_steps = 24
    config.model.update(image_size=(84, 112), decoder_dim=16)
    config.data.update(name="rooms/84x112-384-128", eval_split="validation", in_memory=True)
    config.selector.update(steps=80, learning_rate=3e-3, weight_decay=0.0)
    config.finetune.update(
        trainable="^decoder/",
        epochs=10.0,
        learning_rate=2e-3,
        warmup_steps=20,
        schedule="polynomial",
        weight_decay=0.05,
        clip_norm=1.0,
    )
    config.eval.update(batch_size=32, controls=("dense", "random"), figure_images=4)
    return config
