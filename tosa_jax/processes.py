"""Several processes that train one network: joining, proving that they run the same thing, failing together.

`jax.distributed` does the work. What is added: a run never starts as N separate ones, and whatever ends one process
ends all of them, each with one line.
"""

import contextlib
import hashlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src import distributed  # the only place that knows how many joined
from jax.experimental import multihost_utils

from tosa_jax.errors import ConfigError, ProcessError, UserError

T = TypeVar("T")

HEARTBEAT_SECONDS = 30
"""A process that has been silent for so long is dead, and the coordination service ends the others."""

LINGER_SECONDS = 3.0
"""How long process 0, which hosts that service, outlives a failure: the others then report it in their own words."""

LAUNCHED = {
    "SLURM_STEP_NUM_TASKS": int,
    "OMPI_COMM_WORLD_SIZE": int,
    "TPU_WORKER_HOSTNAMES": lambda hosts: hosts.count(",") + 1,
    "MEGASCALE_NUM_SLICES": int,
}
"""Environment variables by which a launcher says how many processes it started."""

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """How this process finds the others.

    multihost    True: it must. False: it trains alone, whatever launched it. None: alone, unless a launcher started
                 several, which is an error then.
    coordinator  "host:port" of process 0; "", None and None: told by Cloud TPU, Slurm or Open MPI.
    join_timeout seconds to wait for the others.
    """

    multihost: bool | None = None
    coordinator: str = ""
    num_processes: int | None = None
    process_id: int | None = None
    join_timeout: int = 300

    def __post_init__(self) -> None:
        given = (
            bool(self.coordinator),
            self.num_processes is not None,
            self.process_id is not None,
        )
        if any(given) and not (all(given) and self.multihost):
            raise ConfigError(
                "command line: --coordinator, --num_processes and --process_id go together, with --multihost; "
                "without all three Cloud TPU, Slurm or Open MPI must tell them"
            )
        if all(given):
            if not re.fullmatch(r".+:\d+", self.coordinator):
                raise ConfigError(
                    f"command line: --coordinator={self.coordinator!r} is not HOST:PORT"
                )
            if not 0 <= self.process_id < self.num_processes:
                raise ConfigError(
                    f"command line: --process_id={self.process_id} is not in [0, {self.num_processes})"
                )


def join(cluster: Cluster) -> None:
    """Joins the other processes, before JAX has touched a device.

    Raises ConfigError: a launcher started several processes, but `cluster` does not say that they belong together.
    Where they cannot join, the process ends with one line and status 2: the service would abort it with many.
    """
    if not cluster.multihost:
        if cluster.multihost is None:
            _check_alone()
        return
    # For CPU devices: collectives of two programs in flight could meet each other's between two processes.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    where = cluster.coordinator or "the address that the cluster gave"
    failure = f"the processes did not come together at {where} in {cluster.join_timeout} s; all of them must be started"
    with _deadline(cluster.join_timeout, failure):
        try:
            jax.distributed.initialize(
                cluster.coordinator or None,
                cluster.num_processes,
                cluster.process_id,
                initialization_timeout=2 * cluster.join_timeout,  # after ours
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                shutdown_timeout_seconds=HEARTBEAT_SECONDS,
            )
            joined, found = distributed.global_state.num_processes, jax.process_count()
        except (ValueError, RuntimeError, KeyError, OSError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ProcessError(
                f"--multihost: this process cannot join others ({reason}); nothing was trained. Start it through "
                "launch/tpu_vm.sh, launch/gke_xpk.sh or launch/slurm.sbatch, or give --coordinator=HOST:PORT "
                "--num_processes=N --process_id=I"
            ) from error
    if found != joined:
        raise ProcessError(
            f"--multihost: {joined} processes joined, but the devices know of {found}"
        )


def are_several() -> bool:
    """Whether other processes train with this one."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_main() -> bool:
    """Whether this is the process that writes and talks."""
    return jax.process_index() == 0


def gather_texts(text: str) -> list[str]:
    """Each process's text, in order, on all of them."""
    data = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(data.size)).reshape(-1)
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: data.size] = data
    rows = multihost_utils.process_allgather(padded).reshape(len(lengths), -1)
    return [bytes(row[:n]).decode() for row, n in zip(rows, lengths, strict=True)]


def together(work: Callable[[], T]) -> T:
    """Process 0 does some work, then the others do; a UserError of any of them is raised by all."""
    if not are_several():
        return work()
    for turn in (True, False):
        message = ""
        if is_main() == turn:
            try:
                result = work()
            except UserError as error:
                message = str(error)
        for number, said in enumerate(gather_texts(message)):
            if said:
                raise ProcessError(said if turn else f"process {number}: {said}")
    return result


def check_same(
    facts: Mapping[str, Any], compare: Callable[[Any, Any], list[str]] | None = None
) -> None:
    """Raises ProcessError on all processes unless they hold the same facts (JSON values by name).

    compare   gives lines for what differs between two processes' facts; default: the names of those that do.
    """
    texts = gather_texts(json.dumps(facts, sort_keys=True))
    first = json.loads(texts[0])
    for number, text in enumerate(texts):
        other = json.loads(text)
        lines = (
            compare(first, other)
            if compare
            else sorted(k for k in first if first[k] != other.get(k))
        )
        if lines:
            raise ProcessError(
                f"process {number} differs from process 0 ({'; '.join(lines)}); start all processes with the same "
                "code, packages and command line"
            )


def code_versions() -> dict[str, str]:
    """What this process runs: a digest of the project's source files, and the packages that decide results."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return {"code": digest.hexdigest()[:12]} | {name: metadata.version(name) for name in PACKAGES}


def lost_another(error: BaseException) -> str:
    """The line to print if this error means that another process went away, else ""."""
    text = str(error)
    if not are_several() or not re.search(r"Gloo|heartbeat|Barrier failed|NCCL|coordination", text):
        return ""
    return (
        f"another process of this run has stopped, and says why in its own output ({text.splitlines()[0][:160]}); "
        "start the same command again in all processes to go on"
    )


def end_all(status: int) -> int:
    """Ends this process at once where there are others, which may be waiting for it; else returns the status.

    A regular exit would wait for them in turn. They find out by themselves that this one is gone.
    """
    if are_several():
        if is_main():
            time.sleep(LINGER_SECONDS)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _check_alone() -> None:
    for name, count in LAUNCHED.items():
        value = os.environ.get(name, "")
        if value and count(value) > 1:
            raise ConfigError(
                f"{name}={value}: a launcher started several processes, and each would train a network of its own; "
                "give --multihost to train one together, or --nomultihost if separate runs are meant"
            )


@contextlib.contextmanager
def _deadline(seconds: float, message: str) -> Iterator[None]:
    """Ends the process with one line when the body takes longer: it may wait in code that cannot be interrupted."""

    def end():
        print(f"error: {message}", file=sys.stderr, flush=True)
        os._exit(2)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
