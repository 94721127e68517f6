"""Depth of rendered rooms: every stage of the depth task, offline, on two cores in minutes.

    python -m tosa_jax.main --config=configs/rooms.py [--config.seed=1]

4000 training and 400 validation images of 96x128 pixels with exact depth, rendered on the first run; 48 patches. The
dense model is trained from random weights, selectors are fitted, then the dense model, ToSA and the controls are
fine-tuned for the same number of steps. Errors of three seeds, those of the training set's mean depth map, and run
times: `results/rooms.json`.
"""

from tosa_jax.config import default_config


def get_config():
    config = default_config(task="depth")
    config.batch_size = 32
    config.log_steps = 100
    config.model.update(
        image_size=(96, 128), patch_size=16, embed_dim=96, depth=6, num_heads=4, decoder_dim=32
    )
    config.data.update(
        name="rooms/96x128-4000-400", eval_split="validation", augment="flip", in_memory=True
    )
    training = {
        "schedule": "polynomial",
        "weight_decay": 0.05,
        "clip_norm": 1.0,
        "drop_path_rate": 0.1,
    }
    config.pretrain.update(epochs=12.0, learning_rate=1e-3, warmup_steps=100, **training)
    config.selector.update(steps=150, learning_rate=1e-2, weight_decay=0.0)
    config.finetune.update(epochs=4.0, learning_rate=5e-4, warmup_steps=50, **training)
    config.eval.update(batch_size=100, controls=("dense", "random", "skip"), figure_images=4)
    return config
