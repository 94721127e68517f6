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


def resample_positions() -> None:
    """A grid of 6x6 positions on other grids, both ways."""
    before = random_weights({"positions": (1, 36, 3)})["positions"]
    grid = torch.from_numpy(before).reshape(1, 6, 6, 3).permute(0, 3, 1, 2)
    resampled = {"before": before}
    for antialias in (False, True):
        for new in (3, 4, 10):
            after = torch.nn.functional.interpolate(
                grid, size=(new, new), mode="bicubic", antialias=antialias
            )
            key = f"{'bicubic_antialias' if antialias else 'bicubic'}/{new}"
            resampled[key] = after.permute(0, 2, 3, 1).reshape(1, new * new, 3).numpy()
    np.savez(HERE / "torch_resampled.npz", **resampled)


if __name__ == "__main__":
    make_torch_files()
    resample_positions()
