"""Numbers that are not finite: looked for before they are saved or reported, and told in one line."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tosa_jax.distributed.mesh import replicated
from tosa_jax.errors import NonFiniteLossError

ADVICE = "Lower the learning rate or set clip_norm, and start again in a new --workdir"


def first_not_finite(tree: Any) -> str:
    """The path of the first array that holds NaN or infinity, such as "params/head/kernel"; "" if there is none.

    tree  arrays of any types, on one mesh. One program looks at all of them where they are.
    """
    flat = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), x)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
        if jnp.issubdtype(x.dtype, jnp.floating)
    ]
    if not flat:
        return ""
    mesh = getattr(getattr(flat[0][1], "sharding", None), "mesh", None)
    finite = np.asarray(_looker(mesh)([x for _, x in flat]))
    return "" if finite.all() else flat[int(finite.argmin())][0]


@functools.cache
def _looker(mesh: Mesh | None) -> jax.stages.Wrapped:
    """The jitted arrays -> whether each is finite. On a mesh every process gets the whole answer."""

    def look(arrays):
        return jnp.stack([jnp.isfinite(x).all() for x in arrays])

    return jax.jit(look) if mesh is None else jax.jit(look, out_shardings=replicated(mesh))


class StepWatch:
    """Looks at the loss and the gradient of each step, in order: stops the run, or counts what the step has skipped.

    names     the paths of the trained arrays, in the order of `bad_gradient`.
    kept      says which checkpoint is left.
    examples  says which examples the batch of a step holds.
    skip_at_most  steps in a row that may be skipped; None: the first one stops the run.
    max_grad_norm  the norm that no gradient may exceed, for the message; 0: there is none.
    """

    def __init__(
        self,
        stage: str,
        names: Sequence[str],
        kept: Callable[[], str],
        examples: Callable[[int], str],
        skip_at_most: int | None,
        max_grad_norm: float = 0.0,
    ) -> None:
        self.stage, self.names, self.kept, self.examples = stage, names, kept, examples
        self.skip_at_most, self.in_row = skip_at_most, 0
        self.max_grad_norm = max_grad_norm

    def look(self, step: int, metrics: Mapping[str, Any]) -> str:
        """Takes what the update that led to `step` gave. Returns a line if it was skipped, else "".

        Raises NonFiniteLossError: it is not finite or too long, and no more steps may be skipped.
        """
        loss, bad = float(metrics["loss"]), int(metrics.get("bad_gradient", 0))
        if math.isfinite(loss) and not bad:
            self.in_row = 0
            return ""
        self.in_row += 1
        what = f"{self.stage}: the loss of step {step} is {loss}{self._gradient(bad, metrics)}"
        what = f"{what}; its batch holds {self.examples(step)}"
        if self.skip_at_most is None:
            raise NonFiniteLossError(f"{what}; {self.kept()}. {ADVICE}; or set on_nonfinite='skip'")
        if self.in_row > self.skip_at_most:
            raise NonFiniteLossError(
                f"{what}. These are {self.in_row} in a row, skip_at_most={self.skip_at_most} allows no more; "
                f"{self.kept()}. {ADVICE}"
            )
        return f"{what}. The update is skipped"

    def _gradient(self, bad: int, metrics: Mapping[str, Any]) -> str:
        """What is wrong with the gradient, as a part of a sentence."""
        if not bad:
            return ""
        name, norm = self.names[bad - 1], float(metrics["grad_norm"])
        if math.isfinite(norm):
            return (
                f"; the gradient's norm is {norm:.4g}, above max_grad_norm={self.max_grad_norm:g}, "
                f"and {name} has most of it"
            )
        return f"; the gradient of {name} holds NaN or infinity"


def check_state(stage: str, step: int, tree: Any, kept: str) -> None:
    """Raises NonFiniteLossError if an array of a state is not finite. kept  says which checkpoint is left."""
    if path := first_not_finite(tree):
        raise NonFiniteLossError(
            f"{stage}: {path} holds NaN or infinity after step {step}, so this state is not saved; {kept}. {ADVICE}"
        )


def check_metrics(what: str, metrics: Mapping[str, float], params: Any, kept: str) -> None:
    """Raises NonFiniteLossError if a metric is not finite. what  was evaluated: "pretrain step 40"."""
    bad = [name for name, x in metrics.items() if not np.isfinite(x)]
    if bad:
        path = first_not_finite(params)
        why = f"{path} holds NaN or infinity" if path else "all parameters are finite"
        raise NonFiniteLossError(
            f"{what}: the evaluation gives {bad[0]}={metrics[bad[0]]} ({why}); {kept}. {ADVICE}"
        )
