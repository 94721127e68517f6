"""The vision transformer: patches in, a plan of layer kinds, logits out."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tosa_jax.array_types import Images, Indices, PerExample, Scores, Tokens
from tosa_jax.errors import ConfigError
from tosa_jax.models.layers import (
    Block,
    PatchEmbed,
    attend_plainly,
    layer_norm,
    linear,
    token_init,
)
from tosa_jax.models.methods import LAYER_KINDS
from tosa_jax.models.stream import LayerCall, Stream
from tosa_jax.models.vit_config import ViTConfig, check, check_choice, variant_config


class Output(NamedTuple):
    """What a model returns.

    logits    [b c].
    tokens    [b n d] after the final norm, prefix included, as timm's `forward_features`.
    selected  a tuple with one int32 [b s] a selection: indices into the n tokens, ascending, prefix included.
    aux       per-example scalars [b] that layers report, by name.
    scores    one float [b n] a selection: what it chose by, higher is better; a program that does not return them
              does not keep them.
    """

    logits: Float[Array, "b c"]
    tokens: Tokens
    selected: tuple[Indices, ...]
    aux: dict[str, PerExample]
    scores: tuple[Scores, ...] = ()


def check_plan(config: ViTConfig) -> None:
    """Raise a ConfigError for a plan with unknown kinds, a choice at the start, or too many rates."""
    for kind in config.plan:
        check_choice("a layer kind of the plan", kind, LAYER_KINDS)
    selects = [LAYER_KINDS[kind].selects for kind in config.plan]
    check(not selects[0],
          f"plan starts with {config.plan[0]!r}, which needs a standard layer before it")  # fmt: skip
    for i in range(1, config.depth):
        before, kind = config.plan[i - 1 : i + 1]
        check(before == kind or not (selects[i - 1] and selects[i]),
              f"plan has {kind!r} right after {before!r} (layer {i}); put a standard layer between")  # fmt: skip
    groups = sum(selects[i] and config.group(i)[0] for i in range(config.depth))
    given = len(config.keep_rates_given)
    check(given in (1, groups) or not groups,
          f"keep_rate has {given} values, but the plan makes {groups} selections")  # fmt: skip


class VisionTransformer(nnx.Module):
    """A ViT (Dosovitskiy et al. 2021) whose attribute names are timm's, and whose layers come in kinds.

    `blocks` are the pretrained layers; `kinds` says how each is run and holds what methods add to the network.
    """

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs) -> None:
        check_plan(config)
        self.config = config
        init, dtype = token_init, config.param_dtype
        positions = config.num_tokens if config.pos_embed_prefix else config.num_patches
        self.cls_token = nnx.Param(init(rngs.params(), (1, 1, config.embed_dim), dtype))
        if config.distilled:
            self.dist_token = nnx.Param(init(rngs.params(), (1, 1, config.embed_dim), dtype))
        if config.reg_tokens:
            shape = (1, config.reg_tokens, config.embed_dim)
            self.reg_token = nnx.Param(init(rngs.params(), shape, dtype))
        self.pos_embed = nnx.Param(init(rngs.params(), (1, positions, config.embed_dim), dtype))
        self.patch_embed = PatchEmbed(config, rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.depth)])
        self.kinds = nnx.List(
            [LAYER_KINDS[kind](config, i, rngs=rngs) for i, kind in enumerate(config.plan)]
        )
        self.norm = layer_norm(config, rngs)
        self.head = linear(config, config.embed_dim, config.num_classes, rngs)
        if config.distilled:
            self.head_dist = linear(config, config.embed_dim, config.num_classes, rngs)

    def embed(self, images: Images) -> Tokens:
        """Normalised images -> tokens [b n d] with positions, prefix first."""
        config, dtype = self.config, self.config.dtype
        expected = (config.image_size, config.image_size, config.in_chans)
        if images.shape[1:] != expected:
            raise ConfigError(
                f"images are {images.shape[1:]}, but the model was made for {expected}"
            )
        patches = self.patch_embed(images.astype(dtype))
        prefix = [self.cls_token]
        prefix += [self.dist_token] if config.distilled else []
        prefix += [self.reg_token] if config.reg_tokens else []
        prefix = jnp.concatenate([token[...].astype(dtype) for token in prefix], axis=1)
        prefix = jnp.broadcast_to(prefix, (len(patches), *prefix.shape[1:]))
        positions = self.pos_embed[...].astype(dtype)
        if not config.pos_embed_prefix:
            return jnp.concatenate([prefix, patches + positions], axis=1)
        return jnp.concatenate([prefix, patches], axis=1) + positions

    def layers(self, tokens: Tokens, *, key: jax.Array | None, train: bool) -> Stream:
        """Runs the plan on tokens [b n d]."""
        stream = Stream(tokens)
        rates = drop_path_rates(self.config)
        for i, (kind, block) in enumerate(zip(self.kinds, self.blocks, strict=True)):
            attend = self.kinds[i + 1].needs() if i + 1 < len(self.kinds) else None
            layer_key = None if key is None else jax.random.fold_in(key, i)
            call = LayerCall(attend or attend_plainly, layer_key, rates[i], train and rates[i] > 0)
            stream = kind.apply(block, stream, call)
        return stream

    def classify(self, tokens: Tokens) -> Float[Array, "b c"]:
        """Logits of the normalised tokens [b n d]."""
        config = self.config
        if config.global_pool == "avg":
            return self.head(tokens[:, config.num_prefix_tokens :].mean(axis=1))
        logits = self.head(tokens[:, 0])
        return (logits + self.head_dist(tokens[:, 1])) / 2 if config.distilled else logits

    def __call__(
        self, images: Images, *, key: jax.Array | None = None, train: bool = False
    ) -> Output:
        """images [b height width c], normalised. `key` feeds drop path (with `train`) and random selection."""
        stream = self.layers(self.embed(images), key=key, train=train)
        tokens = self.norm(stream.tokens)
        return Output(self.classify(tokens), tokens, stream.selected, stream.aux, stream.scores)


def drop_path_rates(config: ViTConfig) -> list[float]:
    """A rate a layer, rising linearly from 0 to `drop_path_rate`, as in DeiT."""
    last = max(config.depth - 1, 1)
    return [config.drop_path_rate * i / last for i in range(config.depth)]


def create_model(
    name: str,
    *,
    keep_rate: float | tuple[float, ...] | None = None,
    num_classes: int = 1000,
    image_size: int | None = None,
    task: str = "classification",
    plan: tuple[str, ...] | str | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
    **fields: Any,
) -> VisionTransformer:
    """A model by timm's name, or "vit" with sizes of your own; random weights, initialised as DeiT.

    keep_rate  share in (0, 1] of the patches that selective layers take: one number, or one a selection.
               None, without a plan, makes the plain dense network.
    plan       a layer kind for each layer, or the name of one for every second layer; by default every second
               layer is selective.
    fields     any field of `ViTConfig`.

    Raises ConfigError (one line, with what is known) for unknown names and sizes that do not fit.

    >>> model = create_model("vit", embed_dim=32, depth=2, num_heads=2, image_size=8, patch_size=4,
    ...                      num_classes=10, keep_rate=0.5, rngs=nnx.Rngs(0))
    >>> out = model(jnp.zeros((1, 8, 8, 3)))
    >>> out.logits.shape, [s.shape for s in out.selected]
    ((1, 10), [(1, 3)])
    """
    check_choice("task", task, ("classification",))
    fields |= {"num_classes": num_classes, "dtype": dtype, "param_dtype": param_dtype}
    if image_size is not None:
        fields["image_size"] = image_size
    if keep_rate is not None:
        fields["keep_rate"] = keep_rate
    if plan is None and keep_rate is not None:
        plan = "selective"
    return VisionTransformer(variant_config(name, plan=plan, **fields), rngs=rngs)
