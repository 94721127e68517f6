"""A backbone with DINO's projection head, and DenseDINO's reference tokens.

Sources: facebookresearch/dino (`DINOHead`); yyk-wew/DenseDINO (`vision_transformer.py`). A reference token stands for a
point of the image: it starts as the position code at that point, sees itself and the patches, and nothing sees it. So
the backbone computes what it would without them, and any method of token reduction can run in it: reference tokens read
all patches, as the method restores them, before each layer.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tosa_jax.models.factory import with_image_size
from tosa_jax.models.layers import fan_in_init, linear
from tosa_jax.models.vit import Output, VisionTransformer
from tosa_jax.models.vit_config import ViTConfig, check
from tosa_jax.ops.array_types import Images, Keys, Queries, Tokens

Points = Float[Array, "b r 2"]
"""Places in an image: (row, column), shares of its sides in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class DinoConfig(ViTConfig):
    """A backbone and its projection head. Raises ConfigError as `ViTConfig`, and for sizes below 1.

    prototypes        outputs of the head (the published code: 65,536).
    head_hidden       width of its two hidden layers (2,048).
    head_bottleneck   width of what its last layer reads (256).
    reference_points  reference tokens for each pair of crops, 0: plain DINO. Needs learned positions.
    """

    task: ClassVar[str] = "dino"
    unused: ClassVar[tuple[str, ...]] = ("num_classes",)

    prototypes: int = 4096
    head_hidden: int = 512
    head_bottleneck: int = 128
    reference_points: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_classes", 0)
        super().__post_init__()
        for name in ("prototypes", "head_hidden", "head_bottleneck"):
            check(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        check(self.reference_points >= 0, f"reference_points={self.reference_points} is negative")
        check(self.pos_embed or not self.reference_points,
              "reference_points needs learned positions (pos_embed=True), which this network has not")  # fmt: skip

    @property
    def intermediate_layers(self) -> tuple[int, ...]:
        """The layers whose tokens reference tokens read: all but the last, which none reads after."""
        return tuple(range(self.depth - 1)) if self.reference_points else ()


class ProjectionHead(nnx.Module):
    """Three linear layers with GELU between, unit length, and cosines with prototypes of unit length.

    Weights start so that activations keep their size at any width. The published normal(.02) does so at the published
    width of 2,048. In a head of width 128 it leaves .002 of them after three layers, and the first updates of the
    biases make all outputs the same. Prototypes start as PyTorch starts a linear layer: Adam turns shorter ones faster.
    """

    def __init__(self, config: DinoConfig, *, rngs: nnx.Rngs) -> None:
        self.count = config.prototypes
        hidden, narrow = config.head_hidden, config.head_bottleneck
        init = nnx.initializers.lecun_normal()
        self.fc1 = linear(config, config.embed_dim, hidden, rngs, kernel_init=init)
        self.fc2 = linear(config, hidden, hidden, rngs, kernel_init=init)
        self.fc3 = linear(config, hidden, narrow, rngs, kernel_init=init)
        shape = (narrow, config.prototypes)
        self.prototypes = nnx.Param(fan_in_init(narrow)(rngs.params(), shape, config.param_dtype))

    def __call__(self, features: Float[Array, "m d"]) -> Float[Array, "m k"]:
        x = jax.nn.gelu(self.fc1(features), approximate=False)
        x = self.fc3(jax.nn.gelu(self.fc2(x), approximate=False)).astype(jnp.float32)
        prototypes = self.prototypes[...].astype(jnp.float32)
        return unit(x, axis=1) @ unit(prototypes, axis=0)

    def macs(self) -> int:
        """Multiply-adds for one vector."""
        d, hidden = self.fc1.in_features, self.fc1.out_features
        return d * hidden + hidden**2 + self.fc3.out_features * (hidden + self.count)


def unit(x: Float[Array, "m k"], axis: int) -> Float[Array, "m k"]:
    """Rows or columns of length 1."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(axis=axis, keepdims=True), 1e-12))


def reading(count: int):
    """The attention of `count` reference tokens: keys are their own, then those of the patches."""

    def attend(query: Queries, key: Keys, value: Keys) -> tuple[Queries, None]:
        sees = jnp.arange(key.shape[1])[None] >= count
        sees = sees | (jnp.arange(key.shape[1])[None] == jnp.arange(count)[:, None])
        return jax.nn.dot_product_attention(query, key, value, mask=sees[None, None]), None

    return attend


class DinoTransformer(VisionTransformer):
    """A ViT with the head under `projection/`, and with reference tokens one for them under `reference_projection/`.

    It takes images of any size that the patch divides, as crops are.
    """

    config: DinoConfig
    config_class: ClassVar[type[ViTConfig]] = DinoConfig

    def add_head(self, rngs: nnx.Rngs) -> None:
        super().add_head(rngs)
        self.projection = ProjectionHead(self.config, rngs=rngs)
        if self.config.reference_points:
            self.reference_projection = ProjectionHead(self.config, rngs=rngs)

    def head_macs(self) -> int:
        return super().head_macs() + self.projection.macs()

    def __call__(
        self,
        images: Images,
        points: Points | None = None,
        *,
        key: jax.Array | None = None,
        train: bool = False,
    ) -> Output:
        """images [b height width c], normalised; `points` of the reference tokens, with `reference_points` above 0.

        Predictions are `features` [b d], `prototypes` [b k] (cosines), and with points `reference` [b r k] and
        `reference_features` [b r d].
        """
        size = (images.shape[1], images.shape[2])
        if size != self.config.image_shape:
            return with_image_size(self, size)(images, points, key=key, train=train)  # pyright: ignore[reportCallIssue]
        embedded = self.embed(images)
        state = self.layers(embedded, key=key, train=train)
        tokens = state.tokens if self.config.global_pool == "avg" else self.norm(state.tokens)
        features = self.pool(tokens, state.weights)
        found = {"features": features, "prototypes": self.projection(features)}
        if points is not None:
            before = [embedded, *(state.intermediate[i] for i in range(self.config.depth - 1))]
            read = self.read_at(points, before)
            b, r, d = read.shape
            found["reference_features"] = read
            outputs = self.reference_projection(read.reshape(b * r, d))
            found["reference"] = outputs.reshape(b, r, -1)
        return Output(found, tokens, state.selected, state.aux, state.scores)

    def read_at(self, points: Points, before: list[Tokens]) -> Float[Array, "b r d"]:
        """Reference tokens after the final norm; `before` are all tokens [b n d] before each layer."""
        config = self.config
        own = self.pos_embed[...].astype(config.dtype)[:, -config.num_patches :]
        weights = place_weights(points, config.grid).astype(own.dtype)
        references = jnp.einsum("brn,nd->brd", weights, own[0])
        attend = reading(references.shape[1])
        for block, tokens in zip(self.blocks, before, strict=True):
            patches = tokens[:, config.num_prefix_tokens :]
            keys = jnp.concatenate([references, patches], axis=1)
            update, _ = block.attn_branch(references, attend, keys)
            references = block.finished(references, update)
        return self.fc_norm(references) if config.global_pool == "avg" else self.norm(references)


def place_weights(points: Points, grid: tuple[int, int]) -> Float[Array, "b r n"]:
    """The share of each patch of `grid` in a bilinear sample at each point; rows sum to 1, edges are repeated."""

    def along(places, count):
        at = jnp.clip(places * count - 0.5, 0, count - 1)
        return jnp.maximum(1 - jnp.abs(at[..., None] - jnp.arange(count)[None, None]), 0)

    rows, columns = (along(points[..., i], count) for i, count in enumerate(grid))
    return (rows[..., :, None] * columns[..., None, :]).reshape(*points.shape[:2], -1)
