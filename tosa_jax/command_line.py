"""What the entries share: flags in, one call, one line and an exit status for what a person did wrong."""

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from absl import flags, logging
from ml_collections import config_flags

from tosa_jax.errors import ConfigError, DeviceError, UserError

CACHE_DIR = "~/.cache/tosa_jax/compiled"


def configure_jax() -> None:
    """Keeps compiled programs between runs, unless the environment says where, or that none are kept.

    On several CPU devices one program runs at a time: two with collectives can starve each other of threads.
    """
    import jax

    if jax.config.jax_num_cpu_devices > 1 or "device_count" in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(CACHE_DIR))


def parse(usage: str, argv: list[str]) -> tuple[object, Path]:
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
    given = [a.partition("=")[2] for a in argv if a.lstrip("-").startswith("config=")]
    path, _, argument = given[0].partition(":") if given else ("", "", "")
    if given and not Path(path).is_file():
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
    name = Path(path).stem + (f"_{argument.replace(',', '_').replace('=', '')}" if argument else "")
    return config_flag.value, Path(workdir_flag.value or f"runs/{name}")


def _last_line(error: Exception) -> str:
    """The text of an error; of a recipe's own, which comes with its traceback, where and what it was."""
    # The text of a KeyError is the repr of what it says.
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    first, *rest = text.strip().splitlines() or [""]
    return f"{first.partition(' Traceback')[0]} {rest[-1]}" if "Traceback" in text else text


def run(usage: str, argv: list[str], work: Callable[[object, Path], None]) -> int:
    """Parses, works, and turns what went wrong into one line and an exit status."""
    from tosa_jax.train import Stopped

    def parsed() -> int:
        config, workdir = parse(usage, argv)
        configure_jax()
        try:
            work(config, workdir)
        except Stopped as stopped:
            print(f"{stopped}; start the same command again to go on", file=sys.stderr)
            return 128 + stopped.signum
        return 0

    return guard(parsed)


def guard(work: Callable[[], int]) -> int:
    """What `work` returns, or 2 and one line on standard error for what a person can mend."""
    # Grain asks absl for its flags, and warnings of libraries belong to standard error.
    flags.FLAGS.mark_as_parsed()
    logging.set_verbosity(logging.ERROR)
    try:
        return work()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except (RuntimeError, AssertionError) as error:
        print(f"error: {_as_user_error(error)}", file=sys.stderr)
    return 2


def _as_user_error(error: Exception) -> UserError:
    """What JAX says of devices, as one line; anything else is a defect and is raised again."""
    frames = traceback.extract_tb(error.__traceback__)
    # JAX only asserts that there is a backend where a platform of JAX_PLATFORMS has none at all.
    if frames and frames[-1].filename.endswith("xla_bridge.py"):
        asked = os.environ.get("JAX_PLATFORMS", "")
        return DeviceError(
            f"JAX finds no device of the kind asked for (JAX_PLATFORMS={asked!r} {error}): install tosa-jax[cuda] or "
            "tosa-jax[tpu], or set JAX_PLATFORMS=cpu"
        )
    if "RESOURCE_EXHAUSTED" in str(error):
        return DeviceError(
            f"the device's memory is full ({str(error)[:160]}): take a smaller batch size, model.map_chunk=64, or more "
            "devices along --config.mesh.fsdp"
        )
    raise error
