"""Measures whether saved multiply-adds are saved time, and how fast the input is.

    python -m tosa_jax.bench --model=deit_small_patch16_224 --keep_rate .7 .5 .3 [--train] [--json]
    python -m tosa_jax.bench --model=deit_small_patch16_224 --task=depth --image_size 480 640 --keep_rate .7 .5 .3
    python -m tosa_jax.bench --data --config=configs/deit_s.py [--images_per_second=2500] [--json]

Networks have random weights; dense and every budget take turns in one run, and medians count. The first form reads
no data, so that it runs where neither TFDS nor Grain is installed. Exit status: 0 done, 2 bad input.
"""

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tosa_jax import cost
from tosa_jax.errors import ConfigError
from tosa_jax.exit_status import guard
from tosa_jax.losses import silog, smoothed_targets, soft_cross_entropy
from tosa_jax.models.networks import build, network_config
from tosa_jax.models.params import set_params, split
from tosa_jax.models.vit import Output
from tosa_jax.models.vit_config import ViTConfig, check
from tosa_jax.optim import OptimConfig, make_optimizer

Program = tuple[Any, tuple[Any, ...]]
"""A compiled program and its arguments."""


def forward_program(config: ViTConfig, batch_size: int) -> Program:
    """The forward pass of a network of this configuration on zeros."""
    graphdef, params = split(build(config, rngs=nnx.Rngs(0)))
    images = _images(config, batch_size)
    forward = jax.jit(lambda p, x: set_params(graphdef, p)(x).prediction)
    return forward.lower(params, images).compile(), (params, images)


def training_program(config: ViTConfig, batch_size: int) -> Program:
    """Forward, backward and AdamW's update; what comes out is as large as what goes in."""
    graphdef, params = split(build(config, rngs=nnx.Rngs(0)))
    optimizer = make_optimizer(OptimConfig(steps=100, learning_rate=1e-3))

    def step(params, opt, images):
        def loss(p):
            return _task_loss(set_params(graphdef, p)(images)).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt = optimizer.update(grads, opt, params)
        return jax.tree.map(jnp.add, params, updates), opt, value

    args = (params, optimizer.init(params), _images(config, batch_size))
    return jax.jit(step).lower(*args).compile(), args


def _images(config: ViTConfig, batch_size: int) -> jax.Array:
    return jnp.zeros((batch_size, *config.image_shape, config.in_chans), config.dtype)


def _task_loss(out: Output) -> jax.Array:
    """The loss of the network's task against made-up targets."""
    if out.depth is not None:
        return silog(out.depth, jnp.full_like(out.depth, 2.0), jnp.ones(out.depth.shape, bool))
    batch_size, num_classes = out.logits.shape
    labels = jnp.zeros(batch_size, jnp.int32)
    return soft_cross_entropy(out.logits, smoothed_targets(labels, num_classes, 0.1))


def interleaved_seconds(programs: Sequence[Program], rounds: int) -> np.ndarray:
    """Seconds [rounds, programs]; programs take turns, and a first round that warms up is left out."""
    seconds = np.zeros((rounds + 1, len(programs)))
    for i in range(rounds + 1):
        for j, (program, args) in enumerate(programs):
            start = time.perf_counter()
            jax.block_until_ready(program(*args))
            seconds[i, j] = time.perf_counter() - start
    return seconds[1:]


