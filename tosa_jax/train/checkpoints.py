"""Orbax checkpoints of a stage, of one process or several, local or in a bucket.

Precedence when a run starts: the newest whole checkpoint of the stage, else what the stage before left, else
`init_from`, else random weights.
"""

import contextlib
import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from tosa_jax.distributed.coordination import are_several, first_said, is_main
from tosa_jax.distributed.messages import say
from tosa_jax.distributed.preemption import Stopped
from tosa_jax.errors import WorkdirError
from tosa_jax.models.weights.digests import write_digests
from tosa_jax.models.weights.run_checkpoints import (
    FACTS,
    STATE,
    checkpoint_damage,
    mark,
    saved_steps,
    take_marks,
)
from tosa_jax.paths import AnyPath, is_remote, parse_json, write_atomically
from tosa_jax.train import tensorstore_leak
from tosa_jax.train.identity import Identity

Tree = TypeVar("Tree")

SCORES = "scores.json"
"""The file of a stage's folder with what evaluations gave: {step: {metric: value}}."""


class Manager(ocp.CheckpointManager):
    """Orbax's manager without its question whether a preemption is due: the training loop asks that.

    Orbax would ask with step numbers, which the service compares; but they begin again with each stage.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


@dataclass
class NewestAndBest:
    """Orbax's question which checkpoints to keep: the newest ones, and the best of those that were scored.

    scores  a number for each scored step; the highest is the best.
    """

    newest: int
    scores: Mapping[int, float]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Whether to keep each checkpoint (Orbax's `PreservationPolicy`)."""
        steps = sorted(info.step for info in checkpoints)
        scored = [step for step in steps if step in self.scores]
        kept = {*steps[-self.newest :], *sorted(scored, key=lambda s: self.scores[s])[-1:]}
        return [info.step in kept for info in checkpoints]


