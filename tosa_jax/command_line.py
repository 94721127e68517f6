"""What the entries share: flags in, one call, one line and an exit status for what a person did wrong."""

import os
import sys
from collections.abc import Callable

import jax
from absl import flags, logging
from ml_collections import config_flags

from tosa_jax import processes
from tosa_jax.errors import ConfigError, UserError
from tosa_jax.files import AnyPath, as_path
from tosa_jax.joining import Cluster, join
from tosa_jax.stopping import Stopped

CACHE_DIR = "~/.cache/tosa_jax/compiled"


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

    Raises ConfigError for everything that is wrong with them, except `--help`, which prints `usage` and exits.
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
    try:
        rest = values(["tosa_jax", *argv])
        # A recipe that cannot be loaded raises only when it is looked at.
        if config_flag.value is not None:
            config_flag.value.to_dict()
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise ConfigError(f"command line: {error}") from error
    if len(rest) > 1:
        raise ConfigError(f"command line: unexpected argument {rest[1]!r}; see --help")
    if config_flag.value is None:
        raise ConfigError("command line: --config=FILE is missing, e.g. --config=configs/digits.py")
    recipe = next(a.partition("=")[2] for a in argv if a.lstrip("-").startswith("config="))
    path, _, argument = recipe.partition(":")
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
    # Grain asks absl for its flags, and warnings of libraries belong to standard error.
    flags.FLAGS.mark_as_parsed()
    logging.set_verbosity(logging.ERROR)
    try:
        cluster = None
        if several_processes:
            cluster, argv = parse_cluster(argv)
        config, workdir = parse(usage, argv)
        configure_jax()
        if cluster:
            join(cluster)
        work(config, workdir)
        status = 0
    except Stopped as stopped:
        print(f"{stopped}; start the same command again to go on", file=sys.stderr)
        status = 128 + stopped.signum
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return processes.end_all(2, str(error))
    except BaseException as error:
        if not processes.are_several():
            raise
        sys.stderr.write(processes.explain(error))
        return processes.end_all(1, str(error) or type(error).__name__)
    processes.part()
    return status
