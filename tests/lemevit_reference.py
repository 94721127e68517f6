"""LeMeViT as its repository defines it, in NumPy, float64, by its own names: nothing of this project is used.

Source: ViTAE-Transformer/LeMeViT, `models/lemevit.py`. Images are [b, channels, height, width] as there.
"""

import math

import numpy as np

KINDS = "CDDSS"


def state_dict(rng, *, depths, widths, meta=4, channels=1, classes=7, ratio=4):
    """Random arrays by the names and in the layouts of PyTorch's `state_dict()`."""
    out = {}

    def array(name, *shape, scale=0.3):
        out[name] = rng.normal(0, scale, shape).astype(np.float32)

    def linear(name, i, o):
        array(f"{name}.weight", o, i, scale=1 / math.sqrt(i))
        array(f"{name}.bias", o)

    def norm(name, d):
        array(f"{name}.weight", d)
        array(f"{name}.bias", d)

    def batch_norm(name, d):
        norm(name, d)
        array(f"{name}.running_mean", d)
        out[f"{name}.running_var"] = rng.uniform(0.5, 2, d).astype(np.float32)
        out[f"{name}.num_batches_tracked"] = np.asarray(3, np.int64)

    def conv(name, i, o, groups=1):
        array(f"{name}.weight", o, i // groups, 3, 3, scale=1 / math.sqrt(9 * i / groups))
        array(f"{name}.bias", o)

    conv("downsample_layers.0.0", channels, widths[0] // 2)
    batch_norm("downsample_layers.0.1", widths[0] // 2)
    conv("downsample_layers.0.3", widths[0] // 2, widths[0])
    batch_norm("downsample_layers.0.4", widths[0])
    array("meta_tokens", meta, widths[0], scale=1)
    for i, (kind, width, depth) in enumerate(zip(KINDS, widths, depths, strict=True)):
        before = widths[max(i - 1, 0)]
        if i and KINDS[i - 1] != "C":
            conv(f"downsample_layers.{i}.0", before, width)
            batch_norm(f"downsample_layers.{i}.1", width)
        linear(f"meta_token_downsample.{i}.0", before, 4 * before)
        norm(f"meta_token_downsample.{i}.1", 4 * before)
        linear(f"meta_token_downsample.{i}.3", 4 * before, width)
        norm(f"meta_token_downsample.{i}.4", width)
        parts = {
            "C": {"q": 1, "kv": 2, "proj": 1},
            "D": {"qkv1": 3, "qkv2": 3, "proj_x": 1, "proj_c": 1},
            "S": {"qkv": 3, "proj": 1},
        }[kind]
        for j in range(depth):
            stem = f"stages.{i}.{j}"
            conv(f"{stem}.pos_embed", width, width, groups=width)
            norm(f"{stem}.norm1", width)
            norm(f"{stem}.norm2", width)
            for name, times in parts.items():
                linear(f"{stem}.attn.{name}", width, times * width)
            linear(f"{stem}.mlp.0", width, ratio * width)
            linear(f"{stem}.mlp.3", ratio * width, width)
    batch_norm("norm", widths[-1])
    norm("norm_c", widths[-1])
    linear("head", widths[-1], classes)
    return out


class Network:
    """The forward pass by such arrays. With `train` it normalises by the batch, and `running` gets the new values."""

    def __init__(self, arrays, head_dim, *, train=False):
        self.p = {name: x.astype(np.float64) for name, x in arrays.items()}
        self.head_dim, self.train, self.running = head_dim, train, {}

    def linear(self, name, x):
        return x @ self.p[f"{name}.weight"].T + self.p[f"{name}.bias"]

    def layer_norm(self, name, x, eps):
        mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / np.sqrt(var + eps) * self.p[f"{name}.weight"] + self.p[f"{name}.bias"]

    def batch_norm(self, name, x):
        mean, var = self.p[f"{name}.running_mean"], self.p[f"{name}.running_var"]
        if self.train:
            seen = x.transpose(1, 0, 2, 3).reshape(x.shape[1], -1)
            self.running[f"{name}.running_mean"] = 0.9 * mean + 0.1 * seen.mean(1)
            self.running[f"{name}.running_var"] = 0.9 * var + 0.1 * seen.var(1, ddof=1)
            mean, var = seen.mean(1), seen.var(1)
        x = (x - mean[:, None, None]) / np.sqrt(var[:, None, None] + 1e-5)
        return x * self.p[f"{name}.weight"][:, None, None] + self.p[f"{name}.bias"][:, None, None]

    def conv(self, name, x, stride=1, depthwise=False):
        weight, bias = self.p[f"{name}.weight"], self.p[f"{name}.bias"]
        b, _, height, width = x.shape
        padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
        rows, columns = (height - 1) // stride + 1, (width - 1) // stride + 1
        out = np.zeros((b, len(weight), rows, columns))
        for r in range(rows):
            for c in range(columns):
                window = padded[:, :, r * stride : r * stride + 3, c * stride : c * stride + 3]
                if depthwise:
                    out[:, :, r, c] = (window * weight[:, 0]).sum((2, 3))
                else:
                    out[:, :, r, c] = np.einsum("bihw,oihw->bo", window, weight)
        return out + bias[:, None, None]

    def attend(self, query, key, value, scale):
        out = np.zeros_like(query)
        for h in range(query.shape[-1] // self.head_dim):
            part = slice(h * self.head_dim, (h + 1) * self.head_dim)
            logits = query[..., part] @ key[..., part].swapaxes(1, 2) * scale
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            out[..., part] = weights / weights.sum(-1, keepdims=True) @ value[..., part]
        return out

    def attention(self, name, kind, x, c):
        """What it adds to image tokens [b n d] (0 where they stay) and to meta tokens [b m d]."""
        dim, of_head = x.shape[-1], self.head_dim**-0.5
        if kind == "C":
            key, value = np.split(self.linear(f"{name}.kv", x), 2, axis=-1)
            out = self.attend(self.linear(f"{name}.q", c), key, value, of_head)
            return 0, self.linear(f"{name}.proj", out)
        if kind == "D":
            q1, k1, v1 = np.split(self.linear(f"{name}.qkv1", x), 3, axis=-1)
            q2, k2, v2 = np.split(self.linear(f"{name}.qkv2", c), 3, axis=-1)
            scale = dim**-0.5
            of_image = self.attend(q1, k2, v2, math.log(c.shape[1], x.shape[1]) * scale)
            of_meta = self.attend(q2, k1, v1, scale)
            return self.linear(f"{name}.proj_x", of_image), self.linear(f"{name}.proj_c", of_meta)

        def alone(tokens):
            q, k, v = np.split(self.linear(f"{name}.qkv", tokens), 3, axis=-1)
            return self.linear(f"{name}.proj", self.attend(q, k, v, of_head))

        return alone(x), alone(c)

    def mlp(self, stem, x):
        x = self.linear(f"{stem}.mlp.0", self.layer_norm(f"{stem}.norm2", x, 1e-6))
        return self.linear(f"{stem}.mlp.3", gelu(x))

    def block(self, stem, kind, x, c):
        b, d, height, width = x.shape
        tokens = x + self.conv(f"{stem}.pos_embed", x, depthwise=True)
        tokens = tokens.reshape(b, d, -1).swapaxes(1, 2)
        normed = (self.layer_norm(f"{stem}.norm1", part, 1e-6) for part in (tokens, c))
        of_image, of_meta = self.attention(f"{stem}.attn", kind, *normed)
        c = c + of_meta
        c = c + self.mlp(stem, c)
        if kind == "C":
            return x, c
        tokens = tokens + of_image
        tokens = tokens + self.mlp(stem, tokens)
        return tokens.swapaxes(1, 2).reshape(b, d, height, width), c

    def meta_mlp(self, i, c):
        stem = f"meta_token_downsample.{i}"
        c = self.layer_norm(f"{stem}.1", self.linear(f"{stem}.0", c), 1e-5)
        return self.layer_norm(f"{stem}.4", self.linear(f"{stem}.3", gelu(c)), 1e-5)

    def __call__(self, images):
        """Logits [b c], image tokens [b n d] and meta tokens [b m d] after their last norms."""
        x = self.conv("downsample_layers.0.0", images, 2)
        x = gelu(self.batch_norm("downsample_layers.0.1", x))
        x = self.batch_norm("downsample_layers.0.4", self.conv("downsample_layers.0.3", x, 2))
        c = np.repeat(self.p["meta_tokens"][None], len(images), 0)
        for i, kind in enumerate(KINDS):
            if f"downsample_layers.{i}.0.weight" in self.p and i:
                x = self.conv(f"downsample_layers.{i}.0", x, 2)
                x = self.batch_norm(f"downsample_layers.{i}.1", x)
            c = self.meta_mlp(i, c)
            j = 0
            while f"stages.{i}.{j}.norm1.weight" in self.p:
                x, c = self.block(f"stages.{i}.{j}", kind, x, c)
                j += 1
        x = self.batch_norm("norm", x)
        c = self.layer_norm("norm_c", c, 1e-5)
        tokens = x.reshape(*x.shape[:2], -1).swapaxes(1, 2)
        return self.linear("head", tokens.mean(1) + c.mean(1)), tokens, c


_ERF = np.vectorize(math.erf)


def gelu(x):
    return 0.5 * x * (1 + _ERF(x / math.sqrt(2)))
