"""Blocks that are not ours on fewer tokens: what our own layers give, and what docs/other_models.md shows."""

import re
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


@pytest.mark.parametrize(
    "fields", [{}, {"pos_embed": False, "rope": "dinov3", "reg_tokens": 2}], ids=["added", "rotary"]
)
def test_blocks_run_as_the_layers_of_redundancy_do(fields):
    fields = {"plan": "redundancy", "budget": "linear", "keep_rate": 0.6, "depth": 3, **fields}
    model = small_model(**fields)
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
