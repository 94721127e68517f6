"""Times models to compare saved time with saved multiply-adds; with --data, measures the input pipeline.

    python -m tosa_jax.bench --model=deit_small_patch16_224 --keep_rate .7 .5 .3 [--train] [--json]
    python -m tosa_jax.bench --model=deit_small_patch16_224 --against=transformers --controls random
    python -m tosa_jax.bench --model=deit_small_patch16_224 --batch_size 16 64 --sweep [--out=results] [--name=NAME]
    python -m tosa_jax.bench --model=deit_small_patch16_224 --task=depth --image_size 480 640 --keep_rate .7 .5 .3
    python -m tosa_jax.bench --model=deit_small_patch16_224 --estimate=v5e --batch_size 64 [--train] [--sweep]
    python -m tosa_jax.bench --data --config=configs/deit_s.py [--images_per_second=2500] [--json]

Weights and images are random. The dense model and ToSA at every keep rate run in turn, round after round; the medians
are reported. With --estimate nothing is run: the TPU compiler says how many cycles it expects on one chip, on any Linux
machine with libtpu. Only --data reads a data set; the other forms with a device need neither TFDS nor Grain.
`docs/bench.md` explains the numbers.
Exit status: 0 done, 2 bad input.
"""

import argparse
import functools
import json
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from tosa_jax.cli import flags
from tosa_jax.cli.command import run_command
from tosa_jax.distributed.devices import describe_device, versions
from tosa_jax.errors import ConfigError
from tosa_jax.models.method import controls
from tosa_jax.models.options import OPTIONS
from tosa_jax.models.variants import variant_config
from tosa_jax.paths import as_path, write_atomically
from tosa_jax.performance import results, torch_baselines
from tosa_jax.performance.benchmark import measure, measure_batch_sizes, passes_in_flight
from tosa_jax.performance.results import format_records


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    return run_command(lambda: _bench(argv, *parse_arguments(argv)))


def parse_arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Parses the arguments; returns them and those of the form --config.FIELD=VALUE. Raises ConfigError."""
    parser = flags.ArgumentParser(
        prog="python -m tosa_jax.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="deit_small_patch16_224", help="name of a variant, as in timm")
    add("--keep_rate", type=float, nargs="+", default=[0.5])
    add("--batch_size", type=int, nargs="+", default=[16])
    _add_model_fields(parser)
    add("--train", action="store_true", help="time whole training steps")
    add(
        "--controls",
        nargs="+",
        default=[],
        help=f"at the same budgets: {', '.join(controls(timed=True))}",
    )
    add(
        "--against",
        nargs="+",
        default=[],
        help="dense baselines in PyTorch: timm, transformers or none",
    )
    add("--torch_compile", default="", help=f"on a GPU, one of {', '.join(torch_baselines.MODES)}")
    add("--estimate", default="", help="cycles by the TPU compiler, for v5e or v6e")
    add("--rounds", type=int, default=10)
    add("--sweep", action="store_true", help="write bench_NAME.json, .md and .png into --out")
    add("--out", default="results", help="folder of --sweep's files")
    add("--name", default="", help="NAME of these files; default: model, dtype and mode")
    add("--data", action="store_true", help="measure the input pipeline of --config instead")
    add("--config", help="a recipe, for --data")
    add(
        "--images_per_second",
        type=float,
        default=2500.0,
        help="images/s that an accelerator consumes, for --data",
    )
    add("--json", action="store_true", help="print JSON instead of a table")
    args, rest = parser.parse_known_args(argv)
    if stray := [a for a in rest if not (args.data and a.startswith("--config."))]:
        raise ConfigError(f"command line: unexpected argument {stray[0]!r}; see --help")
    if args.data and not args.config:
        raise ConfigError("command line: --data needs --config=FILE")
    return args, rest


def _add_model_fields(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--task", default="classification", help="or depth")
    add(
        "--image_size",
        type=int,
        nargs="+",
        help="side, or height and width, in pixels; default: the model's",
    )
    add("--dtype", default="float32")
    add(
        "--map_chunk",
        type=int,
        default=0,
        help="query rows of an attention map computed at a time; 0: all",
    )
    add("--gather", default="indices", help="or one_hot")
    add("--scan_layers", action="store_true", help="compile the repeated layers once (lax.scan)")
    add(
        "--remat",
        default="none",
        help="rematerialisation in training: none, full, dots, dots_no_batch",
    )
    add = parser.add_argument_group("options of ToSA and the controls").add_argument
    for name, options in OPTIONS.items():
        default = getattr(options(), name)
        if isinstance(default, bool):
            add(f"--{name}", action=argparse.BooleanOptionalAction, default=default)
        elif isinstance(default, tuple):
            add(
                f"--{name}",
                type=_whole_numbers,
                default=default,
                help="whole numbers, with commas between",
            )
        else:
            add(f"--{name}", type=type(default), default=default, help=f"default: {default!r}")


def _whole_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number)


def _bench(argv: Sequence[str], args: argparse.Namespace, overrides: list[str]) -> int:
    if args.data:
        rows = measure_input(args.config, overrides, args.images_per_second)
        text = "\n".join(", ".join(f"{k}: {_short(v)}" for k, v in r.items()) for r in rows)
    else:
        rows = measure_networks(argv, args)
        text = format_records(rows)
    print(json.dumps(rows, indent=1) if args.json else text)
    return 0


def measure_networks(argv: Sequence[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures every batch size and returns the records; with --sweep it also writes the files."""
    if args.estimate:
        return estimate_networks(argv, args)
    _check_likeness(args.model, args.against)
    names = ("task", "dtype", "map_chunk", "gather", "scan_layers", "remat", *OPTIONS)
    names += ("train", "rounds", "controls", "against", "torch_compile")
    fields = {name: getattr(args, name) for name in names}
    if args.image_size:
        fields["image_size"] = flags.image_size(args.image_size)
    one = functools.partial(measure, args.model, args.keep_rate, **fields)
    if not args.sweep:
        return [row for batch_size in args.batch_size for row in one(batch_size=batch_size)]
    rows, left_out = measure_batch_sizes(
        args.batch_size, lambda batch_size: one(batch_size=batch_size)
    )
    against = [library for library in args.against if library != "none"]
    result = {
        "command": f"python -m tosa_jax.bench {shlex.join(argv)}",
        "device": describe_device(),
        "versions": versions() | torch_baselines.versions(against),
        "settings": {"rounds": args.rounds, "passes": passes_in_flight()}
        | torch_baselines.settings(against, args.dtype, args.torch_compile, train=args.train),
        "left_out": left_out,
        "rows": rows,
    }
    name = args.name or "_".join([args.model, args.dtype, *(["train"] if args.train else [])])
    for path in results.write(as_path(args.out), name, result):
        print(f"wrote {path}", file=sys.stderr)
    return rows


