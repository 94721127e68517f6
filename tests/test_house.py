"""The house: what may import what."""

import ast
import importlib.util
import re
from pathlib import Path

import tosa_jax

ROOT = Path(tosa_jax.__path__[0])
FLOORS = [
    "errors",
    "paths",
    "ops",
    "distributed",
    "models",
    "reporting",
    "data",
    "tasks",
    "config",
    "train",
    "inference",
    "performance",
    "cli",
    "main prepare predict bench budget compare compile_check",
]
"""Packages and modules of the top level, from the ground up: each imports from lower floors, and from itself."""

FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names.split()}


def files():
    """(name of the top-level package or module, path) of every file."""
    for path in sorted(ROOT.rglob("*.py")):
        first = path.relative_to(ROOT).parts[0]
        if first != "__init__.py":
            yield first.removesuffix(".py"), path


def imported_rooms(path):
    """Top-level packages and modules of this project that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "tosa_jax":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tosa_jax."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("tosa_jax."))


def test_imports_never_go_up():
    for room, path in files():
        assert room in FLOOR, f"{room} has no floor: give it one in FLOORS"
        for other in imported_rooms(path):
            assert other == room or FLOOR[other] < FLOOR[room], f"{path} imports {other}"


def test_the_top_level_is_small():
    python_own = ("__pycache__", "__init__.py", "py.typed")
    names = [p.name for p in ROOT.iterdir() if p.name not in python_own]
    assert len(names) <= 20, sorted(names)


def test_every_package_says_what_is_in_it_and_what_is_not():
    for path in ROOT.rglob("__init__.py"):
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        assert len(re.findall(r"[.:](?=\s|$)", text)) >= 2, f"{path} says too little"


def test_files_are_short_and_have_a_purpose():
    for room, path in files():
        text = path.read_text()
        assert text.startswith('"""'), f"{path} does not say what it is for"
        assert text.count("\n") <= 500, f"{path} is long"
        assert not re.search(r"utils|helpers|misc", path.name)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{room}.{node.name} is long"


def test_scripts_import_what_there_is():
    """Those under results/ run seldom, so that nobody notices when what they import moves."""
    scripts = {path.stem: path for path in sorted((ROOT.parent / "results").glob("*.py"))}

    def is_there(module, name):
        if module in scripts:
            return name in defined_in(scripts[module])
        whole = importlib.import_module(module)
        return hasattr(whole, name) or importlib.util.find_spec(f"{module}.{name}") is not None

    missing = [
        f"{path.name}: {node.module}.{x.name}"
        for path in scripts.values()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
        and node.module is not None
        and (node.module in scripts or node.module.split(".")[0] == ROOT.name)
        for x in node.names
        if not is_there(node.module, x.name)
    ]
    assert missing == []


def defined_in(path):
    """Names at the top level of a file."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {x.asname or x.name for x in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {
                x.id for target in targets for x in ast.walk(target) if isinstance(x, ast.Name)
            }
    return names
