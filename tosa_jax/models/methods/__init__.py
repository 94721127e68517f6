"""The layer kinds, by the names that plans use. A method of its own: one file here and its lines in the registry."""

from tosa_jax.models.methods.controls import Previous, Random, Skip
from tosa_jax.models.methods.oracles import ClassAttention, PredictedBypass, TrueMap, WorstBypass
from tosa_jax.models.methods.redundancy import Redundancy
from tosa_jax.models.methods.standard import Standard
from tosa_jax.models.methods.tosa import Selective, SelectiveFit
from tosa_jax.models.token_state import LayerKind

LAYER_KINDS: dict[str, type[LayerKind]] = {
    "standard": Standard,
    "selective": Selective,
    "selective_fit": SelectiveFit,
    "random": Random,
    "previous": Previous,
    "skip": Skip,
    "redundancy": Redundancy,
    "class_attention": ClassAttention,
    "true_map": TrueMap,
    "worst_bypass": WorstBypass,
    "predicted_bypass": PredictedBypass,
}
"""What the names in a plan mean."""
