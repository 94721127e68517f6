"""Mixup, cutmix and erasing against their definitions, on one device and on eight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tosa_jax.errors import ConfigError
from tosa_jax.tasks.mixing import MixingConfig, erase, mix

B, H, W, C = 6, 20, 30, 5
IMAGES = jnp.arange(B, dtype=jnp.float32)[:, None, None, None] * jnp.ones((1, H, W, 3))
TARGETS = jnp.eye(C)[jnp.arange(B) % C] * 0.9 + 0.1 / C

mix_jit = jax.jit(mix, static_argnums=0)
erase_jit = jax.jit(erase, static_argnums=0)


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def own_shares(config, count):
    """Share of each image's own pixels in draws of `mix`, [count, H, W], from images 0 and 5."""
    draw = jax.vmap(lambda key: mix(config, key, IMAGES, TARGETS)[0][0, :, :, 0])
    return 1 - np.asarray(jax.jit(draw)(keys(count))) / 5


def test_nothing_happens_by_default():
    config = MixingConfig()
    images, targets = mix(config, jax.random.key(0), IMAGES, TARGETS)
    assert images is IMAGES and targets is TARGETS
    assert erase(config, jax.random.key(0), IMAGES) is IMAGES


@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_the_partner_is_of_the_reversed_batch_and_labels_follow_the_pixels(alphas):
    config = MixingConfig(mixup=alphas[0], cutmix=alphas[1])
    for key in keys(12):
        images, targets = mix_jit(config, key, IMAGES, TARGETS)
        share = 1 - np.asarray(images)[0].mean() / 5
        want = share * TARGETS + (1 - share) * TARGETS[::-1]
        np.testing.assert_allclose(targets, want, atol=1e-5)
        np.testing.assert_allclose(np.asarray(targets).sum(1), 1, atol=1e-6)
        pixels = np.asarray(IMAGES) * share + np.asarray(IMAGES)[::-1] * (1 - share)
        np.testing.assert_allclose(
            np.asarray(images).mean((1, 2, 3)), pixels.mean((1, 2, 3)), atol=1e-5
        )
        if not alphas[0]:  # cutmix: each pixel is one image's or the other's
            assert set(np.unique(images[0])) <= {0.0, 5.0}


def test_lambda_of_mixup_is_beta():
    shares = own_shares(MixingConfig(mixup=0.8), 3000)
    assert np.ptp(shares, axis=(1, 2)).max() < 1e-6  # one lambda for all pixels
    drawn = shares[:, 0, 0]
    want = np.random.default_rng(0).beta(0.8, 0.8, 100_000)
    levels = [0.1, 0.3, 0.5, 0.8]
    np.testing.assert_allclose(np.quantile(drawn, levels), np.quantile(want, levels), atol=0.03)


def test_cutmix_boxes():
    shares = own_shares(MixingConfig(cutmix=1.0), 3000)
    box = shares < 0.5
    rows, columns = box.any(2).sum(1), box.any(1).sum(1)
    assert (box.sum((1, 2)) == rows * columns).all()  # one rectangle
    # Before it is cut off at the edges a box has sides int(side * sqrt(1 - lambda)), made even.
    whole = (rows > 0) & ~box[:, [0, -1]].any((1, 2)) & ~box[:, :, [0, -1]].any((1, 2))
    assert (rows[whole] % 2 == 0).all() and (columns[whole] % 2 == 0).all()
    assert np.abs(columns[whole] / W - rows[whole] / H).max() < 2 / H
    often = box.mean(0)
    assert np.abs(often - often[::-1]).max() < 0.05 and np.abs(often - often[:, ::-1]).max() < 0.05
    # E[1 - lambda] = 1/2; clipping at the edges leaves less, the same for any implementation.
    rng = np.random.default_rng(0)
    sides, areas = np.sqrt(1 - rng.random(20_000)), []
    centres = rng.integers((H, W), size=(20_000, 2))
    for cut, (y, x) in zip(sides, centres, strict=True):
        h, w = int(H * cut) // 2, int(W * cut) // 2
        areas.append((min(y + h, H) - max(y - h, 0)) * (min(x + w, W) - max(x - w, 0)))
    assert abs(box.mean() - np.mean(areas) / (H * W)) < 0.015


