"""Compares token methods on one pretrained network at equal multiply-adds. No labels, and no training.

    python -m tosa_jax.compare --model=NAME --weights=FILE --images=DIR --methods tome evit redundancy --target .75 .5
    python -m tosa_jax.compare ... --methods mctf mctf:mctf_information=previous [--time] [--estimate=v5e]

Every method gets each target, a share of the dense network's multiply-adds, within 2 %; one that cannot is told and
left out. Behind a name stand fields that are set differently, and the layers: expedit:layers=3-11. What is compared are
the final tokens, all of them: their cosine to those of the dense network, of the class token and of the patches, with
95 % intervals by resampling pictures.
It writes OUT/NAME.json after each row, then OUT/NAME.md and OUT/NAME.png. The same command goes on where it stopped,
and further methods and targets may be added to it. Exit status: 0 done, 2 bad input, 130 stopped by SIGINT.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tosa_jax.cli import flags
from tosa_jax.cli.command import configure_jax, run_command
from tosa_jax.data.crops import random_crops
from tosa_jax.data.image_files import find_images
from tosa_jax.distributed.devices import describe_device, versions
from tosa_jax.errors import ConfigError
from tosa_jax.inference import loading
from tosa_jax.models import cost
from tosa_jax.models.vit import VisionTransformer
from tosa_jax.models.vit_config import ViTConfig, check
from tosa_jax.paths import write_atomically
from tosa_jax.performance import comparison
from tosa_jax.performance.comparison import Contender
from tosa_jax.reporting import comparison as tables
from tosa_jax.reporting.intervals import by_picture

IDENTITY = ("model", "weights", "image_size", "count", "seed", "pictures", "device", "versions")
"""What all rows of one file have in common."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (without the program's name); returns the exit status."""
    return run_command(lambda: _main(parse_arguments(argv)))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the arguments; `methods` become a list of `Contender`. Raises ConfigError."""
    parser = flags.ArgumentParser(
        prog="python -m tosa_jax.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, help="name of a variant, as in timm")
    add("--weights", required=True, help="released weights")
    add("--images", required=True, nargs="+", help="pictures: files, folders or globs")
    add("--methods", required=True, nargs="+", help="METHOD or METHOD:FIELD=VALUE,...")
    add("--target", required=True, type=float, nargs="+", help="shares of the dense GMACs")
    add("--count", type=int, default=64, help="crops, as many of each picture")
    add("--image_size", type=int, help="side of the crops, in pixels; default: the model's")
    add("--seed", type=int, default=0, help="where the crops lie")
    add("--time", action="store_true", help="time all networks too, in turn, on this device")
    add("--batch_size", type=int, default=16, help="for --time and --estimate")
    add("--rounds", type=int, default=10, help="for --time")
    add("--estimate", default="", help="cycles by the TPU compiler too, for v5e or v6e")
    add("--out", type=Path, default=Path("comparison"), metavar="DIR")
    add("--name", default="", help="NAME of the files; default: the model's")
    args = parser.parse_args(argv)
    args.methods = [comparison.contender(text) for text in dict.fromkeys(args.methods)]
    for share in args.target:
        check(0 < share < 1, f"--target={share} is not in (0, 1)")
    for flag in ("count", "batch_size", "rounds"):
        value = getattr(args, flag)
        check(value >= 1, f"--{flag}={value} must be at least 1")
    return args


def _main(args: argparse.Namespace) -> int:
    configure_jax()
    size = {} if args.image_size is None else {"image_size": args.image_size}
    dense = _load(args, print, None, num_classes=0, **size)
    config = dense["model"].config
    files = find_images(args.images)
    crops, sources = random_crops(files, args.count, config.image_shape[0], args.seed)
    mean, std = (np.asarray(dense[name], np.float32) for name in ("mean", "std"))
    images = ((crops / 255 - mean) / std).astype(np.float32)
    record, path = _opened(args, config, [x.name for x in files])
    todo = list(_missing(args, record, config))
    if todo:
        _run(args, todo, dense["model"], images, sources, record, path)
    if args.time:
        _add_times(args, record, config)
    if args.estimate:
        _add_estimates(args, record, config, path)
    _write(path, record)
    write_atomically(path.with_suffix(".md"), tables.markdown(path.stem, record).encode())
    write_atomically(path.with_suffix(".png"), tables.plot(record))
    for suffix in (".json", ".md", ".png"):
        print(f"wrote {path.with_suffix(suffix)}", file=sys.stderr)
    return 0


def _run(
    args: argparse.Namespace,
    todo: Sequence[tuple[Contender, float, ViTConfig]],
    dense: VisionTransformer,
    images: np.ndarray,
    sources: Sequence[Path],
    record: dict[str, Any],
    path: Path,
) -> None:
    """Runs the dense network and then each row, which is written at once."""
    truth = comparison.grid_features(dense, images)
    for row, target, network in todo:
        begun = time.monotonic()
        tokens = comparison.grid_features(_model(args, network), images)
        near = comparison.closeness(tokens, truth, network)
        gmacs = cost.gmacs(network)
        found = {"name": row.name, "method": row.method, "target": target, "gmacs": gmacs,
                 "share": gmacs / record["dense_gmacs"]}  # fmt: skip
        found |= {k: by_picture(x, sources).round(7).tolist() for k, x in near.items()}
        record["rows"].append(found)
        _write(path, record)
        jax.clear_caches()  # no other row runs this program
        cosines = ", ".join(f"{part} {x.mean():.5f}" for part, x in near.items())
        seconds = time.monotonic() - begun
        print(f"{target:g} {row.name}: share {found['share']:.3f}, {cosines}; {seconds:.0f} s", flush=True)  # fmt: skip


def _load(args: argparse.Namespace, say: Any, keep_rate: Any, **fields: Any) -> loading.LoadedModel:
    return loading.from_pretrained(args.model, args.weights, None, keep_rate, None, say, **fields)


def _model(args: argparse.Namespace, config: ViTConfig) -> VisionTransformer:
    """The network with the weights; what a method adds and no file has is as it is before training."""
    fields = config.to_fields()
    rate = fields.pop("keep_rate")
    return _load(args, lambda line: None, rate, **fields)["model"]


def _opened(
    args: argparse.Namespace, config: ViTConfig, pictures: list[str]
) -> tuple[dict[str, Any], Path]:
    """The record so far, and its file. Raises ConfigError: the file is of another comparison, or none at all."""
    path = args.out / f"{args.name or args.model}.json"
    record = {
        "command": "", "device": describe_device(), "versions": versions(), "seed": args.seed,
        "model": args.model, "weights": Path(args.weights).name, "image_size": config.image_size,
        "count": args.count, "pictures": pictures, "dense_gmacs": cost.gmacs(config), "left_out": [], "rows": [],
    }  # fmt: skip
    if path.exists():
        try:
            before = json.loads(path.read_text())
            others = [name for name in IDENTITY if before[name] != record[name]]
            record |= {name: before[name] for name in ("left_out", "rows")}
            record |= {name: before[name] for name in ("time", "estimate") if name in before}
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path} is no file of this command ({error!r}): take another --name"
            ) from error
        check(not others, f"{path} has rows with another {', '.join(others)}: take another --name")
    args.out.mkdir(parents=True, exist_ok=True)
    record["command"] = _command(args, record)
    return record, path


def _command(args: argparse.Namespace, record: dict[str, Any]) -> str:
    """A command that makes the whole file, without the paths of this machine."""
    done = record["rows"] + record["left_out"]
    methods = dict.fromkeys([*(x["name"] for x in done), *(row.name for row in args.methods)])
    targets = sorted({*(x["target"] for x in done), *args.target}, reverse=True)
    words = [f"--model={args.model}", f"--weights={Path(args.weights).name}", "--images=DIR"]
    words += ["--methods", *methods, "--target", *(f"{share:g}" for share in targets)]
    words += [f"--count={args.count}", f"--image_size={record['image_size']}", f"--seed={args.seed}"]  # fmt: skip
    words += ["--time"] if args.time or "time" in record else []
    words += [f"--estimate={args.estimate}"] if args.estimate else []
    return f"python -m tosa_jax.compare {shlex.join(words)}"


def _missing(
    args: argparse.Namespace, record: dict[str, Any], dense: ViTConfig
) -> Iterator[tuple[Contender, float, ViTConfig]]:
    """The rows that the record lacks, target by target; those that cannot be are told and noted there."""
    there = {(x["name"], x["target"]) for x in record["rows"]}
    for target in args.target:
        for row in args.methods:
            if (row.name, target) in there:
                continue
            left_out = [x for x in record["left_out"] if (x["name"], x["target"]) != (row.name, target)]  # fmt: skip
            try:
                network = comparison.solved(dense, row, target)
            except ConfigError as error:
                print(f"{target:g} {row.name} left out: {error}", flush=True)
                why = {"name": row.name, "target": target, "why": str(error)}
                record["left_out"] = [*left_out, why]
                continue
            record["left_out"] = left_out
            yield row, target, network


def _networks(record: dict[str, Any], dense: ViTConfig) -> dict[str, ViTConfig]:
    """The dense network and that of each row, by a name that is unique."""
    rows = {_key(x): comparison.contender(x["name"]) for x in record["rows"]}
    targets = {_key(x): x["target"] for x in record["rows"]}
    return {"dense": dense} | {k: comparison.solved(dense, rows[k], targets[k]) for k in rows}


def _key(row: dict[str, Any]) -> str:
    return f"{row['name']} {row['target']}"


def _add_times(args: argparse.Namespace, record: dict[str, Any], dense: ViTConfig) -> None:
    """Times all networks of the record in one run, unless one run has timed all of them."""
    asked = {"batch_size": args.batch_size, "rounds": args.rounds}
    known = record.get("time", {})
    wanted = {"dense", *map(_key, record["rows"])}
    if known.get("networks", {}).keys() == wanted and known | asked == known:
        return
    found = comparison.time_networks(_networks(record, dense), args.batch_size, args.rounds)
    record["time"] = {**asked, "networks": found}


def _add_estimates(
    args: argparse.Namespace, record: dict[str, Any], dense: ViTConfig, path: Path
) -> None:
    """The compiler's cycles of each network that has none yet, written one by one."""
    from tosa_jax.performance.tpu_estimate import forward_mcycles  # brings data libraries

    asked = {"chip": args.estimate, "batch_size": args.batch_size}
    known = record.get("estimate", {})
    if known | asked != known:
        record["estimate"] = known = {**asked, "mcycles": {}}
    networks = {k: x for k, x in _networks(record, dense).items() if k not in known["mcycles"]}
    cycles = forward_mcycles(networks.values(), args.estimate, args.batch_size)
    for name, mcycles in zip(networks, cycles, strict=True):
        known["mcycles"][name] = mcycles
        _write(path, record)


def _write(path: Path, record: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(record, indent=1) + "\n").encode())


if __name__ == "__main__":
    sys.exit(main())
