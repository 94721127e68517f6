"""The vision transformer: patches in, a plan of layer kinds, logits out."""

import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tosa_jax.errors import ConfigError
from tosa_jax.models import naflex
from tosa_jax.models.batch_norm import Running
from tosa_jax.models.encoder import GatherParams, run_layers, run_scanned
from tosa_jax.models.layers import (
    AttentionPool,
    PatchEmbed,
    layer_norm,
    linear,
    token_init,
)
from tosa_jax.models.method import check_key, layer_kinds
from tosa_jax.models.plan import layer_specs
from tosa_jax.models.positions import resample_matrix
from tosa_jax.models.token_state import TokenState, key_bias
from tosa_jax.models.vit_config import STANDARD, ViTConfig
from tosa_jax.ops.array_types import (
    AttnMap,
    Grids,
    Images,
    Indices,
    PerExample,
    Present,
    Scores,
    Tokens,
)
from tosa_jax.ops.attention import attention_and_map
from tosa_jax.ops.rotary import Rotary, axial_rotary

PatchLabels = Float[Array, "b patches"]

READ_TOGETHER = 8
"""Tokens that the last layer works out for a head that reads one or two: a TPU works on as many rows at once, and with
fewer XLA would turn every array around."""


class Output(NamedTuple):
    """What a model returns.

    predictions  what the model is for, arrays by name whose first axis is the example: `logits` [b c], `features` [b d]
              without classes, or `depth` [b height width] at the images' size.
    tokens    [b n d] after the final norm, prefix included, as timm's `forward_features`; that norm comes after the
              mean with `global_pool="avg"`, and they are as the last layer left them. Fewer than n where a method has
              removed some for good. None where they were not wanted. Padding comes last.
    selected  a tuple with one int32 [b s] a selection: indices into the n tokens, ascending, prefix included. -1 for
              padding (`ViTConfig.max_patches`), which is selected where an image has fewer patches than s.
    aux       per-example scalars [b] that layers report, by name.
    scores    one float [b n] a selection: what it chose by, higher is better; a program that does not return them
              does not keep them.
    running   new values of running statistics by path, float32, in training; {} for a network without batch norm.
    """

    predictions: dict[str, Array]
    tokens: Tokens | None
    selected: tuple[Indices, ...]
    aux: dict[str, PerExample]
    scores: tuple[Scores, ...] = ()
    running: Running = {}

    @property
    def layer_losses(self) -> PerExample | float:
        """What layers add to the loss of each example in training, [b]: the sum of `aux` under "loss/"; 0: nothing."""
        return sum((x for name, x in self.aux.items() if name.startswith("loss/")), start=0.0)

    @property
    def logits(self) -> Any:
        """Floats [b c]; None for a model without classes."""
        return self.predictions.get("logits")

    @property
    def features(self) -> Any:
        """Floats [b d]: what a head would classify, of a model with `num_classes=0`; the embedding of a CLIP, whose
        head is a projection. None for any other.
        """
        return self.predictions.get("features")

    @property
    def depth(self) -> Any:
        """Floats [b height width] in metres, or relative inverse depth where the configuration says so; None for a
        model that predicts no depth.
        """
        return self.predictions.get("depth")


