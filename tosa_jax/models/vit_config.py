"""What a vision transformer is, before any of it is built: `ViTConfig`, and plans of its layers.

A plan is a tuple with the name of a layer kind for each layer, `("standard", "selective", "standard", ...)`.
"""

import builtins
import dataclasses
import difflib
import functools
import numbers
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import jax.numpy as jnp
import numpy as np

from tosa_jax.errors import ConfigError
from tosa_jax.models.options import OPTIONS, Options, with_values
from tosa_jax.models.positions import RESAMPLINGS
from tosa_jax.ops.rotary import FORMS

AnyOptions = TypeVar("AnyOptions", bound=Options)

STANDARD = "standard"
"""What plans call an ordinary transformer layer."""

POOLS = {
    "token": "the class token",
    "avg": "the mean of the patches, normalised after it, as in MAE",
    "token_avg": "the class token beside the mean of the patches, as DINOv2's linear heads",
    "map": "attention pooling, as in SigLIP",
}
"""What the head reads, by the value of `ViTConfig.global_pool`."""

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}  # as in recipes

_PLAIN = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}
_MOST = {int: 2**32, float: 1e300}


MOST_LAYERS = 1000


def check_choice(field: str, value: Any, known: Iterable[Any]) -> None:
    """Raise a ConfigError that names the choices, unless `value` is one of them."""
    known = list(known)
    if value in known:
        return
    near = difflib.get_close_matches(str(value), map(str, known), n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(f"{field}={value!r} is unknown; {hint}known: {', '.join(map(str, known))}")


def check(condition: bool, message: str) -> None:
    """Raise a ConfigError with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def plain_value(name: str, value: Any, kind: type) -> Any:
    """A field's value as Python's own `int`, `float`, `bool` or `str`; NumPy's and JAX's numbers are such values too.

    Raises ConfigError, which names the field, for a value that is none: a text is no number.
    """
    if getattr(value, "shape", None) == ():
        value = np.asarray(value).item()
    taken = {int: int, float: int | float, bool: bool, str: str}
    exact = kind is int and isinstance(value, float) and value.is_integer()
    fits = exact or (
        isinstance(value, taken[kind]) and (kind is bool or not isinstance(value, bool))
    )
    check(fits, f"{name}={value!r} must be {_PLAIN[kind]}")
    if kind in _MOST:
        check(abs(value) < _MOST[kind], f"{name}={value!r} is too large or not finite")
    return kind(value)


def are_many(given: Any) -> typing.TypeGuard[Sequence[Any]]:
    """Whether it is a list, a tuple or an array of one axis. What these hold is not looked at."""
    return isinstance(given, list | tuple) or getattr(given, "ndim", 0) == 1


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def check_types(cls: type, values: Mapping[str, Any]) -> None:
    """Raise a ConfigError that names the field, for a value that is not of the type that a dataclass says.

    Numbers must be finite too, and whole ones below 2**32.
    """
    for name, value in values.items():
        hint = _hints(cls).get(name, Any)
        if not _fits(value, hint):
            said = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else hint
            bounds = {int: ", above -2**32 and below 2**32", float: ", and finite"}.get(hint, "")
            raise ConfigError(f"{name}={value!r} must be of type {said}{bounds}")


def _fits(value: Any, hint: Any) -> bool:
    options = typing.get_args(hint)
    if getattr(value, "shape", None) == ():  # a number of NumPy or JAX
        value = np.asarray(value).item()
    match typing.get_origin(hint) or hint:
        case types.UnionType | typing.Union:
            return any(_fits(value, option) for option in options)
        case builtins.tuple:
            if not isinstance(value, tuple | list):
                return False
            return all(_fits(x, options[0]) for x in value)  # how many, the class itself says
        case builtins.bool | builtins.str as kind:
            return isinstance(value, kind)
        case builtins.int:
            whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
            return whole and abs(int(value)) < 2**32
        case builtins.float:
            real = isinstance(value, numbers.Real) and not isinstance(value, bool)
            return real and abs(value if isinstance(value, int) else float(value)) < 1e300
    return True


def _own_fields(config: Any) -> list[str]:
    """Names of the fields that a configuration, or its class, can be given: all but the options of methods."""
    return [x.name for x in dataclasses.fields(config) if x.init and x.name != "options"]


def check_fields(config: Any, names: Iterable[str]) -> None:
    """Raise a ConfigError for a name that is no field of a configuration, or its class, and no option of a method."""
    for name in names:
        check_choice("model field", name, [*_own_fields(config), *OPTIONS])


class _TakesOptions(type):
    """The class of `ViTConfig` and its subclasses: their calls take the options of methods among their own fields."""

    def __call__(cls, *, options: tuple[Options, ...] = (), **values: Any) -> Any:
        check_fields(cls, values)
        own = _own_fields(cls)
        of_methods = {name: values.pop(name) for name in values.keys() - own}
        # Those of one plain type, and these two, are made plain values in `__post_init__`.
        plain = {
            "image_size",
            "keep_rate",
            *(x for x, hint in _hints(cls).items() if hint in _PLAIN),
        }
        check_types(cls, {name: x for name, x in values.items() if name not in plain})
        for name, value in of_methods.items():
            check_types(OPTIONS[name], {name: value})
        return super().__call__(options=with_values(options, of_methods), **values)


@dataclass(frozen=True, kw_only=True)
class ViTConfig(metaclass=_TakesOptions):
    """What a network is. Sizes are timm's; the fields from `plan` on are this project's.

    What a single method reads is in that method's file, in a subclass of `Options`. Its fields are set and read like
    those of this class: `ViTConfig(bypass="shared").bypass`, `dataclasses.replace(config, bypass="shared")`.

    Raises ConfigError for an unknown field, and for values that are out of range or do not go together.

    task      for which such models are built, unless another is named: a key of `tasks.TASKS`.
    has_plan  whether layer kinds of a plan can run in it.
    resizes   images that the patch does not divide are brought to the next multiple; else they are refused.
    unused    fields that this task's network does not read.

    architecture       the kind of network, which its class has set: "vit", or "lemevit" (`LeMeViTConfig`).
    plan               a layer kind for each layer; (): all standard.
    keep_rate          share in (0, 1] of patches selected: one, or one a selection.
    budget_gmacs       above 0: keep_rate is solved for this cost of an image, and what was given is not read.
    budget             "uniform": one keep_rate for all selections; "linear": keep_rate is the mean of falling ones,
                       which "redundancy" follows as far down as it can.
    count_multiple     counts of selected tokens are rounded up to a multiple of it.
    gather             "one_hot": tokens are gathered and put back by matrix products on every device; "indices": on
                       TPUs alone.
    scan_layers        one program for all repetitions of the plan: compiles faster, computes the same.
    remat              what backward computes again to save memory: "none", "full", "dots" or "dots_no_batch".
    map_chunk          query rows at a time when a map is walked; 0: all.
    options            of methods: one object of each class that is not at its defaults; `options_of` reads them.
    """

    task: ClassVar[str] = "classification"
    resizes: ClassVar[bool] = False
    unused: ClassVar[tuple[str, ...]] = ()
    has_plan: ClassVar[bool] = True

    architecture: str = "vit"
    image_size: int | tuple[int, int] = 224  # pixels: the side of a square, or (height, width)
    patch_size: int = 16
    in_chans: int = 3
    num_classes: int = 1000
    embed_dim: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp: str = "gelu"  # "gelu", "gelu_tanh", "quick_gelu" (OpenAI's CLIP) or "swiglu" (packed)
    mlp_ratio: float = 4.0
    mlp_norm: bool = False  # a norm before the MLP's second layer, as in EVA-02's base and large
    attn_norm: bool = False  # a norm before the attention's projection, as in EVA-02-CLIP
    qkv_bias: bool = True
    key_bias: bool = True  # False: the keys' part of that bias is held at 0, as in DINOv3
    patch_bias: bool = True  # the patch projection has a bias; CLIP's has none
    norm_eps: float = 1e-6
    layer_scale: float = 0.0  # initial value; 0: none
    class_token: bool = True
    reg_tokens: int = 0  # registers
    distilled: bool = False  # a distillation token, and a head of its own
    pre_norm: bool = False  # a norm before the layers (`norm_pre`), as in CLIP
    pos_embed: bool = True  # learned positions are added to the tokens
    pos_embed_prefix: bool = True  # positions for the prefix tokens too
    max_patches: int = 0  # above 0: images of any proportion, of at most so many patches (NaFlex)
    pos_resample: str = "bicubic_antialias"  # positions of another grid: one of `RESAMPLINGS`
    rope: str = ""  # rotary positions of the patches: a key of `ops.rotary.FORMS`, or "" for none
    rope_base: float = 100.0  # the highest frequency over the lowest one, nearly
    projection: bool = (
        False  # the head gives an embedding of `num_classes` values and no classes, as CLIP's
    )
    global_pool: str = "token"  # what is classified: one of `POOLS`
    drop_path_rate: float = 0.0  # of the last layer; rises linearly from 0
    init_std: float = 0.02  # of weights and positions; narrow networks need more
    dtype: Any = jnp.float32  # computes
    param_dtype: Any = jnp.float32  # stores
    plan: tuple[str, ...] = ()
    keep_rate: float | tuple[float, ...] = 0.5
    budget_gmacs: float = 0.0
    budget: str = "uniform"
    count_multiple: int = 1
    gather: str = "indices"
    scan_layers: bool = False
    remat: str = "none"
    map_chunk: int = 0
    options: tuple[Options, ...] = ()

    def __post_init__(self) -> None:
        own = type(self).architecture
        check(
            self.architecture == own,
            f"architecture={self.architecture!r}: this network is of the architecture {own!r}; name a network of the "
            "other one (tosa_jax.VARIANTS)",
        )
        for field in dataclasses.fields(self):
            if isinstance(field.type, type) and field.type in _PLAIN:
                value = plain_value(field.name, getattr(self, field.name), field.type)
                object.__setattr__(self, field.name, value)
        for name in ("dtype", "param_dtype"):
            object.__setattr__(self, name, self._float_type(name, getattr(self, name)))
        for name in ("patch_size", "in_chans", "embed_dim", "depth", "num_heads"):
            value = getattr(self, name)
            check(value >= 1, f"{name}={value!r} must be at least 1")
        check(self.init_std > 0, f"init_std={self.init_std} must be above 0")
        check(self.depth <= MOST_LAYERS, f"depth={self.depth} must be at most {MOST_LAYERS}")
        check(self.num_classes >= 0, f"num_classes={self.num_classes} must be at least 0 (no head)")
        self._check_image_size()
        self._check_form()
        check(
            self.embed_dim % self.num_heads == 0,
            f"num_heads={self.num_heads} does not divide embed_dim={self.embed_dim}",
        )
        check_choice("mlp", self.mlp, ("gelu", "gelu_tanh", "quick_gelu", "swiglu"))
        check_choice("pos_resample", self.pos_resample, RESAMPLINGS)
        check_choice("gather", self.gather, ("indices", "one_hot"))
        check_choice("remat", self.remat, ("none", "full", "dots", "dots_no_batch"))
        check_choice("budget", self.budget, ("uniform", "linear"))
        check(self.budget_gmacs >= 0, f"budget_gmacs={self.budget_gmacs} is negative")
        check(self.count_multiple >= 1, f"count_multiple={self.count_multiple} must be at least 1")
        check(
            0 <= self.drop_path_rate < 1, f"drop_path_rate={self.drop_path_rate} is not in [0, 1)"
        )
        check(
            self.map_chunk >= 0, f"map_chunk={self.map_chunk} must be positive, or 0 for all rows"
        )
        rates = self.keep_rates_given
        object.__setattr__(self, "keep_rate", rates[0] if len(rates) == 1 else rates)
        plan = tuple(self.plan or (STANDARD,) * self.depth)
        object.__setattr__(self, "plan", plan)
        check(len(plan) == self.depth, f"plan has {len(plan)} layers, but depth={self.depth}")
        for rate in self.keep_rates_given:
            check(0 < rate <= 1, f"keep_rate={rate} is not in (0, 1]")
        for options in self.options:
            options.check_network(self)

    @staticmethod
    def _float_type(name: str, value: Any) -> Any:
        """The dtype of a field, by name or as NumPy's or JAX's."""
        if isinstance(value, str):
            check_choice(name, value, DTYPES)
        try:
            found = jnp.dtype(value)
        except TypeError:
            found = None
        known = [jnp.dtype(dtype) for dtype in DTYPES.values()]
        check(found in known, f"{name}={value!r} is no float that models have: {', '.join(DTYPES)}")
        return found

    def _check_form(self) -> None:
        """The tokens that the head reads are there, and heads can be turned."""
        check_choice("global_pool", self.global_pool, POOLS)
        pool = self.global_pool
        check(
            self.class_token or (not self.distilled and pool in ("avg", "map")),
            f"global_pool={pool!r} with class_token=False and distilled={self.distilled}: there is no class token; "
            "use 'avg' or 'map', and no distillation token",
        )
        check(
            not self.distilled or (pool in ("token", "avg") and self.num_classes > 0),
            "distilled=True needs num_classes above 0 and global_pool='token'",
        )
        check_choice("rope", self.rope, ("", *FORMS))
        head_dim = self.embed_dim // self.num_heads
        check(
            not self.rope or head_dim % 4 == 0,
            f"rope={self.rope!r} needs heads whose width 4 divides, not {head_dim}",
        )
        check(self.rope_base > 1, f"rope_base={self.rope_base} must be above 1")
        self._check_padding()

    def _check_padding(self) -> None:
        """A network for images of any proportion has positions that are resampled for each image."""
        given = f"max_patches={self.max_patches}"
        check(self.max_patches >= 0, f"{given} must be at least 1, or 0 for images of one size")
        if not self.max_patches:
            return
        check(
            not self.rope and self.pos_embed and self.pos_resample == "bilinear_antialias",
            f"{given} needs learned positions with pos_resample='bilinear_antialias', and no rotary ones",
        )
        check(
            not self.resizes, f"{given}: networks for {self.task} take images of any size already"
        )

    def _check_image_size(self) -> None:
        """One form for each size (a square is an int), which the network can take."""
        size = self.image_size
        if are_many(size):
            check(len(size) == 2, f"image_size={size!r} must be one number, or (height, width)")
            size = tuple(plain_value("image_size", side, int) for side in size)
            size = size[0] if size[0] == size[1] else size
        else:
            size = plain_value("image_size", size, int)
        object.__setattr__(self, "image_size", size)
        check(min(self.image_shape) >= 1, f"image_size={size!r} must be at least 1")
        self._check_grid()

    def _check_grid(self) -> None:
        """The patch divides the image size, unless the network resizes."""
        patch = self.patch_size
        nearest = [max(1, round(side / patch)) * patch for side in self.image_shape]
        check(
            self.resizes or self.image_shape == tuple(nearest),
            f"image_size={self.image_size} is not a multiple of patch_size={patch}; the nearest that is: "
            f"{nearest[0] if nearest[0] == nearest[-1] else tuple(nearest)}",
        )

    def options_of(self, cls: type[AnyOptions]) -> AnyOptions:
        """The options of one class, at their defaults unless others were given."""
        return next((one for one in self.options if isinstance(one, cls)), cls())

    if not TYPE_CHECKING:  # a type checker would take any misspelt field for an option

        def __getattr__(self, name: str) -> Any:
            """The value of a method's option."""
            if name not in OPTIONS:
                raise AttributeError(f"{type(self).__name__} has no field {name!r}")
            return getattr(self.options_of(OPTIONS[name]), name)

    def to_fields(self) -> dict[str, Any]:
        """Every field and every option by name, dtypes as text: what makes an equal configuration."""
        values = {name: getattr(self, name) for name in [*_own_fields(self), *OPTIONS]}
        return values | {name: str(values[name]) for name in ("dtype", "param_dtype")}

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else size

    @property
    def intermediate_layers(self) -> tuple[int, ...]:
        """Layers, counted from 0, whose tokens the head reads beside those of the last one."""
        return ()

    @property
    def silent_fields(self) -> dict[str, Any]:
        """Fields that say what is computed where the shapes of parameters do not; files of weights state them."""
        names = ("num_heads", "mlp", "norm_eps", "patch_size")
        names += ("rope", "rope_base", "key_bias") if self.rope else ()
        return {name: getattr(self, name) for name in names}

    @property
    def keep_rates_given(self) -> tuple[float, ...]:
        """`keep_rate` as a tuple, however it was given."""
        given: Any = self.keep_rate
        rates = given if are_many(given) else (given,)
        return tuple(plain_value("keep_rate", rate, float) for rate in rates)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches; with `max_patches` those of the positions alone."""
        return self.grid_of(self.image_shape)

    def grid_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the patches that cover an image of (height, width) pixels."""
        return -(-size[0] // self.patch_size), -(-size[1] // self.patch_size)

    @property
    def num_patches(self) -> int:
        """Patches of an image, one token each; with `max_patches` padding is among them."""
        return self.max_patches or int(np.prod(self.grid))

    @property
    def num_positions(self) -> int:
        """Learned positions: of the patches of `grid`, and of prefix tokens where those have some."""
        return int(np.prod(self.grid)) + self.num_prefix_tokens * self.pos_embed_prefix

    @property
    def num_prefix_tokens(self) -> int:
        """Class, distillation and register tokens."""
        return self.class_token + self.distilled + self.reg_tokens

    @property
    def num_tokens(self) -> int:
        """Patches and prefix tokens: n."""
        return self.num_prefix_tokens + self.num_patches

    @property
    def mlp_dim(self) -> int:
        """Width after the MLP's first layer (both halves of a packed SwiGLU)."""
        return int(self.embed_dim * self.mlp_ratio)

    @property
    def mlp_weights(self) -> int:
        """Weights of the MLP's two matrices, which are its multiply-adds a token."""
        into, out_of = self.mlp_dim, self.mlp_dim // 2 if self.mlp == "swiglu" else self.mlp_dim
        return self.embed_dim * (into + out_of)


def alternate(kind: str, depth: int, period: int = 2) -> tuple[str, ...]:
    """The plan in which a standard layer is followed by `period - 1` layers of `kind`, over and over.

    With period 0 there are no standard layers. Raises ConfigError: more than `MOST_LAYERS`.
    """
    check(depth <= MOST_LAYERS, f"depth={depth} must be at most {MOST_LAYERS}")
    return tuple(STANDARD if period and i % period == 0 else kind for i in range(depth))
