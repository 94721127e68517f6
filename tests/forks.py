"""Processes that are there at once: forks of a server that has imported what a run imports, and has touched no device.

A Python of its own takes some two seconds of CPU time to import JAX, Orbax, Grain and TFDS.
"""

import atexit
import multiprocessing
import os
import signal
import subprocess
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

from tests.kill_starts import ROOT, end_process

ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "1",
    "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
}
"""What JAX reads when it is imported: one CPU device."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "pytest",
        "matplotlib.backends.backend_agg",
        "tosa_jax.main",
        "tosa_jax.train.runner",
        "tosa_jax.train.workdir",
        "tests.forks",
    ]
)
# Ends the server and waits for it, so that its time is part of that of the tests.
atexit.register(lambda: forkserver._forkserver._stop())


class Fork:
    """`work(*args)`, a function of a module, in a process whose status it returns; used as a `subprocess.Popen`.

    cwd       its folder.
    out, err  the files that its streams go to.
    """

    def __init__(
        self, work: Callable[..., int], *args: Any, out: Path, err: Path, cwd: Path = ROOT
    ) -> None:
        self._process = _context.Process(target=_run, args=(work, args, cwd, out, err))
        # The first one starts the server. Whoever starts the tests may ignore Ctrl-C; these processes heed it.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with mock.patch.dict(os.environ, ENVIRONMENT):
                self._process.start()
        finally:
            signal.signal(signal.SIGINT, before)

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(str(self._process.name), timeout or 0.0)
        return self._process.exitcode

    def send_signal(self, signum: int) -> None:
        if self._process.is_alive() and self._process.pid:
            os.kill(self._process.pid, signum)

    def kill(self) -> None:
        self._process.kill()


def main(argv: list[str]) -> int:
    """`python -m tosa_jax.main ARGV`."""
    from tosa_jax import main as entry

    return entry.main(argv)


def _run(work: Callable[..., int], args: tuple[Any, ...], cwd: Path, out: Path, err: Path) -> None:
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
    os.chdir(cwd)
    end_process(lambda: work(*args))
