"""Every command and every Python snippet of README.md and docs/ is one that works.

Commands are read as their own parsers read them, and those that are cheap are run; snippets run in the order of their
page. What needs data or weights that are not here gets a representative: the call is checked and a small network used.
"""

import importlib
import inspect
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
from golden.pretrained_cases import quickly_drawn
from test_house import FLOOR, FLOORS
from trained import make_depth_workdir, make_pictures, make_workdir

import tosa_jax
from tosa_jax import predict
from tosa_jax.cli import flags
from tosa_jax.config import make_run_config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_OURS = {
    "tensorboard",
    "git",
    "cd",
    "source",
    "export",
    "ssh",
    "gcloud",
    "docker",
    "curl",
    "unzip",
}
"""Commands that documentation may show and that are not this project's to check."""


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of each fenced and each indented block, in order; an indented one is of shell."""
    found: list[tuple[str, list[str]]] = []
    fence, before = None, ""
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            fence = line[3:].strip() if fence is None else None
            if fence is not None:
                found.append((fence, []))
        elif fence is not None:
            found[-1][1].append(line)
        elif line.startswith("    "):
            if not before.strip():
                found.append(("sh", []))
            found[-1][1].append(line[4:])
        before = line
    return [(language, "\n".join(lines)) for language, lines in found]


def commands(page: Path) -> list[str]:
    """The command lines of a page, comments removed and continued lines joined."""
    lines = []
    for language, text in blocks(page):
        if language in ("sh", "bash", "shell", "console"):
            joined = re.sub(r"\\\n\s*", " ", text)
            lines += [
                re.sub(r"(^|\s{2,})#.*", "", x).strip().removeprefix("$ ")
                for x in joined.splitlines()
            ]
    inline = re.findall(r"`((?:python -m tosa_jax|launch/|pip install)[^`]*)`", page.read_text())
    return [line for line in lines + inline if line]


def cases(find) -> list:
    return [
        pytest.param(page, item, id=f"{page.name}-{i}")
        for page in PAGES
        for i, item in enumerate(find(page))
    ]


def arguments(words: list[str]) -> list[str]:
    """The arguments of a line: what is optional or elided left out, a redirection cut off."""
    words = words[: words.index(">")] if ">" in words else words
    return [w for w in words if w != "..." and not re.search(r"\.FIELD=|=\.\.\.$", w)]


def check_recipe(argv: list[str]) -> None:
    """A command line of main or prepare: the recipe loads, and every field passes its checks."""
    argv = [arg for arg in argv if arg not in ("--overwrite", "--help")]
    configs = [i for i, arg in enumerate(argv) if arg.startswith("--config=")]
    if not configs or argv[configs[0]].endswith(("/X.py", "=FILE")):
        return
    own = argv[configs[0]].replace("model=NAME", "model=vit_small_patch14_dinov2")
    own = own.replace("weights=FILE,", "")  # the recipe would read it
    config, _ = flags.parse("", [own, *argv[: configs[0]], *argv[configs[0] + 1 :]])
    make_run_config(config)


def check_module(name: str, argv: list[str]) -> None:
    """A command line of one of the entries, read by its own parser."""
    module = importlib.import_module(name)
    if name in ("tosa_jax.main", "tosa_jax.prepare"):
        check_recipe(argv)
    elif "--help" not in argv:
        assert hasattr(module, "parse_arguments"), f"{name} needs parse_arguments to be checked"
        # A placeholder for a variant's name; the others are paths, which are only parsed.
        module.parse_arguments([arg.replace("=NAME", "=deit_tiny_patch16_224") for arg in argv])


def check_command(line: str) -> None:
    line = re.sub(r"\[-{1,2}[^\]]*\]", "", line)  # optional arguments of a synopsis
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # VARIABLE=value before a command
        words = words[1:]
    program, rest = words[0], arguments(words[1:])
    if re.fullmatch(r"(\.venv/bin/)?python3?", program) and rest[:1] == ["-m"]:
        name = rest[1]
        assert name.startswith("tosa_jax.") or name in (
            "pip",
            "venv",
            "pydoc",
            "pytest",
            "build",
        ), line
        if name.startswith("tosa_jax."):
            check_module(name, rest[2:])
    elif re.fullmatch(r"(\.venv/bin/)?python3?", program):
        compile((ROOT / rest[0]).read_text(), rest[0], "exec")
    elif program.startswith("launch/"):
        assert os.access(ROOT / program, os.X_OK), f"{program} cannot be run"
        subprocess.run(["bash", "-n", ROOT / program], check=True)
        if any(arg.startswith("--config") for arg in rest):
            check_recipe(rest)
        for path in (arg for arg in rest if arg.endswith(".py") and not arg.startswith("-")):
            assert (ROOT / path).exists(), path
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
            "optional-dependencies"
        ]
        for extra in re.findall(r"tosa-jax\[(.*?)\]", " ".join(rest)):
            assert set(extra.split(",")) <= extras.keys(), line
    else:
        assert program in NOT_OURS, f"this test does not know how to check {program!r}: {line}"


@pytest.fixture
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(("page", "line"), cases(commands))
def test_a_command_is_one_that_its_program_understands(page, line, in_root):
    check_command(line)


def test_a_wrong_command_is_found(in_root):
    for line in (
        "python -m tosa_jax.main --config=configs/digit.py",
        "python -m tosa_jax.main --config=configs/digits.py --config.model.keep_rates=0.5",
        "python -m tosa_jax.bench --modle=deit_tiny_patch16_224",
        "python -m tosa_jax.predict --workdir=runs/digits --keep=1 x.png",
        "launch/remote.sh",
        'pip install "tosa-jax[gpu]"',
        "make all",
    ):
        with pytest.raises((AssertionError, tosa_jax.UserError)):
            check_command(line)


def python_pages() -> list:
    pages = [page for page in PAGES if any(language == "python" for language, _ in blocks(page))]
    return [pytest.param(page, id=page.name) for page in pages]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Work directories of a classifier and of a depth network."""
    folder = tmp_path_factory.mktemp("runs")
    make_workdir(folder / "digits")
    make_depth_workdir(folder / "rooms")
    return folder


