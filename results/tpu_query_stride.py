"""Cycles of attention kernels whose selector reads every row of the map, or fewer, by the TPU compiler.

    python results/tpu_query_stride.py > results/tpu_query_stride.json

One layer, v5e, batch 64, bfloat16. `plain` is attention without a selector.
"""

import json
import sys
from typing import Any

import jax
import jax.numpy as jnp

from tosa_jax.performance import tpu_cycles

DUMPS = tpu_cycles.kernel_dumps()  # before the compiler is loaded

from tosa_jax.distributed.devices import versions  # noqa: E402
from tosa_jax.ops import tpu_attention  # noqa: E402
from tosa_jax.performance.aot import tpu_devices  # noqa: E402
from tosa_jax.performance.tpu_estimate import cycles  # noqa: E402

LAYERS = {"DeiT-S, 224 px": (197, 6), "DeiT-B, 224 px": (197, 12), "DeiT-S, 384 px": (577, 6)}
BATCH, HEAD_DIM, STRIDES = 64, 64, (1, 2, 4, 8)


def kernel(function: Any, *shapes: tuple[int, ...]) -> int:
    """Cycles of the one kernel of a function."""
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    found = cycles(function, *arguments, device=tpu_devices("v5e:2x2")[0], dumps=DUMPS)
    (number,) = found["kernel_cycles"].values()
    return number


def main() -> None:
    rows = []
    for name, (tokens, heads) in LAYERS.items():
        hidden, shape = 2 * heads, (BATCH, tokens, heads, HEAD_DIM)
        layers = (heads, hidden), (hidden,), (hidden, heads)

        def selecting(qkv, *layers, stride, shape=shape):
            return tpu_attention.attention_and_selector_sums(*parts(qkv, shape), *layers, stride)

        def plain(qkv, shape=shape):
            return tpu_attention.attention(*parts(qkv, shape))

        product = (BATCH, tokens, 3 * heads * HEAD_DIM)
        row = {"layer": name, "plain": kernel(plain, product)}
        for stride in STRIDES:

            def form(*arrays, stride=stride, selecting=selecting):
                return selecting(*arrays, stride=stride)

            row[f"stride_{stride}"] = kernel(form, product, *layers)
        rows.append(row)
        print(row, file=sys.stderr)
    json.dump({
        "command": "python results/tpu_query_stride.py", "device": "one TPU v5e chip, by the compiler's estimate",
        "versions": versions(), "batch_size": BATCH, "results": rows,
    }, sys.stdout, indent=1)  # fmt: skip
    print()


def parts(qkv: jax.Array, shape: tuple[int, ...]) -> list[jax.Array]:
    """Queries, keys and values of their common product."""
    return [x.reshape(shape) for x in jnp.split(qkv, 3, axis=2)]


if __name__ == "__main__":
    main()
