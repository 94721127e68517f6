"""What a LeMeViT is, before any of it is built: the sizes of its five stages.

Source: Jiang et al. 2024, "LeMeViT: Efficient Vision Transformer with Learnable Meta Tokens for Remote Sensing Image
Interpretation" (arXiv 2405.09789; ViTAE-Transformer/LeMeViT, `models/lemevit.py`).
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

from tosa_jax.models.vit_config import STANDARD, ViTConfig, check

STAGES = ("cross", "dual", "dual", "standard", "standard")
"""What the blocks of each stage do (`lemevit.ATTENTION`)."""

STRIDES = (4, 4, 8, 16, 32)
"""Pixels between two image tokens of each stage. The first two share a grid."""

_HOW_LAYERS_RUN = ("scan_layers", "map_chunk", "gather", "count_multiple")


@dataclass(frozen=True, kw_only=True)
class LeMeViTConfig(ViTConfig):
    """A LeMeViT: image tokens on a grid that is halved from stage to stage, and meta tokens beside them.

    Of the fields of `ViTConfig` it has those of images, classes, drop path, dtypes and `remat`. The others are fixed.

    widths       of the tokens in each of the five stages; `head_dim` divides each.
    depths       blocks of each stage.
    head_dim     width of an attention head.
    meta_tokens  how many there are.

    Raises ConfigError as `ViTConfig`; for other numbers of stages; for images of which a stage with dual cross
    attention has one token; and for a plan, a keep rate, a budget or an option of a method.
    """

    has_plan: ClassVar[bool] = False

    architecture: str = "lemevit"
    widths: tuple[int, ...] = (64, 64, 128, 192, 320)
    depths: tuple[int, ...] = (1, 2, 2, 8, 2)
    head_dim: int = 32
    meta_tokens: int = 16

    # Of the last stage, and of all blocks together.
    embed_dim: int = field(default=0, init=False)
    depth: int = field(default=0, init=False)
    num_heads: int = field(default=0, init=False)
    # The same in every LeMeViT.
    patch_size: int = field(default=STRIDES[-1], init=False)
    mlp: str = field(default="gelu", init=False)
    mlp_norm: bool = field(default=False, init=False)
    qkv_bias: bool = field(default=True, init=False)
    key_bias: bool = field(default=True, init=False)
    patch_bias: bool = field(default=True, init=False)
    norm_eps: float = field(default=1e-6, init=False)
    layer_scale: float = field(default=0.0, init=False)
    class_token: bool = field(default=False, init=False)
    reg_tokens: int = field(default=0, init=False)
    distilled: bool = field(default=False, init=False)
    pre_norm: bool = field(default=False, init=False)
    pos_embed: bool = field(default=False, init=False)
    pos_embed_prefix: bool = field(default=False, init=False)
    pos_resample: str = field(default="bicubic", init=False)
    rope: str = field(default="", init=False)
    rope_base: float = field(default=100.0, init=False)
    projection: bool = field(default=False, init=False)
    global_pool: str = field(default="avg", init=False)

    def __post_init__(self) -> None:
        self._check_stages()
        self._check_plan()
        last = {"depth": sum(self.depths), "embed_dim": self.widths[-1]}
        last["num_heads"] = self.widths[-1] // self.head_dim
        for name, value in last.items():
            object.__setattr__(self, name, value)
        super().__post_init__()

    def _check_stages(self) -> None:
        for name in ("widths", "depths"):
            object.__setattr__(self, name, tuple(map(int, getattr(self, name))))
            values = getattr(self, name)
            check(
                len(values) == len(STAGES) and min(values) >= 1,
                f"{name}={values} must be {len(STAGES)} numbers of at least 1, one for each stage",
            )
        for name in ("head_dim", "meta_tokens"):
            check(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        check(
            not any(width % self.head_dim for width in self.widths) and self.widths[0] % 2 == 0,
            f"widths={self.widths}: head_dim={self.head_dim} must divide each of them, and 2 the first",
        )
        check(
            self.widths[0] == self.widths[1],
            f"widths={self.widths}: the first two stages share a grid and must be of one width",
        )

    def _check_plan(self) -> None:
        """Nothing asks for layers on fewer tokens: all blocks run on all of them."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        dense = set(self.plan) <= {STANDARD} and self.keep_rates_given == (defaults["keep_rate"],)
        check(
            dense and not (self.budget_gmacs or self.options) and self.budget == defaults["budget"],
            "a LeMeViT runs no layer kinds of a plan, because its meta tokens stand for the image's: leave out plan, "
            "keep_rate, budget, budget_gmacs and the options of methods",
        )
        for name in _HOW_LAYERS_RUN:
            value, default = getattr(self, name), defaults[name]
            check(
                value == default,
                f"{name}={value!r} is not for a LeMeViT, whose blocks differ: leave it at {default!r}",
            )

    def _check_grid(self) -> None:
        """Any size will do of which dual cross attention has more than one image token."""
        rows, columns = self.stage_grid(STAGES.index("standard") - 1)
        check(
            rows * columns > 1,
            f"image_size={self.image_size} leaves dual cross attention one image token: it must be above "
            f"{STRIDES[STAGES.index('standard') - 1]} pixels",
        )

    def stage_grid(self, stage: int) -> tuple[int, int]:
        """Rows and columns of image tokens in a stage, counted from 0."""
        height, width = self.image_shape
        return -(-height // STRIDES[stage]), -(-width // STRIDES[stage])

    def stage(self, number: int) -> ViTConfig:
        """The sizes of a stage's blocks, as those of a plain ViT."""
        width = self.widths[number]
        return ViTConfig(
            embed_dim=width, num_heads=width // self.head_dim, mlp_ratio=self.mlp_ratio, norm_eps=self.norm_eps,
            dtype=self.dtype, param_dtype=self.param_dtype,
        )  # fmt: skip

    @property
    def num_prefix_tokens(self) -> int:
        """Meta tokens, which come before the image's in `Output.tokens`."""
        return self.meta_tokens

    @property
    def silent_fields(self) -> dict[str, Any]:
        return {"head_dim": self.head_dim}
