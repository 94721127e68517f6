"""Joins the processes of a run. If they cannot all join, the run stops: it never becomes N separate runs."""

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
"""After so many seconds without a heartbeat of a process, JAX's coordination service aborts the others.
`coordination.watch` is faster and gives a reason; this is for a process in which Python no longer runs."""

LAUNCHED = {
    "SLURM_STEP_NUM_TASKS": int,
    "OMPI_COMM_WORLD_SIZE": int,
    "TPU_WORKER_HOSTNAMES": lambda hosts: hosts.count(",") + 1,
    "MEGASCALE_NUM_SLICES": int,
}
"""Environment variables of launchers, each with a function from its value to the number of started processes."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The other processes of a run, and how to reach them.

    multihost      True: this process must join others. False: it trains alone. None: it trains alone, and it is an
                   error if a launcher started several processes.
    coordinator    "host:port" of process 0; "": Cloud TPU, Slurm or Open MPI provide it, with the next two.
    num_processes  number of processes of the run; None with an empty `coordinator`.
    process_id     index of this process, from 0; None with an empty `coordinator`.
    join_timeout   seconds to wait for the others.
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
        if self.num_processes is not None and self.process_id is not None:
            if not re.fullmatch(r".+:\d+", self.coordinator):
                raise ConfigError(
                    f"command line: --coordinator={self.coordinator!r} is not HOST:PORT"
                )
            if not 0 <= self.process_id < self.num_processes:
                raise ConfigError(
                    f"command line: --process_id={self.process_id} is not in [0, {self.num_processes})"
                )


def join(cluster: Cluster) -> None:
    """Joins the other processes. Call it before JAX looks for devices.

    Raises ConfigError: a launcher started several processes, but `cluster.multihost` is None; ProcessError: the
    coordinator is unknown, or the devices report another number of processes.
    If not all processes join in time, this process exits with one line and status 2.
    """
    if not cluster.multihost:
        if cluster.multihost is None:
            _check_alone()
        return
    # On CPU devices, collectives of two programs that run at once could be matched with each other across processes.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    where = cluster.coordinator or "the address that the cluster provides"
    failure = (
        f"the processes did not join at {where} in {cluster.join_timeout} s; start all of them"
    )
    coordination.explain_aborts()
    with _deadline(cluster.join_timeout, failure):
        try:
            jax.distributed.initialize(
                cluster.coordinator or None,
                cluster.num_processes,
                cluster.process_id,
                initialization_timeout=2
                * cluster.join_timeout,  # longer than our own deadline, whose message is clearer
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            )
            joined, found = distributed.global_state.num_processes, jax.process_count()
            # The first collective runs here, where no process compiles: on CPUs it fails after 30 s without a partner.
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
    """Exits with status 2 and `message` if the body takes longer than `seconds`.

    The body may wait in C++ code, which no exception interrupts.
    """

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