class Timer:
    """Whether a time is over, by the clock of process 0, the same in all processes.

    seconds  0: it never is.
    steps    where there are several processes, they ask at every so many steps: an answer takes messages.
    """

    def __init__(
        self, seconds: float, steps: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.seconds, self.steps, self.clock = seconds, steps, clock
        self.restart()

    def restart(self) -> None:
        """Counts from now on."""
        self.started = self.clock()

    def is_over(self, step: int) -> bool:
        """Whether it is over before this step. Every process asks at every step."""
        if not self.seconds or (are_several() and step % self.steps):
            return False
        over = is_main() and self.clock() - self.started >= self.seconds
        return bool(first_said("over" if over else ""))


class Checkpoints(contextlib.AbstractContextManager):
    """Checkpoints `<directory>/<step>/` of one stage, written in the background; the newest and the best are kept.

    A digest of each file is written before a checkpoint counts as finished. Opening looks for damage: checkpoints that
    are newer than the newest whole one become `<step>.damaged`, and a line says why.

    best_metric      decides which is the best: the highest, or the lowest where `lower_is_better`.
    keep             how many of the newest are kept.
    identity         what the run is: written with each checkpoint, and compared with what is restored.

    Raises WorkdirError: there are checkpoints, and none is whole; WeightsError: a later version wrote one.
    """

    def __init__(
        self,
        directory: AnyPath,
        best_metric: str,
        lower_is_better: bool = False,
        keep: int = 1,
        identity: Identity | None = None,
    ) -> None:
        tensorstore_leak.mend()
        self.identity = identity
        self.folder = directory if is_remote(directory) else directory.absolute()
        self.best_metric, self.sign = best_metric, -1 if lower_is_better else 1
        if is_main():
            set_damaged_aside(self.folder)
        said = first_said(json.dumps(read_scores(self.folder)) if is_main() else "")
        self.scores: dict[int, dict[str, float]] = {int(k): v for k, v in json.loads(said).items()}
        self.ranks: dict[int, float] = {}
        for step, metrics in self.scores.items():
            self._rank(step, metrics)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=NewestAndBest(keep, self.ranks),
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._sign),
        )
        self.manager = Manager(self.folder, options=options)
        self._saving = 0

    def save(self, step: int, state: Any, facts: Mapping[str, Any]) -> None:
        """Starts writing state and facts (JSON values). A step that was saved before is left as it is.

        Raises RuntimeError: Orbax does not save; WorkdirError: the checkpoint before could not be written.
        """
        if step in self.manager.all_steps():
            return
        self.wait()
        self._saving = step
        facts = mark(dict(facts), self.identity.to_json() if self.identity else {})
        args = ocp.args.Composite(
            **{STATE: ocp.args.PyTreeSave(state), FACTS: ocp.args.JsonSave(facts)}
        )
        if not self.manager.save(step, args=args):
            raise RuntimeError(f"orbax refused to save step {step} under {self.folder}")

    def score(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes down what the evaluation of a step gave, saved or not. Processes other than the first only keep it."""
        self.scores[step] = dict(metrics)
        self._rank(step, metrics)
        self._write_scores()

    def restore(self, abstract: Any) -> tuple[Any, dict[str, Any]] | None:
        """The newest whole state, and its facts; None if there is no checkpoint.

        abstract  shapes of the state, with shardings.

        One that Orbax cannot read is passed over as a damaged one is: that is how damage without digests shows.

        Raises WorkdirError: there are checkpoints, and none of them can be read, or it is of another run or other data.
        """
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
        state = ocp.args.PyTreeRestore(item=abstract, restore_args=restore_args)
        args = ocp.args.Composite(**{STATE: state, FACTS: ocp.args.JsonRestore()})
        failures: dict[int, str] = {}
        for step in sorted(self.manager.all_steps(), reverse=True):
            damage = self._damage(step) if failures else ""  # opening has looked at the newest
            if damage:
                failures[step] = damage
                continue
            try:
                restored = self.manager.restore(step, args=args)
            except (jax.errors.JaxRuntimeError, MemoryError):
                raise  # the device's fault, not the file's
            except (
                Exception
            ) as error:  # Orbax and TensorStore say of damage whatever they stumble over
                failures[step] = (str(error) or type(error).__name__).splitlines()[0][:200]
                continue
            for bad, why in failures.items():
                if is_main():
                    set_aside(self.folder / str(bad), why)
            if failures:
                self._agree("")
                self.manager.reload()
            self._forget_after(step)
            facts, form, run = take_marks(restored[FACTS])
            if self.identity:
                self.identity.check(run, f"{self.folder / str(step)}")
            if form == 1:  # saved after its evaluation, which its facts tell
                self.scores.setdefault(step, facts.get("after") or facts.get("before") or {})
            return restored[STATE], facts
        if failures:
            raise _none_is_whole(self.folder, failures)
        self._forget_after(-1)
        return None

    def kept(self) -> str:
        """Which checkpoint the next start goes on from, as a part of a sentence."""
        return _is_kept(self.manager.latest_step())

    def wait(self) -> None:
        """Waits until everything is on disk. Raises WorkdirError: the checkpoint could not be written."""
        try:
            self.manager.wait_until_finished()
        except (OSError, ValueError) as error:
            # Not by Orbax, which counts a checkpoint as gone as soon as one is begun that shall take its place.
            kept = _is_kept(max(saved_steps(self.folder), default=None))
            raise WorkdirError(
                f"{self.folder}: step {self._saving} cannot be saved ({_reason(error)}); {kept}. Mend that, and start "
                "the same command again"
            ) from error

    def close(self) -> None:
        """Waits for what is being written, and closes the manager."""
        self.manager.close()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Closing waits for the other processes, which may have ended after a failure.
        if kind is None or kind is Stopped or not are_several():
            self.close()

    def _sign(self) -> None:
        """Orbax calls this in its thread in process 0, when all files are written and before the folder's last name."""
        names = (str(self._saving), f"{self._saving}.orbax-checkpoint-tmp")
        for folder in self.folder.iterdir():
            if folder.name == names[0] or folder.name.startswith(names[1]):
                write_digests(folder)

    def _forget_after(self, step: int) -> None:
        """Drops the scores of steps that are done again, from the file too: their records are dropped as well."""
        later = [s for s in self.scores if s > step]
        for scores in (self.scores, self.ranks):
            for s in later:
                scores.pop(s, None)
        if later:
            self._write_scores()

    def _write_scores(self) -> None:
        if is_main():
            text = json.dumps(self.scores, indent=1)
            write_atomically(self.folder / SCORES, text.encode())

    def _rank(self, step: int, metrics: Mapping[str, float]) -> None:
        value = metrics.get(self.best_metric)
        if isinstance(value, int | float) and math.isfinite(value):
            self.ranks[step] = self.sign * value

    def _damage(self, step: int) -> str:
        return self._agree(checkpoint_damage(self.folder / str(step)) if is_main() else "")

    def _agree(self, text: str) -> str:
        return first_said(text)


def set_damaged_aside(folder: AnyPath) -> None:
    """Sets aside the checkpoints of a stage's folder that are newer than the newest whole one.

    Raises WorkdirError: there are checkpoints, and none is whole. Then nothing is touched.
    """
    if not folder.exists():
        return
    found = [item for item in folder.iterdir() if item.name.isdigit() and _is_finished(item)]
    damaged: dict[int, str] = {}
    for item in sorted(found, key=lambda item: int(item.name), reverse=True):
        if not (why := checkpoint_damage(item)):
            for step, reason in damaged.items():
                set_aside(folder / str(step), reason)
            return
        damaged[int(item.name)] = why
    if damaged:
        raise _none_is_whole(folder, damaged)


def set_aside(checkpoint: AnyPath, why: str) -> None:
    """Renames a checkpoint to `<step>.damaged`, and says so. Raises WorkdirError: it cannot be renamed."""
    folder, step = checkpoint.parent, checkpoint.name
    target = folder / f"{step}.damaged"
    for number in range(2, 1000):
        if not target.exists():
            break
        target = folder / f"{step}.damaged{number}"
    try:
        checkpoint.rename(target)
    except OSError as error:
        raise WorkdirError(
            f"{checkpoint} is damaged ({why}) and cannot be renamed ({error.strerror or error}): move it away"
        ) from error
    say(
        f"{folder.name}: the checkpoint of step {step} is passed over ({why}); it is {target.name} now"
    )


def _is_kept(step: int | None) -> str:
    """Which checkpoint there is, as a part of a sentence."""
    return "no checkpoint was written" if step is None else f"the checkpoint of step {step} is kept"


def _reason(error: OSError | ValueError) -> str:
    """Why something cannot be written. TensorStore names all files first, and the system's reason at the end."""
    first = (str(error) or type(error).__name__).splitlines()[0]
    system = re.search(r": ([^:]+) \[os_error_code", first)
    return system[1] if system else getattr(error, "strerror", None) or first[:160]


def read_scores(folder: AnyPath) -> dict[str, dict[str, float]]:
    """What evaluations of a stage gave, by step. What cannot be read counts as not scored."""
    scores: dict[str, dict[str, float]] = {}
    old = [(item.parent.parent.name, item) for item in folder.glob("*/metrics/metrics")]
    for step, path in [*old, ("", folder / SCORES)]:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            read = parse_json(path.read_bytes())
            said = {step: read} if step else read
            scores |= {k: dict(v) for k, v in said.items() if k.isdigit() and isinstance(v, dict)}
    return scores


def _is_finished(checkpoint: AnyPath) -> bool:
    """Whether writing has ended. In a bucket, which cannot rename, Orbax's last file tells."""
    return not is_remote(checkpoint) or (checkpoint / "commit_success.txt").exists()


def _none_is_whole(folder: AnyPath, damaged: Mapping[int, str]) -> WorkdirError:
    step, why = max(damaged.items())
    return WorkdirError(
        f"no checkpoint under {folder} can be read (step {step}: {why}); delete that directory to start the stage again"
    )


def with_shardings(tree: Tree, shardings: Tree) -> Tree:
    """The shapes of a tree, with a sharding for each leaf."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )
