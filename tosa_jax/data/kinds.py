"""The kinds of data sets that this project reads. A new kind is a subclass of `ExampleKind` and a row here."""

from tosa_jax.data.depth.maps import DepthMaps
from tosa_jax.data.examples import ExampleKind
from tosa_jax.data.labelled import LabelledImages, LabelSets

EXAMPLE_KINDS: tuple[type[ExampleKind], ...] = (LabelledImages, LabelSets, DepthMaps)
"""A set is of the first kind whose `matches` says so."""
