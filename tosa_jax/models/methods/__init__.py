"""The methods of this package: one file each, with its layer kinds and its row in the table (`METHODS`).

What a row is, is not here but in `models.method`. A method of your own is another such file and a call of `register`.
"""

from tosa_jax.models.method import METHODS, Method, register
from tosa_jax.models.methods import (
    ailurus,
    as_vit,
    ats,
    class_attention,
    diffrate,
    dynamicvit,
    evit,
    expedit,
    mctf,
    ppt,
    previous,
    psvit,
    random,
    redundancy,
    skip,
    standard,
    token_learner,
    tome,
    tosa,
    true_map,
    worst_bypass,
)

__all__ = ["METHODS", "Method", "register"]

# In the order of tables and charts.
for module in (
    standard,
    tosa,
    random,
    previous,
    class_attention,
    redundancy,
    tome,
    evit,
    diffrate,
    ppt,
    mctf,
    dynamicvit,
    as_vit,
    ats,
    expedit,
    ailurus,
    psvit,
    token_learner,
    true_map,
    worst_bypass,
    skip,
):
    register(*module.METHODS)