class VisionTransformer(nnx.Module):
    """A ViT (Dosovitskiy et al. 2021) whose attribute names are timm's, and whose layers come in kinds.

    `blocks` are the pretrained layers; `kinds` says how each is run and holds what methods add to the network.
    Networks of other tasks are subclasses with a head of their own (`tasks/depth/network.py`).
    """

    config_class: ClassVar[type[ViTConfig]] = ViTConfig
    gather_params: GatherParams | None = (
        None  # what each layer's parameters go through when the layer runs
    )
    preprocessing: Any = None  # the `Preprocessing` that its weights expect; None: not known

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        init, dtype = token_init, config.param_dtype
        if config.class_token:
            self.cls_token = nnx.Param(init(rngs.params(), (1, 1, config.embed_dim), dtype))
        if config.distilled:
            self.dist_token = nnx.Param(init(rngs.params(), (1, 1, config.embed_dim), dtype))
        if config.reg_tokens:
            shape = (1, config.reg_tokens, config.embed_dim)
            self.reg_token = nnx.Param(init(rngs.params(), shape, dtype))
        if config.pos_embed:
            shape = (1, config.num_positions, config.embed_dim)
            start = nnx.initializers.normal(config.init_std)
            self.pos_embed = nnx.Param(start(rngs.params(), shape, dtype))
        self.patch_embed = PatchEmbed(config, rngs=rngs)
        if config.pre_norm:
            self.norm_pre = layer_norm(config, rngs)
        specs, kinds = layer_specs(config), layer_kinds()
        self.blocks = nnx.List(kinds[name].build_block(config, rngs=rngs) for name in config.plan)
        self.kinds = nnx.List(
            kinds[name](config, spec, rngs=rngs)
            for name, spec in zip(config.plan, specs, strict=True)
        )
        if config.global_pool == "avg":
            self.fc_norm = layer_norm(config, rngs)
        else:
            self.norm = layer_norm(config, rngs)
        self.add_head(rngs)

    def add_head(self, rngs: nnx.Rngs) -> None:
        """Makes the modules that turn the normalised tokens into the prediction."""
        config = self.config
        if config.global_pool == "map":
            self.attn_pool = AttentionPool(config, rngs=rngs)
        if not config.num_classes:
            return
        width = config.embed_dim * (2 if config.global_pool == "token_avg" else 1)
        self.head = linear(config, width, config.num_classes, rngs)
        if config.distilled:
            self.head_dist = linear(config, config.embed_dim, config.num_classes, rngs)

    def head_macs(self) -> int:
        """Multiply-adds of those modules for one example."""
        config = self.config
        pooling = self.attn_pool.macs(config.num_tokens) if config.global_pool == "map" else 0
        read = 1 + (config.distilled or config.global_pool == "token_avg")
        return pooling + read * config.embed_dim * config.num_classes

    def macs(self) -> int:
        """Multiply-adds of one example's forward pass: patch projection, layers, what their kinds add, head."""
        config = self.config
        patch_weights = config.patch_size**2 * config.in_chans * config.embed_dim
        layers = sum(
            kind.block_macs(block) + kind.own_macs(block)
            for kind, block in zip(self.kinds, self.blocks, strict=True)
        )
        return config.num_patches * patch_weights + layers + self.head_macs()

    def rotary(self, grid: tuple[int, int]) -> Rotary | None:
        """Rotary positions of all n tokens of an image of (rows, columns) patches; None: the network has none."""
        config = self.config
        if not config.rope:
            return None
        head_dim = config.embed_dim // config.num_heads
        prefix = config.num_prefix_tokens
        return axial_rotary(grid, head_dim, config.rope_base, prefix, config.rope)

    def positions(self, size: tuple[int, int]) -> Float[Array, "1 m d"] | None:
        """Positions for images of (height, width) pixels, of the prefix tokens too where those have some.

        None: the network adds none to its tokens. Those of another size than the model's are resampled.
        """
        config = self.config
        if not config.pos_embed:
            return None
        own = self.pos_embed[...]
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

    def positions_of(self, grids: Grids) -> Float[Array, "b m d"]:
        """The same for strips of patches (`models.naflex`), of which `grids` has the rows and columns."""
        return naflex.positions_of(self.pos_embed[...][0], grids, self.config)

    def check_images(self, images: Images, grids: Grids | None = None) -> None:
        """Raise a ConfigError for images of another size or number of channels than the model's."""
        config = self.config
        if images.shape[3] != config.in_chans:
            raise ConfigError(
                f"images have {images.shape[3]} channels, but the model was made for {config.in_chans}"
            )
        size = (images.shape[1], images.shape[2])
        if grids is not None:
            if not config.max_patches or size != naflex.strip_shape(config):
                raise ConfigError(
                    f"grids belong to strips of max_patches={config.max_patches} patches, and these are {size[0]}x"
                    f"{size[1]} pixels: models.naflex.to_strips makes both"
                )
        elif size != config.image_shape and not config.resizes:
            raise ConfigError(
                f"images are {size[0]}x{size[1]}, but the model was made for "
                f"{'x'.join(map(str, config.image_shape))} (height x width): tosa_jax.with_image_size makes it for "
                "another size"
            )
        elif config.max_patches and math.prod(config.grid_of(size)) != config.num_patches:
            raise ConfigError(
                f"the model takes {config.num_patches} patches, and images of {size[0]}x{size[1]} have others: pass "
                "strips and grids (models.naflex.to_strips), or make it for that size (tosa_jax.with_image_size)"
            )

    @jax.named_scope("embed")
    def embed(self, images: Images, grids: Grids | None = None) -> Tokens:
        """Normalised images -> tokens [b n d] with positions, prefix first.

        grids  with `ViTConfig.max_patches`: images are strips of patches, and this has rows and columns of each
               (`models.naflex.to_strips`). None: images are of the model's own size.

        Raises ConfigError for images of another size or number of channels than the model's.
        """
        config, dtype = self.config, self.config.dtype
        self.check_images(images, grids)
        if grids is None:
            positions = self.positions((images.shape[1], images.shape[2]))
        else:
            positions = self.positions_of(grids)
        positions = None if positions is None else positions.astype(dtype)
        patches = self.patch_embed(images.astype(dtype))
        prefix = [self.cls_token] if config.class_token else []
        prefix += [self.dist_token] if config.distilled else []
        prefix += [self.reg_token] if config.reg_tokens else []
        tokens = []
        if prefix:
            prefix = jnp.concatenate([token[...].astype(dtype) for token in prefix], axis=1)
            tokens = [jnp.broadcast_to(prefix, (patches.shape[0], *prefix.shape[1:]))]
        if positions is not None and not config.pos_embed_prefix:
            patches = patches + positions
        tokens = jnp.concatenate([*tokens, patches], axis=1) if tokens else patches
        if positions is not None and config.pos_embed_prefix:
            tokens = tokens + positions
        return self.norm_pre(tokens) if config.pre_norm else tokens

    def layers(
        self,
        tokens: Tokens,
        *,
        key: jax.Array | None,
        train: bool,
        read: int | None = None,
        grid: tuple[int, int] | None = None,
        present: Present | None = None,
        after: Sequence[int] = (),
        patch_labels: PatchLabels | None = None,
    ) -> TokenState:
        """Runs the plan on tokens [b n d].

        read          how many of the first ones are read afterwards; None: all.
        grid          rows and columns of patches; None: those of the model's image size.
        present       which tokens are no padding, [b n]; None: all.
        after         layers, counted from 0, whose tokens `TokenState.intermediate` has beside those that the head
                      reads.
        patch_labels  [b patches], labels that travel with the tokens (`TokenState.labels`); prefix tokens start with
                      their mean. None: tokens have none.
        """
        check_key(self.config.plan, key)
        rotary = self.rotary(grid or self.config.grid)
        state = TokenState(tokens, grid_rotary=rotary, grid_present=present)
        if patch_labels is not None:
            mean = patch_labels.mean(axis=1, keepdims=True)
            prefix = jnp.repeat(mean, self.config.num_prefix_tokens, axis=1)
            labels = jnp.concatenate([prefix, patch_labels], axis=1)[:, :, None]
            state = state._replace(labels=labels)
        parts = self.config, self.blocks, self.kinds, state
        fields = {"key": key, "train": train, "gather_params": self.gather_params}
        if self.config.scan_layers and not after:
            return run_scanned(*parts, **fields)
        return run_layers(*parts, read=read, after=after, **fields)

    @jax.named_scope("head")
    def classify(self, tokens: Tokens, weights: Scores | None = None) -> Float[Array, "b c"]:
        """Logits of `Output.tokens` [b n d]; `weights` as in `pool`."""
        logits = self.head(self.pool(tokens, weights))
        read_two = self.config.distilled and self.config.global_pool == "token"
        return (logits + self.head_dist(tokens[:, 1])) / 2 if read_two else logits

    def pool_labels(self, state: TokenState) -> PerExample:
        """The label of what the head classifies: the class token's, or the mean of the patches', as `pool` takes it.

        Raises ConfigError for a head that pools by attention.
        """
        assert state.labels is not None
        labels, config = state.labels[:, :, 0], self.config
        if config.global_pool == "token":
            return labels[:, 0]
        if config.global_pool == "map":
            raise ConfigError(
                "align_labels needs a head that reads the class token or the mean of the patches, and this network's "
                "pools by attention (global_pool='map')"
            )
        weights = jnp.ones_like(labels) if state.weights is None else state.weights
        weights = jax.lax.stop_gradient(weights[:, config.num_prefix_tokens :])
        mean = (labels[:, config.num_prefix_tokens :] * weights).sum(axis=1) / weights.sum(axis=1)
        return mean if config.global_pool == "avg" else (labels[:, 0] + mean) / 2

    def pool(self, tokens: Tokens, weights: Scores | None = None) -> Float[Array, "b e"]:
        """What the head classifies of `Output.tokens` [b n d]: e is d, or 2d with `global_pool="token_avg"`.

        weights  [b n], how often each token counts beside others (`TokenState.weights`); None: once.
        """
        config = self.config
        if config.global_pool == "token":
            return tokens[:, 0]
        if config.global_pool == "map":
            return self.attn_pool(tokens, weights)
        patches = tokens[:, config.num_prefix_tokens :]
        if weights is None:
            mean = patches.mean(axis=1)
        else:
            shares = weights[:, config.num_prefix_tokens :]
            shares = (shares / shares.sum(axis=1, keepdims=True)).astype(patches.dtype)
            mean = (patches * shares[:, :, None]).sum(axis=1)
        if config.global_pool == "avg":
            return self.fc_norm(mean)
        return jnp.concatenate([tokens[:, 0], mean], axis=1)

    def __call__(
        self,
        images: Images,
        *,
        grids: Grids | None = None,
        key: jax.Array | None = None,
        train: bool = False,
        tokens: bool = True,
        patch_labels: PatchLabels | None = None,
    ) -> Output:
        """images [b height width c], normalised.

        grids         of images that are strips of patches, as in `embed`.
        tokens        whether `Output.tokens` is wanted. Without it, and with a head that reads the class token, the
                      last layer works out keys and values of the other tokens and nothing more: the same logits for
                      less.
        patch_labels  [b patches] in [0, 1], a label a patch, which travels through the layers with the tokens;
                      `Output.aux["label"]` then has that of the token or mean that the head classifies. No gradient
                      passes through it.

        `key` feeds drop path (with `train`) and random selection: one key, or one an example, so that what an
        example draws does not depend on the others in its batch.
        """
        if grids is not None and patch_labels is not None:
            raise ConfigError(
                "labels travel with the tokens of images of one size: leave out grids"
            )
        first = self.config.global_pool == "token"
        read = min(READ_TOGETHER, self.config.num_tokens) if first and not tokens else None
        present = self._present(grids)
        state = self.layers(
            self.embed(images, grids), key=key, train=train, read=read, present=present,
            patch_labels=patch_labels,
        )  # fmt: skip
        if patch_labels is not None:
            state = state._replace(aux=state.aux | {"label": self.pool_labels(state)})
        last = self._normed(state.tokens[:, :read])
        config, weights = self.config, state.weights
        predict = self.classify if config.num_classes else self.pool
        name = "logits" if config.num_classes and not config.projection else "features"
        predictions = {name: predict(last, weights)}
        shown = last if tokens else None
        selected = state.selected
        if present is not None:
            selected = tuple(naflex.without_padding(chosen, present) for chosen in selected)
        return Output(predictions, shown, selected, state.aux, state.scores)

    def _normed(self, tokens: Tokens) -> Tokens:
        """Tokens after the final norm, which comes after the mean with `global_pool="avg"`."""
        return tokens if self.config.global_pool == "avg" else self.norm(tokens)

    def _present(self, grids: Grids | None) -> Present | None:
        return None if grids is None else naflex.presence(grids, self.config)

    def forward_features(
        self, images: Images, *, key: jax.Array | None = None, **fields: Any
    ) -> Tokens:
        """All tokens [b n d] after the last norm, prefix first, as timm's function of this name: `Output.tokens`.

        images, key and further fields (`grids`) are those of a call.
        """
        tokens = self(images, key=key, **fields).tokens
        assert tokens is not None, "a call returns them unless told otherwise"
        return tokens

    def features(
        self, images: Images, *, grids: Grids | None = None, key: jax.Array | None = None
    ) -> Float[Array, "b e"]:
        """What the head reads, or would read, of each image: timm's `forward_head(tokens, pre_logits=True)`.

        e is d, or 2d with `global_pool="token_avg"`. Depth networks pool as classifiers do.
        """
        tokens, present = self.embed(images, grids), self._present(grids)
        state = self.layers(tokens, key=key, train=False, present=present)
        return self.pool(self._normed(state.tokens), state.weights)

    def intermediate_layers(
        self,
        images: Images,
        layers: int | Sequence[int] = 1,
        *,
        norm: bool = True,
        reshape: bool = False,
        grids: Grids | None = None,
        key: jax.Array | None = None,
    ) -> tuple[Array, ...]:
        """The tokens after some layers, as DINOv2's `get_intermediate_layers` and timm's `forward_intermediates`.

        layers   how many of the last ones, or which, counted from 0; negative ones from the end.
        norm     whether they go through the last norm (networks with `global_pool="avg"` have none for tokens).
        reshape  patches alone, [b rows columns d], instead of all tokens [b n d], prefix first. Not with grids.
        grids    of images that are strips of patches, as in `embed`.

        Of a layer of reduced tokens these are all tokens, back in their places.

        Raises ConfigError: no such layer, or `reshape` with grids, which differ from image to image.
        """
        if reshape and grids is not None:
            raise ConfigError("reshape=True needs images of one grid: leave it out with grids")
        depth, size = self.config.depth, (images.shape[1], images.shape[2])
        wanted = _numbered(
            range(depth - layers, depth) if isinstance(layers, int) else layers, depth
        )
        grid = self.config.grid_of(size)
        present = self._present(grids)
        tokens = self.embed(images, grids)
        state = self.layers(tokens, key=key, train=False, grid=grid, present=present, after=wanted)
        found = [state.intermediate[layer] for layer in wanted]
        if norm and self.config.global_pool != "avg":
            found = [self.norm(tokens) for tokens in found]
        if reshape:
            prefix = self.config.num_prefix_tokens
            found = [tokens[:, prefix:].reshape(tokens.shape[0], *grid, -1) for tokens in found]
        return tuple(found)

    def attention_maps(
        self,
        images: Images,
        layers: Sequence[int] = (-1,),
        *,
        grids: Grids | None = None,
        key: jax.Array | None = None,
    ) -> tuple[AttnMap, ...]:
        """The attention maps [b h n n] of some standard layers, float32; each row sums to 1. Padding is paid nothing.

        layers  counted from 0, negative ones from the end. A layer's map is made anew for this, from the tokens that
                the layer gets: maps do not leave layers otherwise.

        Raises ConfigError: no such layer, or one that reduces tokens, which has no map of all of them.
        """
        config = self.config
        wanted = _numbered(layers, config.depth)
        standard = [i for i, kind in enumerate(config.plan) if kind == STANDARD]
        if missing := sorted(set(wanted) - set(standard)):
            raise ConfigError(
                f"layer {missing[0]} is {config.plan[missing[0]]!r} and has no map of all tokens; standard layers: "
                f"{', '.join(map(str, standard)) or 'none'}"
            )
        grid = config.grid_of((images.shape[1], images.shape[2]))
        tokens, before = self.embed(images, grids), [layer - 1 for layer in wanted if layer]
        present = self._present(grids)
        state = self.layers(tokens, key=key, train=False, grid=grid, present=present, after=before)
        read = functools.partial(attention_and_map, key_bias=key_bias(None, present))
        maps = []
        for layer in wanted:
            block = self.blocks[layer]
            entering = state.intermediate[layer - 1] if layer else tokens
            maps.append(block.attn(block.norm1(entering), read, rotary=self.rotary(grid))[1])
        return tuple(maps)


def _numbered(layers: Sequence[int] | range, depth: int) -> tuple[int, ...]:
    """Numbers of layers from 0 on. Raises ConfigError for one that is not there."""
    if outside := [layer for layer in layers if not -depth <= layer < depth]:
        raise ConfigError(f"layer {outside[0]} is not there: the network has {depth}, from 0 on")
    return tuple(int(layer) % depth for layer in layers)
