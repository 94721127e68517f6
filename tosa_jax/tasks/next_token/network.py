"""A backbone with a text decoder: the image's tokens are the prefix of every label that the decoder writes.

Source: Yue et al. 2024, "Object Recognition as Next Token Prediction" (arXiv 2312.02142; kaiyuyue/nxtp). Tokens of the
prefix see one another; those of a label see the prefix and what comes before them in their own label. As nothing in the
prefix sees a label, the decoder runs over it once, and labels read its keys and values of each layer.

Any plan may run in the backbone. Where a method restores the grid, or keeps all tokens as ToSA does, the prefix has a
token for every patch; where a method drops or merges tokens for good, it has what is left, and a merged token counts as
often as the tokens that it stands for.
"""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from tosa_jax.models.layers import AttentionFn, Block, layer_norm, linear, log_counts, token_init
from tosa_jax.models.plan import layer_specs
from tosa_jax.models.vit import Output, VisionTransformer
from tosa_jax.models.vit_config import ViTConfig, check
from tosa_jax.ops.array_types import Images, Keys, Queries, Scores, Tokens
from tosa_jax.ops.attention import attention
from tosa_jax.tasks.next_token.vocabulary import END, Vocabulary

Text = Int[Array, "b m t"]
"""Of m labels an image t tokens each."""


@functools.lru_cache(maxsize=16)
def vocabulary_of(labels: tuple[str, ...]) -> Vocabulary:
    """The vocabulary, made once. Raises ConfigError as `Vocabulary`."""
    return Vocabulary(labels)


