"""What the forms for an NVIDIA GPU compute, beside XLA's own form of the same, on a GPU.

    python results/gpu_exactness.py > results/gpu_exactness.json

Kernels: the largest difference of attention and column sums in bfloat16 from float32, for random arrays. Networks:
DeiT-S with random weights, ToSA at keep .5; how far logits and gradients in bfloat16 are from float32's, with the
kernels and without them, and how many of the same tokens are selected.
"""

import functools
import json
import sys

import jax
import jax.numpy as jnp
from flax import nnx

from tosa_jax.cli.command import configure_jax
from tosa_jax.distributed.devices import describe_device, versions
from tosa_jax.models.factory import build
from tosa_jax.models.params import set_params, split
from tosa_jax.ops import attention as forms
from tosa_jax.ops import gpu_attention
from tosa_jax.tasks import model_config

SHAPES = ((6, 197), (6, 99), (12, 197), (16, 256), (3, 64), (6, 577))
"""Heads and tokens; 64 channels a head."""


def kernel_errors(heads: int, tokens: int) -> dict:
    """Largest differences from float32 at the highest precision."""
    keys = jax.random.split(jax.random.key(tokens + heads), 6)
    arrays = [jax.random.normal(k, (8, tokens, heads, 64), jnp.bfloat16) for k in keys[:3]]
    hidden = 2 * heads
    shapes = ((heads, hidden), (hidden,), (hidden, heads))
    layers = [jax.random.normal(k, s) * 0.3 for k, s in zip(keys[3:], shapes, strict=True)]

    @jax.jit
    def reference(query, key, value, expand, bias, contract):
        logits = forms.attention_logits(query, key)
        attn_map = jax.nn.softmax(logits, axis=-1)
        channels = jnp.einsum("bhqk,hf->bfqk", logits, expand) + bias[None, :, None, None]
        found = jnp.einsum("bfqk,fh->bhqk", jax.nn.relu(channels), contract)
        out = jnp.einsum("bhqk,bkhc->bqhc", attn_map, value)
        return out, attn_map.sum(axis=2), jax.nn.softmax(found, axis=-1).sum(axis=2)

    with jax.default_matmul_precision("highest"):
        wanted = reference(*(x.astype(jnp.float32) for x in arrays), *layers)
    sums = jax.jit(forms.attention_and_column_sums)(*arrays)
    selected = jax.jit(gpu_attention.attention_and_selector_sums)(*arrays, *layers)
    plain = jax.jit(forms.attention)(*arrays)
    found = {"attention": (plain, wanted[0]), "column_sums": (sums[1], wanted[1])}
    found["selector_sums"] = selected[1], wanted[2]
    found["attention_beside"] = selected[0], wanted[0]
    errors = {k: float(jnp.abs(a - b).max()) for k, (a, b) in found.items()}
    return {"heads": heads, "tokens": tokens} | errors


def network_errors(batch: int = 16) -> dict:
    """Of logits (over the largest logit), of gradients (relative, of all parameters), and the tokens in common."""
    images = jax.random.normal(jax.random.key(0), (batch, 224, 224, 3))

    def run(dtype: str, kernels: bool):
        config = model_config(
            "classification", "deit_small_patch16_224",
            plan="selective", keep_rate=0.5, dtype=dtype, num_classes=1000,
        )  # fmt: skip
        has_cuda, forms._has_cuda = forms._has_cuda, functools.cache(lambda: kernels)
        graphdef, params = split(build(config, rngs=nnx.Rngs(0)))

        def loss(params):
            out = set_params(graphdef, params)(images)
            logits = out.logits.astype(jnp.float32)
            return (jax.nn.log_softmax(logits)[:, 0]).mean(), (logits, out.selected)

        grads, (logits, selected) = jax.jit(jax.grad(loss, has_aux=True))(params)
        forms._has_cuda = has_cuda
        flat = jnp.concatenate([x.ravel().astype(jnp.float32) for x in jax.tree.leaves(grads)])
        return logits, flat, selected

    with jax.default_matmul_precision("highest"):
        exact = run("float32", False)

    def beside(found):
        norm = jnp.linalg.norm
        same = [
            (a[:, :, None] == b[:, None]).any(axis=2).mean()
            for a, b in zip(found[2], exact[2], strict=True)
        ]
        return {
            "logits": float(jnp.abs(found[0] - exact[0]).max() / jnp.abs(exact[0]).max()),
            "gradients": float(norm(found[1] - exact[1]) / norm(exact[1])),
            "same_tokens": [round(float(x), 4) for x in same],
        }

    return {"kernels": beside(run("bfloat16", True)), "xla": beside(run("bfloat16", False))}


def main() -> None:
    configure_jax()
    result = {
        "command": "python results/gpu_exactness.py",
        "device": describe_device(),
        "versions": versions(),
        "kernels": [kernel_errors(*shape) for shape in SHAPES],
        "network": network_errors(),
    }
    json.dump(result, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
