"""Candidates take turns, and what the clock said becomes records and tables."""

import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tosa_jax.models import cost
from tosa_jax.models.factory import network_config
from tosa_jax.models.vit_config import check, check_choice
from tosa_jax.performance import torch_candidates
from tosa_jax.performance.candidates import CONTROLS, Candidate, candidate, networks

Record = dict[str, Any]


def measure(
    model: str,
    keep_rates: Sequence[float],
    *,
    batch_size: int,
    train: bool,
    rounds: int,
    task: str = "classification",
    controls: Sequence[str] = (),
    against: Sequence[str] = (),
    torch_compile: str = "",
    **fields: Any,
) -> list[Record]:
    """One record a candidate: dense first, then ToSA and each control at each keep rate, then others' dense networks.

    controls       of `CONTROLS`; `skip` has no keep rate and takes part once; `redundancy` gets ToSA's GMACs.
    against        of `torch_candidates.LIBRARIES`: the dense network of PyTorch on the same device, in the same rounds.
    torch_compile  how that is compiled on a GPU: a value of `torch_candidates.MODES`.
    fields         of `ViTConfig`. Weights are stored in float32 for training, and else in `dtype`, unless
                   `param_dtype` says otherwise.

    gmacs (the sum of gmacs_by_part) and xla_gmacs are for one image (the latter by XLA's count of the compiled
    program, which leaves out what it does not know); ms and ms_iqr for a batch; temp_bytes by XLA's memory analysis.
    `realised` is speed-up / ratio of GMACs: 1 means that every saved multiply-add is saved time. With the control
    `random` records have `selector_overhead`: what ToSA takes longer than it, as a share of the dense network's time.

    Raises ConfigError for bad arguments and missing packages, DeviceError for what does not fit the device.
    """
    check(batch_size >= 1, f"--batch_size={batch_size} must be at least 1")
    check(rounds >= 1, f"--rounds={rounds} must be at least 1")
    for name in controls:
        check_choice("--controls", name, CONTROLS)
    against = torch_candidates.check_arguments(against, task, torch_compile)
    fields = {"param_dtype": fields.get("dtype", "float32") if not train else "float32"} | fields
    make_config = functools.partial(network_config, task, model, **fields)
    entries = list(networks(make_config, keep_rates, controls))
    candidates = [candidate(*entry, batch_size, train=train) for entry in entries]
    candidates += [
        torch_candidates.candidate(
            library, model, entries[0][2], batch_size, train=train, mode=torch_compile
        )
        for library in against
    ]
    seconds = interleaved_seconds(candidates, rounds)
    return make_records(candidates, seconds, batch_size, train=train)


def interleaved_seconds(candidates: Sequence[Candidate], rounds: int) -> np.ndarray:
    """Seconds [rounds, candidates]; candidates take turns, and a first round that warms up is left out."""
    seconds = np.zeros((rounds + 1, len(candidates)))
    for i in range(rounds + 1):
        for j, one in enumerate(candidates):
            start = time.perf_counter()
            one.wait(one.run())
            seconds[i, j] = time.perf_counter() - start
            time.sleep(one.rest)
    return seconds[1:]


def make_records(
    candidates: Sequence[Candidate], seconds: np.ndarray, batch_size: int, *, train: bool
) -> list[Record]:
    """The records of `measure` from seconds [rounds, candidates]; the first candidate is the dense network."""
    low, median, high = np.percentile(seconds, [25, 50, 75], axis=0)
    dense_gmacs, records = cost.gmacs(candidates[0].config), []
    for i, one in enumerate(candidates):
        parts = cost.macs_by_part(cost.abstract_model(one.config))
        gmacs = sum(parts.values()) / 1e9
        speedup, ratio = float(median[0] / median[i]), dense_gmacs / gmacs
        records.append(
            {
                "name": one.name,
                "keep_rate": one.keep_rate,
                "batch_size": batch_size,
                "image_size": one.config.image_size,
                "dtype": str(one.config.dtype),
                "train": train,
                "gmacs": gmacs,
                "gmacs_by_part": {part: count / 1e9 for part, count in parts.items()},
                "xla_gmacs": one.xla_gmacs,
                "ms": float(median[i] * 1e3),
                "ms_iqr": float((high[i] - low[i]) * 1e3),
                "img_per_sec": float(batch_size / median[i]),
                "temp_bytes": one.temp_bytes,
                "speedup": speedup,
                "gmac_ratio": ratio,
                "realised": speedup / ratio,
            }
        )
    return add_selector_overhead(records)


def add_selector_overhead(records: list[Record]) -> list[Record]:
    """Adds `selector_overhead` to all records if the control `random` is among them; None for all but ToSA."""
    drawn = {r["keep_rate"]: r["ms"] for r in records if r["name"] == "random"}
    if not drawn:
        return records
    dense_ms = records[0]["ms"]
    return [
        r
        | {
            "selector_overhead": (r["ms"] - drawn[r["keep_rate"]]) / dense_ms
            if r["name"] == "tosa"
            else None
        }
        for r in records
    ]


COLUMNS = {
    "name": "name",
    "keep": "keep_rate",
    "batch": "batch_size",
    "GMACs": "gmacs",
    "ms": "ms",
    "iqr": "ms_iqr",
    "img/s": "img_per_sec",
    "speed-up": "speedup",
    "GMACs ratio": "gmac_ratio",
    "realised": "realised",
    "overhead": "selector_overhead",
}
"""Title of a column -> field of the record."""

_FORMATS = {
    "keep_rate": "{:g}",
    "gmacs": "{:.3f}",
    "ms": "{:.1f}",
    "ms_iqr": "{:.1f}",
    "img_per_sec": "{:.1f}",
    "speedup": "{:.2f}x",
    "gmac_ratio": "{:.2f}x",
    "realised": "{:.2f}",
    "selector_overhead": "{:.1%}",
}


def table(records: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Titles and one row of texts a record; a column that no record has is left out."""
    shown = {title: field for title, field in COLUMNS.items() if field in records[0]}
    return [list(shown), *([_text(r, field) for field in shown.values()] for r in records)]


def _text(record: Mapping[str, Any], field: str) -> str:
    value = record[field]
    if field == "name":
        return value + (" (training)" if record["train"] else "")
    return "-" if value is None else _FORMATS.get(field, "{}").format(value)


def format_records(records: Sequence[Mapping[str, Any]]) -> str:
    """The records as an aligned table."""
    rows = table(records)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
