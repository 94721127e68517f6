"""Makes families.npz here (--goldens), or measures exactness against transformers, or timm (--timm).

pip install "torch>=2.6" "transformers>=5" "timm>=1.0" && PYTHONPATH=.:tests python tests/golden/make_families.py

Float32, on the CPU, with random weights: a few minutes for all. What is measured is in
results/families_exactness.json and families_exactness_timm.json. A case of the golden file has its config.json and the
names and shapes of its weights as `save_pretrained` or timm wrote them. For each size it has what a head gives: the
projection (CLIP, EVA-02-CLIP), the pooled token (SigLIP, DINOv3), logits (DINOv2), logits or pooled patches (EVA-02);
of DINOv3 and EVA-02 all tokens too.
"""

import argparse
import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy
import timm
import torch
import transformers
from flax import nnx
from golden.family_cases import (
    CASES,
    IMAGES,
    TIMM_CASES,
    TIMM_WHOLE,
    WHOLE,
    WHOLE_IMAGES,
    image_of,
    weights_of,
)

import tosa_jax
from tosa_jax.models.params import set_params, split
from tosa_jax.models.variants import variant_config

HERE = Path(__file__).parent
jax.config.update("jax_platforms", "cpu")


def results_of(model, name: str, pixels: torch.Tensor) -> dict[str, np.ndarray]:
    """What is stored of one image: "head", and of DINOv3 "tokens" too."""
    resampled = {} if "DINOv3" in name or "Dinov2" in name else {"interpolate_pos_encoding": True}
    if name in ("CLIPModel", "SiglipModel"):
        out = model.get_image_features(pixel_values=pixels, **resampled)
        out = out if isinstance(out, torch.Tensor) else out.pooler_output
        return {"head": out.numpy()}
    out = model(pixel_values=pixels, **resampled)
    for field in ("image_embeds", "logits", "pooler_output"):
        if getattr(out, field, None) is not None:
            tokens = {"tokens": out.last_hidden_state.numpy()} if "DINOv3" in name else {}
            return {"head": getattr(out, field).numpy()} | tokens
    raise ValueError(f"{name} gives nothing that is stored")


def written(name: str, fields: dict, folder: Path) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """transformers' network with random weights, which `folder` then holds, and the shapes of its weights by name."""
    model_class = getattr(transformers, name)
    model_class(model_class.config_class(**fields)).save_pretrained(folder)
    file = folder / "model.safetensors"
    shapes = {name: x.shape for name, x in safetensors.numpy.load_file(file).items()}
    safetensors.numpy.save_file(weights_of(shapes), file, {"format": "pt"})
    return model_class.from_pretrained(folder, attn_implementation="eager").eval(), shapes


def written_by_timm(name: str, args: dict, folder: Path) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """The same of timm's network `name`."""
    model = timm.create_model(name, **args)
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    weights = weights_of(shapes)
    model.load_state_dict({name: torch.from_numpy(x) for name, x in weights.items()})
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    safetensors.numpy.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"model_args": args}
    (folder / "config.json").write_text(json.dumps(config))
    return model.eval(), shapes


def computed(model: Any, name: str, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """`results_of` the image of (height, width) pixels."""
    pixels = torch.from_numpy(image_of(size).transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        if name in timm.list_models():
            model = copy.deepcopy(model)  # its positions are resampled in place
            model.set_input_size(size)
            return {"head": model(pixels).numpy(), "tokens": model.forward_features(pixels).numpy()}
        return results_of(model, name, pixels)


def make(case: str, folder: Path) -> dict[str, np.ndarray]:
    """What is stored of a case, whose network is written to `folder` on the way."""
    name = case.partition("/")[0]
    write = written_by_timm if case in TIMM_CASES else written
    model, shapes = write(name, (CASES | TIMM_CASES)[case], folder)
    stored = {
        f"{case}:config": np.array((folder / "config.json").read_text()),
        f"{case}:shapes": np.array(json.dumps(shapes)),
    }
    for height, width in IMAGES:
        for what, found in computed(model, name, (height, width)).items():
            print(case, what, found.shape, float(found.std()))
            stored[f"{case}:{height}x{width}:{what}"] = found
    return stored


def make_goldens() -> None:
    """Writes the golden file."""
    stored: dict[str, np.ndarray] = {}
    for case in CASES | TIMM_CASES:
        with tempfile.TemporaryDirectory() as folder:
            stored |= make(case, Path(folder))
    np.savez_compressed(HERE / "families.npz", **stored)


def measure(variant: str, folder: Path) -> dict[str, float]:
    """The largest difference of what the head gives between the reference and this project, by size."""
    name, theirs, ours = (WHOLE | TIMM_WHOLE)[variant]
    write = written_by_timm if variant in TIMM_WHOLE else written
    reference, _ = write(name, theirs, folder)
    differences = {}
    own = variant_config(variant, **ours).image_shape
    for size in dict.fromkeys((own, *WHOLE_IMAGES)):
        model = tosa_jax.create_model(variant, image_size=size, rngs=nnx.Rngs(0), **ours)
        graphdef, params = split(tosa_jax.load_pretrained(model, folder))
        run = jax.jit(lambda p, x, graphdef=graphdef: set_params(graphdef, p)(x).predictions)
        (found,) = run(params, image_of(size)).values()
        expected = computed(reference, name, size)["head"]
        differences["x".join(map(str, size))] = float(np.abs(found - expected).max())
    return differences


def measure_all(by_timm: bool) -> None:
    """Writes the measured differences to transformers, or to timm."""
    library, variants = (timm, TIMM_WHOLE) if by_timm else (transformers, WHOLE)
    cases = {}
    for variant in variants:
        with tempfile.TemporaryDirectory() as folder:
            cases[variant] = {
                "reference": variants[variant][0],
                "differences": measure(variant, Path(folder)),
            }
        print(variant, cases[variant], flush=True)
    result = {
        "what": f"max |difference| to {library.__name__} of what the head gives, float32, CPU, random weights, "
        "one image; keys are heightxwidth (tests/golden/family_cases.py)",
        "command": "PYTHONPATH=.:tests python tests/golden/make_families.py" + " --timm" * by_timm,
        "versions": {m.__name__: m.__version__ for m in (jax, torch, library, np)},
        "limit": 2e-5,
        "cases": cases,
    }
    out = HERE.parents[1] / f"results/families_exactness{'_timm' * by_timm}.json"
    out.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--goldens", action="store_true", help="make the test file instead")
    parser.add_argument("--timm", action="store_true", help="measure against timm")
    args = parser.parse_args()
    make_goldens() if args.goldens else measure_all(args.timm)


if __name__ == "__main__":
    main()
