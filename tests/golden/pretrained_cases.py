"""What the exactness of released weights is shown on: cases, random weights in released forms, our logits.

Nothing here needs torch. Weights come from NumPy by name and seed, so that tests make the same ones
as `make_pretrained.py` did and only logits are stored.

A case is called as its variant, with `:avg` behind it for the head of MAE's fine-tuned models. Each
runs at its native and at one other resolution, in two ways:
timm          timm's names; positions resampled with antialiasing, as timm does.
transformers  the names that `save_pretrained` writes; positions resampled by the transformers model
              itself.
"""

import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from tosa_jax.models.params import set_params, split
from tosa_jax.models.tracing import abstract
from tosa_jax.models.variants import VARIANTS
from tosa_jax.models.vit import VisionTransformer
from tosa_jax.models.weights.load import load_pretrained
from tosa_jax.tasks import create_model

# What the tests run: every form at a real width, two layers deep; giant's SwiGLU at the width of
# tiny.
_SMALL = {"depth": 2}
_NARROW = {"embed_dim": 192, "num_heads": 3, "image_size": 280}
GOLDEN = {
    "deit_tiny_patch16_224": _SMALL,
    "deit_tiny_distilled_patch16_224": _SMALL,
    "deit3_small_patch16_224": _SMALL,
    "vit_tiny_patch16_224": _SMALL,
    "vit_tiny_patch16_224:avg": _SMALL,
    "vit_small_patch14_dinov2": _SMALL | {"image_size": 280},
    "vit_small_patch14_reg4_dinov2": _SMALL | {"image_size": 280},
    "vit_giant_patch14_dinov2": _SMALL | _NARROW,
    "vit_giant_patch14_reg4_dinov2": _SMALL | _NARROW,
}
GIANT_DEPTH = 8  # of 40, in the results: whole, it would need 25 GB
MEASURED = {
    name: {"depth": GIANT_DEPTH} if "giant" in name else {}
    for name in VARIANTS
    # The others are in `family_cases`.
    if name != "vit" and not re.search("clip|siglip|dinov3|eva02|lemevit", name)
}
MEASURED["vit_base_patch16_224:avg"] = {}


def limit(case: str) -> float:
    """Largest |logit difference| allowed, float32."""
    return 1e-4 if "giant" in case else 2e-5


def case_fields(case: str, fields: dict) -> tuple[str, dict]:
    """Arguments of `create_model` and `variant_config` for a case."""
    name, _, pool = case.partition(":")
    return name, fields | ({"global_pool": pool} if pool else {})


def ways(config) -> list[str]:
    """The ways that a case is measured in; transformers has no DeiT III and no `avg`."""
    known = config.pos_embed_prefix or config.reg_tokens
    return ["timm", "transformers"] if known and config.global_pool == "token" else ["timm"]


def other_size(config) -> int:
    """The resolution beside the native one: 224 grows to 288, 384 and 518 shrink to 224."""
    return 288 if config.image_size == 224 else 224


