"""The house: what may import what."""

import ast
import re
from pathlib import Path

import tosa_jax

ROOT = Path(tosa_jax.__path__[0])
FLOORS = [
    "array_types errors files metric_writer progress data.mixing memory data.class_names",
    "token_ops stand_ins attention_ops losses metrics sharding processes joining stopping exit_status",
    "collectives devices profiling figures",
    "models.vit_config models.params models.positions",
    "optim models.layers",
    "models.stream models.selector",
    "models.bypass models.methods.standard",
    "models.methods.tosa",
    "models.methods.controls models.methods.oracles models.methods.redundancy",
    "models.methods models.plan",
    "models.run_layers models.vit models.depth models.networks models.bypass_fit",
    "cost models.torch_files models.weight_names models.google_names models.weight_files models.weight_checks "
    "models.pretrained",
    "data.decoding data.randaugment data.rendering data.rooms data.clutter",
    "data.transforms data.depth_transforms data.depth_maps data.labelled",
    "data.builders.digits data.builders.idx data.builders.rooms data.builders.shards data.builders.image_folder",
    "data.builders.depth_folder data.builders.imagenet data.builders.nyu data.builders.tfrecord "
    "data.builders.cluttered_fashion",
    "data.builders.preparing",
    "data.builders",
    "data.sources data.settings data.pipeline data.speed data.image_files",
    "token_pictures tasks.task tasks.selector_fitting tasks.classification tasks.depth tasks",
    "config config_json run_plan",
    "steps checkpoints workdir report report_charts report_page network_sources predictions predictor",
    "evaluate",
    "train",
    "stages",
    "compiling",
    "command_line",
    "answers",
    "main prepare bench compile_check predict",
]
"""From the ground up; a room imports from lower floors, or from a room of its own floor listed before it."""

ORDER = [room for floor in FLOORS for room in floor.split()]


def rooms():
    for path in sorted(ROOT.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        yield name.removesuffix(".__init__").removesuffix("__init__"), path


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tosa_jax"):
            module = node.module.removeprefix("tosa_jax").removeprefix(".")
            for alias in node.names:
                inner = f"{module}.{alias.name}".removeprefix(".")
                yield inner if inner in ORDER else module
        elif isinstance(node, ast.Import):
            yield from (a.name[9:] for a in node.names if a.name.startswith("tosa_jax."))


def test_imports_never_go_up():
    for room, path in rooms():
        if room in ("", "models", "data"):
            continue
        assert room in ORDER, f"{room} has no floor: give it one in FLOORS"
        for other in imports(path):
            if other:
                assert ORDER.index(other) < ORDER.index(room), f"{room} imports {other}"


def test_files_are_short_and_have_a_purpose():
    for room, path in rooms():
        text = path.read_text()
        assert text.startswith('"""'), f"{path} does not say what it is for"
        assert text.count("\n") <= 300, f"{path} is long"
        assert not re.search(r"utils|helpers|misc", path.name)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{room}.{node.name} is long"
