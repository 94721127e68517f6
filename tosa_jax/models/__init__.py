"""Vision transformers whose layers come in kinds: sizes, layers, plans, the networks, what they cost.

How they are trained is in `train`, what they are trained for in `tasks`.
"""

from tosa_jax.models import (
    methods as methods,  # Whatever reads the table of methods finds it filled.
)
