"""Representatives: who shares whose update, against plain loops."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tosa_jax.ops import token_matching, token_selection


def random(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def chosen(seed=0, batch=2, n=9, count=5, prefix=1):
    selection = token_selection.select_tokens(random(seed, batch, n), count, prefix)
    return token_matching.with_representatives(random(seed + 1, batch, n, 6), selection, prefix)


def unit(x):
    return np.asarray(x) / np.linalg.norm(x, axis=-1, keepdims=True)


def test_the_complement_is_what_is_not_selected():
    selection = chosen()
    others = token_selection.complement(selection)
    for row, rest in zip(np.asarray(selection.indices), np.asarray(others.indices), strict=True):
        assert sorted([*row, *rest]) == list(range(9)) and list(rest) == sorted(rest)
    tokens = random(3, 2, 9, 4)
    both = token_selection.scatter_tokens(
        token_selection.scatter_tokens(
            jnp.zeros(()), token_selection.gather_tokens(tokens, others), others
        ),
        token_selection.gather_tokens(tokens, selection),
        selection,
    )
    np.testing.assert_array_equal(both, tokens)


def test_a_stand_in_is_the_most_similar_selected_patch():
    features = random(1, 2, 9, 6)
    selection = chosen()
    for b in range(2):
        kept = np.asarray(selection.indices)[b]
        similar = unit(features[b]) @ unit(features[b]).T
        for i in range(9):
            owner = kept[int(selection.slot[b, i])]
            expected = i if i in kept else kept[1:][np.argmax(similar[i, kept[1:]])]
            assert owner == expected


def test_groups_are_summed_and_spread_and_each_is_the_others_transpose():
    selection = chosen()
    values, sums = random(5, 2, 9, 3), random(6, 2, 5, 3)
    expected = np.zeros((2, 5, 3))
    for b in range(2):
        for i in range(9):
            expected[b, int(selection.slot[b, i])] += np.asarray(values)[b, i]
    np.testing.assert_allclose(token_matching.sum_groups(values, selection), expected, atol=1e-5)
    spread = token_matching.spread_groups(sums, selection)
    np.testing.assert_allclose((spread * values).sum(), (sums * expected).sum(), rtol=1e-4)
    grads = jax.grad(lambda v: (token_matching.sum_groups(v, selection) * sums).sum())(values)
    np.testing.assert_allclose(grads, spread, atol=1e-6)
    grads = jax.grad(lambda s: (token_matching.spread_groups(s, selection) * values).sum())(sums)
    np.testing.assert_allclose(grads, expected, atol=1e-5)


@pytest.fixture(params=["default", "tpu"])
def form(request, monkeypatch):
    """Matching as on a CPU, and by products as on a TPU."""

    def take(*args, tpu=None, default=None, **_):
        return ((request.param == "tpu" and tpu) or default)(*args)

    monkeypatch.setattr(jax.lax, "platform_dependent", take)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize(("n", "count", "prefix"), [(9, 7, 1), (9, 5, 1), (10, 6, 2), (5, 5, 1)])
def test_the_most_redundant_candidates_leave_to_their_nearest(n, count, prefix):
    features = random(7, 3, n, 5)
    selection, scores = token_matching.bipartite_matching(features, count, prefix)
    chex.assert_shape(selection.indices, (3, count))
    candidates = list(range(prefix, n, 2))
    stay = [i for i in range(prefix, n) if i not in candidates]
    for b in range(3):
        similar = (unit(features[b]) @ unit(features[b]).T)[:, stay]
        leave = sorted(candidates, key=lambda i: -similar[i].max())[: n - count]
        kept = [i for i in range(n) if i not in leave]
        assert np.asarray(selection.indices)[b].tolist() == kept
        assert np.asarray(selection.mask)[b].nonzero()[0].tolist() == kept
        for i in leave:
            assert kept[int(selection.slot[b, i])] == stay[int(similar[i].argmax())]
            np.testing.assert_allclose(scores[b, i], 1 - similar[i].max(), atol=1e-5)


@pytest.mark.usefixtures("form")
def test_of_a_chessboard_the_fields_leave_that_cost_least_to_merge():
    """Four rows of four patches, of which some stand for several; the number in a row tells the colour."""
    keys, sizes = random(7, 3, 17, 5), 1 + jnp.arange(51).reshape(3, 17) % 4
    selection, scores = token_matching.bipartite_matching(keys, 13, 1, rows=4, sizes=sizes * 1.0)
    leaving = [
        1 + 4 * row + column for row in range(4) for column in range(4) if (row + column) % 2 == 0
    ]
    assert token_matching.candidates(17, 1, rows=4).nonzero()[0].tolist() == leaving
    stay = [i for i in range(1, 17) if i not in leaving]
    for b in range(3):

        def cost(i, j, b=b):
            x, y = float(sizes[b, i]), float(sizes[b, j])
            return np.square(keys[b, i] - keys[b, j]).sum() * (x * y / (x + y)) ** 0.3

        nearest = {i: min(stay, key=lambda j: cost(i, j)) for i in leaving}
        gone = sorted(leaving, key=lambda i: cost(i, nearest[i]))[:4]
        kept = [i for i in range(17) if i not in gone]
        assert np.asarray(selection.indices)[b].tolist() == kept
        for i in gone:
            assert kept[int(selection.slot[b, i])] == nearest[i]
            np.testing.assert_allclose(scores[b, i], 1 - 1 / (1 + cost(i, nearest[i])), rtol=1e-4)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("by_cost", [False, True])
def test_padding_leaves_first_and_represents_nobody(by_cost):
    """The last three of nine patches are padding, and one of them is what every other patch resembles most."""
    features = np.array(random(8, 2, 10, 5))
    features[:, [1, 3, 5]] = features[:, [8]]
    present = jnp.arange(20).reshape(2, 10) % 10 < 7
    sizes = jnp.ones((2, 10)) if by_cost else None
    selection, scores = token_matching.bipartite_matching(
        jnp.asarray(features), 7, 1, present=present, sizes=sizes
    )
    for b in range(2):
        kept = np.asarray(selection.indices)[b].tolist()
        gone = [i for i in range(10) if i not in kept]
        assert gone[1:] == [7, 9] and gone[0] in (1, 3, 5)
        assert kept[int(selection.slot[b, gone[0]])] in (2, 4, 6)
        assert np.asarray(scores)[b, [7, 9]].tolist() == [-1, -1]


@pytest.mark.parametrize("rows", [2, 3, 4, 6])
def test_of_a_chessboard_with_gaps_both_colours_are_there(rows):
    for patches in range(2, 4 * rows):
        leave = token_matching.candidates(patches + 1, 1, rows=rows)
        assert 0 < leave.sum() < patches and not leave[0]
        assert abs(leave.sum() - patches / 2) <= rows / 2


def test_the_least_count_is_what_can_be_reached():
    for n, prefix, least in ((9, 1, 5), (10, 1, 5), (10, 2, 6), (3, 1, 2)):
        assert token_matching.least_after_matching(n, prefix) == least
        selection, _ = token_matching.bipartite_matching(random(0, 1, n, 4), least, prefix)
        assert len(set(np.asarray(selection.indices)[0])) == least
    assert (
        token_matching.least_after_matching(2, 1) == 2
    )  # nobody could stand in for a single patch


def test_redundancy_counts_likeness_to_more_attended_patches_alone():
    scores = jnp.array([[0.0, 4.0, 3.0, 2.0, 1.0]])
    # Tokens 1 and 2 are alike: only the less attended of them is redundant. Token 4 is like the prefix token.
    features = jnp.eye(5)[jnp.array([[0, 1, 1, 2, 0]])]
    weighed = token_matching.weigh_redundancy(scores, features, 1.0, 1)[0]
    assert int(jnp.argmin(weighed)) == 2
    np.testing.assert_array_equal(
        jnp.argsort(token_matching.weigh_redundancy(scores, features, 0.0, 1)[0]),
        jnp.argsort(scores[0]),
    )
