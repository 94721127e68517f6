"""The text of an optimised HLO program: its computations, and how often its loops go round."""

import re

_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


def computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation by its name, callers after what they call; and the name of the program's own."""
    found: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if head := _HEADER.match(line):
            name = head.group(2)
            found[name] = []
            entry = name if head.group(1) else entry
        elif line.startswith("}"):
            name = ""
        elif name:
            found[name].append(line)
    return found, entry


def rounds(line: str, found: dict[str, list[str]]) -> int | None:
    """How often the loop of a line with "while(" goes round; None where that depends on data.

    By XLA's annotation, or on a TPU by the constant that the condition compares its counter with.
    """
    if match := _TRIPS.search(line):
        return int(match.group(1))
    condition = re.search(r"condition=%?([\w.-]+)", line)
    lines = "\n".join(found.get(condition.group(1), ()) if condition else ())
    ends = re.findall(r"= s32\[\]\S* constant\((\d+)\)", lines)
    return int(ends[0]) if len(ends) == 1 and "direction=LT" in lines else None