def _check_likeness(model: str, against: Sequence[str]) -> None:
    """Raise a ConfigError where the network made of transformers' parts would be another one than the model."""
    config = variant_config(model)
    unlike = config.rope or config.pre_norm or not config.class_token  # a LeMeViT has none either
    if "transformers" in against and unlike:
        raise ConfigError(
            f"--against=transformers has no network like {model!r}, which is no ViT, DeiT or DINOv2; --against=timm has"
        )


def estimate_networks(argv: Sequence[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    """The compiler's estimates for every batch size; with --sweep also as a file, `tpu_estimate_NAME.json`.

    Raises ConfigError for arguments that only a measurement has.
    """
    from tosa_jax.performance import (
        tpu_estimate,  # brings data libraries, which a measurement does without
    )

    if args.against:
        raise ConfigError(
            "command line: --against needs a device; an estimate has no PyTorch baseline"
        )
    names = ("task", "map_chunk", "gather", "scan_layers", "remat", *OPTIONS, "train", "controls")
    fields = {name: getattr(args, name) for name in names}
    if args.image_size:
        fields["image_size"] = flags.image_size(args.image_size)
    rows = [
        row
        for batch_size in args.batch_size
        for row in tpu_estimate.estimate(
            args.model, args.keep_rate, chip=args.estimate, batch_size=batch_size, **fields
        )
    ]
    if args.sweep:
        result = {
            "command": f"python -m tosa_jax.bench {shlex.join(argv)}",
            "device": f"one TPU {args.estimate} chip, by the compiler's estimate",
            "versions": versions() | {"libtpu": version("libtpu")},
            "model": args.model,
            "rows": rows,
        }
        name = args.name or "_".join([args.model, *(["train"] if args.train else [])])
        path = as_path(args.out) / f"tpu_estimate_{name}.json"
        write_atomically(path, (json.dumps(result, indent=1) + "\n").encode())
        print(f"wrote {path}", file=sys.stderr)
    return rows


def measure_input(recipe: str, overrides: Sequence[str], images_per_second: float) -> list[dict]:
    """Images/s a core of each part of a recipe's training input, and the cores needed to feed one accelerator."""
    from tosa_jax.config import make_run_config
    from tosa_jax.data import speed

    config, _ = flags.parse("", [f"--config={recipe}", *overrides])
    return speed.measure_config(make_run_config(config).data, accelerator_rate=images_per_second)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
