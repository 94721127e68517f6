"""Blocks that are not ours on fewer tokens: what our own layers give, and what docs/other_models.md shows."""

import re
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
import pytest
from small import forward, random_images, small_model

from tosa_jax.errors import ConfigError
from tosa_jax.models.plan import layer_specs
from tosa_jax.ops.attention import attention
from tosa_jax.ops.blocks import run_blocks

PAGE = Path(__file__).parents[1] / "docs/other_models.md"


def test_the_page_is_right_on_equimo(monkeypatch):
    pytest.importorskip("equimo", reason="the network of docs/other_models.md: pip install equimo")
    if find_spec("equimo.vision") is None:  # version 1, the newest for Python 3.11
        for name in ("vision", "vision.models", "vision.models.vit"):
            monkeypatch.setitem(sys.modules, f"equimo.{name}", import_module("equimo.models.vit"))
    names = {}
    for snippet in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(snippet, names)
    network, images, counts = (names[name] for name in ("network", "images", "counts"))
    assert counts[-1] < counts[0] <= 69 and names["tokens"].shape == (2, 69, 32)

    def own(image):
        return network.forward_features(image, key=jax.random.key(0), inference=True)

    dense = names["reduced_tokens"](network, images, [69] * 4)
    expected = jax.vmap(own)(images)
    np.testing.assert_allclose(dense[:, 5:], expected["x_norm_patchtokens"], atol=1e-5)
    np.testing.assert_allclose(dense[:, 0], expected["x_norm_cls_token"], atol=1e-5)
    apart = np.abs(names["tokens"] - dense).max()
    assert 1e-3 < apart < 1  # fewer tokens, and not another network


def attend(block, tokens, key_bias, rotary):
    def with_keys(query, key, value):
        return attention(query, key, value, key_bias), key

    update, keys = block.attn_branch(tokens, with_keys, rotary=rotary)
    return tokens + update, keys


def finish(block, tokens):
    return tokens + block.mlp_branch(tokens)


def run_with(model, images, counts):
    """All tokens after the last norm, with `counts` of them left by each block."""
    tokens, rotary = model.embed(images), model.rotary(model.config.grid)
    prefix = model.config.num_prefix_tokens
    parts = {"attend": attend, "finish": finish, "rotary": rotary}
    return model.norm(run_blocks(model.blocks, tokens, counts, prefix, **parts))


def test_blocks_run_as_the_layers_of_redundancy_do():
    fields = {"plan": "redundancy", "budget": "linear", "keep_rate": 0.6, "depth": 3}
    model = small_model(**fields, pos_embed=False, rope="dinov3", reg_tokens=2)
    counts = [spec.count for spec in layer_specs(model.config)]
    assert len(set(counts)) == 3 and counts[-1] < model.config.num_tokens
    found = jax.jit(lambda x: run_with(model, x, counts))(random_images())
    np.testing.assert_allclose(found, forward(model, random_images()).tokens, atol=1e-5)


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        ((17, 17), "2 counts for 4 blocks: give one for each"),
        (
            (17, 8, 8, 8),
            "counts[1]=8, but 17 tokens reach that block, of which 9 to 17 can be left",
        ),
        ((17, 12, 13, 13), "counts[2]=13, but 12 tokens reach that block"),
    ],
)
def test_counts_that_cannot_be_are_one_line(counts, says):
    model = small_model()
    with pytest.raises(ConfigError, match=re.escape(says)):
        jax.eval_shape(lambda x: run_with(model, x, counts), random_images())
