"""Makes dpt.npz here: depths of transformers' DPT and Depth Anything with random weights, in float32 on the CPU.

pip install "torch>=2.6" "transformers>=5" && python tests/golden/make_dpt.py

A case has its config.json and the names and shapes of its weights as `save_pretrained` wrote them, and a depth a size.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
import transformers
from dpt_cases import CASES, SIZES, image_of, lifted
from pretrained_cases import random_weights

HERE = Path(__file__).parent


def make(case: str, folder: Path) -> dict[str, np.ndarray]:
    """What is stored of a case, whose network is written to `folder` on the way."""
    kind = "DepthAnything" if case.startswith("depth_anything") else "DPT"
    config = getattr(transformers, f"{kind}Config")(**CASES[case])
    model_class = getattr(transformers, f"{kind}ForDepthEstimation")
    model_class(config).save_pretrained(folder)
    file = folder / "model.safetensors"
    shapes = {name: x.shape for name, x in safetensors.numpy.load_file(file).items()}
    weights = lifted(random_weights(shapes))
    safetensors.numpy.save_file(weights, file, {"format": "pt"})
    model = model_class.from_pretrained(folder, attn_implementation="eager").eval()
    stored = {
        f"{case}/config": np.array((folder / "config.json").read_text()),
        f"{case}/shapes": np.array(json.dumps(shapes)),
    }
    for height, width in SIZES[case]:
        pixels = torch.from_numpy(image_of((height, width)).transpose(0, 3, 1, 2).copy())
        with torch.no_grad():
            depth = model(pixel_values=pixels).predicted_depth.numpy()
        assert depth.shape == (1, height, width)
        print(case, depth.shape, f"{(depth > 0).mean():.2f} above 0", depth.min(), depth.max())
        stored[f"{case}/{height}x{width}"] = depth
    return stored


def main() -> None:
    """Writes the golden file."""
    stored: dict[str, np.ndarray] = {}
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            stored |= make(case, Path(folder))
    np.savez_compressed(HERE / "dpt.npz", **stored)


if __name__ == "__main__":
    main()
