"""How a command runs: its exit status, one line on standard error for a user's mistake, JAX's settings."""

import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import jax
from absl import flags, logging

from tosa_jax.cli.library_messages import shorten_library_messages
from tosa_jax.distributed import coordination
from tosa_jax.distributed.devices import has_only_cpus
from tosa_jax.distributed.messages import let_go_of_broken_streams, say
from tosa_jax.errors import DeviceError, UserError

CACHE_DIR = "~/.cache/tosa_jax/compiled"
"""Folder of compiled programs, unless the environment variable JAX_COMPILATION_CACHE_DIR names another."""

END_SECONDS = 5.0
"""How long a program that a signal stopped waits for its threads and worker processes."""


def configure_jax() -> None:
    """Sets what every command wants of JAX. Call it before JAX looks for devices.

    Compiled programs are cached in `CACHE_DIR`. The environment variable JAX_COMPILATION_CACHE_DIR names another
    folder; if it is empty, nothing is cached. With several CPU devices, dispatch is synchronous: two programs with
    collectives that run at the same time can starve each other of threads.
    """
    config: Any = jax.config  # its fields are made at run time
    several = config.jax_num_cpu_devices > 1 or "device_count" in os.environ.get("XLA_FLAGS", "")
    if several:
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(CACHE_DIR))


def run_command(command: Callable[[], int]) -> int:
    """Runs a command and returns its exit status.

    A UserError becomes one line on standard error and status 2. So does what JAX says of a missing device or a full
    memory, and what the system says of a full disk, of permissions, or of a disk that fails.
    SIGINT (Ctrl-C) is one line and status 130. Any other error is a defect of this project and keeps its traceback.

    In a run of several processes an error here ends the other processes too. Where libtpu is installed without a TPU,
    JAX does not start it, unless the environment variable JAX_PLATFORMS says so.
    """
    config: Any = jax.config  # its fields are made at run time
    if not config.jax_platforms and has_only_cpus():
        jax.config.update("jax_platforms", "cpu")
    # Grain reads absl's flags, and fails if nobody has parsed them.
    flags.FLAGS.mark_as_parsed()
    logging.set_verbosity(logging.ERROR)
    shorten_library_messages()
    try:
        status = command()
        coordination.finish()
    except BaseException as error:
        user_error = error if isinstance(error, UserError) else None
        user_error = user_error or _device_error(error) or _system_error(error)
        if user_error is not None:
            say(f"error: {user_error}")
            let_go_of_broken_streams()
            return coordination.end_all(2, str(user_error))
        if isinstance(error, KeyboardInterrupt):
            say("stopped by SIGINT")
            let_go_of_broken_streams()
            return coordination.end_all(128 + signal.SIGINT, "stopped by SIGINT")
        if not coordination.are_several():
            raise
        sys.stderr.write(coordination.explain(error))
        return coordination.end_all(1, str(error) or type(error).__name__)
    let_go_of_broken_streams()
    return status


def end_with(status: int) -> NoReturn:
    """Ends this program with a status. One that a signal stopped ends in seconds, even if a thread hangs in a read."""
    if status > 128:
        end = threading.Timer(END_SECONDS, os._exit, (status,))
        end.daemon = True
        end.start()
    sys.exit(status)


def _device_error(error: BaseException) -> UserError | None:
    """An error of JAX about devices as a DeviceError; None if `error` is anything else."""
    if not isinstance(error, RuntimeError | AssertionError):
        return None
    frames = traceback.extract_tb(error.__traceback__)
    # If no platform of JAX_PLATFORMS exists, JAX raises only an AssertionError: the file tells it from others.
    if frames and frames[-1].filename.endswith("xla_bridge.py"):
        platforms = os.environ.get("JAX_PLATFORMS", "")
        return DeviceError(
            f"JAX finds no device of the kind asked for (JAX_PLATFORMS={platforms!r} {error}): install tosa-jax[cuda] "
            "or tosa-jax[tpu], or set JAX_PLATFORMS=cpu"
        )
    if "RESOURCE_EXHAUSTED" in str(error):
        return DeviceError(
            f"the device's memory is full ({str(error)[:160]}): take a smaller batch size, model.map_chunk=64, or more "
            "devices along --config.mesh.fsdp"
        )
    return None


_SYSTEM_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
)


def _system_error(error: BaseException) -> UserError | None:
    """An error of the system about space, permissions or a failing disk as a UserError; None if it is anything else."""
    if not isinstance(error, OSError) or error.errno not in _SYSTEM_ERRORS:
        return None
    where = error.filename or "a file"
    return UserError(
        f"{where}: {error.strerror}; mend that, and start the same command again. What was saved before is whole"
    )
