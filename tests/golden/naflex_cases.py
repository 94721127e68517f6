"""What the exactness of SigLIP 2's NaFlex is shown on: tiny networks, images of several proportions in one batch."""

import numpy as np
from golden.family_cases import SIZES, TEXT

VISION = SIZES | {"intermediate_size": 80, "patch_size": 8, "num_patches": 16}
CASES = {
    "Siglip2VisionModel": VISION,
    "Siglip2Model": {"vision_config": VISION, "text_config": TEXT},
}
"""transformers' class, and fields of its configuration."""

TIMM_CASES = {
    "naflexvit_base_patch16_siglip": {
        "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "mlp_ratio": 2.5, "pos_embed_grid_size": (4, 4)
    }
}  # fmt: skip
"""timm's name, and what its `create_model` gets."""

MAX_PATCHES = 20
GRIDS = ((4, 5), (2, 3), (1, 7), (4, 4), (9, 2))
"""Rows and columns of the patches of each image of the batch."""

WHOLE_GRIDS = ((16, 16), (9, 28), (32, 8), (1, 200))
"""The same for the released size, of at most 256 patches."""

SIZES_OF_IMAGES = [
    (480, 640), (640, 480), (333, 500), (17, 1000), (1, 1), (16, 16), (4000, 30), (224, 224), (75, 1)
]  # fmt: skip
SEARCHES = [
    (*size, *limit) for size in SIZES_OF_IMAGES for limit in ((16, 256), (16, 1024), (14, 49))
]
"""Height and width of an image, patch size, most patches."""


def patches_of(grids: tuple[tuple[int, int], ...], most: int, side: int) -> np.ndarray:
    """Normalised patches [b most side*side*3] of images and, where one has fewer, of noise; float32."""
    return np.random.default_rng(0).standard_normal((len(grids), most, side * side * 3), np.float32)


def picture() -> np.ndarray:
    """uint8 [50 31 3]."""
    return np.random.default_rng(1).integers(0, 256, (50, 31, 3), np.uint8)
