"""The published decoder: DPT (Ranftl et al. 2021, "Vision Transformers for Dense Prediction"; isl-org/DPT).

As in transformers' `DPTForDepthEstimation` and `DepthAnythingForDepthEstimation`, whose weights `load_pretrained`
reads. The two are one computation but for the fields of `DepthConfig` and for grids of an odd side: there Depth
Anything brings a fused map to the size of the next finer one, as here, and DPT doubles it, so that its depth is larger
than the image.
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
    AnyMap,
    FeatureMap,
    ResidualUnit,
    map_shape,
    resize,
    resize_corners,
    start_bias,
)

HEAD_WIDTH = 32
"""Channels before the last convolution, in every released network."""


def _pointwise(config: DepthConfig, into: int, out_of: int, rngs: nnx.Rngs, **fields) -> nnx.Linear:
    """A linear layer a token or pixel, which is a 1x1 convolution."""
    init = nnx.initializers.lecun_normal()
    return linear(config, into, out_of, rngs, kernel_init=init, **fields)


class Grow(nnx.Module):
    """A transposed convolution whose stride `up` is its size: a pixel becomes `up` by `up` ones.

    As a matrix product: the kernel is `[channels, (row column channel)]`; all places have the same bias.
    """

    def __init__(self, config: DepthConfig, channels: int, up: int, *, rngs: nnx.Rngs) -> None:
        self.up, self.dtype = up, config.dtype
        shape, init = (channels, up**2 * channels), nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), shape, config.param_dtype))
        self.bias = nnx.Param(jnp.zeros(channels, config.param_dtype))

    def __call__(self, x: FeatureMap) -> AnyMap:
        (b, rows, columns, channels), up = x.shape, self.up
        x = x @ self.kernel[...].astype(self.dtype)
        x = x.reshape(b, rows, columns, up, up, channels).transpose(0, 1, 3, 2, 4, 5)
        bias = self.bias[...].astype(self.dtype)[None, None, None]
        return x.reshape(b, rows * up, columns * up, channels) + bias


class Reassemble(nnx.Module):
    """Tokens [b n d] of one depth -> a map of `width` channels at `scale` times the patch grid.

    The class token is concatenated to each patch and both are projected to d (`readout` and `readout_token` are the two
    halves of that matrix), or it is ignored.
    """

    def __init__(self, config: DepthConfig, scale: float, width: int, *, rngs: nnx.Rngs) -> None:
        d, project, up = config.embed_dim, config.readout == "project", int(scale)
        self.num_prefix_tokens, self.scale = config.num_prefix_tokens, scale
        self.readout = _pointwise(config, d, d, rngs) if project else None
        self.readout_token = _pointwise(config, d, d, rngs, use_bias=False) if project else None
        self.proj = _pointwise(config, d, width, rngs)
        self.grow = Grow(config, width, up, rngs=rngs) if up > 1 else None
        down = {"strides": 2, "padding": ((1, 1), (1, 1))}
        self.shrink = convolution(config, width, width, 3, rngs, **down) if scale < 1 else None

    def __call__(self, tokens: Tokens, grid: tuple[int, int]) -> AnyMap:
        x = tokens[:, self.num_prefix_tokens :]
        if self.readout is not None and self.readout_token is not None:
            x = jax.nn.gelu(self.readout(x) + self.readout_token(tokens[:, :1]), approximate=False)
        x = self.proj(x).reshape(x.shape[0], *grid, -1)
        x = x if self.grow is None else self.grow(x)
        return x if self.shrink is None else self.shrink(x)

    def macs(self, grid: tuple[int, int]) -> int:
        """Multiply-adds for one example."""
        (d, width), patches = self.proj.kernel.shape, math.prod(grid)
        total = patches * d * width + (0 if self.readout is None else (patches + 1) * d**2)
        pixels = math.prod(map_shape(grid, self.scale))
        per_pixel = (self.grow is not None) + 9 * (self.shrink is not None)
        return total + per_pixel * width**2 * pixels


class Fusion(nnx.Module):
    """A fused map and the finer one beside it -> one map at the next resolution; the coarsest has no finer one."""

    def __init__(self, config: DepthConfig, first: bool, *, rngs: nnx.Rngs) -> None:
        self.residual1 = None if first else ResidualUnit(config, rngs=rngs)
        self.residual2 = ResidualUnit(config, rngs=rngs)
        self.proj = _pointwise(config, config.decoder_dim, config.decoder_dim, rngs)
        units = 1 if first else 2
        self.weights = units * self.residual2.weights + config.decoder_dim**2

    def __call__(self, fused: FeatureMap | None, fine: FeatureMap, size: tuple[int, int]) -> AnyMap:
        x = fine if self.residual1 is None else self.residual1(fine)
        x = self.residual2(x if fused is None else x + fused)
        # Published the other way round. The two commute, and this way the product has a quarter of the pixels.
        return resize_corners(self.proj(x), size)


class DPTDecoder(nnx.Module):
    """Tokens of four depths -> depth in metres, or relative inverse depth (`DepthConfig.depth_estimation_type`)."""

    def __init__(self, config: DepthConfig, *, rngs: nnx.Rngs) -> None:
        channels, widths = config.decoder_dim, config.map_widths
        self.patch_size, self.channels = config.patch_size, channels
        self.max_depth = config.max_depth if config.depth_estimation_type == "metric" else None
        self.reassemble = nnx.List(
            Reassemble(config, scale, width, rngs=rngs)
            for scale, width in zip(SCALES, widths, strict=True)
        )
        self.convs = nnx.List(
            convolution(config, width, channels, 3, rngs, use_bias=False) for width in widths
        )
        self.fusion = nnx.List(Fusion(config, scale == SCALES[-1], rngs=rngs) for scale in SCALES)
        self.conv1 = convolution(config, channels, channels // 2, 3, rngs)
        self.conv2 = convolution(config, channels // 2, HEAD_WIDTH, 3, rngs)
        self.conv3 = _pointwise(config, HEAD_WIDTH, 1, rngs)
        if self.max_depth:
            self.conv3.bias = start_bias(config)

    def __call__(
        self, taps: list[Tokens], grid: tuple[int, int], size: tuple[int, int]
    ) -> Float[Array, "b height width"]:
        """Tokens of four depths, the shallowest first -> float32 [b height width] for images of that size.

        The head ends at the size that the patches cover, as published; from there it is resized to the images' own.
        """
        parts = zip(self.reassemble, self.convs, taps, strict=True)
        maps = [conv(part(x, grid)) for part, conv, x in parts]
        sizes = [map_shape(grid, 2 * SCALES[0]), *(x.shape[1:3] for x in maps[:-1])]
        *finer, (fusion, coarsest, into) = zip(self.fusion, maps, sizes, strict=True)
        fused = fusion(None, coarsest, into)
        for fusion, fine, into in reversed(finer):
            fused = fusion(fused, fine, into)
        x = resize_corners(self.conv1(fused), map_shape(grid, self.patch_size))
        x = self.conv3(jax.nn.relu(self.conv2(x))).astype(jnp.float32)
        x = self.max_depth * jax.nn.sigmoid(x) if self.max_depth else jax.nn.relu(x)
        return resize(x, size)[..., 0]

    def macs(self, grid: tuple[int, int]) -> int:
        """Multiply-adds for one example; interpolation is left out."""
        total = sum(part.macs(grid) for part in self.reassemble)
        for scale, conv, fusion in zip(SCALES, self.convs, self.fusion, strict=True):
            pixels = math.prod(map_shape(grid, scale))
            total += pixels * (math.prod(conv.kernel.shape) + fusion.weights)
        enlarged, covered = (
            math.prod(map_shape(grid, x)) for x in (2 * SCALES[0], self.patch_size)
        )
        half = self.channels // 2
        total += enlarged * 9 * self.channels * half
        return total + covered * (9 * half * HEAD_WIDTH + HEAD_WIDTH)
