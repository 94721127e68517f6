"""Where the checkpoints of a run are, and the model's parameters in one of them.

A work directory holds `checkpoints/<stage>/<step>/` with the items `state` and `facts`, which `train.checkpoints`
writes.
"""

from pathlib import Path
from typing import Any

import numpy as np

from tosa_jax.errors import WeightsError
from tosa_jax.models.weights.digests import DIGESTS, find_damage
from tosa_jax.paths import AnyPath, parse_json

FOLDER = "checkpoints"
STATE, FACTS = "state", "facts"
"""The items of a checkpoint: the training state, and what the report says of the stage (JSON)."""

FORMAT = 2
"""The form of the checkpoints that this version writes. Form 1, of earlier versions, has no digests."""

_FORMAT_FIELD, _RUN_FIELD = "format", "run"

_STAGES = (
    "finetune",
    "selector",
    "pretrain",
)  # the stage that a work directory stands for: the last


def stage_folder(workdir: AnyPath, stage: str) -> AnyPath:
    """The folder of a stage's checkpoints."""
    return workdir / FOLDER / stage


def saved_steps(stage: AnyPath) -> list[int]:
    """The steps of the finished checkpoints in a stage's folder, ascending; empty if there is no such folder."""
    names = [item.parent.name for item in stage.glob(f"*/{STATE}")]
    return sorted(int(name) for name in names if name.isdigit())


def has_checkpoint(workdir: AnyPath) -> bool:
    """Whether any stage of a run has a finished checkpoint."""
    return any(saved_steps(stage) for stage in workdir.glob(f"{FOLDER}/*"))


def mark(facts: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """The facts of a checkpoint with the form in which it is written, and what the run is (JSON values)."""
    return facts | {_FORMAT_FIELD: FORMAT, _RUN_FIELD: run}


def take_marks(facts: dict[str, Any]) -> tuple[dict[str, Any], int, dict[str, Any]]:
    """The facts without what `mark` added; the form; and what the run is, {} if they do not say."""
    own = {k: v for k, v in facts.items() if k not in (_FORMAT_FIELD, _RUN_FIELD)}
    return own, facts.get(_FORMAT_FIELD, 1), facts.get(_RUN_FIELD) or {}


def recorded_run(workdir: AnyPath) -> dict[str, Any]:
    """What the newest checkpoint of a work directory says of its run; {} if none does."""
    for stage in sorted(workdir.glob(f"{FOLDER}/*")):
        for step in reversed(saved_steps(stage)):
            try:
                facts = parse_json((stage / str(step) / FACTS / "metadata").read_bytes())
                if run := take_marks(facts)[2]:
                    return run
            except (OSError, ValueError, AttributeError):
                continue
    return {}


def checkpoint_damage(checkpoint: AnyPath) -> str:
    """What is wrong with the folder of a checkpoint; "" if it is whole.

    Of form 1, which has no digests, only what is there and its facts are looked at.

    Raises WeightsError: a later version wrote it.
    """
    try:
        if not checkpoint.is_dir():
            return "it is a file, not a folder"
        if not (checkpoint / STATE).is_dir():
            return f"{STATE} is missing"
        facts = parse_json((checkpoint / FACTS / "metadata").read_bytes())
        form = facts.get(_FORMAT_FIELD, 1)
        has_digests = (checkpoint / DIGESTS).exists()
    except OSError as error:
        return f"it cannot be read: {error.strerror or error}"
    except (ValueError, AttributeError):
        return f"{FACTS}/metadata is damaged"
    if form == 1 and not has_digests:
        return ""
    # A damaged number is damage, and no sign of another version: so the digests come first.
    damage = find_damage(checkpoint)
    if not damage and form != FORMAT:
        raise WeightsError(
            f"{checkpoint} has form {form}, which a later version of tosa_jax wrote (this one reads up to "
            f"{FORMAT}): use that version"
        )
    return damage


def workdir_of(checkpoint: Path) -> Path:
    """The work directory that a checkpoint lies in."""
    return checkpoint.absolute().parents[2]


def find_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that a folder stands for; None if the folder belongs to no run.

    folder  a work directory (the newest step of its last stage counts), the folder of a stage (its newest step), or
            that of a step.

    Raises WeightsError: a work directory without a checkpoint.
    """
    if (folder / STATE).is_dir():
        return folder
    if (folder / FOLDER).is_dir():
        begun = [folder / FOLDER / name for name in _STAGES if saved_steps(folder / FOLDER / name)]
        if not begun:
            raise WeightsError(f"{folder / FOLDER} holds no checkpoint of {', '.join(_STAGES)}")
        folder = begun[0]
    steps = saved_steps(folder)
    return folder / str(steps[-1]) if steps else None


def read_params(checkpoint: Path) -> dict[str, np.ndarray]:
    """The model's parameters by path: frozen ones, trained ones, and of these the moving average where there is one.

    The optimizer's state and the teacher are not read. `train.step.trained_params` follows the same rule.

    Raises WeightsError: the checkpoint is damaged or cannot be read.
    """
    import orbax.checkpoint as ocp  # slow to import, and only needed here

    if damage := checkpoint_damage(checkpoint):
        others = [step for step in saved_steps(checkpoint.parent) if str(step) != checkpoint.name]
        advice = f"; give another step: {checkpoint.parent / str(others[-1])}" if others else ""
        raise WeightsError(f"{checkpoint} is damaged ({damage}){advice}")

    state = (checkpoint / STATE).absolute()
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            saved = checkpointer.metadata(state).item_metadata.tree
            wanted = {part: saved[part] for part in ("frozen", "params", "ema") if saved.get(part)}
            kinds = {
                part: {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in tree}
                for part, tree in wanted.items()
            }
            args = ocp.args.PyTreeRestore(item=wanted, restore_args=kinds, partial_restore=True)
            parts = checkpointer.restore(state, args=args)
    except (ValueError, KeyError, TypeError, OSError, AttributeError) as error:
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise WeightsError(f"{checkpoint} is no checkpoint that can be read ({reason})") from error
    trained = parts.get("params", {})
    average = {name: x.astype(trained[name].dtype) for name, x in parts.get("ema", {}).items()}
    return parts.get("frozen", {}) | trained | average
