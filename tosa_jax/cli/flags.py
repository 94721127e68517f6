"""Parsing of command lines: the recipe and its overrides, the processes of a run, and a command's own arguments.

Every mistake raises a ConfigError of one line.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags

from tosa_jax.distributed.initialisation import Cluster
from tosa_jax.errors import ConfigError, UserError
from tosa_jax.paths import AnyPath, as_path


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser, except that a mistake raises a ConfigError and flags cannot be abbreviated."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError with `message`."""
        raise ConfigError(f"command line: {message}; see --help")


@contextlib.contextmanager
def neighbours_of(recipe: str) -> Iterator[None]:
    """In this context a recipe's `import` finds the files beside it first, whatever the current folder is.

    What it imported from there is forgotten, so that a recipe elsewhere finds its own neighbours.
    """
    folder, before = os.path.dirname(os.path.abspath(recipe)), set(sys.modules)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)
        for name in set(sys.modules) - before:
            if os.path.dirname(getattr(sys.modules[name], "__file__", None) or "") == folder:
                del sys.modules[name]


def _joined(argv: list[str]) -> list[str]:
    """The arguments with `--config FILE` and `--workdir DIR` as one each, so that all readers see the same."""
    joined: list[str] = []
    for argument in argv:
        if joined and joined[-1] in ("--config", "-config", "--workdir", "-workdir"):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def parse(usage: str | None, argv: list[str]) -> tuple[ConfigDict, AnyPath]:
    """Parses `--config=FILE[:ARG] [--workdir=DIR] [--config.FIELD=VALUE ...]`.

    usage  the text that `--help` prints.
    argv   the arguments, without the program's name.

    Returns the configuration and the work directory, by default `runs/<name of FILE>[_ARG]`.

    Raises ConfigError for wrong arguments or a recipe that cannot be loaded, SystemExit after `--help`.
    """
    argv = _joined(argv)
    values = flags.FlagValues()
    config_flag = config_flags.DEFINE_config_file(
        "config",
        None,
        "the recipe, a Python file",
        lock_config=True,
        flag_values=values,
        sys_argv=["tosa_jax", *argv],
    )
    workdir_flag = flags.DEFINE_string(
        "workdir", "", "work directory of the run", flag_values=values
    )
    if {"--help", "-h", "-help"} & set(argv):
        print((usage or "").strip())
        raise SystemExit(0)
    given = [a.partition("=")[2] for a in argv if a.lstrip("-").startswith("config=")]
    path, _, argument = given[-1].partition(":") if given else ("", "", "")
    if given and not os.path.isfile(path):
        raise ConfigError(
            f"--config={path}: no such file; give the path of a recipe, e.g. --config=configs/digits.py"
        )
    try:
        with neighbours_of(path):
            rest = values(["tosa_jax", *argv])
            # ml_collections loads the recipe, and raises its errors, only when the value is read.
            if config_flag.value is not None:
                config_flag.value.to_dict()
    except UserError:
        raise  # a recipe may say itself what is wrong
    except Exception as error:  # a recipe is a program, and may fail in any way
        raise ConfigError(f"command line: {_one_line(error)}") from error
    if len(rest) > 1:
        raise ConfigError(f"command line: unexpected argument {rest[1]!r}; see --help")
    if config_flag.value is None:
        raise ConfigError("command line: --config=FILE is missing, e.g. --config=configs/digits.py")
    name = os.path.splitext(os.path.basename(path))[0]
    if argument:
        name += f"_{argument.replace(',', '_').replace('=', '')}"
    return config_flag.value, as_path(workdir_flag.value or f"runs/{name}")


def image_size(values: Sequence[int]) -> int | tuple[int, int]:
    """What `--image_size` says: one side, or height and width. Raises ConfigError for more numbers."""
    if len(values) > 2:
        raise ConfigError(
            f"--image_size has {len(values)} numbers, but must be one side, or height and width"
        )
    return values[0] if len(values) == 1 else (values[0], values[1])


def parse_cluster(argv: list[str]) -> tuple[Cluster, list[str]]:
    """Parses `--[no]multihost --coordinator= --num_processes= --process_id= --join_timeout=`.

    Returns the cluster and the arguments that are none of these. Raises ConfigError for wrong values.
    """
    values = flags.FlagValues()
    flags.DEFINE_boolean("multihost", None, "several processes train one model", flag_values=values)
    flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0", flag_values=values)
    for name, text in (
        ("num_processes", "number of processes"),
        ("process_id", "index of this process, from 0"),
        ("join_timeout", "seconds to wait for the other processes"),
    ):
        flags.DEFINE_integer(name, None, text, lower_bound=0, flag_values=values)
    try:
        rest = values(["tosa_jax", *argv], known_only=True)[1:]
    except flags.Error as error:
        raise ConfigError(f"command line: {error}") from error
    given: dict[str, Any] = {name: values[name].value for name in values}
    return Cluster(**{name: value for name, value in given.items() if value is not None}), rest


class Begin(NamedTuple):
    """How a run begins where it does not simply begin or go on.

    extend       its last stage may be longer than that of the run in the work directory.
    branch_from  a checkpoint of another run that a new work directory starts from; "": none.
    """

    extend: bool = False
    branch_from: str = ""


def parse_begin(argv: list[str]) -> tuple[Begin, list[str]]:
    """Parses `--extend` and `--branch_from=CHECKPOINT`; returns them and the other arguments.

    Raises ConfigError: a flag without its value, or both.
    """
    values = flags.FlagValues()
    flags.DEFINE_boolean("extend", False, "the last stage may be longer", flag_values=values)
    flags.DEFINE_string("branch_from", "", "a checkpoint of another run", flag_values=values)
    try:
        rest = values(["tosa_jax", *argv], known_only=True)[1:]
    except flags.Error as error:
        raise ConfigError(f"command line: {error}") from error
    begin = Begin(bool(values["extend"].value), values["branch_from"].value or "")
    if begin.extend and begin.branch_from:
        raise ConfigError("command line: give --extend or --branch_from, not both")
    return begin, rest


def _one_line(error: Exception) -> str:
    """The message of an error while parsing; if the recipe raised it, where and its last line."""
    what = error.args[0] if error.args else ""
    if isinstance(what, KeyError):  # ml_collections wraps one if a field does not exist
        return f"config has no field {what.args[0]}"
    # str() of a KeyError is the repr of its message.
    text = str(what if isinstance(error, KeyError) else error)
    first, *rest = text.strip().splitlines() or [""]
    # ml_collections appends the traceback of an error in a recipe.
    return f"{first.partition(' Traceback')[0]} {rest[-1]}" if "Traceback" in text else text