def measure(
    model: str,
    keep_rates: Sequence[float],
    *,
    batch_size: int,
    train: bool,
    rounds: int,
    task: str = "classification",
    **fields: Any,
) -> list[dict[str, Any]]:
    """One record a contestant: dense first, then ToSA at each keep rate.

    gmacs (the sum of gmacs_by_part) and xla_gmacs are for one image (the latter by XLA's count of the compiled
    program, which leaves out what it does not know); ms and ms_iqr for a batch; temp_bytes by XLA's memory analysis;
    `realised` is speed-up / ratio of GMACs: 1 means that every saved multiply-add is saved time.
    """
    check(batch_size >= 1, f"--batch_size={batch_size} must be at least 1")
    check(rounds >= 1, f"--rounds={rounds} must be at least 1")
    make_config = functools.partial(network_config, task, model, **fields)
    configs = [make_config()]
    configs += [make_config(plan="selective", keep_rate=k) for k in keep_rates]
    make: Callable[..., Program] = training_program if train else forward_program
    programs = [make(config, batch_size) for config in configs]
    seconds = interleaved_seconds(programs, rounds)
    low, median, high = np.percentile(seconds, [25, 50, 75], axis=0)
    gmacs = [cost.gmacs(config) for config in configs]
    records = []
    for i, (config, (program, _)) in enumerate(zip(configs, programs, strict=True)):
        analysis = program.cost_analysis()
        speedup, ratio = float(median[0] / median[i]), gmacs[0] / gmacs[i]
        records.append(
            {
                "name": "tosa" if i else "dense",
                "keep_rate": keep_rates[i - 1] if i else None,
                "batch_size": batch_size,
                "image_size": config.image_size,
                "dtype": str(config.dtype),
                "train": train,
                "gmacs": gmacs[i],
                "gmacs_by_part": {
                    part: count / 1e9
                    for part, count in cost.macs_by_part(cost.abstract_model(config)).items()
                },
                "xla_gmacs": analysis.get("flops", float("nan")) / 2e9 / batch_size,
                "ms": float(median[i] * 1e3),
                "ms_iqr": float((high[i] - low[i]) * 1e3),
                "img_per_sec": float(batch_size / median[i]),
                "temp_bytes": int(program.memory_analysis().temp_size_in_bytes),
                "speedup": speedup,
                "gmac_ratio": ratio,
                "realised": speedup / ratio,
            }
        )
    return records


def format_records(records: Sequence[dict[str, Any]]) -> str:
    """The records as an aligned table."""
    lines = ["name   keep   GMACs      ms    iqr   img/s  speed-up  GMACs ratio  realised"]
    for r in records:
        keep = "-" if r["keep_rate"] is None else f"{r['keep_rate']:g}"
        lines.append(
            f"{r['name']:6} {keep:>4} {r['gmacs']:7.3f} {r['ms']:7.1f} {r['ms_iqr']:6.1f} "
            f"{r['img_per_sec']:7.1f} {r['speedup']:8.2f}x {r['gmac_ratio']:11.2f}x {r['realised']:9.2f}"
        )
    return "\n".join(lines)


def measure_input(recipe: str, overrides: Sequence[str], images_per_second: float) -> list[dict]:
    """Images/s a core of each part of a recipe's training input, and the cores that feed one accelerator."""
    from tosa_jax.command_line import parse
    from tosa_jax.config import make_run_config
    from tosa_jax.data import speed

    config, _ = parse("", [f"--config={recipe}", *overrides])
    return speed.measure_config(make_run_config(config).data, accelerator_rate=images_per_second)


def parse_arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The arguments, and those of the form --config.FIELD=VALUE."""
    parser = argparse.ArgumentParser(prog="tosa_jax.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="deit_small_patch16_224", help="timm's name")
    parser.add_argument("--keep_rate", type=float, nargs="+", default=[0.5])
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--task", default="classification", help="or depth")
    parser.add_argument(
        "--image_size", type=int, nargs="+", help="side, or height and width; default: the model's"
    )
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--map_chunk", type=int, default=0, help="query rows at a time; 0: all")
    parser.add_argument("--train", action="store_true", help="time whole training steps")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--data", action="store_true", help="measure the input of --config instead")
    parser.add_argument("--config", help="a recipe, for --data")
    parser.add_argument(
        "--images_per_second", type=float, default=2500.0, help="to feed, for --data"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args, rest = parser.parse_known_args(argv)
    if stray := [a for a in rest if not (args.data and a.startswith("--config."))]:
        raise ConfigError(f"command line: unexpected argument {stray[0]!r}; see --help")
    if args.data and not args.config:
        raise ConfigError("command line: --data needs --config=FILE")
    return args, rest


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return guard(lambda: _bench(*parse_arguments(argv)))


def _bench(args: argparse.Namespace, overrides: list[str]) -> int:
    if args.data:
        rows = measure_input(args.config, overrides, args.images_per_second)
        text = "\n".join(", ".join(f"{k}: {_short(v)}" for k, v in r.items()) for r in rows)
    else:
        fields = {"dtype": args.dtype, "map_chunk": args.map_chunk, "task": args.task}
        if size := args.image_size:
            fields["image_size"] = size[0] if len(size) == 1 else tuple(size)
        run = functools.partial(measure, args.model, args.keep_rate, rounds=args.rounds)
        rows = run(batch_size=args.batch_size, train=args.train, **fields)
        text = format_records(rows)
    print(json.dumps(rows, indent=1) if args.json else text)
    return 0


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
