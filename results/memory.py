"""Temporaries at 480x640 (1201 tokens), DeiT-S, batch 8, by XLA's memory analysis; nothing is run.

    python results/memory.py > results/memory_cpu.json

A training step of the dense network and of ToSA, and ToSA's forward pass with the attention map walked whole and in
chunks of query rows.
"""

import json
import sys

from tosa_jax.distributed.devices import describe_device, versions
from tosa_jax.performance.candidates import candidate
from tosa_jax.tasks import model_config

MODEL, SIZE, BATCH_SIZE = "deit_small_patch16_224", (480, 640), 8


def main() -> None:
    rows = []
    cases = [(True, None, 0), (True, 0.5, 0), (True, 0.3, 0), (True, 0.5, 64)]
    cases += [(False, 0.5, 0), (False, 0.5, 64)]
    for train, keep_rate, chunk in cases:
        fields = {"image_size": SIZE, "map_chunk": chunk}
        if keep_rate:
            fields |= {"plan": "selective", "keep_rate": keep_rate}
        config = model_config("classification", MODEL, **fields)
        name = "tosa" if keep_rate else "dense"
        measured = candidate(name, keep_rate, config, BATCH_SIZE, train=train)
        row = {"name": name, "keep_rate": keep_rate, "map_chunk": chunk, "train": train}
        rows.append(row | {"temp_bytes": measured.temp_bytes})
        print(rows[-1], file=sys.stderr)
    json.dump({
        "command": "python results/memory.py", "device": describe_device(), "versions": versions(),
        "model": MODEL, "image_size": SIZE, "batch_size": BATCH_SIZE, "dtype": "float32", "rows": rows,
    }, sys.stdout, indent=1)  # fmt: skip
    print()


if __name__ == "__main__":
    main()
