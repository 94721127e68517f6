"""Every public name says what it is, and every public function which errors it raises."""

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

import tosa_jax
from tosa_jax import errors

ROOT = Path(tosa_jax.__path__[0])
MODULES = sorted(
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in ROOT.rglob("*.py")
)


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_says_what_it_is_and_which_errors_it_raises(name):
    module = importlib.import_module(name)
    assert not [*silent_things(module)]


def silent_things(module) -> Iterator[str]:
    """Classes, functions and methods without a docstring, and errors of which theirs says nothing."""
    scopes = [("", ast.parse(Path(module.__file__).read_text()), module)]
    for where, scope, owner in scopes:
        for node in scope.body:
            if not isinstance(node, ast.ClassDef | ast.FunctionDef) or node.name.startswith("_"):
                continue
            thing, path = getattr(owner, node.name), where + node.name
            said = inspect.getdoc(thing)  # of an overriding method: what its base says, too
            if not said:
                yield path
            elif isinstance(node, ast.FunctionDef):
                yield from (f"{path}: {x}" for x in raised_errors(node) if not mentions(said, x))
            if isinstance(node, ast.ClassDef):
                scopes.append((f"{path}.", node, thing))


def raised_errors(function: ast.FunctionDef) -> set[str]:
    """Names of the errors that stand in a function's own body, checks included."""
    found, nodes = set(), list(function.body)
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.Raise) and node.exc is not None:
            name = ast.unparse(node.exc).partition("(")[0]
            found.add(name if name[0].isupper() else None)  # not a variable
        if isinstance(node, ast.Call):
            called = {"check": "ConfigError", "check_choice": "ConfigError"}
            found.add((called | {"check_fits": "DeviceError"}).get(ast.unparse(node.func)))
        nodes += ast.iter_child_nodes(node)
    return found - {None, "NotImplementedError"}


def mentions(text: str, error: str) -> bool:
    """Whether a text names an error, or says UserError for one of the project's own."""
    return error in text or (hasattr(errors, error) and "UserError" in text)
