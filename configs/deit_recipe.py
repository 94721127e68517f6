"""The DeiT recipe (Touvron et al. 2021; facebookresearch/deit, README_deit.md), shared by deit_ti, deit_s and deit_b.

From scratch: 300 epochs at batch 1024, AdamW 5e-4 per 512, 5 epochs of warm-up from 1e-6, a cosine to 1e-5,
weight decay .05, drop path .1, smoothing .1, mixup .8 / cutmix 1, RandAugment, erasing .25, repeated augmentation,
EMA .99996. DeiT moves the learning rate once an epoch, this recipe at every update (`schedule_per="epoch"` for the
former); DeiT evaluates the network itself, this project its average.
Published top-1 of the dense networks: Ti 72.2, S 79.9, B 81.8 %, B at 384 px 82.9 %.

ToSA's fine-tuning is this project's choice: 30 epochs from the released weights with the schedule of EViT's
fine-tuning (2e-5 per 512 down to 2e-6, no warm-up, almost no decay) and DeiT's augmentation. Its EMA is .9996, which
looks back over the same share of the run as .99996 over 300 epochs: with .99996 the network before fine-tuning would
still be 22 % of the average. Dense and ToSA are averaged alike; "dense, as pretrained" is the released network itself.
"""

from tosa_jax.config import default_config

VARIANTS = ("", "scratch", "eval", "384")

REGULARISED = {
    "drop_path_rate": 0.1,
    "label_smoothing": 0.1,
    "mixup": 0.8,
    "cutmix": 1.0,
    "erase_prob": 0.25,
    "learning_rate_batch": 512,
    "checkpoint_epochs": 1.0,
    "eval_epochs": 5.0,
}
"""What every stage that trains on ImageNet has."""


def on_imagenet(config):
    """Sets DeiT's data and augmentation, and what goes with them."""
    config.log_steps = 100
    config.model.dtype = "bfloat16"
    config.data.update(
        name="imagenet2012",
        eval_split="validation",
        augment="deit",
        repeats=3,
        eval_resize="crop",
        workers="threads:16",
    )
    config.eval.batch_size = 1024


def deit(size: str, variant: str = ""):
    """The recipe for a size ("tiny", "small", "base"): "" fine-tunes ToSA from `init_from`; see VARIANTS."""
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; known: {', '.join(filter(None, VARIANTS))}")
    large = variant == "384"
    native = large and size == "base"
    config = default_config(f"deit_{size}_patch16_{384 if native else 224}")
    config.batch_size = 1024
    config.model.image_size = 384 if large else 224
    on_imagenet(config)
    if variant == "scratch":
        config.pretrain.update(
            epochs=300.0,
            learning_rate=5e-4,
            warmup_epochs=5.0,
            warmup_learning_rate=1e-6,
            min_learning_rate=1e-5,
            weight_decay=0.05,
            ema_decay=0.99996,
            **REGULARISED,
        )
    if variant != "eval":
        config.selector.update(steps=1000, warmup_steps=100, learning_rate=3e-3, weight_decay=0.0)
        config.finetune.update(
            epochs=30.0,
            learning_rate=5e-6 if large else 2e-5,
            min_learning_rate=5e-7 if large else 2e-6,
            weight_decay=1e-8 if large else 1e-6,
            ema_decay=0.9996,
            **REGULARISED,
        )
    return config
