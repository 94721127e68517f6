"""The quickstart notebook runs from top to bottom."""

import json
from pathlib import Path

from trained import make_workdir

NOTEBOOK = Path(__file__).parents[1] / "docs/quickstart.ipynb"


def code_cells():
    notebook = json.loads(NOTEBOOK.read_text())
    return ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]


def test_every_cell_runs_in_order(tmp_path, monkeypatch):
    make_workdir(tmp_path / "runs/digits")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    names = {"__name__": "__main__"}
    for i, text in enumerate(code_cells()):
        exec(compile(text, f"cell {i}", "exec"), names)
    assert names["speed"][0.25] > 0 and names["figure"].shape[2] == 3