def test_the_switch():
    shares = own_shares(MixingConfig(mixup=0.8, cutmix=1.0, switch_prob=0.3), 2000)
    # Under cutmix pixels are 0 or 1; mixup has them in between.
    is_cutmix = ((shares == 0) | (shares == 1)).all((1, 2))
    assert abs(is_cutmix.mean() - 0.3) < 0.04
    assert abs(shares[~is_cutmix].std() - np.sqrt(1 / (4 * 2.6))) < 0.02  # Beta(0.8, 0.8)'s


def test_dtypes_stay_and_draws_follow_the_key():
    config, key = MixingConfig(mixup=0.8, cutmix=1.0, erase_prob=0.5), jax.random.key(0)
    low = jax.ShapeDtypeStruct(IMAGES.shape, jnp.bfloat16)
    images, targets = jax.eval_shape(lambda x: mix(config, key, x, TARGETS), low)
    assert images.dtype == jnp.bfloat16 and targets.dtype == jnp.float32
    assert jax.eval_shape(lambda x: erase(config, key, x), low).dtype == jnp.bfloat16
    images, again, other = (
        mix_jit(config, jax.random.key(i), IMAGES, TARGETS)[0] for i in (1, 1, 2)
    )
    assert (images == again).all() and (images != other).any()


def test_erasing_has_the_areas_and_aspects_of_the_definition():
    config = MixingConfig(erase_prob=0.25)
    side = 48
    images = jnp.full((2500, side, side, 1), 100.0)
    out = np.asarray(erase_jit(config, jax.random.key(0), images))[..., 0]
    box = out != 100
    chosen = box.any((1, 2))
    assert abs(chosen.mean() - 0.25) < 0.03
    box = box[chosen]
    rows, columns = box.any(2).sum(1), box.any(1).sum(1)
    assert (box.sum((1, 2)) == rows * columns).all()
    area, aspect = rows * columns / side**2, np.log(rows / columns)
    assert 0.015 < area.min() < 0.05 and 0.3 < area.max() < 0.345
    assert np.abs(aspect).max() < np.log(1 / 0.3) + 0.12 and abs(aspect.mean()) < 0.1
    low = area < 0.2  # there all aspects fit: log-uniform
    assert abs(np.abs(aspect[low]).mean() - np.log(1 / 0.3) / 2) < 0.05
    assert abs(np.median(area[low]) - 0.11) < 0.02
    noise = out[chosen][box]
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert len(np.unique(noise[:1000])) > 990  # a pixel each, not one colour a box
    top, left = box.any(2).argmax(1), box.any(1).argmax(1)
    assert top.min() == 0 and left.min() == 0
    assert (top + rows).max() == side and (left + columns).max() == side


def test_erase_prob_1_erases_all():
    out = erase_jit(MixingConfig(erase_prob=1.0), jax.random.key(0), jnp.full((64, 32, 16, 3), 9.0))
    assert (np.asarray(out) != 9).any((1, 2, 3)).all()


def test_eight_devices_give_what_one_gives():
    config = MixingConfig(mixup=0.8, cutmix=1.0, erase_prob=0.5)
    images = jax.random.normal(jax.random.key(3), (16, 12, 12, 3))
    targets = jax.nn.softmax(jax.random.normal(jax.random.key(4), (16, C)))

    @jax.jit
    def both(key, images, targets):
        return mix(config, key, erase(config, key, images), targets)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    key = jax.random.key(1)
    want = both(key, images, targets)
    got = both(key, jax.device_put(images, rows), jax.device_put(targets, rows))
    assert (want[0] != images).any()
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize(
    "wrong", [{"mixup": -0.1}, {"cutmix": float("nan")}, {"switch_prob": 1.5}, {"erase_prob": -1.0}]
)
def test_bad_configs(wrong):
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))}=.* must be"):
        MixingConfig(**wrong)
