"""Data sets on disk: this project's TFDS builders, the conversion of raw files, and where prepared sets are found.
What their examples become in a batch is decided in `data.kinds` and `data.pipeline`. No TensorFlow is needed.
"""

from tosa_jax.data.builders.prepared import prepared_dir
from tosa_jax.data.builders.preparing import open_builder, prepare, prepare_own

__all__ = ["open_builder", "prepare", "prepare_own", "prepared_dir"]
