"""Makes pretrained.npz and torch_* here (--goldens), or measures results/pretrained_exactness.json.

    pip install "torch>=2.6" "transformers>=5" && python tests/golden/make_pretrained.py [--depth 2]
    [--only REGEX]

Reference: Hugging Face transformers on CPU PyTorch with random weights of every variant (DeiT III:
the module below, which transformers lacks). Weights come from NumPy by name and seed, so that tests
make the same ones and only logits are stored.

Each variant runs at its native and at one other resolution, in two ways:
timm          timm's names in a `.pth`; positions resampled with antialiasing, as timm does.
transformers  the folder that `save_pretrained` writes; positions resampled by the transformers
              model itself.
"""

import argparse
import json
import re
import tempfile
import zlib
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent

# What the tests run: every form at a real width, two layers deep; giant's SwiGLU at the width of
# tiny.
NARROW = {"embed_dim": 192, "num_heads": 3}
GOLDEN = {
    "deit_tiny_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},
    "deit3_small_patch16_224": {},
    "vit_tiny_patch16_224": {},
    "vit_small_patch14_dinov2": {"image_size": 280},
    "vit_small_patch14_reg4_dinov2": {"image_size": 280},
    "vit_giant_patch14_dinov2": {"image_size": 280} | NARROW,
    "vit_giant_patch14_reg4_dinov2": {"image_size": 280} | NARROW,
}
GOLDEN_DEPTH = 2


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
    shapes |= {"norm.weight": (d,), "head.weight": (config.num_classes, d)}
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


# ---- The reference, in PyTorch ----


def hf_model(config, weights: dict[str, np.ndarray], norm_eps: float):
    """The transformers model of a ViTConfig that holds timm's `weights`."""
    import torch
    import transformers

    fields = {
        "hidden_size": config.embed_dim, "num_hidden_layers": config.depth,
        "image_size": config.image_size, "num_attention_heads": config.num_heads,
        "patch_size": config.patch_size, "layer_norm_eps": norm_eps,
        "attn_implementation": "eager",
    }  # fmt: skip
    if config.layer_scale:
        fields |= {"use_swiglu_ffn": config.mlp == "swiglu", "mlp_ratio": 4}
        kind = "Dinov2WithRegisters" if config.reg_tokens else "Dinov2"
        model = getattr(transformers, f"{kind}Model")
    else:
        fields |= {"intermediate_size": config.mlp_dim, "num_labels": config.num_classes}
        kind = "DeiT" if config.distilled else "ViT"
        suffix = "ForImageClassification" + "WithTeacher" * config.distilled
        model = getattr(transformers, kind + suffix)
    model = model(getattr(transformers, f"{kind}Config")(**fields)).eval()
    arrays = hf_names(config, weights)
    state = {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in arrays.items()}
    model.load_state_dict(state, strict=True)
    return model


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