@pytest.fixture
def folder(runs, tmp_path, monkeypatch):
    """A folder as the pages assume it: a trained run, pictures, and weights wherever a page names a file."""
    shutil.copytree(runs, tmp_path / "runs")
    for name in ("digit", "dog", "a", "b"):
        make_pictures(tmp_path / "some", 1)[0].replace(tmp_path / f"{name}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    load, create = tosa_jax.load_pretrained, tosa_jax.create_model
    signature = inspect.signature(load)

    def load_what_is_there(*args, **kwargs):
        values = signature.bind(*args, **kwargs).arguments
        files = [values[key] for key in ("path", "selectors") if values.get(key) is not None]
        assert files, "load_pretrained without a file"
        return load(*args, **kwargs) if all(Path(f).exists() for f in files) else values["model"]

    def create_shallow(name, **fields):
        shallow = (
            {"depth": 2} if name != "vit" and not isinstance(fields.get("plan"), tuple) else {}
        )
        if not Path(str(fields.get("pretrained", "."))).exists():
            shallow["pretrained"] = False
        fields |= shallow
        if not fields.get("pretrained") and "rngs" not in fields:
            fields.pop("pretrained", None)
            return quickly_drawn(name, **fields)
        return create(name, **fields)

    monkeypatch.setattr(tosa_jax, "load_pretrained", load_what_is_there)
    monkeypatch.setattr(tosa_jax, "create_model", create_shallow)
    return tmp_path


OF_OTHERS = ("equimo", "jax2onnx")
"""Packages that a page may show and that this project does not install."""


def missing_module(text: str) -> str:
    """The module of one of `OF_OTHERS` that a snippet imports and that is not here; "" if there is none."""

    def is_there(module: str) -> bool:
        try:
            return find_spec(module) is not None
        except ModuleNotFoundError:  # of the package above it
            return False

    imported = re.findall(r"^(?:from|import) ([\w.]+)", text, re.MULTILINE)
    others = [module for module in imported if module.split(".")[0] in OF_OTHERS]
    return next((module for module in others if not is_there(module)), "")


@pytest.mark.parametrize("page", python_pages())
def test_the_snippets_of_a_page_run_in_order(page, folder, capsys):
    names = {"__name__": page.stem}
    for i, (language, text) in enumerate(blocks(page)):
        if language == "python":
            if module := missing_module(text):
                pytest.skip(f"block {i} of {page.name} needs {module}, which is not installed")
            exec(compile(text, f"{page.name}, block {i}", "exec"), names)
            for says, arrays, wanted in stated(text, names):
                dtypes, sizes = zip(*((str(x.dtype), x.ndim) for x in arrays), strict=True)
                assert set(sizes) == {wanted[1]} and set(dtypes) <= {wanted[0] or dtypes[0]}, says


STATEMENT = re.compile(
    r"^(?:(\w+) = .*|([\w.]+))  # (a (?:tuple|list) of )?(?:(float32|int32|uint8) )?\[([\w, ]+)\]",
    re.MULTILINE,
)
"""What a line gives, as its comment says: `out.depth  # float32 [b, height, width], metres`."""


def stated(text: str, names: dict):
    """(the line, the arrays that it gives, the dtype and the number of dimensions that its comment states)."""
    for found in STATEMENT.finditer(text):
        variable, expression, several, dtype, sizes = found.groups()
        value = eval(variable or expression, names)
        yield found[0], value if several else [value], (dtype, sizes.count(",") + 1)


def test_statements_are_found_on_the_pages():
    found = [x[0] for page in PAGES for x in STATEMENT.finditer(page.read_text())]
    assert "out.depth  # float32 [b, height, width]" in found and len(found) >= 8


def test_the_commands_of_using_a_network_are_run(folder, capsys):
    for line in commands(ROOT / "docs/predict.md"):
        words = arguments(shlex.split(line))
        if "--workdir=runs/digits" in words and words[-1] == "digit.png":
            assert predict.main(words[3:]) == 0, line
    assert (folder / "out/digit.png").exists()


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        text = page.read_text()
        named = re.findall(
            r"`((?:docs|tests|results|configs|launch|tosa_jax)/[\w./-]+\.\w+)`", text
        )
        for name in named:
            assert (ROOT / name).exists(), f"{page.name} names {name}, which is not there"


ARCHITECTURE = (ROOT / "docs/architecture.md").read_text()


def walks() -> dict[str, list[tuple[str, str, list[str]]]]:
    """(package, file, names) of each row of each table of a walk, by the walk's first row."""
    found, package = {}, ""
    for table in re.findall(r"\| package \| file .*?\n\n", ARCHITECTURE + "\n", re.DOTALL):
        rows = []
        for line in table.strip().splitlines()[2:]:
            first, file, names, *_ = (cell.strip() for cell in line.strip("|").split("|"))
            package = first.strip("`") or package
            rows.append((package, file.strip("`"), re.findall(r"`(\w+)`", names)))
        found["/".join(rows[0][:2])] = rows
    return found


@pytest.mark.parametrize("rows", walks().values(), ids=walks())
def test_a_walk_names_what_is_there_and_enters_each_package_once(rows):
    for package, file, names in rows:
        assert file.split("/")[0].removesuffix(".py") == package, file
        module = importlib.import_module(
            "tosa_jax." + file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        )
        for name in names:
            assert hasattr(module, name), f"{file} has no {name}"
    entered = [
        package for i, (package, *_) in enumerate(rows) if i == 0 or package != rows[i - 1][0]
    ]
    assert len(entered) == len(set(entered)) > 1, entered


def test_arrows_of_the_diagram_go_down_and_no_package_is_missing():
    diagram = ARCHITECTURE.split("```mermaid")[1].split("```")[0]
    arrows = re.findall(r"(\w+)(?:\[.*?\])? --> (\w+)", diagram)
    floor = FLOOR | {"entries": len(FLOORS)}
    assert all(floor[lower] < floor[upper] for upper, lower in arrows), arrows
    assert len(walks()) == 4
    assert {name for arrow in arrows for name in arrow} == {*FLOOR, "entries"} - set(
        FLOORS[-1].split()
    )
