"""Makes old_workdir/, a small run stopped in its second stage, and old_workdir.json, what it predicts and its results.

It was run at commit 4259aff, before the modules were arranged in packages, and needs the modules of that time:

    git worktree add old 4259aff; cd old
    PYTHONPATH=. python ../tests/golden/make_old_workdir.py ../tests/golden/old_workdir
"""

import contextlib
import io
import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from tosa_jax import main, predict, train
from tosa_jax.data.builders import prepare_own

STOP_BEFORE_STEP = 3
"""Steps of the stage of selectors until SIGTERM: the one that runs then is finished, and saved."""


def run(folder: Path) -> None:
    """Trains until a signal that it sends itself, and then a copy to the end."""
    prepare_own("digits", "data")
    recipe = Path(__file__).with_name("old_workdir_recipe.py")
    train_batches, stages = train.train_batches, []

    def batches(*args, **kwargs):
        stages.append(args)
        for i, batch in enumerate(train_batches(*args, **kwargs), start=1):
            if len(stages) == 2 and i == STOP_BEFORE_STEP:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    train.train_batches = batches
    arguments = [f"--config={recipe}", "--config.data.data_dir=data"]
    status = main.main([*arguments, f"--workdir={folder}"])
    assert status == 128 + signal.SIGTERM, status
    for marker in folder.rglob("commit_success.txt"):  # Orbax writes absolute paths in them
        marker.write_text(marker.read_text().replace(str(folder), folder.name))
    Image.fromarray(np.arange(0, 256, 4, np.uint8).reshape(8, 8)).save("ramp.png")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert predict.main([f"--workdir={folder}", "--json", "--top=10", "ramp.png"]) == 0
    shutil.copytree(folder, "whole")
    assert main.main([*arguments, "--workdir=whole"]) == 0
    report = json.loads(Path("whole/report.json").read_text())
    expected = {"results": report["results"], "ramp": json.loads(printed.getvalue())}
    folder.with_suffix(".json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    target = Path(sys.argv[1]).absolute()
    with tempfile.TemporaryDirectory() as here, contextlib.chdir(here):
        run(target)
