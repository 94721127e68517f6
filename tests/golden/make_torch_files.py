"""Makes torch_*: small files that torch.save wrote, and positions that F.interpolate resampled.

pip install "torch>=2.6" && python tests/golden/make_torch_files.py
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from pretrained_cases import random_weights

HERE = Path(__file__).parent


def make_torch_files() -> None:
    """Small files that torch.save wrote, in the forms that releases have."""
    torch.manual_seed(0)
    base = torch.arange(24, dtype=torch.float32)
    state = {
        "plain": base.reshape(4, 6) / 8,
        "view": base.reshape(4, 6).t()[1:3],  # shares its storage, strided
        "half": base.half(),
        "bfloat16": base.bfloat16() / 8,
        "double": base[:3].double(),
        "scalar": torch.tensor(7),
        "parameter": torch.nn.Parameter(base[:5].clone()),
        "empty": torch.zeros(0, 3),
    }
    training = {"model": state, "epoch": 3, "args": argparse.Namespace(lr=1.0)}
    training["optimizer"] = {"step": base}
    torch.save(training, HERE / "torch_zip.pth")
    torch.save(training, HERE / "torch_legacy.pth", _use_new_zipfile_serialization=False)
    expected = {name: x.detach().float().numpy() for name, x in state.items()}
    np.savez(HERE / "torch_expected.npz", **expected)


WAYS = {
    "bicubic": {"mode": "bicubic"},
    "bicubic_antialias": {"mode": "bicubic", "antialias": True},
    "bicubic_offset": {"mode": "bicubic"},
    "bilinear": {"mode": "bilinear"},
}


def resample_positions() -> None:
    """A grid of 6x6 positions on other grids, in each of `WAYS`; computed in float64, stored as float32."""
    before = random_weights({"positions": (1, 36, 3)})["positions"]
    grid = torch.from_numpy(before).double().reshape(1, 6, 6, 3).permute(0, 3, 1, 2)
    resampled = {"before": before}
    for how, options in WAYS.items():
        for new in (3, 4, 10):
            # DINOv2 gives a factor, not a size: PyTorch then steps by that factor, not by the ratio of the sizes.
            scale = ((new + 0.1) / 6,) * 2
            size = {"scale_factor": scale} if how == "bicubic_offset" else {"size": (new, new)}
            after = torch.nn.functional.interpolate(grid, **size, **options)
            after = after.permute(0, 2, 3, 1).reshape(1, new * new, 3)
            resampled[f"{how}/{new}"] = after.float().numpy()
    np.savez(HERE / "torch_resampled.npz", **resampled)


if __name__ == "__main__":
    make_torch_files()
    resample_positions()
