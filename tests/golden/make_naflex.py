"""Makes naflex.npz here (--goldens), or measures the exactness of a released size against transformers.

pip install "torch>=2.6" "transformers>=5" "timm>=1.0.31" && PYTHONPATH=.:tests python tests/golden/make_naflex.py

Float32, on the CPU, with random weights: a minute. What is measured is in results/naflex_exactness.json. A case of the
golden file has its config.json, the names and shapes of its weights, and of a batch of images of several proportions
the pooled token of each ("head") and all tokens, those of padding too. Of transformers' image processor it has the
sizes that images are resized to, and the patches of one picture.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import timm
import torch
import transformers
from flax import nnx
from golden.make_families import written, written_by_timm
from golden.naflex_cases import (
    CASES,
    GRIDS,
    MAX_PATCHES,
    SEARCHES,
    TIMM_CASES,
    WHOLE_GRIDS,
    patches_of,
    picture,
)
from transformers.models.siglip2.image_processing_pil_siglip2 import (
    Siglip2ImageProcessorPil,
    get_image_size_for_max_num_patches,
)

import tosa_jax
from tosa_jax.models.params import set_params, split

HERE = Path(__file__).parent


def computed(
    model: Any, patches: np.ndarray, grids: tuple[tuple[int, int], ...]
) -> dict[str, np.ndarray]:
    """The pooled tokens [b d], and the tokens [b n d] after the last norm."""
    most = patches.shape[1]
    counts = np.prod(grids, axis=1)
    present = torch.from_numpy(np.arange(most)[None] < counts[:, None])
    pixels = torch.from_numpy(patches)
    with torch.no_grad():
        if isinstance(model, timm.models.naflexvit.NaFlexVit):
            places = [np.stack(np.divmod(np.arange(most), columns), axis=1) for _, columns in grids]
            coord = torch.from_numpy(np.where(present.numpy()[..., None], np.stack(places), 0))
            given = {"patch_coord": coord, "patch_valid": present}
            tokens = model.forward_features(pixels, **given)["patches"]
            return {"head": model(pixels, **given).numpy(), "tokens": tokens.numpy()}
        tower = getattr(model, "vision_model", model)
        out = tower(pixels, pixel_attention_mask=present.int(), spatial_shapes=torch.tensor(grids))
    return {"head": out.pooler_output.numpy(), "tokens": out.last_hidden_state.numpy()}


def make_goldens() -> None:
    """Writes the golden file."""
    stored: dict[str, np.ndarray] = {}
    patches = patches_of(GRIDS, MAX_PATCHES, 8)
    for case, fields in (CASES | TIMM_CASES).items():
        with tempfile.TemporaryDirectory() as folder:
            write = written_by_timm if case in TIMM_CASES else written
            model, shapes = write(case, fields, Path(folder))
            stored[f"{case}:config"] = np.array((Path(folder) / "config.json").read_text())
            stored[f"{case}:shapes"] = np.array(json.dumps(shapes))
            for what, found in computed(model, patches, GRIDS).items():
                print(case, what, found.shape, float(found.std()))
                stored[f"{case}:{what}"] = found
    stored["sizes"] = np.array([get_image_size_for_max_num_patches(*given) for given in SEARCHES])
    processor = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=MAX_PATCHES)
    seen = processor(picture(), return_tensors="np")
    stored |= {"patches": seen["pixel_values"][0], "grid": seen["spatial_shapes"][0]}
    stored["processor"] = np.array(processor.to_json_string())
    np.savez_compressed(HERE / "naflex.npz", **stored)


def measure() -> None:
    """Writes the measured difference of the pooled tokens and of the tokens that are no padding, by grid."""
    patches = patches_of(WHOLE_GRIDS, 256, 16)
    with tempfile.TemporaryDirectory() as folder:
        reference, _ = written("Siglip2VisionModel", {}, Path(folder))
        model = tosa_jax.create_model("naflexvit_base_patch16_siglip", rngs=nnx.Rngs(0))
        tosa_jax.load_pretrained(model, folder)
    graphdef, params = split(model)
    strips = patches.reshape(len(patches), -1, 16, 3)
    run = jax.jit(lambda p, x, grids: set_params(graphdef, p)(x, grids=grids))
    out = run(params, strips, np.array(WHOLE_GRIDS, np.int32))
    expected = computed(reference, patches, WHOLE_GRIDS)
    differences = {}
    for i, (rows, columns) in enumerate(WHOLE_GRIDS):
        count = rows * columns
        differences[f"{rows}x{columns}"] = {
            "head": float(np.abs(out.features[i] - expected["head"][i]).max()),
            "tokens": float(np.abs(out.tokens[i] - expected["tokens"][i])[:count].max()),
        }
    result = {
        "what": "max |difference| to transformers of SigLIP 2's NaFlex, base, float32, CPU, random weights; four "
        "images in one batch of 256 patches each; keys are rows x columns of patches (tests/golden/naflex_cases.py)",
        "command": "PYTHONPATH=.:tests python tests/golden/make_naflex.py",
        "versions": {m.__name__: m.__version__ for m in (jax, torch, transformers, np)},
        "limit": 2e-5,
        "differences": differences,
    }
    print(json.dumps(result, indent=1))
    out = HERE.parents[1] / "results" / "naflex_exactness.json"
    out.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--goldens", action="store_true", help="make the test file instead")
    make_goldens() if parser.parse_args().goldens else measure()


if __name__ == "__main__":
    main()
