"""big_vision's ViT by the TPU compiler's estimate, beside which this project's dense networks stand.

    git clone https://github.com/google-research/big_vision
    python results/tpu_estimate_big_vision.py --checkout=big_vision --variants S/16 B/16 [--train]
        > results/tpu_estimate_big_vision.json

The network is its own in its public form: `models/vit.py` with a class token, computing in bfloat16. The program is a
forward pass to the logits, or with --train forward and backward of the softmax cross-entropy, for one v5e chip.
"""

import argparse
import importlib
import json
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import optax

from tosa_jax.distributed.devices import versions
from tosa_jax.performance import tpu_cycles, tpu_estimate
from tosa_jax.performance.aot import tpu_devices


def load_vit(checkout: str) -> types.ModuleType:
    """Its module of ViTs. What that imports for checkpoints, TensorFlow among it, is left out."""
    sys.path.insert(0, checkout)
    for name in ("big_vision.utils", "big_vision.models.common"):
        sys.modules[name] = types.ModuleType(name)
        package, _, attribute = name.rpartition(".")
        setattr(importlib.import_module(package), attribute, sys.modules[name])
    return importlib.import_module("big_vision.models.vit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkout", required=True)
    parser.add_argument("--variants", nargs="+", default=["S/16", "B/16"])
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--train", action="store_true")
    args = parser.parse_args()
    dumps, vit = tpu_cycles.kernel_dumps(), load_vit(args.checkout)
    device = tpu_devices("v5e:2x2")[0]
    images = jax.ShapeDtypeStruct(
        (args.batch_size, args.image_size, args.image_size, 3),
        jnp.float32 if args.train else jnp.bfloat16,
    )
    labels = jax.ShapeDtypeStruct((args.batch_size,), jnp.int32)
    rows = []
    for variant in args.variants:
        network = vit.Model(
            1000, variant=variant, pool_type="tok", posemb="learn", dtype_mm="bfloat16"
        )
        params = jax.eval_shape(network.init, jax.random.key(0), images)

        def logits(params, images, network=network):
            return network.apply(params, images)[0]

        def loss(params, images, labels, logits=logits):
            found = logits(params, images).astype(jnp.float32)
            return optax.softmax_cross_entropy_with_integer_labels(found, labels).mean()

        program = (
            (jax.grad(loss), params, images, labels) if args.train else (logits, params, images)
        )
        found = tpu_estimate.cycles(*program, device=device, dumps=dumps)
        rows.append(
            {
                "name": f"big_vision ViT-{variant}",
                "batch_size": args.batch_size,
                "image_size": args.image_size,
                "train": args.train,
                "mcycles": found["cycles"] / 1e6,
                "uncounted": found["uncounted"],
            }
        )
    commit = subprocess.run(
        ["git", "-C", args.checkout, "rev-parse", "--short", "HEAD"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    command = [x for x in sys.argv[1:] if not x.startswith("--checkout")]
    result = {
        "command": f"python results/tpu_estimate_big_vision.py --checkout=big_vision {' '.join(command)}",
        "device": "one TPU v5e chip, by the compiler's estimate",
        "versions": versions() | {"big_vision": commit.stdout.strip()},
        "rows": rows,
    }
    json.dump(result, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
