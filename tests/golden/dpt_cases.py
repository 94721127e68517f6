"""What the exactness of the published depth decoder is shown on: tiny networks, random weights, images.

Nothing here needs torch: weights come from NumPy by name and seed, so that the tests make the same ones as
`make_dpt.py` did and only names, shapes, configurations and depths are stored.
"""

import numpy as np

BACKBONE = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
DECODER = {"neck_hidden_sizes": [8, 12, 16, 20], "fusion_hidden_size": 16}
DINOV2 = BACKBONE | {
    "model_type": "dinov2",
    "patch_size": 14,
    "image_size": 56,
    "reshape_hidden_states": False,
}
ANYTHING = DECODER | {"patch_size": 14, "reassemble_hidden_size": 32}

CASES = {
    "depth_anything": ANYTHING | {"backbone_config": DINOV2 | {"out_indices": [1, 2, 3, 4]}},
    "depth_anything_metric": ANYTHING
    | {"depth_estimation_type": "metric", "max_depth": 20}
    | {"backbone_config": DINOV2 | {"num_hidden_layers": 5, "out_indices": [1, 2, 4, 5], "apply_layernorm": False}},
    "dpt": BACKBONE | DECODER
    | {"intermediate_size": 128, "image_size": 64, "backbone_out_indices": [0, 1, 2, 3]},
    "dpt_ignore": BACKBONE | DECODER
    | {"intermediate_size": 128, "image_size": 64, "backbone_out_indices": [0, 1, 2, 3]}
    | {"readout_type": "ignore", "layer_norm_eps": 1e-6},
}  # fmt: skip
"""Fields of transformers' configurations; the first part of a name is their `model_type`."""

SIZES = {
    # The own size; a rectangle whose grid, 5x3, is odd on both sides.
    "depth_anything": ((56, 56), (70, 42)),
    "depth_anything_metric": ((42, 56),),
    # The own size, and one whose coarsest map is a single pixel. transformers takes squares alone.
    "dpt": ((64, 64), (32, 32)),
    "dpt_ignore": ((64, 64),),
}
"""Height and width of the images of a case."""


def lifted(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Random weights with a last bias that lifts most depths above the ReLU."""
    last = {"head.conv3.bias", "head.head.4.bias"} & weights.keys()
    return weights | {name: weights[name] + 2.4 for name in last}


def image_of(size: tuple[int, int]) -> np.ndarray:
    """One normalised image [1 height width 3], float32."""
    return np.random.default_rng([0, *size]).standard_normal((1, *size, 3), np.float32)
