"""Cycles of a compiled TPU program by the compiler's own estimate.

Two sources are added up. XLA writes the cycles that it expects of an instruction into the compiled program. For a
Pallas kernel it does not; but the compiler can write down the kernel's final instruction bundles, and the core runs one
bundle a cycle, in order: bundles times loop counts are the kernel's cycles, as long as its copies hide behind them.

The sum compares programs. It is no measurement: what waits for memory or for another instruction is in it only as far
as the compiler's model knows, and an instruction without an estimate is not in it at all (`uncounted` is their number).
What chips send each other has none.
"""

import atexit
import collections
import functools
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from tosa_jax.models.vit_config import check
from tosa_jax.performance import hlo

PARTS = ("selector", "selection", "attention", "mlp", "embed", "head")
"""Scopes that models name (`jax.named_scope`); where they lie within one another the first of these counts."""

_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
_NAME = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = .*? ([a-z][a-z\-]*)\(")
_OP = re.compile(r'op_name="([^"]*)"')
_CONFIG = re.compile(r"backend_config=(.*)$")
_BUNDLE = re.compile(r"^\s*0x[0-9a-f]+\s*(?:\w+)?\s*:\s*(>*)")
_TRIPS = re.compile(r"scmp\.\w+\.s32\.totalorder %s\w+, (\d+) /\* loop exit test \*/")
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "copy-done"}
_FREE |= {"copy-start", "after-all", "broadcast", "slice-start", "slice-done", "async-done"}


@functools.cache
def kernel_dumps() -> Path:
    """The folder that the compiler writes bundles of kernels into; asked for before it is loaded, or it does not."""
    folder = tempfile.mkdtemp(prefix="kernels_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    wanted = (
        f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
        "--xla_jf_dump_llo_pass_label_regex=final_bundles"
    )
    os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {wanted}".strip()
    return Path(folder)


def empty(dumps: Path | None) -> None:
    """Removes what the compiler wrote for the programs before."""
    for old in dumps.iterdir() if dumps else ():
        old.unlink()


def count(text: str, dumps: Path) -> dict[str, Any]:
    """Cycles of a compiled program, given as text, on one chip.

    What stands in a loop counts as often as the loop goes round. Where that depends on data it counts once, and the
    loop is among the `uncounted`. Returns `cycles`, `parts` (by `PARTS`, and "rest"), `kernels`, `uncounted`, and
    `kernel_cycles`, those of each different kernel by the name of its first call.

    dumps  the folder of `kernel_dumps`, empty before the program was compiled.

    Raises ConfigError: kernels that were not written into `dumps`.
    """
    computations, entry = hlo.computations(text)
    parts: collections.Counter[str] = collections.Counter()
    # The compiler writes a kernel once, under the name of its first call.
    first_call: dict[str, str] = {}
    kernel_cycles: dict[str, int] = {}
    kernels, uncounted = 0, 0
    waiting = [(entry, 1)]
    while waiting:
        name, times = waiting.pop()
        for line in computations[name]:
            if not (found := _NAME.match(line)):
                continue
            name, operation = found.groups()
            if operation in ("while", "call"):
                rounds = hlo.rounds(line, computations) if operation == "while" else 1
                uncounted += times * (rounds is None)
                waiting.append((_called(line), times * (rounds or 1)))
            elif estimated := _CYCLES.search(line):
                parts[_part(line)] += times * int(estimated.group(1))
            elif "tpu_custom_call" in line:
                first = first_call.setdefault(_CONFIG.findall(line)[0], name)
                if first not in kernel_cycles:
                    kernel_cycles[first] = _bundles(dumps, first)
                parts[_part(line)] += times * kernel_cycles[first]
                kernels += times
            elif operation not in _FREE:
                uncounted += times
    return {
        "cycles": sum(parts.values()),
        "parts": {part: parts[part] for part in (*PARTS, "rest") if parts[part]},
        "kernels": kernels,
        "uncounted": uncounted,
        "kernel_cycles": kernel_cycles,
    }


def _called(line: str) -> str:
    (name,) = re.findall(r"(?:body|to_apply)=%?([\w.\-]+)", line)
    return name


def _part(line: str) -> str:
    found = _OP.search(line)
    scopes = set(re.findall(r"[\w]+", found.group(1))) if found else set()
    return next((part for part in PARTS if part in scopes), "rest")


def _bundles(dumps: Path, name: str) -> int:
    """Bundles of a kernel times the counts of the loops that they stand in.

    Of several loops at one depth the longest stands for all.

    Raises ConfigError: the kernel was not written.
    """
    files = [x for x in dumps.glob(f"*-{name}-*final_bundles.txt") if "schedule" not in x.name]
    check(
        bool(files),
        "the compiler wrote no kernels: it was loaded before; run the estimate in a process of its own",
    )
    bundles: collections.Counter[int] = collections.Counter()
    trips: dict[int, int] = collections.defaultdict(lambda: 1)
    for line in sorted(files)[-1].read_text().splitlines():
        if not (found := _BUNDLE.match(line)):
            continue
        depth = len(found.group(1))
        bundles[depth] += 1
        if counted := _TRIPS.search(line):
            trips[depth] = max(trips[depth], int(counted.group(1)))
    total = 0
    for depth, number in bundles.items():
        for outer in range(1, depth + 1):
            number *= trips[outer]
        total += number
    return total
