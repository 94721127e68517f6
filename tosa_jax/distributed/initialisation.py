"""How processes find each other, or stop: a run never starts as N separate ones."""

import contextlib
import os
import re
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import jax
from jax._src import distributed  # how many joined has no public name
from jax.experimental import multihost_utils

from tosa_jax.distributed import coordination
from tosa_jax.errors import ConfigError, ProcessError

HEARTBEAT_SECONDS = 40
"""A process that has been silent for so long makes the coordination service abort the others; `coordination.watch`,
which says more, comes first wherever Python still runs."""

LAUNCHED = {
    "SLURM_STEP_NUM_TASKS": int,
    "OMPI_COMM_WORLD_SIZE": int,
    "TPU_WORKER_HOSTNAMES": lambda hosts: hosts.count(",") + 1,
    "MEGASCALE_NUM_SLICES": int,
}
"""Environment variables by which a launcher says how many processes it started."""


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

    Raises ConfigError: a launcher started several processes, but `cluster` does not say that they belong together;
    ProcessError: nobody says where the others are, or the devices know of another number of processes.
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
            )
            joined, found = distributed.global_state.num_processes, jax.process_count()
            # The devices meet now, while nobody compiles: those of CPUs give up on a partner after 30 s.
            multihost_utils.sync_global_devices("joined")
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
    coordination.watch()


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
