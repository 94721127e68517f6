"""A run that begins from a checkpoint of another one, with its optimizer and its place in the stage."""

import json
import shutil
from pathlib import Path

from tosa_jax.config import STAGES
from tosa_jax.distributed.messages import say
from tosa_jax.errors import WorkdirError
from tosa_jax.models.weights.digests import write_digests
from tosa_jax.models.weights.run_checkpoints import (
    FACTS,
    checkpoint_damage,
    has_checkpoint,
    mark,
    saved_steps,
    stage_folder,
    take_marks,
    workdir_of,
)
from tosa_jax.paths import AnyPath, as_path, is_remote, parse_json, write_atomically


def branch(checkpoint: str, workdir: AnyPath) -> None:
    """Copies a checkpoint `<workdir>/checkpoints/<stage>/<step>` to a new work directory, for a run to go on from.

    The newest checkpoints of the stages before it are copied too: they are done. The copies do not say which run they
    are of, so that the new one may have another configuration. Where there are checkpoints already nothing is done: the
    branch goes on.

    Raises WorkdirError: it is no checkpoint, is damaged or lies in a bucket, or the folder cannot be written.
    """
    if is_remote(checkpoint) or is_remote(workdir):
        raise WorkdirError(
            f"{checkpoint}: a run branches between folders; copy the checkpoint from the bucket"
        )
    source = Path(as_path(checkpoint))
    stage = source.parent.name
    if not source.name.isdigit() or stage.partition("_")[0] not in STAGES:
        raise WorkdirError(
            f"{source} is no checkpoint: give the folder of a step, <workdir>/checkpoints/<stage>/<step>"
        )
    if has_checkpoint(workdir):
        return
    if damage := checkpoint_damage(source):
        raise WorkdirError(f"{source} cannot be branched from ({damage}); give another step")
    earlier = STAGES[: STAGES.index(stage.partition("_")[0])]
    done = {name: stage_folder(workdir_of(source), name) for name in earlier}
    copies = [folder / str(saved_steps(folder)[-1]) for folder in done.values() if folder.exists()]
    try:
        for original in [*copies, source]:
            _copy(original, Path(workdir) / original.relative_to(workdir_of(source)))
    except OSError as error:
        raise WorkdirError(f"{workdir} cannot be written ({error.strerror or error})") from error
    say(f"{stage} goes on from step {source.name} of {workdir_of(source)}, with its optimizer")


def _copy(checkpoint: Path, target: Path) -> None:
    """Copies a checkpoint without what says of which run it is; it gets its name when it is whole."""
    unfinished = target.with_name(f"{target.name}.branching")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(checkpoint, unfinished)
    path = unfinished / FACTS / "metadata"
    facts, _, _ = take_marks(parse_json(path.read_bytes()))
    write_atomically(path, json.dumps(mark(facts, {})).encode())
    write_digests(unfinished)
    unfinished.rename(target)
