"""What `report.json` must look like: a file that anything may have changed is checked before a table is made of it."""

from collections.abc import Callable, Mapping
from typing import Any

Test = Callable[[Any], bool]


def is_number(value: Any) -> bool:
    """Whether a value is a number of a size that can be shown: no bool, not NaN, not infinite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def find_fault(report: Any) -> str:
    """The first place where a report is not of the form that `write_report` writes; "" if there is none."""
    return _fault(report, _REPORT, "")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable()


def _may_be(test: Test) -> Test:
    return lambda value: value is None or test(value)


def _is_rate(value: Any) -> bool:
    return is_number(value) or (isinstance(value, list) and all(map(is_number, value)))


def _is_decay(value: Any) -> bool:
    return is_number(value) and 0 <= value < 1


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < 2**53


_METRICS = {"*": _may_be(is_number)}
_ROW = {
    "name": _is_text,
    "keep_rate": _may_be(_is_rate),
    "split": _may_be(_is_text),
    "count": _may_be(_is_count),
    "metrics": _METRICS,
    "gmacs": _may_be(is_number),
    "img_per_sec": _may_be(is_number),
}
_STAGE = {
    "steps": _is_count,
    "seconds": _may_be(is_number),
    "row": _is_text,
    "keep_rate": _may_be(_is_rate),
    "before": _METRICS,
    "after": _METRICS,
}
_TRAINED = {"ema_decay": _is_decay}
_CONFIG = {"pretrain": _TRAINED, "finetune": _TRAINED, "data": {"name": _may_be(_is_text)}}
_REPORT = {
    "results": [_ROW],
    "stages": {"*": _STAGE},
    "versions": {"*": lambda value: True},
    # What is not a configuration of fields is shown as text.
    "config": lambda value: not isinstance(value, Mapping) or not _fault(value, _CONFIG, "config"),
}
"""Forms: a test; a dict of forms by key, of which "*" is for all others; a list with the form of its items. A key that
is missing fits, and so does None for a dict."""

_NEEDED = {"results": _REPORT, "name": _ROW}


def _fault(value: Any, form: Any, where: str) -> str:
    if callable(form):
        return "" if form(value) else f"{where or 'it'} is {str(value)[:40]!r}"
    if isinstance(form, list):
        if not isinstance(value, list):
            return f"{where} is no list"
        return next(
            filter(None, (_fault(x, form[0], f"{where}[{i}]") for i, x in enumerate(value))), ""
        )
    if value is None and where:
        return ""
    if not isinstance(value, Mapping):
        return f"{where or 'it'} has no fields"
    for key, owner in _NEEDED.items():
        if form is owner and key not in value:
            return f"{where or 'it'} has no {key!r}"
    for key, x in value.items():
        own = form.get(key, form.get("*"))
        if own is not None and (fault := _fault(x, own, f"{where}.{key}".lstrip("."))):
            return fault
    return ""
