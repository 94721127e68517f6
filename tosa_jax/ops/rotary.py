"""Rotary positions: the place of a token turns its queries and keys (Su et al. 2021, arXiv 2104.09864).

A token's sine and cosine are arrays of their own beside the tokens, so that they go wherever the token goes
(`Reduction.places`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tosa_jax.ops.array_types import Heads


class Rotary(NamedTuple):
    """Cosine and sine of the angles of each token, float32 [b n c] for heads of 2c channels.

    b is 1 where all examples have the same places. Angle j turns two channels of a head: which, `turn` says. A token
    that stands for several has means of both, which also shrink what they turn.
    """

    cos: Float[Array, "b n c"]
    sin: Float[Array, "b n c"]

    def first(self, count: int) -> "Rotary":
        """Those of the first `count` tokens."""
        return Rotary(self.cos[:, :count], self.sin[:, :count])


def _centred(side: int) -> np.ndarray:
    """Angles of the patches of an axis, radians: one turn is half the axis, and its middle is not turned."""
    return 2 * np.pi * (2 * (np.arange(side) + 0.5) / side - 1)


def _counted(side: int) -> np.ndarray:
    """Angles of the patches of an axis, radians: their numbers, stretched to the 16 patches of EVA-02's pretraining."""
    return np.arange(side) * 16 / side


FORMS = {"dinov3": _centred, "eva02": _counted}
"""The angles along an axis at the highest frequency, by the value of `ViTConfig.rope`."""


def axial_rotary(
    grid: tuple[int, int], head_dim: int, base: float, num_prefix_tokens: int, form: str = "dinov3"
) -> Rotary:
    """The places of a grid of (rows, columns) patches; prefix tokens come first and are not turned.

    form  a key of `FORMS`. In both an axis has the same length, whatever the size of the image.

    The first half of the angles is of rows, the second half of columns; frequencies fall geometrically towards 1 / base
    of the highest. `head_dim` is a multiple of 4. Sources: DINOv3 (facebookresearch/dinov3,
    `rope_position_encoding.py`); EVA-02 (baaivision/EVA, `rope.py`).
    """
    frequencies = base ** -np.arange(0, 1, 4 / head_dim)
    by_row, by_column = (FORMS[form](side)[:, None] * frequencies for side in grid)
    shape = (*grid, len(frequencies))
    angles = [np.broadcast_to(by_row[:, None], shape), np.broadcast_to(by_column[None], shape)]
    patches = np.concatenate(angles, axis=-1).reshape(-1, head_dim // 2)
    angles = np.concatenate([np.zeros((num_prefix_tokens, head_dim // 2)), patches])[None]
    cos, sin = (jnp.asarray(f(angles), jnp.float32) for f in (np.cos, np.sin))
    return Rotary(cos, sin)


@jax.named_scope("rotary")
def turn(heads: Heads, rotary: Rotary, neighbours: bool = False) -> Heads:
    """Queries or keys [b n h 2c], turned by the angles of their tokens; computed in float32.

    neighbours  angle j turns the channels 2j and 2j + 1, as in EVA-02; else j and c + j, as in DINOv3.
    """
    cos, sin = rotary.cos[:, :, None], rotary.sin[:, :, None]
    wide = heads.astype(jnp.float32)
    if neighbours:
        first, second = jnp.moveaxis(wide.reshape(*wide.shape[:-1], -1, 2), -1, 0)
    else:
        first, second = jnp.split(wide, 2, axis=-1)
    turned = first * cos - second * sin, second * cos + first * sin
    joined = jnp.stack(turned, axis=-1) if neighbours else jnp.concatenate(turned, axis=-1)
    return joined.reshape(heads.shape).astype(heads.dtype)
