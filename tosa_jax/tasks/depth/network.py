"""The depth network: a decoder on any backbone of this project, plain or token-selective."""

from typing import ClassVar

import jax
from flax import nnx
from jaxtyping import Array, Float

from tosa_jax.models.vit import Output, VisionTransformer
from tosa_jax.models.vit_config import ViTConfig
from tosa_jax.ops.array_types import Images
from tosa_jax.tasks.depth.config import DepthConfig
from tosa_jax.tasks.depth.dpt import DPTDecoder
from tosa_jax.tasks.depth.layers import resize
from tosa_jax.tasks.depth.light import LightDecoder

DECODERS = {"light": LightDecoder, "dpt": DPTDecoder}
"""By the value of `DepthConfig.decoder`."""


class DepthTransformer(VisionTransformer):
    """A ViT that predicts depth. Its parameters are the backbone's, under their names, and those under `decoder/`."""

    config: DepthConfig
    config_class: ClassVar[type[ViTConfig]] = DepthConfig

    def add_head(self, rngs: nnx.Rngs) -> None:
        self.decoder = DECODERS[self.config.decoder](self.config, rngs=rngs)

    def head_macs(self) -> int:
        return self.decoder.macs(self.config.grid)

    def features(self, images: Images, *, key: jax.Array | None = None) -> Float[Array, "b e"]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.pool(self.forward_features(images, key=key))

    def __call__(
        self, images: Images, *, key: jax.Array | None = None, train: bool = False
    ) -> Output:
        """images [b height width c], normalised, of any size. `key` feeds drop path and random selection.

        Returns depth, no logits. With `decoder_norm` every depth that the decoder reads goes through the final norm,
        as DINOv2's `get_intermediate_layers` does.
        """
        config, size = self.config, (images.shape[1], images.shape[2])
        patch, grid = config.patch_size, config.grid_of(size)
        covered = resize(images, (grid[0] * patch, grid[1] * patch))
        state = self.layers(self.embed(covered), key=key, train=train, grid=grid)
        taps = state.intermediate
        if config.decoder_norm:
            taps = {layer: self.norm(tokens) for layer, tokens in taps.items()}
        depth = self.decoder([taps[layer] for layer in config.intermediate_layers], grid, size)
        tokens = self.norm(state.intermediate.get(config.depth - 1, state.tokens))
        return Output({"depth": depth}, tokens, state.selected, state.aux, state.scores)
