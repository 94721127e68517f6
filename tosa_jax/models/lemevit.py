"""LeMeViT: image tokens on a shrinking grid, and a few learned meta tokens that stand for the whole image.

Source: Jiang et al. 2024 (arXiv 2405.09789; ViTAE-Transformer/LeMeViT, `models/lemevit.py`). In the early stages, where
the grid is fine, image tokens read only the meta tokens and meta tokens only the image tokens: the cost is linear in
their number. In the last two stages each of the two groups attends to itself.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, NoReturn

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tosa_jax.errors import ConfigError
from tosa_jax.models.batch_norm import EPSILON, BatchNorm, Running, below
from tosa_jax.models.encoder import drop_path_rates, rematerialised
from tosa_jax.models.layers import (
    Attention,
    DropPath,
    Mlp,
    convolution,
    fan_in_init,
    fold_key,
    gelu,
    layer_norm,
    linear,
)
from tosa_jax.models.lemevit_config import STAGES, STRIDES, LeMeViTConfig
from tosa_jax.models.vit import Output, PatchLabels, VisionTransformer
from tosa_jax.models.vit_config import ViTConfig
from tosa_jax.ops.array_types import AttnMap, Heads, Images, Scores, Tokens
from tosa_jax.ops.attention import attention

Grid = Float[Array, "b rows columns d"]
Halved = Float[Array, "b half_rows half_columns e"]
Meta = Float[Array, "b m d"]
Updates = tuple[Tokens | None, Meta]
"""What attention adds to the image's tokens (None: they stay as they are) and to the meta tokens."""