def timm_shapes(config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of timm's state dict for a ViTConfig."""
    d, hidden, p = config.embed_dim, config.mlp_dim, config.patch_size
    shapes = {"cls_token": (1, 1, d), "patch_embed.proj.weight": (d, config.in_chans, p, p)}
    if config.distilled:
        shapes |= {"dist_token": (1, 1, d), "head_dist.weight": (config.num_classes, d)}
    if config.reg_tokens:
        shapes["reg_token"] = (1, config.reg_tokens, d)
    prefix = config.num_prefix_tokens if config.pos_embed_prefix else 0
    shapes["pos_embed"] = (1, prefix + config.num_patches, d)
    for i in range(config.depth):
        out_of = hidden // 2 if config.mlp == "swiglu" else hidden
        block = {"norm1": (d,), "attn.qkv": (3 * d, d), "attn.proj": (d, d)}
        block |= {"norm2": (d,), "mlp.fc1": (hidden, d), "mlp.fc2": (d, out_of)}
        shapes |= {f"blocks.{i}.{name}.weight": shape for name, shape in block.items()}
        if config.layer_scale:
            shapes |= {f"blocks.{i}.ls{j}.gamma": (d,) for j in (1, 2)}
    norm = "fc_norm" if config.global_pool == "avg" else "norm"
    shapes |= {f"{norm}.weight": (d,), "head.weight": (config.num_classes, d)}
    biases = {k.replace("weight", "bias"): (v[0],) for k, v in shapes.items() if "weight" in k}
    return shapes | biases


def random_weights(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """Float32 arrays drawn by name: norms, biases, layer scales and positions are random too."""
    arrays = {}
    for name, shape in shapes.items():
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        x = rng.standard_normal(shape, np.float32)
        if name.endswith("weight") and len(shape) > 1:
            x *= np.prod(shape[1:]) ** -0.5
        elif name.endswith(("weight", "gamma")):
            x = 1 + 0.3 * x
        else:
            x *= 0.3
        arrays[name] = x
    return arrays


def random_image(size: int, seed: int = 0) -> np.ndarray:
    """One normalised image [1 size size 3], float32."""
    return np.random.default_rng([seed, size]).standard_normal((1, size, size, 3), np.float32)


def hf_names(config, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """timm's weights under the module names of transformers 5."""
    dinov2, d = bool(config.layer_scale), config.embed_dim
    base = "" if dinov2 else "deit." if config.distilled else "vit."
    layer = "encoder.layer" if dinov2 else "layers"
    norms = ("norm1", "norm2") if dinov2 else ("layernorm_before", "layernorm_after")
    out = {}
    weights = dict(weights)
    if dinov2:
        out["embeddings.mask_token"] = np.ones((1, d), np.float32)
        weights = {k: v for k, v in weights.items() if not k.startswith("head")}
    if config.reg_tokens:  # timm folds the class token's position into the token
        split = random_weights({"split": (1, 1, d)})["split"]
        weights["pos_embed"] = np.concatenate([split, weights["pos_embed"]], axis=1)
        weights["cls_token"] = weights["cls_token"] - split
    for name, x in weights.items():
        name = re.sub(r"^blocks\.(\d+)\.", rf"{base}{layer}.\1.", name)
        name = name.replace(".norm1.", f".{norms[0]}.").replace(".norm2.", f".{norms[1]}.")
        name = re.sub(r"\.ls(\d)\.gamma", r".layer_scale\1.lambda1", name)
        name = name.replace(".attn.proj.", ".attention.o_proj.")
        name = re.sub(r"^norm\.", f"{base}layernorm.", name)
        for ours, theirs in [
            ("cls_token", "cls_token"), ("dist_token", "distillation_token"),
            ("reg_token", "register_tokens"), ("pos_embed", "position_embeddings"),
            ("patch_embed.proj", "patch_embeddings.projection"),
        ]:  # fmt: skip
            name = re.sub(rf"^{re.escape(ours)}", f"{base}embeddings.{theirs}", name)
        if config.distilled:
            name = re.sub(r"^head\.", "cls_classifier.", name)
            name = re.sub(r"^head_dist\.", "distillation_classifier.", name)
        name = re.sub(r"^head\.", "classifier.", name)
        if ".attn.qkv." in name:
            for part, piece in zip("qkv", np.split(x, 3), strict=True):
                out[name.replace(".attn.qkv.", f".attention.{part}_proj.")] = piece
        elif config.mlp == "swiglu" and ".fc1." in name:
            for part, piece in zip(("gate", "up"), np.split(x, 2), strict=True):
                out[name.replace(".fc1.", f".{part}_proj.")] = piece
        else:
            out[name.replace(".fc2.", ".down_proj.") if config.mlp == "swiglu" else name] = x
    return out


def hf_fields(config) -> dict[str, object]:
    """The fields of create_model that make a model compute what transformers' does."""
    if config.layer_scale:
        resample = "bicubic_antialias" if config.reg_tokens else "bicubic"
        return {"norm_eps": 1e-6, "pos_resample": resample}
    return {"norm_eps": 1e-12, "pos_resample": "bicubic"}


def quickly_drawn(name: str, **fields) -> VisionTransformer:
    """A model of full width with NumPy's random numbers: JAX's take seconds where nothing is optimised."""
    graphdef, params = split(abstract(lambda rngs: create_model(name, rngs=rngs, **fields)))
    rng = np.random.default_rng(0)
    drawn = {
        path: jnp.asarray(rng.standard_normal(x.shape, np.float32) * np.float32(0.05), x.dtype)
        for path, x in params.items()
    }
    return set_params(graphdef, drawn)


def our_logits(name: str, size: int, path, weights, **fields) -> np.ndarray:
    """Logits [1 c] of this project's model with the weights of `path`.

    A head that the file lacks is set from `weights`.
    """
    model = quickly_drawn(name, **({"image_size": size} | fields))
    messages: list[str] = []
    load_pretrained(model, path, on_message=messages.append)
    if any("the head stays" in message for message in messages):
        model.head.kernel[...] = weights["head.weight"].T
        model.head.bias[...] = weights["head.bias"]
    graphdef, params = split(model)
    run = jax.jit(lambda params, image: set_params(graphdef, params)(image).logits)
    return np.asarray(run(params, random_image(size)))
