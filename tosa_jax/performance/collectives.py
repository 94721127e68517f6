"""Counts the collectives of a compiled program and their bytes, by parsing the text of its optimised HLO.

XLA offers no other public way. A collective in the body of a loop counts once for each iteration.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from tosa_jax.performance import hlo

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
"""XLA's names of the instructions that exchange data between devices."""

_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\((.*)$")
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}")
_RESHAPED = re.compile(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)")
_ON_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}")


@dataclass(frozen=True)
class Collective:
    """One collective instruction of a program.

    kind    one of KINDS. Of an asynchronous pair, the start counts.
    bytes   size of the full buffer on one device: the result of an all-gather, the operand of a reduce-scatter; of the
            other kinds both have this size.
    groups  devices that exchange data with each other, as positions in the program's device list; () means all.
    runs    number of executions in one run of the program.
    """

    kind: str
    bytes: int
    groups: tuple[tuple[int, ...], ...]
    runs: int


def collectives(text: str) -> list[Collective]:
    """The collectives of a program, given as `compiled.as_text()`."""
    computations, entry = hlo.computations(text)
    runs = _runs(computations, entry)
    found: dict[str, Collective] = {}
    for name, lines in computations.items():
        for number, line in enumerate(lines):
            if (match := _COLLECTIVE.search(line)) and runs[name]:
                one = _collective(match, name, runs[name])
                # A fused asynchronous collective appears in several computations with the same channel. On a TPU,
                # reduce-scatters are numbered separately: the key has the kind, too.
                channel = re.search(r"channel_id=(\d+)", line)
                key = f"{one.kind} {channel.group(1)}" if channel else f"{name} {number}"
                found.setdefault(key, one)
    return list(found.values())


def totals(found: Iterable[Collective]) -> dict[str, dict[str, int]]:
    """Number of executions and sum of bytes in one run, for each kind that occurs: `{kind: {"count", "bytes"}}`."""
    table = {kind: {"count": 0, "bytes": 0} for kind in KINDS}
    for one in found:
        table[one.kind]["count"] += one.runs
        table[one.kind]["bytes"] += one.runs * one.bytes
    return {kind: row for kind, row in table.items() if row["count"]}


def _runs(computations: dict[str, list[str]], entry: str) -> dict[str, int]:
    """Number of runs of each computation. A loop of unknown rounds counts once."""
    runs: dict[str, int] = defaultdict(int, {entry: 1})
    for name in reversed(computations):
        for line in computations[name]:
            called = _CALLED.findall(line)
            for branches in _BRANCHES.findall(line):
                called += [branch.strip().lstrip("%") for branch in branches.split(",")]
            trips = (hlo.rounds(line, computations) or 1) if called and " while(" in line else 1
            for other in called:
                runs[other] += runs[name] * trips
    return runs


def _collective(match: re.Match, computation: str, runs: int) -> Collective:
    shapes, kind, start, rest = match.groups()
    groups = _groups(rest)
    ways = len(groups[0]) if groups else 1
    size = sum(_bytes(*shape) for shape in _SHAPE.findall(shapes))
    if kind == "reduce-scatter":
        size *= ways
    elif start and kind == "all-gather":  # the start's type lists the operand and the result
        size = size * ways // (ways + 1)
    elif start and kind == "collective-permute":
        size //= 2
    if computation.startswith(
        "all-reduce-scatter"
    ):  # a reduce-scatter that the TPU compiler has fused
        kind = "reduce-scatter"
    return Collective(kind, size, groups, runs)


def _bytes(dtype: str, dims: str) -> int:
    bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
    return math.prod(int(x) for x in dims.split(",") if x) * bits // 8


def _groups(attributes: str) -> tuple[tuple[int, ...], ...]:
    """Replica groups, parsed from each of XLA's notations: a list, a reshaped iota, or axes of a mesh."""
    if match := _LISTED.search(attributes):
        return tuple(tuple(_ints(group)) for group in re.findall(r"\{([\d,]*)\}", match.group(1)))
    if match := _RESHAPED.search(attributes):
        return _rows(_iota(match.group(2)), _ints(match.group(1))[-1])
    if match := _ON_MESH.search(attributes):
        axes, ids, used = match.groups()
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
        names = re.findall(r"'([^']+)'", used)
        if not names or re.sub(r"'[^']+'|[, ]", "", used):
            raise ValueError(f"replica groups in an unknown notation: {match.group()}")
        positions = _transposed(
            list(sizes.values()),
            [i for i, name in enumerate(sizes) if name not in names]
            + [list(sizes).index(name) for name in names],
        )
        devices = _iota(ids) if ids else list(range(len(positions)))
        return _rows([devices[i] for i in positions], math.prod(sizes[name] for name in names))
    return ()


def _iota(text: str) -> list[int]:
    """`[4,2]T(1,0)` -> the numbers 0 to 7 in an array of this shape, its axes transposed; or a plain list."""
    match = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if not match:
        return _ints(text)
    shape = _ints(match.group(1))
    return _transposed(shape, _ints(match.group(2)) or range(len(shape)))


def _ints(text: str | None) -> list[int]:
    return [int(x) for x in text.split(",")] if text else []


def _transposed(shape: list[int], order: Iterable[int]) -> list[int]:
    """Positions 0, 1, ... in an array of this shape, read with its axes in this order."""
    positions = [0]
    for axis in order:
        stride = math.prod(shape[axis + 1 :])
        positions = [p + i * stride for p in positions for i in range(shape[axis])]
    return positions


def _rows(devices: list[int], size: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(devices[i : i + size]) for i in range(0, len(devices), size))
