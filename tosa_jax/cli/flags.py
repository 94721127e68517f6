"""What the entries share: flags in, one call, one line and an exit status for what a person did wrong."""

import os
import sys
from collections.abc import Callable

import jax
from absl import flags
from ml_collections import config_flags

from tosa_jax.cli.exit_status import guard
from tosa_jax.distributed.initialisation import Cluster, join
from tosa_jax.distributed.preemption import Stopped
from tosa_jax.errors import ConfigError
from tosa_jax.paths import AnyPath, as_path

CACHE_DIR = "~/.cache/tosa_jax/compiled"
"""Where compiled programs are kept, unless JAX_COMPILATION_CACHE_DIR says otherwise."""


def configure_jax() -> None:
    """Keeps compiled programs between runs, unless the environment says where, or that none are kept.

    On several CPU devices one program runs at a time: two with collectives can starve each other of threads.
    """
    if jax.config.jax_num_cpu_devices > 1 or "device_count" in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(CACHE_DIR))


def parse(usage: str, argv: list[str]) -> tuple[object, AnyPath]:
    """`--config=FILE[:ARG] [--workdir=DIR] [--config.FIELD=VALUE]` -> the ConfigDict and the work directory.

    Raises ConfigError for everything that is wrong with them, SystemExit after `--help`, which prints `usage`.
    """
    values = flags.FlagValues()
    config_flag = config_flags.DEFINE_config_file(
        "config", None, "the recipe, a Python file", lock_config=True, flag_values=values,
        sys_argv=["tosa_jax", *argv],
    )  # fmt: skip
    workdir_flag = flags.DEFINE_string(
        "workdir", "", "where the run lives; default: runs/<config name>", flag_values=values
    )
    if {"--help", "-h", "-help"} & set(argv):
        print(usage.strip())
        raise SystemExit(0)
    given = [a.partition("=")[2] for a in argv if a.lstrip("-").startswith("config=")]
    path, _, argument = given[0].partition(":") if given else ("", "", "")
    if given and not os.path.isfile(path):
        raise ConfigError(
            f"--config={path}: no such file; give the path of a recipe, e.g. --config=configs/digits.py"
        )
    try:
        rest = values(["tosa_jax", *argv])
        # A recipe that cannot be loaded raises only when it is looked at.
        if config_flag.value is not None:
            config_flag.value.to_dict()
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise ConfigError(f"command line: {_last_line(error)}") from error
    if len(rest) > 1:
        raise ConfigError(f"command line: unexpected argument {rest[1]!r}; see --help")
    if config_flag.value is None:
        raise ConfigError("command line: --config=FILE is missing, e.g. --config=configs/digits.py")
    name = os.path.splitext(os.path.basename(path))[0] + (
        f"_{argument.replace(',', '_').replace('=', '')}" if argument else ""
    )
    return config_flag.value, as_path(workdir_flag.value or f"runs/{name}")


def parse_cluster(argv: list[str]) -> tuple[Cluster, list[str]]:
    """`--[no]multihost --coordinator= --num_processes= --process_id= --join_timeout=`, and the other arguments.

    Raises ConfigError for everything that is wrong with them.
    """
    values = flags.FlagValues()
    flags.DEFINE_boolean("multihost", None, "one network in several processes", flag_values=values)
    flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0", flag_values=values)
    for name, text in (
        ("num_processes", "processes of the run"),
        ("process_id", "number of this one"),
        ("join_timeout", "seconds to wait for the others"),
    ):
        flags.DEFINE_integer(name, None, text, lower_bound=0, flag_values=values)
    try:
        rest = values(["tosa_jax", *argv], known_only=True)[1:]
    except flags.Error as error:
        raise ConfigError(f"command line: {error}") from error
    given = {name: values[name].value for name in values if values[name].value is not None}
    return Cluster(**given), rest


def _last_line(error: Exception) -> str:
    """The text of an error; of a recipe's own, which comes with its traceback, where and what it was."""
    what = error.args[0] if error.args else ""
    if isinstance(what, KeyError):  # what ml_collections says of a field that is not there
        return f"config has no field {what.args[0]}"
    # The text of a KeyError is the repr of what it says.
    text = str(what if isinstance(error, KeyError) else error)
    first, *rest = text.strip().splitlines() or [""]
    return f"{first.partition(' Traceback')[0]} {rest[-1]}" if "Traceback" in text else text


def run(
    usage: str,
    argv: list[str],
    work: Callable[[object, AnyPath], None],
    *,
    several_processes: bool = False,
) -> int:
    """Parses, works, and turns what went wrong into one line and an exit status.

    several_processes   joins the other processes first, as the command line says.
    """

    def parsed() -> int:
        cluster, rest = parse_cluster(argv) if several_processes else (None, argv)
        config, workdir = parse(usage, rest)
        configure_jax()
        if cluster:
            join(cluster)
        try:
            work(config, workdir)
        except Stopped as stopped:
            print(f"{stopped}; start the same command again to go on", file=sys.stderr)
            return 128 + stopped.signum
        return 0

    return guard(parsed)
