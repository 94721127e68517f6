"""Token Selective Attention (ToSA) for vision transformers in JAX.

    model = tosa_jax.create_model("deit_small_patch16_224", keep_rate=0.5, rngs=nnx.Rngs(0))
    out = model(images)      # images [b, 224, 224, 3], normalised

Training, from the command line: `python -m tosa_jax.main --config=configs/digits.py`.
"""

from tosa_jax.models.depth import DepthConfig
from tosa_jax.models.networks import create_model
from tosa_jax.models.pretrained import load_pretrained, save_selectors, save_weights
from tosa_jax.models.vit import Output, VisionTransformer
from tosa_jax.models.vit_config import VARIANTS, ViTConfig, alternate

__all__ = [
    "VARIANTS",
    "DepthConfig",
    "Output",
    "ViTConfig",
    "VisionTransformer",
    "alternate",
    "create_model",
    "load_pretrained",
    "save_selectors",
    "save_weights",
]
