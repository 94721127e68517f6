"""The tasks, by the names that recipes and `create_model` use. A task of its own: one file here and its line below,
and its network in `models/factory.py`."""

from tosa_jax.tasks.classification import Classification
from tosa_jax.tasks.depth import Depth
from tosa_jax.tasks.task import Task

TASKS: dict[str, type[Task]] = {"classification": Classification, "depth": Depth}
"""By the value of `config.task.name`."""