def hf_logits(config, model, weights, image: np.ndarray, resample: bool) -> np.ndarray:
    """Logits [1 c]; DINOv2's through timm's head on the class token, which transformers lacks."""
    import torch

    pixels = torch.from_numpy(image.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        if config.layer_scale:
            token = model(pixel_values=pixels).last_hidden_state[:, 0].numpy()
            return token @ weights["head.weight"].T + weights["head.bias"]
        return model(pixel_values=pixels, interpolate_pos_encoding=resample).logits.numpy()


def deit3_logits(config, weights: dict[str, np.ndarray], image: np.ndarray) -> np.ndarray:
    """DeiT III by its definition (facebookresearch/deit, models_v2.py), in PyTorch's functions."""
    import torch
    import torch.nn.functional as F

    w = {name: torch.from_numpy(x) for name, x in weights.items()}

    def norm(x, name):
        return F.layer_norm(x, (config.embed_dim,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def dense(x, name):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    x = torch.from_numpy(image.transpose(0, 3, 1, 2).copy())
    x = F.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], config.patch_size)
    x = torch.cat([w["cls_token"], x.flatten(2).transpose(1, 2) + w["pos_embed"]], dim=1)
    for i in range(config.depth):
        at = f"blocks.{i}"
        b, n, d = x.shape
        qkv = dense(norm(x, f"{at}.norm1"), f"{at}.attn.qkv").reshape(b, n, 3, config.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attn = (q @ k.transpose(-2, -1) * (d // config.num_heads) ** -0.5).softmax(-1)
        update = dense((attn @ v).transpose(1, 2).reshape(b, n, d), f"{at}.attn.proj")
        x = x + w[f"{at}.ls1.gamma"] * update
        update = F.gelu(dense(norm(x, f"{at}.norm2"), f"{at}.mlp.fc1"))
        x = x + w[f"{at}.ls2.gamma"] * dense(update, f"{at}.mlp.fc2")
    return dense(norm(x, "norm")[:, 0], "head").numpy()


def timm_resampled(config, weights: dict[str, np.ndarray], size: int) -> dict[str, np.ndarray]:
    """`weights` with positions for another image size: timm's `resample_abs_pos_embed`."""
    import torch
    import torch.nn.functional as F

    if size == config.image_size:
        return weights
    prefix = config.num_prefix_tokens if config.pos_embed_prefix else 0
    head, patches = np.split(weights["pos_embed"], [prefix], axis=1)
    rows, new = config.grid[0], size // config.patch_size
    patches = torch.from_numpy(patches).reshape(1, rows, rows, -1).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=(new, new), mode="bicubic", antialias=True)
    patches = patches.permute(0, 2, 3, 1).reshape(1, new * new, -1).numpy()
    return weights | {"pos_embed": np.concatenate([head, patches], axis=1)}


def reference(config, weights, size: int, way: str) -> np.ndarray:
    """The reference's logits [1 c] at an image size, in one of the two ways."""
    import dataclasses

    image = random_image(size)
    if way == "timm":
        weights = timm_resampled(config, weights, size)
        config = dataclasses.replace(config, image_size=size)
        if not config.pos_embed_prefix and not config.reg_tokens:
            return deit3_logits(config, weights, image)
        return hf_logits(config, hf_model(config, weights, 1e-6), weights, image, False)
    model = hf_model(config, weights, hf_fields(config)["norm_eps"])
    return hf_logits(config, model, weights, image, size != config.image_size)


def hf_fields(config) -> dict[str, object]:
    """The fields of create_model that make a model compute what transformers' does."""
    if config.layer_scale:
        resample = "bicubic_antialias" if config.reg_tokens else "bicubic"
        return {"norm_eps": 1e-6, "pos_resample": resample}
    return {"norm_eps": 1e-12, "pos_resample": "bicubic"}


# ---- Ours ----


def our_logits(name: str, size: int, path, weights, **fields) -> np.ndarray:
    """Logits [1 c] of this project's model with the weights of `path`.

    A head that the file lacks is set from `weights`.
    """
    import jax
    from flax import nnx

    from tosa_jax.models.networks import create_model
    from tosa_jax.models.params import set_params, split
    from tosa_jax.models.pretrained import load_pretrained

    model = create_model(name, rngs=nnx.Rngs(0), **({"image_size": size} | fields))
    messages: list[str] = []
    load_pretrained(model, path, on_message=messages.append)
    if any("the head stays" in message for message in messages):
        model.head.kernel[...] = weights["head.weight"].T
        model.head.bias[...] = weights["head.bias"]
    graphdef, params = split(model)
    run = jax.jit(lambda params, image: set_params(graphdef, params)(image).logits)
    return np.asarray(run(params, random_image(size)))


def measure(name: str, fields: dict, store: dict[str, np.ndarray] | None) -> dict[str, float]:
    """Largest logit difference by way and size; `store` receives the reference's logits."""
    import torch

    from tosa_jax.models.vit_config import variant_config

    config = variant_config(name, **fields)
    weights = random_weights(timm_shapes(config))
    ways = ["timm"]
    if config.pos_embed_prefix or config.reg_tokens:
        ways.append("transformers")
    differences = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "timm.pth"
        torch.save({"model": {k: torch.from_numpy(v) for k, v in weights.items()}}, path)
        for way in ways:
            own = dict(fields)
            own.pop("image_size", None)
            if way == "transformers":
                path = Path(folder) / "transformers"
                own |= hf_fields(config)
                hf_model(config, weights, own["norm_eps"]).save_pretrained(path)
            for size in (config.image_size, other_size(config)):
                expected = reference(config, weights, size, way)
                found = our_logits(name, size, path, weights, **own)
                differences[f"{way}_{size}"] = float(np.abs(found - expected).max())
                if store is not None:
                    store[f"{name}/{way}/{size}"] = expected
    return differences


def make_torch_files() -> None:
    """Small files that torch.save wrote, in the forms that releases have."""
    import torch

    torch.manual_seed(0)
    base = torch.arange(24, dtype=torch.float32)
    state = {
        "plain": base.reshape(4, 6) / 8,
        "view": base.reshape(4, 6).t()[1:3],  # shares its storage, strided
        "half": base.half(),
        "bfloat16": base.bfloat16() / 8,
        "double": base[:3].double(),
        "scalar": torch.tensor(7),
        "parameter": torch.nn.Parameter(base[:5].clone()),
        "empty": torch.zeros(0, 3),
    }
    training = {"model": state, "epoch": 3, "args": argparse.Namespace(lr=1.0)}
    training["optimizer"] = {"step": base}
    torch.save(training, HERE / "torch_zip.pth")
    torch.save(training, HERE / "torch_legacy.pth", _use_new_zipfile_serialization=False)
    expected = {name: x.detach().float().numpy() for name, x in state.items()}
    np.savez(HERE / "torch_expected.npz", **expected)
    before = random_weights({"positions": (1, 36, 3)})["positions"]
    grid = torch.from_numpy(before).reshape(1, 6, 6, 3).permute(0, 3, 1, 2)
    resampled = {"before": before}
    for antialias in (False, True):
        for new in (3, 4, 10):
            after = torch.nn.functional.interpolate(
                grid, size=(new, new), mode="bicubic", antialias=antialias
            )
            key = f"{'bicubic_antialias' if antialias else 'bicubic'}/{new}"
            resampled[key] = after.permute(0, 2, 3, 1).reshape(1, new * new, 3).numpy()
    np.savez(HERE / "torch_resampled.npz", **resampled)


def main() -> None:
    """Measures, and writes what was measured."""
    import jax
    import torch
    import transformers

    from tosa_jax.models.vit_config import VARIANTS

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=2, help="layers to measure with; 0: all")
    parser.add_argument("--only", default=".", help="regular expression of the variants to measure")
    parser.add_argument("--out", default="results/pretrained_exactness.json")
    parser.add_argument("--goldens", action="store_true", help="make the test files instead")
    args = parser.parse_args()
    if args.goldens:
        make_torch_files()
        store: dict[str, np.ndarray] = {}
        for name, fields in GOLDEN.items():
            print(name, measure(name, fields | {"depth": GOLDEN_DEPTH}, store), flush=True)
        np.savez_compressed(HERE / "pretrained.npz", **store)
        return
    out = Path(args.out)
    measured = json.loads(out.read_text())["variants"] if out.exists() else {}
    result = {
        "what": "max |logit difference| to PyTorch, float32, CPU, random weights, one image; "
        "keys are way_imagesize",
        "command": "python tests/golden/make_pretrained.py --depth 2; then --depth 0 --only REGEX",
        "limit": {"giant": 1e-4, "others": 2e-5},
        "versions": {m.__name__: m.__version__ for m in (jax, torch, transformers, np)},
        "variants": measured,
    }
    for name in VARIANTS:
        if name == "vit" or not re.search(args.only, name):
            continue
        fields = {"depth": args.depth} if args.depth else {}
        differences = measure(name, fields, None)
        depth = args.depth or VARIANTS[name]["depth"]
        measured.setdefault(name, {})[f"depth_{depth}"] = differences
        print(name, depth, differences, flush=True)
        out.parent.mkdir(exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