@dataclass(frozen=True, kw_only=True)
class NextTokenConfig(ViTConfig):
    """A backbone and its text decoder. Raises ConfigError as `ViTConfig` and `Vocabulary`, and for sizes out of range.

    labels         names of the data set's labels, in its order: the vocabulary is made of them. () is refused when a
                   network is made.
    decoder_dim    width of the decoder; `decoder_heads` divides it.
    decoder_depth  its layers.
    branches       labels that one-shot sampling writes for an image: the k most probable first tokens, and from each
                   one the most probable tokens on. At most as many as there are tokens beside the end.
    """

    task: ClassVar[str] = "next_token"
    unused: ClassVar[tuple[str, ...]] = ("num_classes", "global_pool")

    labels: tuple[str, ...] = ()
    decoder_dim: int = 192
    decoder_depth: int = 2
    decoder_heads: int = 3
    branches: int = 10

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_classes", 0)
        object.__setattr__(self, "labels", tuple(self.labels))
        super().__post_init__()
        for name in ("decoder_dim", "decoder_depth", "decoder_heads", "branches"):
            check(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        check(
            self.decoder_dim % self.decoder_heads == 0,
            f"decoder_heads={self.decoder_heads} does not divide decoder_dim={self.decoder_dim}",
        )
        if self.labels:
            most = vocabulary_of(self.labels).size - 1
            check(
                self.branches <= most,
                f"branches={self.branches} is more than the {most} tokens of the vocabulary beside the end: give at "
                f"most {most}",
            )

    @property
    def silent_fields(self) -> dict[str, Any]:
        own = {"labels": self.labels, "decoder_heads": self.decoder_heads}
        return super().silent_fields | own

    @property
    def decoder(self) -> ViTConfig:
        """The decoder's layers, as those of a plain ViT."""
        return ViTConfig(
            embed_dim=self.decoder_dim, depth=self.decoder_depth, num_heads=self.decoder_heads,
            norm_eps=self.norm_eps, dtype=self.dtype, param_dtype=self.param_dtype,
        )  # fmt: skip


class Prefix(NamedTuple):
    """What labels read of an image: keys and values of each layer, [b n h dh], and the bias of each key, or None."""

    layers: tuple[tuple[Keys, Keys], ...]
    key_bias: Float[Array, "b n"] | None


class Written(NamedTuple):
    """Labels that were written for images, the most probable first.

    text         int32 [b k t]: tokens; after the end token all are that.
    probability  float32 [b k], of all its tokens, the end included; 0 for a text without an end.
    """

    text: Int[Array, "b k t"]
    probability: Float[Array, "b k"]


class TextDecoder(nnx.Module):
    """Blocks of a ViT on image tokens [b n e] and on labels [b m t]; positions count from 0 in each label.

    Weights start with a standard deviation of 1 / sqrt(inputs), so that what attention reads keeps its size at any
    width. With a ViT's .02 and a width of 64 a label would get a fortieth of what it reads, and learn late.
    """

    def __init__(self, config: NextTokenConfig, *, rngs: nnx.Rngs) -> None:
        own, vocabulary = config.decoder, vocabulary_of(config.labels)
        self.length, self.size, self.width = vocabulary.length, vocabulary.size, own.embed_dim
        self.dtype = own.dtype
        init, dtype, width = token_init, own.param_dtype, own.embed_dim
        self.project = linear(own, config.embed_dim, width, rngs)
        self.embedding = nnx.Param(init(rngs.params(), (self.size, width), dtype))
        self.pos_embed = nnx.Param(init(rngs.params(), (self.length, width), dtype))
        self.blocks = nnx.List(Block(own, rngs=rngs) for _ in range(own.depth))
        self.norm = layer_norm(own, rngs)
        self.head = linear(own, width, self.size, rngs)
        for _, part in nnx.iter_modules(self):
            if isinstance(part, nnx.Linear):
                scale = part.in_features**-0.5 / own.init_std
                part.kernel[...] = part.kernel[...] * scale

    def read_image(self, tokens: Tokens, weights: Scores | None) -> Prefix:
        """The prefix of image tokens [b n e]; `weights` [b n], how often each one counts, None: once."""
        bias = None if weights is None else log_counts(weights)

        def attend(query: Queries, key: Keys, value: Keys) -> tuple[Queries, tuple[Keys, Keys]]:
            return attention(query, key, value, bias), (key, value)

        x, layers = self.project(tokens), []
        for block in self.blocks:
            x, seen = block(x, attend)
            layers.append(seen)
        return Prefix(tuple(layers), bias)

    @jax.named_scope("text_decoder")
    def logits(self, text: Text, prefix: Prefix) -> Float[Array, "b m t v"]:
        """Float32 logits of the token after each one of `text`, which begins with `END`."""
        b, m, t = text.shape
        label, place = jnp.divmod(jnp.arange(m * t), t)
        sees = (label[:, None] == label[None]) & (place[:, None] >= place[None])
        x = self._embed(text, self.pos_embed[...][None, None, :t]).reshape(b, m * t, -1)
        for block, seen in zip(self.blocks, prefix.layers, strict=True):
            x, _ = block(x, _reading(seen, prefix.key_bias, sees))
        return self._head(x).reshape(b, m, t, -1)

    @jax.named_scope("one_shot_sampling")
    def write(self, prefix: Prefix, branches: int) -> Written:
        """One-shot sampling: the first tokens of highest probability, and from each greedily to the end, all at once.

        Each step runs on the newest token of every branch and keeps its keys and values for those after it.
        """
        b, steps = len(prefix.layers[0][0]), self.length - 1
        start = jnp.full((b, 1, 1), END)
        x, layers = self._embed(start, self.pos_embed[...][None, None, :1])[:, 0], []
        sees = jnp.ones((1, 1), bool)
        for block, seen in zip(self.blocks, prefix.layers, strict=True):
            x, own = block(x, _reading(seen, prefix.key_bias, sees))
            # The prefix of what follows has the start, which all labels share.
            layers.append(tuple(jnp.concatenate(pair, axis=1) for pair in zip(seen, own, strict=True)))  # fmt: skip
        bias = prefix.key_bias
        bias = None if bias is None else jnp.pad(bias, ((0, 0), (0, 1)))
        # No label is empty: the end is no first token.
        beginnings = jax.nn.log_softmax(self._head(x)[:, 0])[:, END + 1 :]
        first, tokens = jax.lax.top_k(beginnings, branches)

        whose = jnp.tile(jnp.arange(branches), steps)
        when = jnp.repeat(jnp.arange(steps), branches)

        def step(carried, number):
            tokens, ended, kept = carried
            position = jax.lax.dynamic_index_in_dim(self.pos_embed[...], number + 1)
            x, after = self._embed(tokens[:, :, None], position[None, None])[:, :, 0], []
            sees = (whose[None] == jnp.arange(branches)[:, None]) & (when <= number)[None]
            for block, seen, cache in zip(self.blocks, layers, kept, strict=True):
                x, cache = block(x, _reading(seen, bias, sees, (cache, number * branches)))
                after.append(cache)
            shares = jax.nn.log_softmax(self._head(x))
            best = jnp.where(ended, END, shares.argmax(axis=2)).astype(jnp.int32)
            share = jnp.where(ended, 0, shares.max(axis=2))
            return (best, ended | (best == END), after), (best, share)

        empty = [
            tuple(jnp.zeros((b, steps * branches, *x.shape[2:]), x.dtype) for x in seen)
            for seen in layers
        ]
        tokens = tokens.astype(jnp.int32) + END + 1
        carried = tokens, tokens == END, empty
        (_, ended, _), (rest, shares) = jax.lax.scan(step, carried, jnp.arange(steps))
        text = jnp.concatenate([tokens[:, :, None], jnp.moveaxis(rest, 0, 2)], axis=2)
        probability = jnp.where(ended, jnp.exp(first + shares.sum(axis=0)), 0)
        probability, order = jax.lax.top_k(probability, branches)
        return Written(jnp.take_along_axis(text, order[:, :, None], axis=1), probability)

    def _embed(self, text: Text, positions: Float[Array, "1 1 t d"]) -> Float[Array, "b m t d"]:
        return (self.embedding[...][text] + positions).astype(self.dtype)

    def _head(self, x: Tokens) -> Float[Array, "b n v"]:
        return self.head(self.norm(x)).astype(jnp.float32)

    def macs(self, n: int, branches: int) -> int:
        """Multiply-adds for one image of n tokens, whose labels are written in as many branches."""
        block, steps = self.blocks[0], self.length - 1
        keys = n + 1 + steps * branches
        prefix = n * self.project.in_features * self.width + len(self.blocks) * block.macs(n)

        def of_tokens(count: int, keys: int) -> int:
            projections = 4 * count * self.width**2
            layer = projections + 2 * count * keys * self.width + block.mlp_macs(count)
            return len(self.blocks) * layer + count * self.width * self.size

        return prefix + of_tokens(1, n + 1) + steps * of_tokens(branches, keys)


def _reading(
    seen: tuple[Keys, Keys],
    key_bias: Float[Array, "b k"] | None,
    sees: Bool[Array, "q own"],
    cache: Any = None,
) -> AttentionFn:
    """The attention of label tokens, which read all of a prefix, and of k label tokens those that `sees` says.

    cache  keys and values of all k label tokens, and where the query's own go; None: the query's own are all. The
           function reports them, with the query's own among them.
    """

    def attend(query: Queries, key: Keys, value: Keys) -> tuple[Queries, Any]:
        own = key, value
        if cache is not None:
            kept, place = cache
            own = tuple(
                jax.lax.dynamic_update_slice_in_dim(old, new, place, axis=1)
                for old, new in zip(kept, own, strict=True)
            )
        keys, values = (jnp.concatenate(pair, axis=1) for pair in zip(seen, own, strict=True))
        count = seen[0].shape[1]
        mask = jnp.pad(sees, ((0, 0), (count, 0)), constant_values=True)[None, None]
        bias = None
        if key_bias is not None:
            bias = jnp.pad(key_bias, ((0, 0), (0, keys.shape[1] - count)))
            bias = bias[:, None, None].astype(query.dtype)
        return jax.nn.dot_product_attention(query, keys, values, bias, mask), own

    return attend


class NextTokenTransformer(VisionTransformer):
    """A ViT that writes labels. Its parameters are the backbone's, under their names, and those of `text_decoder/`."""

    config: NextTokenConfig
    config_class: ClassVar[type[ViTConfig]] = NextTokenConfig

    def add_head(self, rngs: nnx.Rngs) -> None:
        self.text_decoder = TextDecoder(self.config, rngs=rngs)

    def head_macs(self) -> int:
        return self.text_decoder.macs(layer_specs(self.config)[-1].count_out, self.config.branches)

    def __call__(
        self,
        images: Images,
        text: Text | None = None,
        *,
        key: jax.Array | None = None,
        train: bool = False,
    ) -> Output:
        """images [b height width c], normalised; `text` what the decoder reads, each label from `END` on.

        Predictions are `next` float32 [b m t v], logits of the token after each one of `text`; without text they are
        what one-shot sampling writes: `text` and `probability` as in `Written`.
        """
        state = self.layers(self.embed(images), key=key, train=train)
        norm = self.fc_norm if self.config.global_pool == "avg" else self.norm
        tokens = norm(state.tokens)
        prefix = self.text_decoder.read_image(tokens, state.weights)
        if text is not None:
            found = {"next": self.text_decoder.logits(text, prefix)}
        else:
            found = self.text_decoder.write(prefix, self.config.branches)._asdict()
        return Output(found, tokens, state.selected, state.aux, state.scores)
