"""Names of arrays by a table of rules, which is read in both directions."""

import re
from collections.abc import Sequence

Rules = Sequence[tuple[str, str]]
"""(regular expression, replacement), applied one after the other.

For `inverse` an expression is text with escaped dots, "^" before it, "$" after it, and at most one group.
"""


def rename(name: str, rules: Rules) -> str:
    """The name after all rules."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def inverse(rules: Rules) -> Rules:
    """The rules that lead back, in the same order; one that only takes a part away leads nowhere and is left out.

    They lead back if no rule's result is changed by a later one, in either direction.
    """
    turned = []
    for pattern, replacement in rules:
        if not replacement:
            continue
        start, end = "^" if pattern.startswith("^") else "", "$" if pattern.endswith("$") else ""
        text = pattern.removeprefix("^").removesuffix("$")
        back = re.escape(replacement)
        if group := re.search(r"\(.*\)", text):
            text = text.replace(group[0], r"\1")
            back = back.replace(r"\\1", group[0])
        turned.append((start + back + end, re.sub(r"\\([^0-9])", r"\1", text)))
    return turned
