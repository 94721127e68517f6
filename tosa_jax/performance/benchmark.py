"""The benchmark: times candidates in interleaved rounds and makes one record of each."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from tosa_jax.distributed.devices import check_dtype
from tosa_jax.distributed.timing import interleaved_seconds
from tosa_jax.errors import DeviceError
from tosa_jax.models import cost
from tosa_jax.models.factory import abstract_model
from tosa_jax.models.method import MAIN, METHODS
from tosa_jax.models.method import controls as known_controls
from tosa_jax.models.vit_config import check, check_choice
from tosa_jax.performance import torch_baselines
from tosa_jax.performance.candidates import Candidate, candidate, networks
from tosa_jax.tasks import model_config

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
    """Measures one batch size. Records: dense, ToSA and each control at each keep rate, PyTorch baselines.

    controls       names of methods that a benchmark times (`models.method.controls`).
    against        of `torch_baselines.LIBRARIES`: the dense model in PyTorch, in the same rounds on the same device.
    torch_compile  mode of `torch.compile` on a GPU, one of `torch_baselines.MODES`.
    fields         of `ViTConfig`. Weights are stored in float32 for training, and else in `dtype`, unless
                   `param_dtype` says otherwise.

    gmacs (the sum of gmacs_by_part) and xla_gmacs are for one image (the latter by XLA's count of the compiled
    program, which leaves out what it does not know); ms and ms_iqr for a batch; temp_bytes by XLA's memory analysis.
    `realised` is the speed-up divided by the ratio of GMACs: at 1, time falls as much as multiply-adds. With a
    control of `free_choice` (`random`), records have `selector_overhead`: the time of ToSA minus that of the control,
    divided by that of `dense`.

    Raises ConfigError for bad arguments and missing packages, DeviceError if a candidate does not fit the device.
    """
    check(batch_size >= 1, f"--batch_size={batch_size} must be at least 1")
    check(rounds >= 1, f"--rounds={rounds} must be at least 1")
    timed_controls = known_controls(timed=True)
    for name in controls:
        check_choice("--controls", name, timed_controls)
    against = torch_baselines.check_arguments(against, task, torch_compile)
    check_dtype("dtype", fields.get("dtype", "float32"))
    fields = {"param_dtype": fields.get("dtype", "float32") if not train else "float32"} | fields
    make_config = functools.partial(model_config, task, model, **fields)
    entries = list(networks(make_config, keep_rates, controls))
    candidates = [candidate(*entry, batch_size, train=train, task=task) for entry in entries]
    candidates += [
        torch_baselines.candidate(
            library, model, entries[0][2], batch_size, train=train, mode=torch_compile
        )
        for library in against
    ]
    seconds = seconds_of(candidates, rounds)
    return make_records(candidates, seconds, batch_size, train=train)


def passes_in_flight() -> int:
    """How many passes a candidate starts before it waits for the last one; their time is divided by this number.

    On an accelerator ten, as in a loop that serves or trains: the host prepares a pass while the device runs another.
    """
    return 1 if jax.default_backend() == "cpu" else 10


def seconds_of(candidates: Sequence[Candidate], rounds: int) -> np.ndarray:
    """Seconds that a pass of each candidate takes in each round, float64 [rounds, candidates]."""
    passes = passes_in_flight()

    def run(one):
        for _ in range(passes):
            result = one.run()
        one.wait(result)

    runs = [functools.partial(run, one) for one in candidates]
    return interleaved_seconds(runs, rounds, [one.rest for one in candidates]) / passes


def make_records(
    candidates: Sequence[Candidate], seconds: np.ndarray, batch_size: int, *, train: bool
) -> list[Record]:
    """The records of `measure`, of seconds [rounds, candidates]; the first candidate is the dense model."""
    low, median, high = np.percentile(seconds, [25, 50, 75], axis=0)
    dense_gmacs, records = cost.gmacs(candidates[0].config), []
    for i, one in enumerate(candidates):
        parts = cost.macs_by_part(abstract_model(one.config))
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
    """Adds `selector_overhead` to all records if a control of `free_choice` is among them; None for all but ToSA.

    Of several such controls the first one in the records counts.
    """
    free = [r for r in records if r["name"] in METHODS and METHODS[r["name"]].free_choice]
    if not free:
        return records
    drawn = {r["keep_rate"]: r["ms"] for r in free if r["name"] == free[0]["name"]}
    dense_ms = records[0]["ms"]
    return [
        r
        | {
            "selector_overhead": (r["ms"] - drawn[r["keep_rate"]]) / dense_ms
            if r["name"] == MAIN
            else None
        }
        for r in records
    ]


def measure_batch_sizes(
    batch_sizes: Iterable[int], measure: Callable[[int], list[Record]]
) -> tuple[list[Record], dict[str, str]]:
    """Calls `measure` for each batch size.

    Returns the records of all batch sizes that fit the device, and the reasons of those that do not, by batch size.

    Raises the last DeviceError if none fits.
    """
    records, left_out, error = [], {}, None
    for batch_size in dict.fromkeys(batch_sizes):
        try:
            records += measure(batch_size)
        except DeviceError as too_large:
            error = too_large
            left_out[str(batch_size)] = str(too_large)
    if not records and error is not None:
        raise error
    return records, left_out
