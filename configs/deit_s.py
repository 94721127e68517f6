"""DeiT-S on ImageNet: released weights -> selectors -> 30 epochs of fine-tuning at keep .5 -> evaluation.

    python -m tosa_jax.prepare --config=configs/deit_s.py --config.data.source_dir=DIR_OF_THE_TWO_TAR_FILES
    python -m tosa_jax.main --config=configs/deit_s.py --config.init_from=deit_small_patch16_224-cd65a155.pth

`:eval` scores the weights, `:384` works at 384 px, `:scratch` pretrains 300 epochs first and needs no weights. The
recipe, its sources and published accuracies: configs/deit_recipe.py. Not run on ImageNet yet: there is no result file.
"""

from deit_recipe import deit


def get_config(variant: str = ""):
    return deit("small", variant)
