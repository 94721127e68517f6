"""Latency and throughput of `Predictor`, pictures in memory to logits on the host, at batch 1, 8 and 64.

    python results/predictor_latency.py [--model=deit_tiny_patch16_224] [--rounds=20] > results/predictor_latency.json

Random weights, which cost the same. Dense and every budget take turns; medians and quartiles count. A call holds what a
caller waits for: uint8 array in, copy to the device, normalisation, the network, copy back.
"""

import argparse
import functools
import json
import sys

import numpy as np
from flax import nnx

import tosa_jax
from tosa_jax.cli.command import configure_jax
from tosa_jax.distributed.devices import describe_device, versions
from tosa_jax.distributed.timing import interleaved_seconds
from tosa_jax.models.cost import gmacs

BATCH_SIZES = (1, 8, 64)


def measure(model: str, keep_rates: list[float], rounds: int, **fields) -> list[dict]:
    """One record a network and batch size; `ms` of a call, images/s at the median."""
    networks = {None: tosa_jax.create_model(model, rngs=nnx.Rngs(0), **fields)}
    for rate in keep_rates:
        networks[rate] = tosa_jax.create_model(model, keep_rate=rate, rngs=nnx.Rngs(0), **fields)
    predictors = {k: tosa_jax.Predictor(x, batch_sizes=BATCH_SIZES) for k, x in networks.items()}
    records = []
    for size in BATCH_SIZES:
        config = networks[None].config
        shape = (size, config.image_size, config.image_size, config.in_chans)
        images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        runs = [functools.partial(predictor, images) for predictor in predictors.values()]
        low, median, high = np.percentile(interleaved_seconds(runs, rounds), [25, 50, 75], axis=0)
        for j, (rate, predictor) in enumerate(predictors.items()):
            records.append(
                {
                    "name": "dense" if rate is None else "tosa",
                    "keep_rate": rate,
                    "batch_size": size,
                    "gmacs": gmacs(predictor.config),
                    "ms": float(median[j] * 1e3),
                    "ms_iqr": float((high[j] - low[j]) * 1e3),
                    "img_per_sec": float(size / median[j]),
                }
            )
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--keep_rate", type=float, nargs="+", default=[0.5, 0.3])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    configure_jax()
    records = measure(args.model, args.keep_rate, args.rounds, dtype=args.dtype)
    result = {
        "command": f"python results/predictor_latency.py {' '.join(sys.argv[1:])}".strip(),
        "device": describe_device(),
        "versions": versions(),
        "model": args.model,
        "dtype": args.dtype,
        "seed": 0,
        "results": records,
    }
    json.dump(result, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
