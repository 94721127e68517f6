"""Methods as their papers and published code state them: NumPy, one image at a time, one token at a time.

Nothing here is shared with the package but the parameters of a network. Each function runs the layers of a network on
the tokens of one image, [n d], and returns the tokens that are left and, for each of the n, the row that represents it.
"""

import copy
import math

import numpy as np

from tosa_jax.models.params import get_params


def softmax(x):
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


erf = np.vectorize(math.erf, otypes=[float])


def gelu(x):
    return x * (1 + erf(x / np.sqrt(2))) / 2


class Layer:
    """One transformer layer, by the parameters under `blocks/<i>` and `kinds/<i>`."""

    def __init__(self, params, number, heads):
        self.own = {
            k.removeprefix(f"kinds/{number}/"): v
            for k, v in params.items()
            if k.startswith(f"kinds/{number}/")
        }
        self.params = {
            k.removeprefix(f"blocks/{number}/"): v
            for k, v in params.items()
            if k.startswith(f"blocks/{number}/")
        }
        self.heads = heads

    def of_kind(self):
        """The same functions with the parameters of the layer's kind."""
        kind = copy.copy(self)
        kind.params = self.own
        return kind

    def linear(self, name, x):
        return x @ self.params[f"{name}/kernel"] + self.params[f"{name}/bias"]

    def norm(self, name, x):
        x = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-6)
        return x * self.params[f"{name}/scale"] + self.params[f"{name}/bias"]

    def qkv(self, x):
        """Queries, keys and values, [h n dh] each."""
        n, d = x.shape
        parts = self.linear("attn/qkv", self.norm("norm1", x)).reshape(n, 3, self.heads, -1)
        return parts.transpose(1, 2, 0, 3)

    def map_of(self, x, sizes):
        """The attention map [h n n]; tokens count as often as `sizes` say."""
        query, key, _ = self.qkv(x)
        logits = query @ key.transpose(0, 2, 1) / np.sqrt(key.shape[-1])
        return softmax(logits + np.log(sizes)[None, None])

    def attend(self, x, attn_map, value):
        out = (attn_map @ value).transpose(1, 0, 2).reshape(len(attn_map[0]), -1)
        return self.linear("attn/proj", out)

    def attention(self, x, sizes=None):
        """The tokens after attention, the map [h n n], keys and values [h n dh]."""
        attn_map = self.map_of(x, np.ones(len(x)) if sizes is None else sizes)
        _, key, value = self.qkv(x)
        return x + self.attend(x, attn_map, value), attn_map, key, value

    def mlp(self, x):
        hidden = self.linear("mlp/fc1", self.norm("norm2", x))
        return x + self.linear("mlp/fc2", gelu(hidden))

    def __call__(self, x, sizes=None):
        return self.mlp(self.attention(x, sizes)[0])


def layers_of(model):
    params = {name: np.asarray(x, np.float64) for name, x in get_params(model).items()}
    return [Layer(params, i, model.config.num_heads) for i in range(model.config.depth)]


def merged(x, sizes, groups):
    """Means weighted by size, and the new sizes; `groups` are lists of rows."""
    new = np.stack([(x[g] * sizes[g, None]).sum(0) / sizes[g].sum() for g in groups])
    return new, np.array([sizes[g].sum() for g in groups])


def rows_of(groups, count):
    """For each of `count` old rows the new one that it went into."""
    owner = np.zeros(count, int)
    for row, group in enumerate(groups):
        owner[group] = row
    return owner


