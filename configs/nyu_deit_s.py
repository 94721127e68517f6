"""Monocular depth on NYU Depth V2 at 480x640: DeiT-S or DINOv2-S with the light DPT decoder, dense or ToSA.

    python -m tosa_jax.prepare --config=configs/nyu_deit_s.py --config.data.source_dir=FOLDER_OF_nyudepthv2
    python -m tosa_jax.main --config=configs/nyu_deit_s.py --config.init_from=deit_small_patch16_224-cd65a155.pth
    python -m tosa_jax.main --config=configs/nyu_deit_s.py:dense --config.init_from=...
    python -m tosa_jax.main --config=configs/nyu_deit_s.py:dinov2_s --config.init_from=dinov2_vits14_pretrain.pth
    python -m tosa_jax.main --config=configs/nyu_deit_s.py:dinov2_s,dense --config.init_from=...

Without `dense`: selectors for the released backbone, then ToSA at keep .5 and the dense network, each fine-tuned for
depth for the same number of steps; `dense` trains the dense model alone. With patch 14 images are resized to 490x644,
and depth is resized back.

Which recipe the paper used for depth is not known. This one mixes published ones: augmentation, loss, crop and
polynomial decay are those of BTS and NeWCRFs (cleinc/bts, aliyun/NeWCRFs: AbsRel .095 with a far larger network), the
learning rates those of DPT (Ranftl et al. 2021: 1e-5 for the backbone, 1e-4 for the decoder; AbsRel .110). The training
frames are TFDS's 47,584, not the 24,231 of BTS or the 36,253 of NeWCRFs. Not run on NYU yet: there is no result file.
"""

from tosa_jax.config import default_config

MODELS = {"deit_s": "deit_small_patch16_224", "dinov2_s": "vit_small_patch14_dinov2"}


def get_config(arguments: str = ""):
    words = set(filter(None, arguments.split(",")))
    backbones = words & MODELS.keys() or {"deit_s"}
    if words - MODELS.keys() - {"dense"} or len(backbones) > 1:
        raise ValueError(
            f"configs/nyu_deit_s.py has no variant {arguments!r}; known: one of {', '.join(MODELS)}, and dense"
        )
    config = default_config(MODELS[backbones.pop()], task="depth")
    config.batch_size = 16
    config.log_steps = 100
    config.model.update(image_size=(480, 640), max_depth=10.0, dtype="bfloat16")
    config.task.update(crop="eigen", flip_average=True)
    config.data.update(
        name="nyu_depth_v2",
        eval_split="validation",
        augment="nyu",
        depth_box=(45, 472, 43, 608),
        workers="threads:16",
    )
    training = {
        "epochs": 25.0,
        "learning_rate": 1e-5,
        "head_lr_scale": 10.0,
        "warmup_steps": 500,
        "min_learning_rate": 1e-6,
        "schedule": "polynomial",
        "weight_decay": 0.01,
        "clip_norm": 1.0,
        "drop_path_rate": 0.1,
        "checkpoint_epochs": 1.0,
        "eval_epochs": 5.0,
    }
    if "dense" in words:
        config.pretrain.update(training)
    else:
        config.selector.update(steps=1000, warmup_steps=100, learning_rate=3e-3, weight_decay=0.0)
        config.finetune.update(training)
    config.eval.update(batch_size=16, controls=("dense",))
    return config
