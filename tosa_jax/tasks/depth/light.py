"""The light decoder: DPT's idea with few channels.

DPT (Ranftl et al. 2021, "Vision Transformers for Dense Prediction"; `dpt.py`): tokens of four depths are put back on
their grid (reassemble), brought to four resolutions, and fused from coarse to fine by residual convolutions. What is
different here:

readout      the class token is projected to the map's few channels and added to each patch's projection, then GELU (by
             tanh). DPT concatenates it to each patch and projects the two to the backbone's width, with GELU, first.
reassemble   tokens go straight to `decoder_dim` channels. DPT has wider maps, each brought to the same channels by a
             3x3 convolution without bias. An enlarged pixel has a bias for each of its places; DPT one for all.
padding      the convolution of stride 2 pads as Flax does, an even side at its end alone; DPT both ends by one.
fusion       one residual unit after the sum. DPT has one before it, on the finer map, and one after, then enlarges
             twofold and projects by a 1x1 convolution.
resizing     pixel centres at halves. DPT aligns corners.
head         of the map at four times the patch grid: 3x3 to half the channels, 1x1 to depth, each after a ReLU; depth
             is enlarged to the image before the sigmoid. DPT convolves at the image's size, and ends in a ReLU.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tosa_jax.models.layers import convolution, linear
from tosa_jax.ops.array_types import Tokens
from tosa_jax.tasks.depth.config import DepthConfig
from tosa_jax.tasks.depth.layers import (
    SCALES,
    FeatureMap,
    ResidualUnit,
    map_shape,
    resize,
    start_bias,
)


class Reassemble(nnx.Module):
    """Tokens [b n d] of one depth -> a map at `scale` times the patch grid.

    Up by a linear layer a token whose outputs are its pixels, down by a convolution of stride 2.
    """

    def __init__(self, config: DepthConfig, scale: float, *, rngs: nnx.Rngs) -> None:
        width, channels = config.embed_dim, config.decoder_dim
        self.num_prefix_tokens, self.width, self.channels = (
            config.num_prefix_tokens,
            width,
            channels,
        )
        self.scale, self.up = scale, int(max(scale, 1))
        init = {"kernel_init": nnx.initializers.lecun_normal()}
        self.proj = linear(config, width, channels, rngs, **init)
        self.readout = (
            linear(config, width, channels, rngs, use_bias=False, **init)
            if config.readout == "project"
            else None
        )
        self.grow = (
            linear(config, channels, self.up**2 * channels, rngs, **init) if self.up > 1 else None
        )
        self.shrink = (
            convolution(config, channels, channels, 3, rngs, strides=2) if scale < 1 else None
        )

    def __call__(self, tokens: Tokens, grid: tuple[int, int]) -> FeatureMap:
        x = self.proj(tokens[:, self.num_prefix_tokens :])
        if self.readout is not None:
            x = jax.nn.gelu(x + self.readout(tokens[:, :1]))
        b, (rows, columns), up = x.shape[0], grid, self.up
        if self.grow is not None:
            x = self.grow(x).reshape(b, rows, columns, up, up, -1).transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(b, rows * up, columns * up, self.channels)
        return x if self.shrink is None else self.shrink(x)

    def macs(self, grid: tuple[int, int]) -> int:
        """Multiply-adds for one example."""
        patches, square = math.prod(grid), self.channels**2
        total = (patches + (self.readout is not None)) * self.width * self.channels
        total += patches * self.up**2 * square if self.grow is not None else 0
        pixels = math.prod(map_shape(grid, self.scale))
        return total + (9 * square * pixels if self.shrink is not None else 0)


class LightDecoder(nnx.Module):
    """Tokens of four depths -> depth in metres."""

    def __init__(self, config: DepthConfig, *, rngs: nnx.Rngs) -> None:
        channels = config.decoder_dim
        self.max_depth = config.max_depth
        self.reassemble = nnx.List([Reassemble(config, scale, rngs=rngs) for scale in SCALES])
        self.fusion = nnx.List([ResidualUnit(config, rngs=rngs) for _ in SCALES])
        self.conv = convolution(config, channels, channels // 2, 3, rngs)
        self.out = convolution(config, channels // 2, 1, 1, rngs)
        self.out.bias = start_bias(config)
        self.head_weights = 9 * channels * (channels // 2) + channels // 2

    def __call__(
        self, taps: list[Tokens], grid: tuple[int, int], size: tuple[int, int]
    ) -> Float[Array, "b height width"]:
        """Tokens of four depths, the shallowest first -> float32 depth of (height, width) pixels."""
        maps = [part(x, grid) for part, x in zip(self.reassemble, taps, strict=True)]
        *finer, (fusion, coarsest) = list(zip(self.fusion, maps, strict=True))
        x = fusion(coarsest)
        for fusion, fine in reversed(finer):
            x = fusion(fine + resize(x, (fine.shape[1], fine.shape[2])))
        x = self.out(jax.nn.relu(self.conv(jax.nn.relu(x)))).astype(jnp.float32)
        return self.max_depth * jax.nn.sigmoid(resize(x, size)[..., 0])

    def macs(self, grid: tuple[int, int]) -> int:
        """Multiply-adds for one example; interpolation is left out."""
        pixels = [math.prod(map_shape(grid, scale)) for scale in SCALES]
        parts = sum(part.macs(grid) for part in self.reassemble)
        fused = sum(fusion.weights * n for fusion, n in zip(self.fusion, pixels, strict=True))
        return parts + fused + self.head_weights * pixels[0]
