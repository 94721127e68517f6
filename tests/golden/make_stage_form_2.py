"""Makes stage_form_2/: the checkpoints of a small stage, in form 2 of `run_checkpoints.FORMAT`.

    PYTHONPATH=. python -m tests.golden.make_stage_form_2

Made with orbax 0.12.8. Later versions must read it: when `FORMAT` grows, it stays, and a new one comes beside it.
"""

from pathlib import Path

from tests.flips import NEW, OLD, make_stage
from tosa_jax.models.weights.digests import write_digests

if __name__ == "__main__":
    folder = Path(__file__).with_name("stage_form_2")
    make_stage(folder)
    for marker in folder.rglob("commit_success.txt"):  # Orbax writes absolute paths in them
        marker.write_text(marker.read_text().replace(str(folder), folder.name))
    for step in (OLD, NEW):
        write_digests(folder / str(step))
