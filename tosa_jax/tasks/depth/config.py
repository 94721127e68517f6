"""What a depth network is, before any of it is built: a backbone and its decoder."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from tosa_jax.models.vit_config import ViTConfig, check, check_choice


@dataclass(frozen=True, kw_only=True)
class DepthConfig(ViTConfig):
    """A backbone and its decoder.

    `image_size` is what the positions are made for; images of any size are accepted: they are resized to the next
    multiple of the patch, positions are resampled, and depth comes back at the images' own size.

    Beside the fields of `ViTConfig`, with its errors:

    max_depth              metres; depth is this times a sigmoid.
    depth_estimation_type  "metric": depth in metres. "relative", of the decoder "dpt" alone: inverse depth of unknown
                           scale and shift, at least 0 and higher where it is nearer; `max_depth` is not read, and such
                           a network is used, not trained or scored.
    decoder                "light" (`light.py`), or "dpt": the published one (`dpt.py`).
    decoder_dim            channels of every map; of "dpt", of the maps that are fused.
    decoder_widths         "dpt": channels of the four maps before that, from the shallowest depth on; (): an eighth, a
                           quarter, a half and the whole of `embed_dim`.
    decoder_layers         four layers whose tokens are read, counted from 0; (): the ends of the four quarters.
    decoder_norm           whether these tokens go through the final norm.
    readout                the class token: "project"ed and added to each patch, or "ignore"d.
    """

    task: ClassVar[str] = "depth"
    resizes: ClassVar[bool] = True
    unused: ClassVar[tuple[str, ...]] = ("num_classes", "global_pool")

    max_depth: float = 10.0
    depth_estimation_type: str = "metric"
    decoder: str = "light"
    decoder_dim: int = 64
    decoder_widths: tuple[int, ...] = ()
    decoder_layers: tuple[int, ...] = ()
    decoder_norm: bool = True
    readout: str = "project"

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.max_depth > 0, f"max_depth={self.max_depth} must be above 0")
        check_choice("decoder", self.decoder, ("light", "dpt"))
        check(self.decoder_dim >= 2, f"decoder_dim={self.decoder_dim} must be at least 2")
        check_choice("readout", self.readout, ("project", "ignore"))
        check(self.class_token or self.decoder == "light" or self.readout == "ignore",
              "readout='project' needs a class token, which this network has not: use 'ignore'")  # fmt: skip
        check_choice("depth_estimation_type", self.depth_estimation_type, ("metric", "relative"))
        check(self.decoder == "dpt" or self.depth_estimation_type == "metric",
              "depth_estimation_type='relative' needs decoder='dpt': the light decoder predicts metres")  # fmt: skip
        object.__setattr__(self, "decoder_widths", tuple(self.decoder_widths))
        check(self.decoder == "dpt" or not self.decoder_widths,
              f"decoder_widths={self.decoder_widths} needs decoder='dpt': the light decoder has decoder_dim "
              "channels in every map")  # fmt: skip
        check(len(self.decoder_widths) in (0, 4) and min(self.map_widths, default=1) >= 1,
              f"decoder_widths={self.decoder_widths} must be four numbers of at least 1")  # fmt: skip
        object.__setattr__(self, "decoder_layers", tuple(self.decoder_layers))
        check(len(self.decoder_layers) in (0, 4) and sorted(self.intermediate_layers) == list(self.intermediate_layers)
              and 0 <= self.intermediate_layers[0] and self.intermediate_layers[-1] < self.depth,
              f"decoder_layers={self.decoder_layers} must be four layers in [0, {self.depth}), ascending")  # fmt: skip

    @property
    def intermediate_layers(self) -> tuple[int, ...]:
        """The layers that the decoder reads: 2, 5, 8, 11 of twelve, as DPT."""
        quarters = (math.ceil(self.depth * i / 4) - 1 for i in range(1, 5))
        return self.decoder_layers or tuple(quarters)

    @property
    def map_widths(self) -> tuple[int, ...]:
        """`decoder_widths` as they are in "dpt"; () in the light decoder."""
        if self.decoder != "dpt":
            return ()
        return self.decoder_widths or tuple(max(1, self.embed_dim // part) for part in (8, 4, 2, 1))

    @property
    def silent_fields(self) -> dict[str, Any]:
        names = ("max_depth", "depth_estimation_type", "decoder", "decoder_dim", "decoder_norm")
        own = {name: getattr(self, name) for name in (*names, "readout")}
        own |= {"decoder_widths": self.map_widths, "decoder_layers": self.intermediate_layers}
        return super().silent_fields | own
