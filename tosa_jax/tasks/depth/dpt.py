"""Dense depth: a light DPT decoder on any backbone of this project, plain or token-selective.

DPT (Ranftl et al. 2021, "Vision Transformers for Dense Prediction"; isl-org/DPT): tokens of four depths are put back on
their grid (reassemble), brought to four resolutions, and fused from coarse to fine by residual convolutions. Ours is
lighter: 64 channels instead of 256 at every resolution (`decoder_dim`), one residual unit a fusion instead of
two, tokens go straight to those channels, and depth is predicted at four times the patch grid.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tosa_jax.models.layers import linear
from tosa_jax.models.positions import resample_matrix
from tosa_jax.models.vit import Output, VisionTransformer
from tosa_jax.models.vit_config import ViTConfig, check, check_choice
from tosa_jax.ops.array_types import Images, Tokens

FeatureMap = Float[Array, "b rows columns f"]
AnyMap = Float[Array, "b _ _ f"]

SCALES = (4.0, 2.0, 1.0, 0.5)
"""Resolution of the map made of each depth over that of the patch grid, from the shallowest depth on."""

START = 0.25
"""Depth of an untrained network over `max_depth`: near the mean of NYU's rooms (of 10 m) and KITTI's roads (80 m)."""


@dataclass(frozen=True, kw_only=True)
class DepthConfig(ViTConfig):
    """A backbone and its decoder.

    `image_size` is what the positions are made for; images of any size are accepted: they are resized to the next
    multiple of the patch, positions are resampled, and depth comes back at the images' own size.

    Beside the fields of `ViTConfig`, with its errors:

    max_depth       metres; depth is this times a sigmoid.
    decoder_dim     channels of every map.
    decoder_layers  four layers whose tokens are read, counted from 0; (): the ends of the four quarters.
    readout         the class token: "project"ed and added to each patch, or "ignore"d.
    """

    task: ClassVar[str] = "depth"
    resizes: ClassVar[bool] = True
    unused: ClassVar[tuple[str, ...]] = ("num_classes", "global_pool")

    max_depth: float = 10.0
    decoder_dim: int = 64
    decoder_layers: tuple[int, ...] = ()
    readout: str = "project"

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.max_depth > 0, f"max_depth={self.max_depth} must be above 0")
        check(self.decoder_dim >= 2, f"decoder_dim={self.decoder_dim} must be at least 2")
        check_choice("readout", self.readout, ("project", "ignore"))
        object.__setattr__(self, "decoder_layers", tuple(self.decoder_layers))
        check(len(self.decoder_layers) in (0, 4) and sorted(self.intermediate_layers) == list(self.intermediate_layers)
              and 0 <= self.intermediate_layers[0] and self.intermediate_layers[-1] < self.depth,
              f"decoder_layers={self.decoder_layers} must be four layers in [0, {self.depth}), ascending")  # fmt: skip

    @property
    def intermediate_layers(self) -> tuple[int, ...]:
        """The layers that the decoder reads: 2, 5, 8, 11 of twelve, as DPT."""
        quarters = (math.ceil(self.depth * i / 4) - 1 for i in range(1, 5))
        return self.decoder_layers or tuple(quarters)


def convolution(
    config: DepthConfig, into: int, out_of: int, size: int, rngs: nnx.Rngs, strides: int = 1
) -> nnx.Conv:
    """A square convolution with zero padding and the configuration's dtypes."""
    return nnx.Conv(
        into, out_of, (size, size), strides=strides, dtype=config.dtype,
        param_dtype=config.param_dtype, rngs=rngs,
    )  # fmt: skip


def resize(x: AnyMap, size: tuple[int, int]) -> AnyMap:
    """Bilinear, pixel centres at halves; untouched where the size is the same."""
    return jax.image.resize(x, (len(x), *size, x.shape[3]), "bilinear")


