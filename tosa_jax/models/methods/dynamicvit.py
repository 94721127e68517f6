"""DynamicViT (Rao et al. 2021, arXiv 2106.02034): small predictors, trained with the network, say which patches stay.

Before a few layers, a predictor reads each patch and the mean of all. In training it draws, by the Gumbel softmax,
whether the patch stays; all patches remain, and those that do not stay are not read (a gradient reaches the choice). A
loss holds their share near the wanted one. At inference the patches with the highest probabilities stay, a fixed
number. For dense prediction, patches that were dropped come back as they were.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from tosa_jax.models.layers import Block, draw, fold_key, layer_norm, linear
from tosa_jax.models.method import Method, at_quarters
from tosa_jax.models.methods.reducing import PersistentReduction
from tosa_jax.models.options import Options
from tosa_jax.models.token_state import LayerContext, LayerSpec, TokenState
from tosa_jax.models.vit_config import ViTConfig, check
from tosa_jax.ops.array_types import Scores, Tokens
from tosa_jax.ops.reduction import Reduction
from tosa_jax.ops.token_selection import select_tokens


@dataclass(frozen=True, kw_only=True)
class PruningOptions(Options):
    """pruning_loss_weight: of the loss that holds the shares of kept patches near the wanted ones; at least 0."""

    pruning_loss_weight: float = 2.0

    def __post_init__(self) -> None:
        check(self.pruning_loss_weight >= 0,
              f"pruning_loss_weight={self.pruning_loss_weight} is negative")  # fmt: skip


class LearnedPruning(PersistentReduction):
    """Drops patches before the layer: at inference a fixed number, in training those that a learned choice masks.

    A subclass gives the scores of patches (`scores`), and makes of them the choice that training learns (`decide`).
    The layer adds `loss/pruning/<layer>` to the loss of each example: `miss` of the share of kept patches in the
    batch, compared with the wanted one.
    """

    options = (PruningOptions,)
    proportional = False

    def __init__(self, config: ViTConfig, spec: LayerSpec, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, spec, rngs=rngs)
        self.loss_weight = config.options_of(PruningOptions).pruning_loss_weight
        self.wanted = (spec.count - config.num_prefix_tokens) / config.num_patches

    def scores(self, state: TokenState) -> Scores:
        """How much each token should stay, [b n]; those of prefix tokens are not read."""
        raise NotImplementedError

    def decide(self, scores: Scores, context: LayerContext) -> Scores:
        """1 for tokens that stay and 0 for others, [b n], with a gradient; what it says of the prefix is not read."""
        raise NotImplementedError

    def miss(self, share: jax.Array) -> jax.Array:
        """The loss for keeping a share of all patches, a scalar."""
        raise NotImplementedError

    def apply(self, block: Block, state: TokenState, context: LayerContext) -> TokenState:
        if self.spec.opens:
            scores = self.scores(state)
            state = (
                self.masked(state, scores, context) if context.train else self.cut(state, scores)
            )
        return super().apply(block, state, context)

    def cut(self, state: TokenState, scores: Scores) -> TokenState:
        """The state with the best patches alone."""
        kept = select_tokens(scores, self.spec.count, self.num_prefix_tokens)
        reduction = Reduction(kept, before=state.tokens)
        return state.reduced(reduction.merge(state.tokens), reduction, scores)

    def masked(self, state: TokenState, scores: Scores, context: LayerContext) -> TokenState:
        """The state whose other patches no layer reads from here on; where all would go, the best one stays."""
        places = jnp.arange(scores.shape[1])[None]
        prefix = places < self.num_prefix_tokens
        before = jnp.ones_like(scores) if state.policy is None else state.policy
        policy = jnp.where(prefix, 1.0, self.decide(scores, context) * before)
        best = jnp.argmax(jnp.where(prefix | (before == 0), -jnp.inf, scores), axis=1)
        none = (policy[:, self.num_prefix_tokens :] == 0).all(axis=1, keepdims=True)
        policy = jnp.where(none & (places == best[:, None]), 1.0, policy)
        share = policy[:, self.num_prefix_tokens :].mean()
        loss = jnp.broadcast_to(self.loss_weight * self.miss(share), policy.shape[0])
        aux = state.aux | {f"loss/pruning/{self.spec.layer}": loss}
        return state._replace(policy=policy, aux=aux)


class Predictor(nnx.Module):
    """The logarithm of the probability that each patch stays or goes, float32 [b n 2], of patches [b n d]."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs) -> None:
        d = config.embed_dim
        self.norm = layer_norm(config, rngs)
        self.inner = linear(config, d, d, rngs)
        self.fc1 = linear(config, d, d // 2, rngs)
        self.fc2 = linear(config, d // 2, d // 4, rngs)
        self.fc3 = linear(config, d // 4, 2, rngs)

    def __call__(self, patches: Tokens, policy: Scores) -> jax.Array:
        """`policy` [b n] is 1 for patches that have stayed so far; the mean goes over these."""
        x = nnx.gelu(self.inner(self.norm(patches)), approximate=False)
        own, shared = jnp.split(x, 2, axis=2)
        weights = (policy / policy.sum(axis=1, keepdims=True)).astype(x.dtype)
        mean = (shared * weights[:, :, None]).sum(axis=1, keepdims=True)
        x = jnp.concatenate([own, jnp.broadcast_to(mean, shared.shape)], axis=2)
        for fc in (self.fc1, self.fc2):
            x = nnx.gelu(fc(x), approximate=False)
        return jax.nn.log_softmax(self.fc3(x).astype(jnp.float32), axis=2)

    def macs(self, n: int) -> int:
        """Multiply-adds for one example of n patches."""
        layers = (self.inner, self.fc1, self.fc2, self.fc3)
        return n * sum(fc.in_features * fc.out_features for fc in layers)


class DynamicViT(LearnedPruning):
    """Keeps `keep_rate` of all patches at its first layer, its square at the second, its cube at the third."""

    def __init__(self, config: ViTConfig, spec: LayerSpec, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, spec, rngs=rngs)
        self.predictor = Predictor(config, rngs=rngs) if spec.opens else None

    @classmethod
    def count_left(cls, config: ViTConfig, spec: LayerSpec, keep_rate: float) -> int:
        """With one `keep_rate` its powers count; of several, each is the share of the patches that reach its layer."""
        if len(config.keep_rates_given) > 1 or config.budget != "uniform":
            return super().count_left(config, spec, keep_rate)
        name = config.plan[spec.layer]
        stage = config.plan[: spec.layer + 1].count(name)
        kept = math.floor(round(config.num_patches * keep_rate**stage, 6))
        return config.num_prefix_tokens + max(kept, 1)

    def scores(self, state: TokenState) -> Scores:
        assert self.predictor is not None  # the layer opens
        prefix = self.num_prefix_tokens
        policy = jnp.ones(state.tokens.shape[:2]) if state.policy is None else state.policy
        found = self.predictor(state.tokens[:, prefix:], policy[:, prefix:])
        return jnp.pad(found[:, :, 0], ((0, 0), (prefix, 0)))

    def decide(self, scores: Scores, context: LayerContext) -> Scores:
        """Drawn by the Gumbel softmax: 1 or 0, with the gradient of the probability."""
        assert context.key is not None, "training passes a key"
        n = scores.shape[1]
        noise = draw(
            fold_key(context.key, 3), scores.shape[0], lambda key: jax.random.logistic(key, (n,))
        )
        # The difference of two Gumbel draws is logistic, and that of the logarithms is the logit.
        logit = scores - jnp.log1p(-jnp.minimum(jnp.exp(scores), 1 - 1e-6))
        return straight_through(jax.nn.sigmoid(logit + noise))

    def miss(self, share: jax.Array) -> jax.Array:
        return (share - self.wanted) ** 2

    def own_macs(self, block: Block) -> int:
        if self.predictor is None:
            return 0
        return self.predictor.macs(self.spec.count_in - self.num_prefix_tokens)


def straight_through(soft: Scores) -> Scores:
    """1 where `soft` is above a half and 0 elsewhere, with the gradient of `soft`."""
    hard = (soft > 0.5).astype(soft.dtype)
    return hard + (soft - jax.lax.stop_gradient(soft))


METHODS = (
    Method(
        name="dynamicvit",
        kind=DynamicViT,
        label="DynamicViT",
        colours=("#2d6f5e", "#7fc9b4"),
        whole_plan=at_quarters,
        equal_gmacs=True,
        fields={"budget": "uniform", "scan_layers": False},
    ),
)
