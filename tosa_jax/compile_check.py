"""Compile a recipe's training and evaluation steps for a TPU slice, without a TPU.

    python -m tosa_jax.compile_check --config=configs/deit_s.py --topology=v5e:4x4 [--mesh=data:4,fsdp:4]
        [--only=TEXT] [--fit] [--estimate] [--json] [--config.FIELD=VALUE ...]

Prints for each step whether it fits, the time to compile, and the bytes, operations and collectives of each chip.
`--topology` names one slice; `--mesh=dcn:2` uses two of them. `--only` keeps the steps whose name contains TEXT, for
example "train finetune". `--fit` finds the largest training batch of a chip. `--estimate` adds the cycles that the
compiler expects of a chip (docs/performance.md). Needs libtpu: pip install "tosa-jax[tpu]".
Exit status: 0 everything fits, 1 something does not, 2 bad input.
"""

import argparse
import dataclasses
import json
import sys
from typing import Any

from tosa_jax.cli import flags
from tosa_jax.cli.command import configure_jax, run_command
from tosa_jax.errors import ConfigError


def main(argv: list[str] | None = None) -> int:
    """Runs the command line `argv` (without the program's name); returns the exit status."""
    return run_command(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: list[str]) -> int:
    args, recipe = parse_arguments(argv)
    config, _ = flags.parse(__doc__, recipe)  # the work directory is not used: nothing is written
    configure_jax()
    records = check(config, args)
    if args.json:
        print(json.dumps(records, indent=1))
    return int(not all(record["fits"] or args.fit for record in records))


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """This command's own arguments, and the others, which are the recipe's. Raises ConfigError."""
    parser = flags.ArgumentParser(add_help=False)
    parser.add_argument("--topology", default="")
    parser.add_argument("--mesh", default="")
    parser.add_argument("--only", default="")
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--estimate", action="store_true")
    parser.add_argument("--json", action="store_true")
    return parser.parse_known_args(argv)


def check(config, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Compiles each step and returns the records; without --json it prints each at once. Raises ConfigError."""
    # Imported late: mistakes in the command line are reported without this delay.
    import jax

    from tosa_jax.config import make_run_config
    from tosa_jax.distributed.mesh import make_mesh
    from tosa_jax.performance import aot, tpu_cycles

    if not args.topology:
        raise ConfigError("command line: --topology=SLICE is missing, e.g. --topology=v5e:2x4")
    jax.config.update(
        "jax_platforms", "cpu"
    )  # no program runs, so JAX need not reserve an accelerator
    jax.config.update("jax_enable_compilation_cache", False)  # compile time is measured
    run = make_run_config(config)
    run = dataclasses.replace(run, mesh=parse_mesh(run.mesh, args.mesh))
    dumps = tpu_cycles.kernel_dumps() if args.estimate else None
    mesh = make_mesh(run.mesh, aot.tpu_devices(args.topology, run.mesh.dcn or 1))
    records = []
    for program in aot.programs(run, mesh):
        if args.only not in program.name or (args.fit and not program.name.startswith("train")):
            continue
        found = [fit_record(run, mesh, program)] if args.fit else []
        records += found or [aot.compile_program(program, mesh, dumps)]
        if not args.json:
            print(format_record(records[-1]), flush=True)
    if not records:
        raise ConfigError(f"command line: --only={args.only}: no step has this in its name")
    return records


def fit_record(run, mesh, program) -> dict[str, Any]:
    """The record of this training step at the largest batch that fits, with `largest_device_batch_size` and `tried`."""
    from tosa_jax.distributed.mesh import batch_ways
    from tosa_jax.performance import aot

    ways, records = batch_ways(mesh) * run.accumulate, {}

    def needed(batch: int) -> tuple[bool, int | None]:
        sized = dataclasses.replace(run, batch_size=batch * ways)
        same = next(p for p in aot.programs(sized, mesh) if p.name == program.name)
        records[batch] = aot.compile_program(same, mesh)
        return records[batch]["fits"], records[batch]["total_bytes"]

    device = aot.accelerator(mesh.devices.flat[0].device_kind)
    best = aot.largest_batch(needed, device.memory if device else 2**34, run.batch_size // ways)
    tried = {str(b): records[b]["total_bytes"] for b in sorted(records)}
    return records[best or min(records)] | {"largest_device_batch_size": best, "tried": tried}


def parse_mesh(mesh, text: str):
    """`mesh` with the sizes in a text such as "data:4,fsdp:4". Raises ConfigError for unknown axes and bad numbers."""
    parts = [pair.partition(":") for pair in text.split(",") if pair]
    sizes = {axis: size for axis, _, size in parts}
    known = [field.name for field in dataclasses.fields(mesh)]
    numbers, problem = {}, ""
    try:
        numbers = {axis: int(size) for axis, size in sizes.items()}
    except ValueError as error:
        problem = str(error)
    if unknown := sorted(sizes.keys() - set(known)):
        problem = f"unknown axes {unknown}"
    if problem:
        raise ConfigError(
            f"command line: --mesh={text}: {problem}; write AXIS:SIZE with commas between, the axes "
            f"are {', '.join(known)}"
        )
    return dataclasses.replace(mesh, **numbers)


def format_record(record: dict[str, Any]) -> str:
    """A step's record as text."""
    mesh = " ".join(f"{axis}={size}" for axis, size in record["mesh"].items())
    verdict = "fits" if record["fits"] else "DOES NOT FIT"
    lines = [
        f"{record['name']}: {verdict}; {record['devices']} x {record['device']}, {mesh}; "
        f"batch {record['batch_size']}, {record['device_batch_size']} a chip; "
        f"compiled in {record['compile_seconds']:.0f} s"
    ]
    memory = _size(record["memory_bytes"])
    if record["argument_bytes"] is None:
        lines.append(f"  bytes a chip: {_size(record['total_bytes'])} of {memory}")
    else:
        lines += [
            f"  bytes a chip: {_size(record['total_bytes'])} of {memory}: arguments "
            f"{_size(record['argument_bytes'])} (parameters, optimizer, average "
            f"{_size(record['state_bytes'])}), temporaries {_size(record['temp_bytes'])}",
            f"  flops a chip: {record['flops']:.3g} by the compiler, "
            f"{record['flops_arithmetic']:.3g} by arithmetic",
            "  collectives: "
            + (
                ", ".join(
                    f"{row['count']} {kind} of {_size(row['bytes'])} together"
                    for kind, row in record["collectives"].items()
                )
                or "none"
            ),
        ]
    if estimate := record.get("estimate"):
        parts = ", ".join(f"{part} {n / 1e6:.3g}" for part, n in estimate["parts"].items())
        lines.append(
            f"  million cycles a chip, by the compiler's estimate and without collectives: "
            f"{estimate['cycles'] / 1e6:.3g} ({parts})"
        )
    if "largest_device_batch_size" in record:
        tried = ", ".join(f"{batch}: {_size(size)}" for batch, size in record["tried"].items())
        lines.append(
            f"  largest batch a chip: {record['largest_device_batch_size']} (tried {tried})"
        )
    return "\n".join(lines)


def _size(count: int | None) -> str:
    """A number of bytes with a unit, in powers of ten."""
    if count is None:
        return "unknown"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"


if __name__ == "__main__":
    sys.exit(main())
