"""How long a forward pass takes on a TPU by the compiler's own estimate; no TPU is needed, nothing is run.

    python results/tpu_estimate.py > results/tpu_estimate.json

The TPU compiler writes into each instruction how many cycles it expects it to take, and the record has their sum. It
compares networks with each other. It is no measurement: waiting for memory is in it only as the compiler models it.
"""

import json
import re
import sys
from importlib.metadata import version

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from tosa_jax.distributed.devices import versions
from tosa_jax.models import cost
from tosa_jax.models.factory import control_config, structure
from tosa_jax.models.params import set_params
from tosa_jax.models.vit_config import ViTConfig
from tosa_jax.performance.aot import tpu_devices
from tosa_jax.tasks import model_config

MODEL, TOPOLOGY, BATCH_SIZE, KEEP_RATE = "deit_small_patch16_224", "v5e:2x2", 128, 0.5


def estimated_cycles(config: ViTConfig, device: jax.Device) -> int:
    """Sum of the cycles that the compiler expects of a forward pass over a batch on one device."""
    graphdef, params = structure(config)
    images = jax.ShapeDtypeStruct((BATCH_SIZE, *config.image_shape, config.in_chans), config.dtype)
    params, images = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device)),
        (params, images),
    )
    forward = jax.jit(lambda params, images: set_params(graphdef, params)(images).logits)
    text = forward.trace(params, images).lower(lowering_platforms=("tpu",)).compile().as_text()
    # A kernel has no estimate, and a loop's body is counted once: neither may be in these programs.
    assert "tpu_custom_call" not in text, "the sum would miss a kernel"
    assert " while(" not in text, "the sum would count a loop's body once"
    return sum(int(found) for found in re.findall(r'"estimated_cycles":"?(\d+)', text))


def main() -> None:
    device = tpu_devices(TOPOLOGY)[0]

    def make(**fields) -> ViTConfig:
        dtypes = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
        return model_config("classification", MODEL, **dtypes, **fields)

    tosa = make(plan="selective", keep_rate=KEEP_RATE)
    one_hot = make(plan="selective", keep_rate=KEEP_RATE, gather="one_hot")
    cases = [
        ("dense", None, make()),
        ("tosa", KEEP_RATE, tosa),
        ("tosa, gather='one_hot'", KEEP_RATE, one_hot),
        ("redundancy at ToSA's multiply-adds", KEEP_RATE, control_config(tosa, "redundancy")),
    ]
    rows = []
    for name, keep_rate, config in cases:
        cycles = estimated_cycles(config, device)
        row = {"name": name, "keep_rate": keep_rate, "gmacs": cost.gmacs(config), "cycles": cycles}
        dense = rows[0] if rows else row
        rows.append(row | {
            "gmac_ratio": dense["gmacs"] / row["gmacs"], "cycle_ratio": dense["cycles"] / cycles,
        })  # fmt: skip
        print(rows[-1], file=sys.stderr, flush=True)
    json.dump({
        "command": "python results/tpu_estimate.py", "device": device.device_kind,
        "versions": versions() | {"libtpu": version("libtpu")}, "model": MODEL,
        "batch_size": BATCH_SIZE, "dtype": "bfloat16", "rows": rows,
    }, sys.stdout, indent=1)  # fmt: skip
    print()


if __name__ == "__main__":
    main()
