"""Makes pretrained.npz here (--goldens), or measures results/pretrained_exactness.json.

    pip install "torch>=2.6" "transformers>=5" && python tests/golden/make_pretrained.py [--only REGEX]

One case at a time on the CPU: at most 9 GB, and 17 minutes of processor time for all of them.
"""

import argparse
import json
import re
import tempfile
from pathlib import Path

import jax
import numpy as np
import torch
import transformers
from pretrained_cases import (
    GOLDEN,
    MEASURED,
    case_fields,
    hf_fields,
    limit,
    other_size,
    our_logits,
    random_weights,
    timm_shapes,
    ways,
)
from torch_reference import hf_model, reference

from tosa_jax.models.variants import variant_config

HERE = Path(__file__).parent
jax.config.update("jax_platforms", "cpu")
COMMAND = "python tests/golden/make_pretrained.py"


def measure(case: str, fields: dict, store: dict[str, np.ndarray]) -> dict[str, float]:
    """Largest logit difference by way and size; `store` receives the reference's logits."""
    name, fields = case_fields(case, fields)
    config = variant_config(name, **fields)
    weights = random_weights(timm_shapes(config))
    differences = {}
    for way in ways(config):
        own = {key: value for key, value in fields.items() if key != "image_size"}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "timm.pth"
            if way == "timm":
                torch.save({"model": {k: torch.from_numpy(v) for k, v in weights.items()}}, path)
            else:
                own |= hf_fields(config)
                path = Path(folder)
                hf_model(config, weights, own["norm_eps"]).save_pretrained(path)
            for size in (config.image_size, other_size(config)):
                expected = reference(config, weights, size, way)
                found = our_logits(name, size, path, weights, **own)
                differences[f"{way}_{size}"] = float(np.abs(found - expected).max())
                store[f"{case}/{way}/{size}"] = expected
    return differences


def make_goldens() -> None:
    """Writes the reference's logits for the tests."""
    store: dict[str, np.ndarray] = {}
    for case, fields in GOLDEN.items():
        print(case, measure(case, fields, store), flush=True)
    np.savez_compressed(HERE / "pretrained.npz", **store)


def measure_all(only: str, out: Path) -> None:
    """Measures the cases that `only` finds and writes them beside the others in `out`."""
    cases = json.loads(out.read_text())["cases"] if out.exists() else {}
    versions = {m.__name__: m.__version__ for m in (jax, torch, transformers, np)}
    for case, fields in MEASURED.items():
        if not re.search(only, case):
            continue
        name, given = case_fields(case, fields)
        cases[case] = {
            "depth": variant_config(name, **given).depth,
            "limit": limit(case),
            "differences": measure(case, fields, {}),
        }
        print(case, cases[case], flush=True)
        result = {
            "what": "max |logit difference| to PyTorch, float32, CPU, random weights, one image; "
            "keys are way_imagesize (tests/golden/pretrained_cases.py)",
            "command": COMMAND,
            "versions": versions,
            "cases": {case: cases[case] for case in MEASURED if case in cases},
        }
        out.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=".", help="regular expression of the cases to measure")
    parser.add_argument(
        "--out", type=Path, default=HERE.parents[1] / "results/pretrained_exactness.json"
    )
    parser.add_argument("--goldens", action="store_true", help="make the test files instead")
    args = parser.parse_args()
    if args.goldens:
        make_goldens()
    else:
        measure_all(args.only, args.out)


if __name__ == "__main__":
    main()
