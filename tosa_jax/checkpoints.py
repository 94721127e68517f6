"""Orbax checkpoints of a stage, and the work directory that holds a run.

Precedence when a run starts: the newest readable checkpoint of the stage, else what the stage before left, else
`init_from`, else random weights.
"""

import contextlib
import fcntl
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from tosa_jax.config import RunConfig, differences, to_json
from tosa_jax.errors import WorkdirError
from tosa_jax.progress import write_atomically

log = logging.getLogger(__name__)


class Checkpoints:
    """Checkpoints `<directory>/<step>/` of one stage, written in the background; the newest and the best are kept."""

    def __init__(self, directory: Path, best_metric: str) -> None:
        def score(metrics):
            return metrics.get(best_metric, float("-inf"))

        keep = policies.AnyPreservationPolicy(
            [
                policies.LatestN(1),
                policies.BestN(get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep,
            best_fn=score,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )
        self.manager = ocp.CheckpointManager(directory.absolute(), options=options)

    def save(
        self,
        step: int,
        state: Any,
        facts: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Starts writing state and facts (JSON values); a step that is there already is left as it is."""
        if step in self.manager.all_steps():
            return
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state), facts=ocp.args.JsonSave(dict(facts))
        )
        if not self.manager.save(step, args=args, metrics=dict(metrics) if metrics else None):
            raise RuntimeError(f"orbax refused to save step {step} under {self.manager.directory}")

    def restore(self, abstract: Any) -> tuple[Any, dict[str, Any]] | None:
        """The newest state that can be read, as `abstract` (shapes with shardings) has it, with its facts.

        None if there is no checkpoint.

        Directory names alone prove nothing: a checkpoint that was damaged is passed over with a warning.
        """
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
        args = ocp.args.Composite(
            state=ocp.args.PyTreeRestore(item=abstract, restore_args=restore_args),
            facts=ocp.args.JsonRestore(),
        )
        failures = []
        for step in sorted(self.manager.all_steps(), reverse=True):
            try:
                restored = self.manager.restore(step, args=args)
            except (ValueError, KeyError, OSError) as error:
                failures.append(f"step {step}: {str(error).splitlines()[0][:200]}")
                log.warning("checkpoint passed over: %s", failures[-1])
                continue
            if failures:
                for bad in [s for s in self.manager.all_steps() if s > step]:
                    self.manager.delete(bad)
            return restored["state"], restored["facts"]
        if failures:
            raise WorkdirError(
                f"no checkpoint under {self.manager.directory} can be read ({failures[0]}); delete that "
                "directory to start the stage again"
            )
        return None

    def wait(self) -> None:
        """Blocks until everything is on disk, and raises what went wrong in the background."""
        self.manager.wait_until_finished()

    def close(self) -> None:
        self.manager.close()


def with_shardings(tree: Any, shardings: Any) -> Any:
    """Shapes that say where each leaf lives."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


@contextlib.contextmanager
def open_workdir(workdir: Path, run: RunConfig) -> Iterator[Path]:
    """Makes or re-opens the work directory of a run and locks it.

    Raises WorkdirError if another process works in it, if it cannot be made, or if it holds a run of another
    configuration (the fields that differ are named). A run that came to no checkpoint leaves it free.
    """
    config_path = workdir / "config.json"
    if workdir.exists() and not workdir.is_dir():
        raise WorkdirError(f"{workdir} is a file; give another --workdir")
    values = json.loads(json.dumps(to_json(run)))
    begun = any(workdir.glob("checkpoints/*/*/state")) or (workdir / "report.json").exists()
    if begun and config_path.exists():
        try:
            lines = differences(json.loads(config_path.read_text()), values)
        except json.JSONDecodeError as error:
            raise WorkdirError(
                f"{config_path} cannot be read ({error}); delete {workdir}"
            ) from error
        if lines:
            more = f"; and {len(lines) - 6} more" if len(lines) > 6 else ""
            raise WorkdirError(
                f"{workdir} holds a run of another configuration ({'; '.join(lines[:6])}{more}); "
                "give another --workdir, or set these fields back"
            )
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WorkdirError(
            f"{workdir} cannot be made ({error.strerror}); give another --workdir"
        ) from error
    with open(workdir / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WorkdirError(
                f"{workdir} is in use by another process; wait for it, or give another --workdir"
            ) from None
        if not begun or not config_path.exists():
            write_atomically(config_path, json.dumps(values, indent=2).encode())
        yield workdir
