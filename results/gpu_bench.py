"""DeiT-S and DeiT-B on a GPU beside timm's under `torch.compile`: 224 and 384 px, forward and training, bfloat16.

    python results/gpu_bench.py [--name=h100] [--batch_size 64 256]

Writes `bench_deit_{s,b}_{224,384}[_train]_NAME.{json,md,png}` into `results/`, one after the other. Most of the time
goes to compilation, a minute for each network and batch size. What does not fit is left out, with the reason.
"""

import argparse
import itertools
import subprocess
import sys

MODELS = {"deit_s": "deit_small_patch16_224", "deit_b": "deit_base_patch16_224"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="gpu")
    parser.add_argument("--batch_size", nargs="+", default=["64", "256"])
    args = parser.parse_args()
    status = 0
    for (short, model), size, train in itertools.product(MODELS.items(), (224, 384), (False, True)):
        name = "_".join([short, str(size), *(["train"] if train else []), args.name])
        command = [
            sys.executable, "-m", "tosa_jax.bench", f"--model={model}", f"--image_size={size}",
            "--batch_size", *args.batch_size, "--dtype=bfloat16", "--keep_rate=0.5",
            "--controls", "random", "previous", "redundancy", "--against", "timm",
            "--sweep", f"--name={name}", *(["--train"] if train else []),
        ]  # fmt: skip
        # A process each: what one leaves on the device does not weigh on the next.
        status = max(status, subprocess.run(command, check=False).returncode)
    return status


if __name__ == "__main__":
    sys.exit(main())