def conv(
    config: ViTConfig,
    in_dim: int,
    out_dim: int,
    rngs: nnx.Rngs,
    *,
    stride: int = 1,
    groups: int = 1,
) -> nnx.Conv:
    """A 3x3 convolution with PyTorch's padding of 1 and its default initialisation."""
    init = fan_in_init(9 * in_dim // groups)
    fields = {"strides": stride, "padding": 1, "feature_group_count": groups}
    return convolution(config, in_dim, out_dim, 3, rngs, kernel_init=init, bias_init=init, **fields)


class Halving(nnx.Module):
    """A convolution of stride 2 and batch normalisation: half as many rows and columns, rounded up."""

    def __init__(self, config: ViTConfig, in_dim: int, out_dim: int, *, rngs: nnx.Rngs) -> None:
        self.conv = conv(config, in_dim, out_dim, rngs, stride=2)
        self.norm = BatchNorm(out_dim, config)
        self.weights = 9 * in_dim * out_dim

    def __call__(self, x: Grid, *, train: bool) -> tuple[Halved, Running]:
        """x of another width and grid, and the new running statistics."""
        halved, running = self.norm(self.conv(x), train=train)
        return halved, below("norm", running)


class MetaMlp(nnx.Module):
    """Takes the meta tokens into a stage: two linear layers with norms; [b m d] -> [b m e]."""

    def __init__(self, config: ViTConfig, in_dim: int, out_dim: int, *, rngs: nnx.Rngs) -> None:
        self.fc1 = linear(config, in_dim, 4 * in_dim, rngs)
        self.norm1 = layer_norm(config, rngs, 4 * in_dim, epsilon=EPSILON)
        self.fc2 = linear(config, 4 * in_dim, out_dim, rngs)
        self.norm2 = layer_norm(config, rngs, out_dim, epsilon=EPSILON)
        self.weights = 4 * in_dim * (in_dim + out_dim)

    def __call__(self, meta: Meta) -> Float[Array, "b m e"]:
        return self.norm2(self.fc2(gelu(self.norm1(self.fc1(meta)))))


class CrossAttention(nnx.Module):
    """Meta tokens read the image, whose tokens stay as they are."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs) -> None:
        d, self.num_heads = config.embed_dim, config.num_heads
        self.q = linear(config, d, d, rngs)
        self.kv = linear(config, d, 2 * d, rngs)
        self.proj = linear(config, d, d, rngs)
        self.width = d

    def __call__(self, image: Tokens, meta: Meta) -> Updates:
        key, value = _heads(self.kv(image), 2, self.num_heads)
        (query,) = _heads(self.q(meta), 1, self.num_heads)
        return None, self.proj(_joined(attention(query, key, value)))

    def macs(self, n: int, m: int) -> int:
        """Multiply-adds for n tokens of an image and m meta tokens."""
        return 2 * (n + m) * self.width**2 + 2 * n * m * self.width


class DualCrossAttention(nnx.Module):
    """Image tokens read the meta tokens, and meta tokens the image tokens, each by projections of its own.

    Logits are divided by the root of the whole width, not of a head's. Those of the image tokens, which have few keys,
    are multiplied by the logarithm of the number of meta tokens to the base of the number of image tokens.
    """

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs) -> None:
        d, self.num_heads = config.embed_dim, config.num_heads
        self.image_qkv = linear(config, d, 3 * d, rngs)
        self.meta_qkv = linear(config, d, 3 * d, rngs)
        self.image_proj = linear(config, d, d, rngs)
        self.meta_proj = linear(config, d, d, rngs)
        self.width = d

    def __call__(self, image: Tokens, meta: Meta) -> Updates:
        query, key, value = _heads(self.image_qkv(image), 3, self.num_heads)
        meta_query, meta_key, meta_value = _heads(self.meta_qkv(meta), 3, self.num_heads)
        # `attention` divides by the root of a head's width.
        scale = self.num_heads**-0.5
        of_image = scale * math.log(meta.shape[1], image.shape[1])
        read = _joined(attention(query * of_image, meta_key, meta_value))
        meta_read = _joined(attention(meta_query * scale, key, value))
        return self.image_proj(read), self.meta_proj(meta_read)

    def macs(self, n: int, m: int) -> int:
        """Multiply-adds for n tokens of an image and m meta tokens."""
        return 4 * (n + m) * self.width**2 + 4 * n * m * self.width


class StandardAttention(Attention):
    """Image tokens attend to themselves, and meta tokens to themselves, by the same weights, as in a ViT."""

    def __call__(self, image: Tokens, meta: Meta) -> Updates:
        return super().__call__(image)[0], super().__call__(meta)[0]

    def macs(self, n: int, m: int) -> int:
        """Multiply-adds for n tokens of an image and m meta tokens."""
        width = self.qkv.in_features
        return 4 * (n + m) * width**2 + 2 * (n * n + m * m) * width


StageAttention = CrossAttention | DualCrossAttention | StandardAttention

ATTENTION: dict[str, type[StageAttention]] = {
    "cross": CrossAttention,
    "dual": DualCrossAttention,
    "standard": StandardAttention,
}
"""By the name in `lemevit_config.STAGES`."""


def _heads(x: Tokens, parts: int, num_heads: int) -> tuple[Heads, ...]:
    """Equal parts of x [b n e] for the heads, [b n h dh] each."""
    whole = x.reshape(*x.shape[:2], parts, num_heads, -1)
    return tuple(whole[:, :, i] for i in range(parts))


def _joined(heads: Heads) -> Tokens:
    return heads.reshape(*heads.shape[:2], -1)


def flat(image: Grid) -> Tokens:
    """The tokens of a grid in raster order, [b n d]."""
    b, rows, columns, d = image.shape
    return image.reshape(b, rows * columns, d)


class LeMeBlock(nnx.Module):
    """A block of a stage: attention, and one MLP with its norms for image and meta tokens alike.

    Before it the image's tokens learn their places from a convolution, one channel at a time. A block with cross
    attention leaves the image as it was, without what the convolution adds.
    """

    def __init__(self, config: ViTConfig, kind: str, *, rngs: nnx.Rngs) -> None:
        d = config.embed_dim
        self.pos_embed = conv(config, d, d, rngs, groups=d)
        self.norm1 = layer_norm(config, rngs)
        self.attn: StageAttention = ATTENTION[kind](config, rngs=rngs)
        self.norm2 = layer_norm(config, rngs)
        self.mlp = Mlp(config, rngs=rngs)
        self.width, self.mlp_weights, self.keeps_image = d, config.mlp_weights, kind == "cross"

    def __call__(self, image: Grid, meta: Meta, drop: DropPath | None = None) -> tuple[Grid, Meta]:
        tokens = flat(image + self.pos_embed(image))
        update, meta_update = self.attn(self.norm1(tokens), self.norm1(meta))
        meta = self._finished(meta, meta_update, drop, 2)
        if update is None:
            return image, meta
        return self._finished(tokens, update, drop, 0).reshape(image.shape), meta

    def _finished(self, x: Tokens, update: Tokens, drop: DropPath | None, branch: int) -> Tokens:
        """x after the update of its attention, and after the MLP; drop path counts them as `branch` and the next."""
        x = x + (drop(update, branch) if drop else update)
        update = self.mlp(self.norm2(x))
        return x + (drop(update, branch + 1) if drop else update)

    def macs(self, n: int, m: int) -> int:
        """Multiply-adds for n tokens of an image and m meta tokens."""
        in_mlp = m if self.keeps_image else n + m
        return 9 * n * self.width + self.attn.macs(n, m) + in_mlp * self.mlp_weights


class Stage(nnx.Module):
    """Blocks of one width on one grid. `downsample` makes the grid of the one before smaller; None: it is the same."""

    def __init__(self, config: LeMeViTConfig, number: int, *, rngs: nnx.Rngs) -> None:
        own, width = config.stage(number), config.widths[number]
        before = config.widths[max(number - 1, 0)]
        shrinks = number > 0 and STRIDES[number] > STRIDES[number - 1]
        self.downsample = Halving(own, before, width, rngs=rngs) if shrinks else None
        self.meta_mlp = MetaMlp(own, before, width, rngs=rngs)
        self.blocks = nnx.List(
            LeMeBlock(own, STAGES[number], rngs=rngs) for _ in range(config.depths[number])
        )

    def macs(self, n: int, m: int) -> int:
        """Multiply-adds for n tokens of an image and m meta tokens."""
        shrinking = n * self.downsample.weights if self.downsample else 0
        return shrinking + m * self.meta_mlp.weights + sum(b.macs(n, m) for b in self.blocks)


class LeMeViT(VisionTransformer):
    """The network of a `LeMeViTConfig`.

    `Output.tokens` are the meta tokens, then the image's of the last stage in raster order, each group after its norm;
    the head reads the mean of the one plus the mean of the other.
    """

    config: LeMeViTConfig
    config_class: ClassVar[type[ViTConfig]] = LeMeViTConfig

    def __init__(self, config: LeMeViTConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        first, last = config.stage(0), config.stage(len(STAGES) - 1)
        narrow, width = config.widths[0] // 2, config.widths[0]
        self.stem = nnx.List(
            [
                Halving(first, config.in_chans, narrow, rngs=rngs),
                Halving(first, narrow, width, rngs=rngs),
            ]
        )
        shape = (config.meta_tokens, width)
        self.meta_tokens = nnx.Param(jax.random.normal(rngs.params(), shape, config.param_dtype))
        self.stages = nnx.List(Stage(config, i, rngs=rngs) for i in range(len(STAGES)))
        self.blocks, self.kinds = nnx.List([]), nnx.List([])  # it has no layers of a plan
        self.norm = BatchNorm(config.embed_dim, config)
        self.norm_meta = layer_norm(last, rngs, epsilon=EPSILON)
        self.add_head(rngs)

    def macs(self) -> int:
        """Multiply-adds of one example's forward pass: convolutions, linear layers, attention."""
        config, (height, width) = self.config, self.config.image_shape
        halved = -(-height // 2) * -(-width // 2)
        counts = [math.prod(config.stage_grid(i)) for i in range(len(STAGES))]
        stem = halved * self.stem[0].weights + counts[0] * self.stem[1].weights
        parts = zip(self.stages, counts, strict=True)
        stages = sum(stage.macs(n, config.meta_tokens) for stage, n in parts)
        return stem + stages + self.head_macs()

    def __call__(
        self,
        images: Images,
        *,
        key: jax.Array | None = None,
        train: bool = False,
        tokens: bool = True,
        patch_labels: PatchLabels | None = None,
    ) -> Output:
        """images [b height width c], normalised; `key` feeds drop path with `train`, one key or one an example.

        tokens  whether `Output.tokens` is wanted.

        With `train` batches are normalised by their own statistics, and `Output.running` has the new running ones.
        Raises ConfigError for images of another size or number of channels, and for `patch_labels`.
        """
        if patch_labels is not None:
            self._refuse("labels that travel with patches (align_labels)")
        self.check_images(images)
        image, meta, running = self._stages(images, key if train else None, train)
        image, moved = self.norm(image, train=train)
        running |= below("norm", moved)
        found = jnp.concatenate([self.norm_meta(meta), flat(image)], axis=1)
        name = "logits" if self.config.num_classes else "features"
        predict = self.classify if self.config.num_classes else self.pool
        shown = found if tokens else None
        return Output({name: predict(found)}, shown, (), {}, running=running)

    def _stages(
        self, images: Images, key: jax.Array | None, train: bool
    ) -> tuple[Grid, Meta, Running]:
        """Image and meta tokens after the last stage, and the new running statistics so far."""
        config, running = self.config, {}
        rates = iter(enumerate(drop_path_rates(config)))
        image = images.astype(config.dtype)
        for i, halving in enumerate(self.stem):
            image, moved = halving(image, train=train)
            image = gelu(image) if i == 0 else image
            running |= below(f"stem/{i}", moved)
        meta = self.meta_tokens[...].astype(config.dtype)
        meta = jnp.broadcast_to(meta[None], (images.shape[0], *meta.shape))
        for i, stage in enumerate(self.stages):
            if stage.downsample is not None:
                image, moved = stage.downsample(image, train=train)
                running |= below(f"stages/{i}/downsample", moved)
            meta = stage.meta_mlp(meta)
            for block in stage.blocks:
                number, rate = next(rates)
                drop = DropPath(rate, fold_key(key, number)) if key is not None and rate else None
                image, meta = rematerialised(config, block)(image, meta, drop)
        return image, meta, running

    def pool(self, tokens: Tokens, weights: Scores | None = None) -> Float[Array, "b e"]:
        """What the head classifies of `Output.tokens` [b n d]: two means, added. There are no `weights`."""
        count = self.config.meta_tokens
        return tokens[:, :count].mean(axis=1) + tokens[:, count:].mean(axis=1)

    def features(self, images: Images, *, key: jax.Array | None = None) -> Float[Array, "b e"]:
        """What the head reads, or would read, of each image."""
        return self.pool(self.forward_features(images, key=key))

    def embed(self, images: Images) -> NoReturn:
        self._refuse("tokens before its layers")

    def layers(self, *args: Any, **fields: Any) -> NoReturn:
        self._refuse("layers of a plan")

    def intermediate_layers(
        self, images: Images, layers: int | Sequence[int] = 1, **fields: Any
    ) -> tuple[Array, ...]:
        self._refuse("intermediate layers on one grid")

    def attention_maps(
        self, images: Images, layers: Sequence[int] = (-1,), **fields: Any
    ) -> tuple[AttnMap, ...]:
        self._refuse("attention maps of all tokens")

    @staticmethod
    def _refuse(what: str) -> NoReturn:
        raise ConfigError(
            f"a LeMeViT has no {what}: its grid shrinks, and meta tokens are beside it"
        )
