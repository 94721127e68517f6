"""Layer kinds unlike those of the package: each tries one part of what a kind may do (`test_method_protocol.py`)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from tosa_jax.models.layers import Block, linear
from tosa_jax.models.methods.selective import SelectiveLayer
from tosa_jax.models.methods.standard import Standard
from tosa_jax.models.token_state import LinearFit
from tosa_jax.ops.reduction import Reduction, TokenWeights, pooled
from tosa_jax.ops.token_matching import bipartite_matching
from tosa_jax.ops.token_selection import gather_tokens, scatter_tokens, select_tokens

PREFIX = 1


class Fuse(Standard):
    """Keeps half of the patches and the mean of the others, for good (as EViT; here by the size of the tokens)."""

    selects = nests = True

    @classmethod
    def counted(cls, config, spec, keep_rate):
        kept = PREFIX + (spec.count_in - PREFIX) // 2
        return spec._replace(closes=False, count=kept + 1, count_out=kept + 1)

    def apply(self, block, state, context):
        state = super().apply(block, state, context)
        tokens = state.tokens
        kept = select_tokens(jnp.linalg.norm(tokens, axis=-1), self.spec.count - 1, PREFIX)
        others = (~kept.mask).astype(tokens.dtype)
        rows = jax.nn.one_hot(kept.indices, tokens.shape[1], dtype=tokens.dtype)
        fused = others / others.sum(axis=1, keepdims=True)
        reduction = Reduction(TokenWeights(jnp.concatenate([rows, fused[:, None]], axis=1)))
        return state.reduced(reduction.merge(tokens), reduction)

    def block_macs(self, block):
        return block.macs(self.spec.count_in)


class Merge(Standard):
    """Merges a quarter of the patches between the branches, with sizes, and unmerges after the last one (ToMe)."""

    selects = nests = True

    @classmethod
    def counted(cls, config, spec, keep_rate):
        count = spec.count_in - (spec.count_in - PREFIX) // 4
        return spec._replace(count=count, count_out=spec.count_group if spec.closes else count)

    def apply(self, block, state, context):
        before, context = state, context.weighing(state.sizes, state.mask)

        def attend(query, key, value):
            out, summary = context.attention_fn(query, key, value)
            return out, (summary, key.mean(axis=2))

        def between(tokens, reported):
            summary, keys = reported
            chosen, scores = bipartite_matching(keys, self.spec.count, PREFIX)
            sizes = jnp.ones(tokens.shape[:2]) if before.sizes is None else before.sizes
            reduction = pooled(chosen, sizes)
            inside = before.opened(reduction.merge(tokens), reduction, scores)
            return inside.tokens, (summary, inside)

        tokens, (summary, state) = block(state.tokens, attend, context.drop, between)
        state = state._replace(tokens=tokens, summary=summary)
        return state.restored() if self.spec.closes else state

    def block_macs(self, block):
        return block.attn_macs(self.spec.count_in) + block.mlp_macs(self.spec.count)


class Cluster(Standard):
    """Runs a group of layers on the means of four patches, and rebuilds all tokens after it (as Expedit)."""

    selects = True

    @classmethod
    def counted(cls, config, spec, keep_rate):
        count = spec.count_in if keep_rate is None else PREFIX + (spec.count_in - PREFIX) // 4
        return spec._replace(count=count, count_out=spec.count_group if spec.closes else count)

    def apply(self, block, state, context):
        if self.spec.opens:
            b, n, _ = state.tokens.shape
            weights = np.zeros((self.spec.count, n), np.float32)
            weights[:PREFIX, :PREFIX] = 1
            for i in range(PREFIX, self.spec.count):
                weights[i, PREFIX + 4 * (i - PREFIX) : PREFIX + 4 * (i - PREFIX + 1)] = 0.25
            weights = jnp.broadcast_to(jnp.asarray(weights), (b, *weights.shape))
            reduction = Reduction(TokenWeights(weights))
            state = state.opened(reduction.merge(state.tokens), reduction)
        state = super().apply(block, state, context)
        return state.restored() if self.spec.closes else state


class ParallelBlock(Block):
    """Attention and MLP side by side on the same tokens (as ViT-22B)."""

    def __call__(self, x, attention_fn, drop_path=None, between=None):
        update, summary = self.attn_branch(x, attention_fn)
        return x + update + self.mlp_branch(x), summary


class Parallel(Standard):
    """Has a block of its own, twice as wide within."""

    @staticmethod
    def build_block(config, *, rngs):
        return ParallelBlock(dataclasses.replace(config, mlp_ratio=4.0), rngs=rngs)


class Hide(Standard):
    """Hides every second patch from the attention of all layers from here on."""

    def apply(self, block, state, context):
        b, n, _ = state.tokens.shape
        mask = jnp.broadcast_to(jnp.asarray(seen(n)), (b, n))
        same = TokenWeights(jnp.broadcast_to(jnp.eye(n), (b, n, n)))
        state = state.reduced(state.tokens, Reduction(same, mask=mask))
        return super().apply(block, state, context)


def seen(n):
    """The tokens that `Hide` leaves: the prefix, and every second patch."""
    return (np.arange(n) < PREFIX) | (np.arange(n) % 2 == 0)


class FewQueries(Standard):
    """Half of the patches are updated, by attention to all tokens."""

    selects = True

    @classmethod
    def counted(cls, config, spec, keep_rate):
        return spec._replace(count=PREFIX + (spec.count_in - PREFIX) // 2)

    def apply(self, block, state, context):
        norms = jnp.linalg.norm(state.tokens, axis=-1)
        chosen = select_tokens(norms, self.spec.count, PREFIX)
        x = gather_tokens(state.tokens, chosen)
        update, summary = block.attn_branch(x, context.attention_fn, state.tokens)
        x = x + update
        x = x + block.mlp_branch(x)
        return state._replace(tokens=scatter_tokens(state.tokens, x, chosen), summary=summary)

    def block_macs(self, block):
        count = self.spec.count
        return block.attn_macs(count, self.spec.count_in) + block.mlp_macs(count)


class KeepMap(Standard):
    """Hands its attention map on to the layers after it."""

    def apply(self, block, state, context):
        def attend(query, key, value):
            logits = jnp.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
            attn_map = jax.nn.softmax(logits, axis=-1)
            return jnp.einsum("bhqk,bkhd->bqhd", attn_map, value), attn_map

        tokens, attn_map = block(state.tokens, attend, context.drop)
        return state._replace(tokens=tokens, attention_map=attn_map)


class ShareMap(Standard):
    """Attends by the map of an earlier layer to values of its own (as PSViT)."""

    def apply(self, block, state, context):
        def attend(query, key, value):
            return jnp.einsum("bhqk,bkhd->bqhd", state.shared_map, value), None

        tokens, _ = block(state.tokens, attend, context.drop)
        return state._replace(tokens=tokens)


class Gated(SelectiveLayer):
    """Selects by a linear map of the normalised tokens, which is fitted to the size of the update."""

    fit_modules = ("gate",)

    def __init__(self, config, spec, *, rngs):
        super().__init__(config, spec, rngs=rngs)
        self.gate = linear(config, config.embed_dim, 1, rngs)

    def scores(self, state, context):
        return self.gate(state.tokens)[:, :, 0]

    def linear_fits(self):
        def size_of_update(block, before, after):
            return jnp.linalg.norm(after - before, axis=-1, keepdims=True)

        def params(down, up, bias):
            return {"gate/kernel": down @ up, "gate/bias": bias}

        return (LinearFit(1, size_of_update, params),)


class GatedFit(Gated):
    """Runs densely."""

    apply = Standard.apply
