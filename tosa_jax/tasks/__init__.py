"""What models are trained for: losses, metrics, predictions and pictures of each task, and `create_model`.

A task is one class, registered under the name that recipes use (`tasks.registry.register`). How steps are run and
what is read from disk are not in here.
"""

from tosa_jax.tasks.classification import Classification
from tosa_jax.tasks.depth.task import Depth
from tosa_jax.tasks.dino.task import Dino
from tosa_jax.tasks.multi_label import MultiLabel
from tosa_jax.tasks.next_token.task import NextToken
from tosa_jax.tasks.registry import TASKS, config_class, create_model, model_config, register
from tosa_jax.tasks.task import Task

__all__ = [
    "TASKS",
    "Classification",
    "Depth",
    "Dino",
    "MultiLabel",
    "NextToken",
    "Task",
    "config_class",
    "create_model",
    "model_config",
    "register",
]
