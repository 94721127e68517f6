"""Compares token methods at equal multiply-adds: on a pretrained network without training, or trained by a recipe.

    python -m tosa_jax.compare --model=NAME --weights=FILE --images=DIR --methods tome evit redundancy --target .75 .5
    python -m tosa_jax.compare --config=configs/digits.py [--config.FIELD=VALUE ...] --methods tome tosa --target .75
    python -m tosa_jax.compare ... --methods mctf mctf:mctf_information=previous [--time] [--estimate=v5e]

Every method gets each target, a share of the dense network's multiply-adds, within 2 %; one that cannot is told and
left out. Behind a name stand fields that are set differently, and the layers: expedit:layers=3-11. A plan of
tosa_jax.budget takes part as redundancy:plan=plans/NAME_redundancy_{}.json, where {} stands for each target.
Without training, final tokens are compared, all of them: their cosine to those of the dense network, of the class token
and of the patches, with 95 % intervals by resampling pictures. With a recipe, the dense network is pretrained once for
each seed, every method is fine-tuned from it as long as the dense network is, and the task's score is compared, with
95 % intervals over seeds. Runs are in OUT/NAME/seed<N>; a recipe's own plan, keep rates and controls do not count.
It writes OUT/NAME.json after each row, then OUT/NAME.md and OUT/NAME.png. The same command goes on where it stopped;
more methods, targets and seeds may be added to it. Exit status: 0 done, 2 bad input, 130 stopped by SIGINT; with a
recipe 128 + the number of each signal that stops `tosa_jax.main`.
"""

import argparse
import functools
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tosa_jax.cli import flags
from tosa_jax.cli.command import configure_jax, end_with, run_command
from tosa_jax.data.crops import random_crops
from tosa_jax.data.image_files import find_images
from tosa_jax.distributed.devices import describe_device, versions
from tosa_jax.distributed.messages import say
from tosa_jax.distributed.preemption import Stopped
from tosa_jax.errors import ConfigError, NonFiniteLossError
from tosa_jax.inference import loading
from tosa_jax.models import cost
from tosa_jax.models.plan_file import from_json
from tosa_jax.models.vit_config import ViTConfig, check
from tosa_jax.paths import write_atomically
from tosa_jax.performance import comparison
from tosa_jax.performance.comparison import Contender
from tosa_jax.reporting import comparison as tables
from tosa_jax.reporting.intervals import by_picture


class Trial:
    """How a row is scored.

    dense     the network whose multiply-adds targets are shares of.
    identity  what all rows of one file have in common (JSON).
    words     of the command, without the paths of this machine.
    """

    dense: ViTConfig
    identity: dict[str, Any]
    words: list[str]

    def begin(self) -> dict[str, Any]:
        """What the record has beside its rows. Called once, if there is a row to score."""
        return {}

    def score(self, key: str, network: ViTConfig) -> dict[str, Any]:
        """The scores of a row's network, which `key` names. Raises NonFiniteLossError: its training failed."""
        raise NotImplementedError

    def is_whole(self, row: dict[str, Any]) -> bool:
        """Whether a row of the record has all scores that are asked for."""
        return True

    def said(self, row: dict[str, Any]) -> str:
        """The scores of a row, for people."""
        raise NotImplementedError


class Untrained(Trial):
    """A pretrained network as it is: how near a method's final tokens are to the dense network's."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        size = {} if args.image_size is None else {"image_size": args.image_size}
        loaded = self._load(print, None, num_classes=0, **size)
        self.model, self.dense = loaded["model"], loaded["model"].config
        files = find_images(args.images)
        crops, self.sources = random_crops(files, args.count, self.dense.image_shape[0], args.seed)
        mean, std = (np.asarray(loaded[name], np.float32) for name in ("mean", "std"))
        self.images = ((crops / 255 - mean) / std).astype(np.float32)
        self.identity = {
            "seed": args.seed, "model": args.model, "weights": Path(args.weights).name,
            "image_size": self.dense.image_size, "count": args.count, "pictures": [x.name for x in files],
        }  # fmt: skip
        self.words = [
            f"--model={args.model}", f"--weights={Path(args.weights).name}", "--images=DIR",
            f"--count={args.count}", f"--image_size={self.dense.image_size}", f"--seed={args.seed}",
        ]  # fmt: skip

    def score(self, key: str, network: ViTConfig) -> dict[str, Any]:
        fields = network.to_fields()
        rate = fields.pop("keep_rate")
        # What a method adds and no file has is as it is before training.
        model = self._load(lambda line: None, rate, **fields)["model"]
        near = comparison.closeness(
            comparison.grid_features(model, self.images), self._truth, network
        )
        jax.clear_caches()  # no other row runs this program
        return {k: by_picture(x, self.sources).round(7).tolist() for k, x in near.items()}

    def said(self, row: dict[str, Any]) -> str:
        return ", ".join(f"{k} {np.mean(row[k]):.5f}" for k in tables.PARTS if k in row)

    @functools.cached_property
    def _truth(self) -> np.ndarray:
        return comparison.grid_features(self.model, self.images)

    def _load(self, say: Any, keep_rate: Any, **fields: Any) -> loading.LoadedModel:
        args = self.args
        return loading.from_pretrained(
            args.model, args.weights, None, keep_rate, None, say, **fields
        )


class Trained(Trial):
    """A recipe: what a method reaches after fine-tuning from the dense network, for each seed."""

    def __init__(self, args: argparse.Namespace, recipe: list[str]) -> None:
        # Imported late: comparing without training needs no data libraries.
        from tosa_jax.config import make_run_config
        from tosa_jax.train.comparison import Study

        config, folder = flags.parse(__doc__, recipe)
        args.name = args.name or folder.name
        self.study = Study(make_run_config(config), args.seeds, args.out / args.name)
        self.dense = self.study.dense
        self.identity = {
            "recipe": [without_path(word) for word in recipe],
            "metric": self.study.metric,
            "lower_is_better": self.study.lower_is_better,
        }
        if trainable := self.study.run.finetune.trainable:
            self.identity["trainable"] = trainable
        self.words = [*self.identity["recipe"], f"--seeds={args.seeds}"]

    def begin(self) -> dict[str, Any]:
        return {"dense": self.study.baselines()}

    def score(self, key: str, network: ViTConfig) -> dict[str, Any]:
        return {"metrics": self.study.metrics(key, network)}

    def is_whole(self, row: dict[str, Any]) -> bool:
        return len(row["metrics"]) >= self.study.seeds

    def said(self, row: dict[str, Any]) -> str:
        name = self.study.metric
        return f"{name} {', '.join(f'{x[name]:.4f}' for x in row['metrics'])}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (without the program's name); returns the exit status."""
    return run_command(lambda: _main(*parse_arguments(argv)))


