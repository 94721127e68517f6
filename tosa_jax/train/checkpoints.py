"""Orbax checkpoints of a stage, of one process or several, local or in a bucket.

Precedence when a run starts: the newest readable checkpoint of the stage, else what the stage before left, else
`init_from`, else random weights.
"""

import contextlib
import logging
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from tosa_jax.distributed.coordination import are_several
from tosa_jax.distributed.preemption import Stopped
from tosa_jax.errors import WorkdirError
from tosa_jax.models.weights.run_checkpoints import FACTS, STATE
from tosa_jax.paths import AnyPath, is_remote

Tree = TypeVar("Tree")

log = logging.getLogger(__name__)


class Manager(ocp.CheckpointManager):
    """Orbax's manager without its question whether a preemption is due: the training loop asks that.

    Orbax would ask with step numbers, which the service compares; but they begin again with each stage.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpoints(contextlib.AbstractContextManager):
    """Checkpoints `<directory>/<step>/` of one stage, written in the background; the newest and the best are kept.

    The best is that of highest `best_metric`, or of lowest where `lower_is_better`.
    """

    def __init__(self, directory: AnyPath, best_metric: str, lower_is_better: bool = False) -> None:
        def score(metrics):
            if best_metric not in metrics:
                return float("-inf")
            return -metrics[best_metric] if lower_is_better else metrics[best_metric]

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
        directory = directory if is_remote(directory) else directory.absolute()
        self.manager = Manager(directory, options=options)

    def save(
        self,
        step: int,
        state: Any,
        facts: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Starts writing state and facts (JSON values). A step that was saved before is left as it is.

        metrics   include the one by which the best is chosen; None: the model was not scored at this step.

        Raises RuntimeError: Orbax does not save.
        """
        if step in self.manager.all_steps():
            return
        items = {STATE: ocp.args.PyTreeSave(state), FACTS: ocp.args.JsonSave(dict(facts))}
        args = ocp.args.Composite(**items)
        if not self.manager.save(step, args=args, metrics=dict(metrics) if metrics else None):
            raise RuntimeError(f"orbax refused to save step {step} under {self.manager.directory}")

    def restore(self, abstract: Any) -> tuple[Any, dict[str, Any]] | None:
        """The newest state that can be read, and its facts; None if there is no checkpoint.

        abstract  shapes of the state, with shardings.

        A damaged checkpoint is passed over with a warning, and deleted when an older one can be read.

        Raises WorkdirError: there are checkpoints, and none of them can be read.
        """
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
        state = ocp.args.PyTreeRestore(item=abstract, restore_args=restore_args)
        args = ocp.args.Composite(**{STATE: state, FACTS: ocp.args.JsonRestore()})
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
            return restored[STATE], restored[FACTS]
        if failures:
            raise WorkdirError(
                f"no checkpoint under {self.manager.directory} can be read ({failures[0]}); delete that "
                "directory to start the stage again"
            )
        return None

    def wait(self) -> None:
        """Waits until everything is on disk. Raises the errors that happened in the background."""
        self.manager.wait_until_finished()

    def close(self) -> None:
        """Waits for what is being written, and closes the manager."""
        self.manager.close()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Closing waits for the other processes, which may have ended after a failure.
        if kind is None or kind is Stopped or not are_several():
            self.close()


def with_shardings(tree: Tree, shardings: Tree) -> Tree:
    """The shapes of a tree, with a sharding for each leaf."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )
