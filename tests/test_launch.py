"""The launch scripts, run for real in a copied tree with a Python that only records its calls."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.subprocess

# Stands for the machine's Python and, once copied by its "venv", for the environment's.
FAKE_PYTHON = """#!/usr/bin/env bash
echo "$(basename "$0") [$PWD] $$: $*" >>"$CALLS"
case "$1 ${2:-}" in
    "-c import ensurepip"*) exit "${ENSUREPIP_RC:-0}" ;;
    "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip") if [[ $3 == install ]]; then exit "${INSTALL_RC:-0}"; fi ;;
    "-m tosa_jax.main" | "-m pytest") exit "${RUN_RC:-0}" ;;
esac
"""


class Tree:
    """A checkout that needs no network, and the calls its scripts made."""

    def __init__(self, path: Path) -> None:
        self.root = path / "a checkout"
        self.path = path / "bin"
        self.path.mkdir()
        self.root.mkdir()
        for name in ("launch", ".ci"):
            shutil.copytree(ROOT / name, self.root / name)
        for name in ("pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.root / name)
        self.calls_file = path / "calls"
        self.python = self.add_python("fake-python")

    def add_python(self, name: str, text: str = FAKE_PYTHON) -> Path:
        python = self.path / name
        python.write_text(text)
        python.chmod(0o755)
        return python

    def run(self, script: str, *args: str, cwd: Path | None = None, **env: str):
        self.calls_file.write_text("")
        env = {"PATH": os.environ["PATH"], "PYTHON": str(self.python), **env}
        env["CALLS"] = str(self.calls_file)
        command = [str(self.root / script), *args]
        self.done = subprocess.Popen(
            command, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        _, self.stderr = self.done.communicate()
        self.calls = self.calls_file.read_text().splitlines()
        return self.done.returncode

    @property
    def installs(self) -> list[str]:
        return [call.split(": ", 1)[1] for call in self.calls if "-m pip install" in call]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_set_up_happens_once_and_with_the_pins(tree: Tree) -> None:
    assert tree.run("launch/local.sh") == 0
    assert len(tree.installs) == 1
    assert tree.installs[0].endswith("-c constraints.txt -e .")
    assert tree.run("launch/local.sh") == 0
    assert len(tree.calls) == 1


def test_a_failed_install_is_repeated(tree: Tree) -> None:
    assert tree.run("launch/local.sh", INSTALL_RC="1") != 0
    assert not any("tosa_jax.main" in call for call in tree.calls)
    assert tree.run("launch/local.sh") == 0
    assert len(tree.installs) == 1


def test_a_failed_install_forgets_the_one_before(tree: Tree) -> None:
    assert tree.run("launch/local.sh") == 0
    assert tree.run("launch/test.sh", INSTALL_RC="1") != 0
    assert tree.run("launch/local.sh") == 0
    assert len(tree.installs) == 1


def test_the_test_environment_serves_runs_but_not_the_reverse(tree: Tree) -> None:
    assert tree.run("launch/local.sh") == 0
    assert tree.run("launch/test.sh") == 0
    assert tree.installs[0].endswith("-e .[test]")
    assert tree.run("launch/local.sh") == 0
    assert not tree.installs


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_changed_requirements_are_installed(tree: Tree, name: str) -> None:
    assert tree.run("launch/test.sh") == 0
    with (tree.root / name).open("a") as file:
        file.write("# changed\n")
    assert tree.run("launch/test.sh") == 0
    assert len(tree.installs) == 1


def test_arguments_replace_the_default_ones(tree: Tree) -> None:
    tree.run("launch/local.sh")
    assert tree.calls[-1].endswith(": -m tosa_jax.main --config=configs/digits.py")
    tree.run("launch/local.sh", "--config=configs/x.py", "--workdir=a b")
    assert tree.calls[-1].endswith(": -m tosa_jax.main --config=configs/x.py --workdir=a b")
    tree.run("launch/test.sh")
    assert tree.calls[-1].endswith(" --dist=loadfile tests")
    tree.run("launch/test.sh", "-k", "name")
    assert tree.calls[-1].endswith(": -m pytest -k name")


def test_works_from_another_directory(tree: Tree, tmp_path: Path) -> None:
    assert tree.run("launch/local.sh", cwd=tmp_path) == 0
    assert tree.calls and all(f"[{tree.root}]" in call for call in tree.calls)


def test_ci_runs_the_tests_as_people_do(tree: Tree, tmp_path: Path) -> None:
    assert tree.run(".ci/run", cwd=tmp_path) == 0
    assert tree.calls[-1].endswith(" --dist=loadfile tests")
    assert tree.run(".ci/run", RUN_RC="3") == 3


def test_signals_reach_python(tree: Tree) -> None:
    assert tree.run("launch/local.sh", RUN_RC="130") == 130
    assert f" {tree.done.pid}: -m tosa_jax.main" in tree.calls[-1]


def test_says_in_one_line_that_venv_is_missing(tree: Tree) -> None:
    assert tree.run("launch/local.sh", ENSUREPIP_RC="1") == 2
    assert len(tree.stderr.splitlines()) == 1
    assert "python3-venv" in tree.stderr
    assert not (tree.root / ".venv").exists()


def test_takes_the_first_python_that_works(tree: Tree) -> None:
    broken = "#!/usr/bin/env bash\nexit 127\n"
    tree.add_python("python3.13", broken)
    tree.add_python("python3.12")
    tree.add_python("python3.11")
    path = f"{tree.path}:{os.environ['PATH']}"
    assert tree.run("launch/local.sh", PATH=path, PYTHON="") == 0
    assert "making .venv with python3.12" in tree.stderr
    for name in ("python3.12", "python3.11", "python3"):
        tree.add_python(name, broken)
    shutil.rmtree(tree.root / ".venv")
    assert tree.run("launch/local.sh", PATH=path, PYTHON="") == 2
    assert "no Python from 3.11 to 3.13" in tree.stderr