def parse_arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Parses the arguments; `methods` become a list of `Contender`. The rest are those of a recipe.

    Raises ConfigError.
    """
    parser = flags.ArgumentParser(
        prog="python -m tosa_jax.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--methods", required=True, nargs="+", help="METHOD or METHOD:FIELD=VALUE,...")
    add("--target", required=True, type=float, nargs="+", help="shares of the dense GMACs")
    plain = parser.add_argument_group("without training").add_argument
    plain("--model", help="name of a variant, as in timm")
    plain("--weights", help="released weights")
    plain("--images", nargs="+", help="pictures: files, folders or globs")
    plain("--count", type=int, default=64, help="crops, as many of each picture")
    plain("--image_size", type=int, help="side of the crops, in pixels; default: the model's")
    plain("--seed", type=int, default=0, help="where the crops lie")
    trained = parser.add_argument_group("trained").add_argument
    trained("--config", metavar="FILE", help="a recipe, and --config.FIELD=VALUE ...")
    trained("--seeds", type=int, default=3, help="seeds 0, 1, ... of the recipe")
    add("--time", action="store_true", help="time all networks too, in turn, on this device")
    add("--batch_size", type=int, default=16, help="for --time and --estimate")
    add("--rounds", type=int, default=10, help="for --time")
    add("--estimate", default="", help="cycles by the TPU compiler too, for v5e or v6e")
    add("--out", type=Path, default=Path("comparison"), metavar="DIR")
    add("--name", default="", help="NAME of the files; default: the model's or the recipe's")
    args, recipe = parser.parse_known_args(argv)
    if args.config:
        given = [name for name in ("model", "weights", "images") if getattr(args, name)]
        check(
            not given,
            f"--{given[0] if given else ''} does not go with --config: a recipe says what is trained",
        )
        recipe = [f"--config={args.config}", *recipe]
    else:
        lacking = [name for name in ("model", "weights", "images") if not getattr(args, name)]
        check(
            not lacking,
            f"--{lacking[0] if lacking else ''} is missing (or --config, to train); see --help",
        )
        check(not recipe, f"command line: unrecognized arguments: {' '.join(recipe)}; see --help")
    args.methods = [comparison.contender(text) for text in dict.fromkeys(args.methods)]
    for share in args.target:
        check(0 < share < 1, f"--target={share} is not in (0, 1)")
    for flag in ("count", "batch_size", "rounds", "seeds"):
        value = getattr(args, flag)
        check(value >= 1, f"--{flag}={value} must be at least 1")
    return args, recipe


def _main(args: argparse.Namespace, recipe: list[str]) -> int:
    configure_jax()
    try:
        trial = Trained(args, recipe) if args.config else Untrained(args)
        record, path = _opened(args, trial)
        _run(args, trial, record, path)
        if args.time:
            _add_times(args, record, trial.dense)
        if args.estimate:
            _add_estimates(args, record, trial.dense, path)
    except Stopped as stopped:
        say(f"{stopped}; start the same command again to go on")
        return 128 + stopped.signum
    _write(path, record)
    write_atomically(path.with_suffix(".md"), tables.markdown(path.stem, record).encode())
    write_atomically(path.with_suffix(".png"), tables.plot(record))
    for suffix in (".json", ".md", ".png"):
        print(f"wrote {path.with_suffix(suffix)}", file=sys.stderr)
    return 0


def _run(args: argparse.Namespace, trial: Trial, record: dict[str, Any], path: Path) -> None:
    """Scores each row that the record lacks, which is written at once."""
    todo = list(_missing(args, trial, record))
    if todo:
        record |= trial.begin()
    for row, target, network in todo:
        begun = time.monotonic()
        gmacs = cost.gmacs(network)
        found = {"name": row.name, "method": row.method, "target": target, "gmacs": gmacs,
                 "share": gmacs / record["dense_gmacs"]}  # fmt: skip
        found |= {"plan": row.plan_fields(target)} if row.plan else {}
        try:
            found |= trial.score(_key(found), network)
        except NonFiniteLossError as error:  # the others can still be trained
            _leave_out(record, row, target, str(error))
            continue
        record["rows"] = [x for x in record["rows"] if _key(x) != _key(found)] + [found]
        _write(path, record)
        about = f"share {found['share']:.3f}, {trial.said(found)}"
        print(f"{target:g} {row.name}: {about}; {time.monotonic() - begun:.0f} s", flush=True)


def _opened(args: argparse.Namespace, trial: Trial) -> tuple[dict[str, Any], Path]:
    """The record so far, and its file. Raises ConfigError: the file is of another comparison, or none at all."""
    path = args.out / f"{args.name or args.model}.json"
    identity = {"device": describe_device(), "versions": versions(), **trial.identity}
    gmacs = cost.gmacs(trial.dense)
    record = {"command": "", **identity, "dense_gmacs": gmacs, "left_out": [], "rows": []}
    if path.exists():
        try:
            before = json.loads(path.read_text())
            others = [name for name in identity if before[name] != record[name]]
            record |= {name: before[name] for name in ("left_out", "rows")}
            record |= {k: before[k] for k in ("dense", "time", "estimate") if k in before}
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path} is no file of this command ({error!r}): take another --name"
            ) from error
        check(not others, f"{path} has rows with another {', '.join(others)}: take another --name")
    args.out.mkdir(parents=True, exist_ok=True)
    record["command"] = _command(args, trial, record)
    return record, path


def _command(args: argparse.Namespace, trial: Trial, record: dict[str, Any]) -> str:
    """A command that makes the whole file, without the paths of this machine."""
    done = record["rows"] + record["left_out"]
    methods = dict.fromkeys([*(x["name"] for x in done), *(row.name for row in args.methods)])
    targets = sorted({*(x["target"] for x in done), *args.target}, reverse=True)
    words = [*trial.words, "--methods", *methods, "--target", *(f"{share:g}" for share in targets)]
    words += ["--time"] if args.time or "time" in record else []
    words += [f"--estimate={args.estimate}"] if args.estimate else []
    return f"python -m tosa_jax.compare {shlex.join(words)}"


def without_path(word: str) -> str:
    """An argument of a recipe with DIR in place of the folders of this machine."""
    name, _, value = word.partition("=")
    return f"{name}=DIR/{Path(value).name}" if os.path.isabs(os.path.expanduser(value)) else word


def _missing(
    args: argparse.Namespace, trial: Trial, record: dict[str, Any]
) -> Iterator[tuple[Contender, float, ViTConfig]]:
    """The rows that the record lacks, target by target; those that cannot be are told and noted there."""
    there = {(x["name"], x["target"]): x for x in record["rows"] if trial.is_whole(x)}
    for target in args.target:
        for row in args.methods:
            try:
                before = there.get((row.name, target))
                if before is not None:
                    if _planned(before) == row.plan_fields(target):
                        continue
                    _forget_cost(record, _key(before))  # another plan in a file of the same name
                network = comparison.solved(trial.dense, row, target)
            except ConfigError as error:
                _leave_out(record, row, target, str(error))
                continue
            _leave_out(record, row, target, "")
            yield row, target, network


def _forget_cost(record: dict[str, Any], key: str) -> None:
    """Forgets what was measured of a row whose network is another one now."""
    record.pop("time", None)  # one run times all
    record.get("estimate", {}).get("mcycles", {}).pop(key, None)


def _leave_out(record: dict[str, Any], row: Contender, target: float, why: str) -> None:
    """Tells and notes why a row cannot be; with "" it can be now."""
    others = [x for x in record["left_out"] if (x["name"], x["target"]) != (row.name, target)]
    if why:
        print(f"{target:g} {row.name} left out: {why}", flush=True)
        others.append({"name": row.name, "target": target, "why": why})
    record["left_out"] = others


def _networks(record: dict[str, Any], dense: ViTConfig) -> dict[str, ViTConfig]:
    """The dense network and that of each row, by a name that is unique."""
    return {"dense": dense} | {
        _key(x): comparison.solved(dense, comparison.contender(x["name"]), x["target"], _planned(x))
        for x in record["rows"]
    }


def _planned(row: dict[str, Any]) -> dict[str, Any]:
    """What the row's plan file said when it was scored; {}: it has none."""
    return from_json(row.get("plan", {}))


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
    end_with(main())