def tome_groups(keys, removed):
    """ToMe's matching of keys [n dh]: groups of rows, the class token first."""
    n = len(keys)
    even, odd = list(range(0, n, 2)), list(range(1, n, 2))
    scores = unit(keys)[even] @ unit(keys)[odd].T
    scores[0] = -np.inf  # the class token stays
    order = np.argsort(-scores.max(axis=1))[: min(removed, (n - 1) // 2)]
    groups = {odd[j]: [odd[j]] for j in range(len(odd))}
    for i in order:
        groups[odd[scores[i].argmax()]].append(even[i])
    for i in set(range(len(even))) - set(order):
        groups[even[i]] = [even[i]]
    return [groups[i] for i in sorted(groups)]


def tome(layers, x, removed):
    sizes, owner = np.ones(len(x)), np.arange(len(x))
    for layer, number in zip(layers, removed, strict=True):
        x, _, keys, _ = layer.attention(x, sizes)
        groups = tome_groups(keys.mean(axis=0), number)
        owner = rows_of(groups, len(x))[owner]
        x, sizes = merged(x, sizes, groups)
        x = layer.mlp(x)
    return x, owner


def evit(layers, x, places, rate, fuse=True):
    owner = np.arange(len(x))
    for number, layer in enumerate(layers):
        if number not in places:
            x = layer(x)
            continue
        x, attn_map, _, _ = layer.attention(x)
        row = attn_map[:, 0, 1:].mean(axis=0)
        count = int(np.ceil(round(rate * len(row), 6)))
        order = np.argsort(-row)
        kept, gone = order[:count], order[count:]
        extra = (row[gone, None] * x[1 + gone]).sum(axis=0)
        groups = [[0], *([1 + i] for i in kept), list(1 + gone)]
        owner = rows_of(groups, len(x))[owner]
        x = np.concatenate([x[:1], x[1 + kept], *([extra[None]] if fuse else [])])
        x = layer.mlp(x)
    return x, owner


def diffrate(layers, x, pruned_to, merged_to):
    sizes, owner = np.ones(len(x)), np.arange(len(x))
    for layer, pruned, left in zip(layers, pruned_to, merged_to, strict=True):
        x, attn_map, _, _ = layer.attention(x, sizes)
        row = attn_map[:, 0].mean(axis=0)
        order = [0, *(1 + np.argsort(-row[1:]))]
        alike = unit(x) @ unit(x).T
        nearest = {i: max(order[1:left], key=alike[i].__getitem__) for i in order[left:]}
        groups = {i: [i] for i in order[:left]}
        grown = {i: sizes[i] for i in order[:left]}
        for i in order[left:pruned]:
            groups[nearest[i]].append(i)
            grown[nearest[i]] += sizes[i] * alike[i, nearest[i]]
        everyone = [[j for j in range(len(x)) if nearest.get(j, j) == i] for i in order[:left]]
        owner = rows_of(everyone, len(x))[owner]
        x = np.stack([x[groups[i]].mean(axis=0) for i in order[:left]])
        sizes = np.array([grown[i] for i in order[:left]])
        x = layer.mlp(x)
    return x, owner


def class_scores(attn_map, value):
    length = np.linalg.norm(value.transpose(1, 0, 2).reshape(value.shape[1], -1), axis=1)
    return attn_map[:, 0].sum(axis=0) * length


def ppt(layers, x, removed, threshold, seen):
    """`seen` gets for each layer whether it merges."""
    sizes, owner = np.ones(len(x)), np.arange(len(x))
    for layer, number in zip(layers, removed, strict=True):
        x, attn_map, keys, value = layer.attention(x, sizes)
        scores = class_scores(attn_map, value)[1:]
        scores = scores / scores.sum()
        keys = keys.mean(axis=0)
        seen.append(scores.var(ddof=1) < threshold)
        if seen[-1]:
            groups = tome_groups(keys, number)
            owner = rows_of(groups, len(x))[owner]
            x, sizes = merged(x, sizes, groups)
        else:
            kept = [0, *np.sort(1 + np.argsort(-scores)[: len(scores) - number])]
            alike = unit(keys) @ unit(keys).T
            nearest = 1 + alike[:, kept[1:]].argmax(axis=1)
            nearest[kept] = np.arange(len(kept))
            owner, x, sizes = nearest[owner], x[kept], sizes[kept]
        x = layer.mlp(x)
    return x, owner


def mctf_groups(x, sizes, informative, removed, taus):
    n = len(x)
    even, odd = np.arange(0, n, 2), np.arange(1, n, 2)
    weights = np.ones((len(even), len(odd)))
    little = (1 / informative) / (1 / informative).max()
    small = (1 / sizes) / (1 / sizes).max()
    for i, a in enumerate(even):
        for j, b in enumerate(odd):
            weights[i, j] *= ((unit(x[a]) @ unit(x[b]) + 1) / 2) ** (1 / taus[0])
            weights[i, j] *= (little[a] * little[b]) ** (1 / taus[1])
            weights[i, j] *= (small[a] * small[b]) ** (1 / taus[2])
    weights[0] = -np.inf
    groups = {i: [i] for i in range(n)}
    first = np.argsort(-weights.max(axis=1))[: removed // 2]
    for i in first:
        groups[odd[weights[i].argmax()]] += groups.pop(even[i])
    rest = [i for i in range(len(even)) if i not in first]
    back = weights[rest].T
    for j in np.argsort(-back.max(axis=1))[: removed - removed // 2]:
        groups[even[rest[back[j].argmax()]]] += groups.pop(odd[j])
    return [groups[i] for i in sorted(groups)]


def mctf(layers, x, removed, information="own", taus=(1, 20, 40), predict=None):
    """The first layer merges nothing; `predict` turns the logits of a layer into the next one's map [h n n]."""
    sizes, owner, before = np.ones(len(x)), np.arange(len(x)), None
    for number, layer in zip(removed, layers, strict=True):
        attn_map = layer.map_of(x, sizes)
        if number:
            of = attn_map if information == "own" else before
            informative = of[:, 0].mean(axis=0) if information == "class" else of.mean(axis=(0, 1))
            groups = mctf_groups(x, sizes, informative, number, taus)
            owner = rows_of(groups, len(x))[owner]
            shares = informative * sizes
            rows = [np.average(attn_map[:, g], axis=1, weights=shares[g]) for g in groups]
            attn_map = np.stack(rows, axis=1)
            attn_map = np.stack([attn_map[:, :, g].sum(axis=2) for g in groups], axis=2)
            x = np.stack([np.average(x[g], axis=0, weights=shares[g]) for g in groups])
            sizes = np.array([sizes[g].sum() for g in groups])
        if information != "own":
            attn_map = layer.map_of(x, sizes)
        before = attn_map
        _, _, value = layer.qkv(x)
        x = layer.mlp(x + layer.attend(x, attn_map, value))
    return x, owner


def ats(layers, x, rate):
    places, came_back = np.arange(len(x)), np.array(x)
    for layer in layers:
        scored, attn_map, _, value = layer.attention(x)
        scores = class_scores(attn_map, value)[1:]
        order = np.argsort(scores)
        added = np.cumsum(scores[order] / scores.sum())
        added = (added - added[0]) / (added[-1] - added[0])
        count = int(np.ceil(round(rate * len(scores), 6)))
        start = added[added > 0].min()
        points = start + (1 - start) * np.linspace(0, 1, count)
        sampled = {order[np.abs(point - added).argmin()] for point in points}
        best = [i for i in order[::-1] if i not in sampled]
        kept = np.array([0, *(1 + np.sort([*sampled, *best[: count - len(sampled)]]))])
        came_back[places] = x
        places = places[kept]
        x = layer.mlp(scored[kept])
    came_back[places] = x
    return x, came_back


def expedit(layers, x, grid, pooled, rounds, temperature, window, neighbours):
    """The first layer runs on all tokens, the others on clusters."""
    x = layers[0](x)
    patches, (rows, columns), (h, w) = x[1:], grid, pooled
    places = [(i, j) for i in range(rows) for j in range(columns)]
    cells = [(i, j) for i in range(h) for j in range(w)]

    def inside(k, size, count, place):
        return k * size // count <= place < -(-(k + 1) * size // count)

    centres = []
    for i, j in cells:
        members = [
            patch
            for (y, z), patch in zip(places, patches, strict=True)
            if inside(i, rows, h, y) and inside(j, columns, w, z)
        ]
        centres.append(np.mean(members, axis=0))
    centres = np.stack(centres)
    for _ in range(rounds):
        belongs = np.zeros((len(cells), len(places)))
        for p, (y, z) in enumerate(places):
            own = y * h // rows, z * w // columns
            distance = np.full(len(cells), np.inf)
            for c, (i, j) in enumerate(cells):
                if max(abs(own[0] - i), abs(own[1] - j)) <= window // 2:
                    distance[c] = ((patches[p] - centres[c]) ** 2).sum()
            belongs[:, p] = softmax(-temperature * distance)
        centres = belongs @ patches / belongs.sum(axis=1, keepdims=True)
    few = np.concatenate([x[:1], centres])
    for layer in layers[1:]:
        few = layer(few)
    whole = [few[0]]
    for patch in patches:
        weights = np.exp(-temperature * ((patch - centres) ** 2).sum(axis=1))
        weights[np.argsort(-weights)[neighbours:]] = 0
        whole.append(weights / np.linalg.norm(weights) @ few[1:])
    whole = np.stack(whole)
    return whole, whole


def ailurus(layers, x, columns, rate, space, neighbours):
    """The first layer runs on all tokens, the others on anchors."""
    x = layers[0](x)
    patches, number = unit(x[1:]), len(x) - 1
    distance = np.zeros((number, number))
    for i in range(number):
        for j in range(number):
            there = np.subtract(divmod(i, columns), divmod(j, columns)) / columns
            distance[i, j] = np.sqrt(
                ((patches[i] - patches[j]) ** 2).sum() + space * (there**2).sum()
            )
    density = [np.exp(-np.mean(np.sort(row)[1 : neighbours + 1] ** 2)) for row in distance]
    scores = []
    for i in range(number):
        higher = [distance[i, j] for j in range(number) if density[j] > density[i]]
        scores.append(density[i] * (min(higher) if higher else distance.max()))
    anchors = np.sort(np.argsort(scores)[number - int(np.ceil(rate * number)) :])
    nearest = [
        list(anchors).index(i) if i in anchors else distance[i, anchors].argmin()
        for i in range(number)
    ]
    owner = np.array([0, *(1 + np.array(nearest))])
    groups = [np.flatnonzero(owner == row) for row in range(1 + len(anchors))]
    x, sizes = merged(x, np.ones(len(x)), groups)
    for layer in layers[1:]:
        x = layer(x, sizes)
    return x[owner], x[owner]


def token_learner(layers, x, fuse=False):
    owner = np.arange(len(x))

    def mlp(layer, name, patches):
        layer = layer.of_kind()
        hidden = layer.linear(f"{name}/fc1", layer.norm(f"{name}/norm", patches))
        hidden = hidden / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
        return layer.linear(f"{name}/fc2", hidden)

    for layer in layers:
        if "maps/fc1/kernel" not in layer.own:
            x = layer(x)
            continue
        before, maps = x, softmax(mlp(layer, "maps", x[1:]).T)
        x = layer(np.concatenate([x[:1], maps @ x[1:]]))
        if not fuse:
            shares = (maps / maps.sum(axis=0)).T
            owner = np.concatenate([x[:1], shares @ x[1:]])
            continue
        kind = layer.of_kind()
        mixed = kind.linear("mix", kind.norm("mix_norm1", x[1:]).T).T
        shares = 1 / (1 + np.exp(-mlp(layer, "back", before[1:])))
        x = np.concatenate([x[:1], before[1:] + shares @ kind.norm("mix_norm2", mixed)])
    return x, owner


def pruned(layers, x, rate, scores, shares=None):
    """Patches with the lowest scores leave before a layer for which `scores(before, layer, x)` gives some.

    before  the layer before, and the tokens that it got.
    """
    places, came_back, before = np.arange(len(x)), np.array(x), None
    for layer in layers:
        found = scores(before, layer, x)
        if found is not None:
            count = shares.pop(0) if shares else int(np.ceil(round(rate * len(found), 6)))
            kept = np.array([0, *(1 + np.sort(np.argsort(-found)[:count]))])
            came_back[places] = x
            x, places = x[kept], places[kept]
        before = layer, x
        x = layer(x)
    came_back[places] = x
    return x, came_back


def predicted(layer, x):
    """The logarithm of the probability that each patch stays, by DynamicViT's predictor."""
    kind = layer.of_kind()
    hidden = gelu(kind.linear("predictor/inner", kind.norm("predictor/norm", x[1:])))
    half = hidden.shape[1] // 2
    shared = np.broadcast_to(hidden[:, half:].mean(axis=0), hidden[:, half:].shape)
    hidden = np.concatenate([hidden[:, :half], shared], axis=1)
    for name in ("fc1", "fc2"):
        hidden = gelu(kind.linear(f"predictor/{name}", hidden))
    return np.log(softmax(kind.linear("predictor/fc3", hidden)))[:, 0]


def dynamicvit(layers, x, rate):
    def scores(before, layer, x):
        return predicted(layer, x) if "predictor/fc3/bias" in layer.own else None

    total = len(x) - 1
    return pruned(layers, x, rate, scores, [int(total * rate**stage) for stage in (1, 2, 3)])


def head_weighted_row(layer, x):
    _, attn_map, _, value = layer.attention(x)
    length = np.linalg.norm(attn_map @ value, axis=2)[:, 1:]
    return (attn_map[:, 0, 1:] * length / length.sum(axis=0)).sum(axis=0)


def as_vit(layers, x, rate):
    def scores(before, layer, x):
        if "threshold" not in layer.own:
            return None
        return head_weighted_row(*before)

    return pruned(layers, x, rate, scores)


def psvit(layers, x, grids):
    """`grids`: rows and columns before each layer that pools, and after it; None: a layer that shares its map."""
    owner, attn_map = np.arange(len(x)), None
    for layer, sides in zip(layers, grids, strict=True):
        if sides is not None:
            (rows, columns), (h, w) = sides
            groups = [[0]]
            for i in range(h):
                for j in range(w):
                    inside = range(i * rows // h, -(-(i + 1) * rows // h))
                    along = range(j * columns // w, -(-(j + 1) * columns // w))
                    groups.append([1 + y * columns + z for y in inside for z in along])
            owner = rows_of(groups, len(x))[owner]
            x = np.stack([x[g].mean(axis=0) for g in groups])
            attn_map = layer.map_of(x, np.ones(len(x)))
        x = layer.mlp(x + layer.attend(x, attn_map, layer.qkv(x)[2]))
    return x, owner