class Reassemble(nnx.Module):
    """Normalised tokens [b n d] of one depth -> a map at `scale` times the patch grid.

    Up by a linear layer a token whose outputs are its pixels (a transposed convolution whose stride is its size, as in
    DPT), down by a convolution of stride 2.
    """

    def __init__(self, config: DepthConfig, scale: float, *, rngs: nnx.Rngs) -> None:
        width, channels = config.embed_dim, config.decoder_dim
        self.num_prefix_tokens, self.width, self.channels = (
            config.num_prefix_tokens,
            width,
            channels,
        )
        self.up = int(max(scale, 1))
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
        self.shrink = convolution(config, channels, channels, 3, rngs, 2) if scale < 1 else None

    def __call__(self, tokens: Tokens, grid: tuple[int, int]) -> FeatureMap:
        x = self.proj(tokens[:, self.num_prefix_tokens :])
        if self.readout is not None:
            x = jax.nn.gelu(x + self.readout(tokens[:, :1]))
        b, (rows, columns), up = len(x), grid, self.up
        if self.grow is not None:
            x = self.grow(x).reshape(b, rows, columns, up, up, -1).transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(b, rows * up, columns * up, self.channels)
        return x if self.shrink is None else self.shrink(x)

    def shape(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the map."""
        if self.shrink is not None:
            return -(-grid[0] // 2), -(-grid[1] // 2)
        return grid[0] * self.up, grid[1] * self.up

    def macs(self, grid: tuple[int, int]) -> int:
        """Multiply-adds for one example."""
        patches, square = math.prod(grid), self.channels**2
        total = (patches + (self.readout is not None)) * self.width * self.channels
        total += patches * self.up**2 * square if self.grow is not None else 0
        return total + (9 * square * math.prod(self.shape(grid)) if self.shrink is not None else 0)


class Fusion(nnx.Module):
    """A finer map and the coarser one below it -> one map, by RefineNet's residual unit (Lin et al. 2017)."""

    def __init__(self, config: DepthConfig, *, rngs: nnx.Rngs) -> None:
        channels = config.decoder_dim
        self.conv1 = convolution(config, channels, channels, 3, rngs)
        self.conv2 = convolution(config, channels, channels, 3, rngs)
        self.weights = 2 * 9 * channels**2

    def __call__(self, fine: FeatureMap, coarse: AnyMap | None) -> FeatureMap:
        x = fine if coarse is None else fine + resize(coarse, (fine.shape[1], fine.shape[2]))
        return x + self.conv2(jax.nn.relu(self.conv1(jax.nn.relu(x))))


class DepthDecoder(nnx.Module):
    """Tokens of four depths -> depth in metres."""

    def __init__(self, config: DepthConfig, *, rngs: nnx.Rngs) -> None:
        channels = config.decoder_dim
        self.max_depth = config.max_depth
        self.reassemble = nnx.List([Reassemble(config, scale, rngs=rngs) for scale in SCALES])
        self.fusion = nnx.List([Fusion(config, rngs=rngs) for _ in SCALES])
        self.conv = convolution(config, channels, channels // 2, 3, rngs)
        self.out = convolution(config, channels // 2, 1, 1, rngs)
        start = jnp.full(1, math.log(START / (1 - START)), config.param_dtype)
        self.out.bias = nnx.Param(start)
        self.head_weights = 9 * channels * (channels // 2) + channels // 2

    def __call__(
        self, taps: list[Tokens], grid: tuple[int, int], size: tuple[int, int]
    ) -> Float[Array, "b height width"]:
        """Normalised tokens of four depths, the shallowest first -> float32 depth of (height, width) pixels."""
        maps = [part(x, grid) for part, x in zip(self.reassemble, taps, strict=True)]
        *finer, coarsest = list(zip(self.fusion, maps, strict=True))
        x = coarsest[0](coarsest[1], None)
        for fusion, fine in reversed(finer):
            x = fusion(fine, x)
        x = self.out(jax.nn.relu(self.conv(jax.nn.relu(x)))).astype(jnp.float32)
        return self.max_depth * jax.nn.sigmoid(resize(x, size)[..., 0])

    def macs(self, grid: tuple[int, int]) -> int:
        """Multiply-adds for one example; interpolation is left out."""
        shapes = [math.prod(part.shape(grid)) for part in self.reassemble]
        parts = sum(part.macs(grid) for part in self.reassemble)
        fused = sum(fusion.weights * n for fusion, n in zip(self.fusion, shapes, strict=True))
        return parts + fused + self.head_weights * shapes[0]


class DepthTransformer(VisionTransformer):
    """A ViT that predicts depth. Its parameters are the backbone's, under their names, and those under `decoder/`."""

    config: DepthConfig
    config_class: ClassVar[type[ViTConfig]] = DepthConfig

    def add_head(self, rngs: nnx.Rngs) -> None:
        self.decoder = DepthDecoder(self.config, rngs=rngs)

    def head_macs(self) -> int:
        return self.decoder.macs(self.config.grid)

    def positions(self, size: tuple[int, int]) -> Float[Array, "1 m d"]:
        config, own = self.config, self.pos_embed[...]
        grid = config.grid_of(size)
        if grid == config.grid:
            return own
        num_prefix = config.num_prefix_tokens if config.pos_embed_prefix else 0
        rows, columns = (
            jnp.asarray(resample_matrix(old, new, config.pos_resample), own.dtype)
            for old, new in zip(config.grid, grid, strict=True)
        )
        patches = own[0, num_prefix:].reshape(*config.grid, -1)
        moved = jnp.einsum("ij,kl,jld->ikd", rows, columns, patches)
        moved = moved.reshape(1, math.prod(grid), -1)
        return jnp.concatenate([own[:, :num_prefix], moved], axis=1)

    def __call__(
        self, images: Images, *, key: jax.Array | None = None, train: bool = False
    ) -> Output:
        """images [b height width c], normalised, of any size. `key` feeds drop path and random selection.

        Returns depth, no logits. Every depth that the decoder reads goes through the final norm, as DINOv2's
        `get_intermediate_layers` does.
        """
        size, patch = (images.shape[1], images.shape[2]), self.config.patch_size
        grid = self.config.grid_of(size)
        covered = resize(images, (grid[0] * patch, grid[1] * patch))
        state = self.layers(self.embed(covered), key=key, train=train)
        taps = {layer: self.norm(tokens) for layer, tokens in state.intermediate.items()}
        depth = self.decoder([taps[layer] for layer in self.config.intermediate_layers], grid, size)
        last = self.config.depth - 1
        tokens = taps[last] if last in taps else self.norm(state.tokens)
        return Output({"depth": depth}, tokens, state.selected, state.aux, state.scores)
