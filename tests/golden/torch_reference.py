"""The reference of the goldens: transformers' models on CPU PyTorch, and a ViT by its definition.

transformers lacks DeiT III and the head of MAE's fine-tuned models; those are written out in
PyTorch's functions.
"""

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from pretrained_cases import hf_fields, hf_names, random_image, ways


def hf_model(config, weights: dict[str, np.ndarray], norm_eps: float):
    """The transformers model of a ViTConfig that holds timm's `weights`."""
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


def hf_logits(config, model, weights, image: np.ndarray, resample: bool) -> np.ndarray:
    """Logits [1 c]; DINOv2's through timm's head on the class token, which transformers lacks."""
    pixels = torch.from_numpy(image.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        if config.layer_scale:
            token = model(pixel_values=pixels).last_hidden_state[:, 0].numpy()
            return token @ weights["head.weight"].T + weights["head.bias"]
        return model(pixel_values=pixels, interpolate_pos_encoding=resample).logits.numpy()


def plain_logits(config, weights: dict[str, np.ndarray], image: np.ndarray) -> np.ndarray:
    """Logits [1 c] of DeiT III (facebookresearch/deit, models_v2.py) and of MAE's fine-tuned models
    (facebookresearch/mae, models_vit.py), by their definitions.
    """
    w = {name: torch.from_numpy(x) for name, x in weights.items()}

    def norm(x, name):
        return F.layer_norm(x, (config.embed_dim,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def dense(x, name):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def add(x, update, scale):
        return x + (w[scale] * update if config.layer_scale else update)

    x = torch.from_numpy(image.transpose(0, 3, 1, 2).copy())
    x = F.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], config.patch_size)
    x, positions = x.flatten(2).transpose(1, 2), w["pos_embed"]
    if config.pos_embed_prefix:
        x = torch.cat([w["cls_token"], x], dim=1) + positions
    else:
        x = torch.cat([w["cls_token"], x + positions], dim=1)
    for i in range(config.depth):
        at = f"blocks.{i}"
        b, n, d = x.shape
        qkv = dense(norm(x, f"{at}.norm1"), f"{at}.attn.qkv").reshape(b, n, 3, config.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attn = (q @ k.transpose(-2, -1) * (d // config.num_heads) ** -0.5).softmax(-1)
        update = dense((attn @ v).transpose(1, 2).reshape(b, n, d), f"{at}.attn.proj")
        x = add(x, update, f"{at}.ls1.gamma")
        update = F.gelu(dense(norm(x, f"{at}.norm2"), f"{at}.mlp.fc1"))
        x = add(x, dense(update, f"{at}.mlp.fc2"), f"{at}.ls2.gamma")
    if config.global_pool == "avg":
        return dense(norm(x[:, 1:].mean(dim=1), "fc_norm"), "head").numpy()
    return dense(norm(x, "norm")[:, 0], "head").numpy()


def timm_resampled(config, weights: dict[str, np.ndarray], size: int) -> dict[str, np.ndarray]:
    """`weights` with positions for another image size: timm's `resample_abs_pos_embed`."""
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
    image = random_image(size)
    if way == "timm":
        weights = timm_resampled(config, weights, size)
        config = dataclasses.replace(config, image_size=size)
        if "transformers" not in ways(config):
            return plain_logits(config, weights, image)
        return hf_logits(config, hf_model(config, weights, 1e-6), weights, image, False)
    model = hf_model(config, weights, hf_fields(config)["norm_eps"])
    return hf_logits(config, model, weights, image, size != config.image_size)
