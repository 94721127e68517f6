"""Find how many tokens each layer of a pretrained network should keep, on a folder of pictures. No labels, no training.

    python -m tosa_jax.budget --model=NAME --weights=FILE --images=DIR --target .75 .65 [--method=redundancy]
    python -m tosa_jax.budget --weights=FOLDER --images=DIR --target .65      files that state their network

For each share of the dense network's cost it writes a plan file, OUT/MODEL_METHOD_TARGET.json, for
`create_model(NAME, plan="FILE.json")`, recipes (--config.model.plan=FILE.json) and predict --plan. The counts are those
whose final tokens are nearest to the dense network's (`docs/budgets.md`), and so are the method's settings where it has
several. Costs are multiply-adds of the whole network, as in `tosa_jax.compare`, or with --cost=time the time of its
layers, measured on this device. Exit status: 0 done, 2 bad input, 130 stopped by SIGINT.
"""

import argparse
import functools
import random
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tosa_jax.cli import flags
from tosa_jax.cli.command import configure_jax, run_command
from tosa_jax.data.decoding import BadImageError
from tosa_jax.data.image_files import find_images, read_ahead
from tosa_jax.distributed.devices import describe_device, versions
from tosa_jax.errors import DataError
from tosa_jax.inference import loading
from tosa_jax.models import cost
from tosa_jax.models.budget_search import COSTS, READ, BudgetSearch, Found
from tosa_jax.models.method import METHODS
from tosa_jax.models.plan_file import write_plan
from tosa_jax.models.vit_config import check, check_choice
from tosa_jax.tasks import TASKS


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (without the program's name); returns the exit status."""
    return run_command(lambda: _main(parse_arguments(argv)))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses and checks the arguments. Raises ConfigError."""
    parser = flags.ArgumentParser(
        prog="python -m tosa_jax.budget",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--model",
        help="name of a variant, as in timm, where the files of --weights do not state it",
    )
    add(
        "--weights",
        required=True,
        help="what `tosa_jax.load` reads: a file, a folder, hf:OWNER/NAME",
    )
    add("--selectors", help="file of selectors, for --method=tosa")
    add("--task", choices=list(TASKS), help="default: as the files state, else classification")
    add("--images", required=True, nargs="+", help="pictures: files, folders or globs")
    add("--method", default="redundancy", help="a method of the house that has counts")
    add("--target", type=float, nargs="+", required=True, help="shares of the dense cost")
    add("--read", choices=READ, default="both", help="which final tokens are compared")
    add("--cost", choices=COSTS, default="gmacs")
    add("--refine", action="store_true", help="let layers exchange tokens too; some hundred trials")
    add("--count", type=int, default=32, help="pictures that are read, at most")
    add("--seed", type=int, default=0, help="which pictures, where there are more")
    add("--image_size", type=int, nargs="+", help="side, or height and width")
    add("--out", type=Path, default=Path("plans"), metavar="DIR")
    args = parser.parse_args(argv)
    check_choice("--method", args.method, METHODS)
    check(METHODS[args.method].has_budget, f"--method={args.method} has no counts to search for")
    check(args.count >= 1, f"--count={args.count} must be at least 1")
    for share in args.target:
        check(0 < share < 1, f"--target={share} is not in (0, 1)")
    return args


def _main(args: argparse.Namespace) -> int:
    configure_jax()
    name, loaded = _load(args)
    images, used = _images(args, loaded)
    say = functools.partial(print, flush=True)  # a search takes minutes
    search = BudgetSearch(
        loaded["model"], images, read=args.read, cost=args.cost, refine=args.refine, on_message=say
    )
    args.out.mkdir(parents=True, exist_ok=True)
    for share in args.target:
        found = search.run(share)
        path = args.out / f"{name}_{args.method}_{share:g}.json"
        write_plan(path, found.config, _facts(args, name, found, used))
        say(
            f"{path}: {found.share:.3f} of the dense network's cost, {cost.gmacs(found.config):.3f} GMACs an image; "
            f"error {found.error:.5f}, {found.start[1]} schedule {found.start[0]:.5f}; {found.seconds:.0f} s, "
            f"{found.trials} schedules"
        )
    return 0


def _load(args: argparse.Namespace) -> tuple[str, loading.LoadedModel]:
    """A name for files, and the network with its preprocessing and the method's layers."""
    method = METHODS[args.method]
    fields: dict[str, Any] = {"plan": method.plan, **method.fields}
    if args.image_size:
        fields["image_size"] = flags.image_size(args.image_size)
    if args.task:
        fields["task"] = args.task
    name = args.model or Path(args.weights).resolve().name.removesuffix(".safetensors")
    parts = args.weights, args.model or "", args.selectors
    return name, loading.load(*parts, 0.5, None, print, **fields)


def _images(
    args: argparse.Namespace, loaded: loading.LoadedModel
) -> tuple[Float[Array, "b h w c"], list[str]]:
    """Normalised images, and the names of their files."""
    files = find_images(args.images)
    random.Random(args.seed).shuffle(files)
    size, arrays, names = loaded["model"].config.image_shape, [], []
    for path, array in read_ahead(files, loaded["form"].decode, ahead=4):
        if isinstance(array, BadImageError):
            print(f"left out: {path}: {array}")
            continue
        check(
            array.shape[:2] == size,
            f"{path} is {array.shape[0]}x{array.shape[1]} pixels, but counts are searched for images of "
            f"{size[0]}x{size[1]} (height x width): bring all pictures to that size",
        )
        arrays.append(array)
        names.append(path.name)
        if len(arrays) == args.count:
            break
    if not arrays:
        raise DataError("none of the files could be read as an image")
    mean, std = (np.asarray(loaded[name], np.float32) for name in ("mean", "std"))
    return jnp.asarray((np.stack(arrays) / np.float32(255) - mean) / std), names


def _facts(args: argparse.Namespace, name: str, found: Found, used: list[str]) -> dict[str, Any]:
    size = np.atleast_1d(found.config.image_size).tolist()
    words = [f"--weights={Path(args.weights).name}", "--images=DIR", f"--method={args.method}"]
    words += [f"--model={args.model}"] if args.model else []
    words += ["--image_size", *map(str, size), f"--read={args.read}", f"--cost={args.cost}"]
    words += ["--refine"] if args.refine else []
    words += ["--target", *map(str, args.target), f"--count={args.count}", f"--seed={args.seed}"]
    return {
        "command": f"python -m tosa_jax.budget {shlex.join(words)}",
        "model": name, "image_size": found.config.image_size, "counts": found.counts,
        "share": found.share, "gmacs": cost.gmacs(found.config), "cost": args.cost, "read": args.read,
        "error": found.error, "start": {"schedule": found.start[1], "error": found.start[0]},
        "trials": found.trials, "seconds": round(found.seconds, 1), "device": describe_device(),
        "versions": versions(), "images": used,
    }  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
