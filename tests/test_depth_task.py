"""The depth loss and metrics against the definitions of the literature, written here a second time in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tosa_jax.errors import ConfigError, DataError
from tosa_jax.models.vit import Output
from tosa_jax.tasks.depth.errors import silog
from tosa_jax.tasks.depth.task import Depth, DepthOptions, crop_box

PIXELS = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
SIZE = (24, 32)


def task(max_depth: float = 10.0, **options) -> Depth:
    return Depth(max_depth=max_depth, scoring=DepthOptions(**options), **PIXELS)


def output(depth) -> Output:
    return Output({"depth": jnp.asarray(depth)}, jnp.zeros((len(depth), 1, 1)), (), {})


def score(depth, truth, **options):
    return task(**options).metrics(output(depth), {"depth": jnp.asarray(truth)})


def random_maps(seed: int, batch: int = 3, size=SIZE):
    """Depth and truth from 0.3 to 12 m; a third of the truth is not measured."""
    rng = np.random.default_rng(seed)
    truth = rng.uniform(0.3, 12, (batch, *size))
    depth = truth * np.exp(rng.normal(0, 0.3, truth.shape))
    truth[rng.random(truth.shape) < 0.33] = 0
    return depth.astype(np.float32), truth.astype(np.float32)


def errors_of_one_image(depth, truth, low, high):
    """The definitions, an image at a time, in float64: Eigen et al. 2014; silog as BTS and NeWCRFs report it."""
    valid = np.logical_and(truth > low, truth < high)
    predicted = np.clip(depth, low, high).astype(np.float64)[valid]
    true = truth.astype(np.float64)[valid]
    worse = np.maximum(predicted / true, true / predicted)
    log_error = np.log(predicted) - np.log(true)
    return {
        "abs_rel": np.mean(np.abs(predicted - true) / true),
        "sq_rel": np.mean((predicted - true) ** 2 / true),
        "rms": np.sqrt(np.mean((predicted - true) ** 2)),
        "log_rms": np.sqrt(np.mean(log_error**2)),
        "log10": np.mean(np.abs(np.log10(predicted) - np.log10(true))),
        "silog": 100 * np.sqrt(np.mean(log_error**2) - np.mean(log_error) ** 2),
        "delta1": np.mean(worse < 1.25),
        "delta2": np.mean(worse < 1.25**2),
        "delta3": np.mean(worse < 1.25**3),
        "loss": 10 * np.sqrt(np.mean(log_error**2) - 0.85 * np.mean(log_error) ** 2),
    }


@pytest.mark.parametrize("seed", range(3))
def test_metrics_are_those_of_the_definitions(seed):
    depth, truth = random_maps(seed)
    found = jax.jit(task().metrics)(output(depth), {"depth": truth})
    wanted = [errors_of_one_image(*pair, 1e-3, 10) for pair in zip(depth, truth, strict=True)]
    assert found.keys() == wanted[0].keys()
    for name, values in found.items():
        np.testing.assert_allclose(
            values, [image[name] for image in wanted], rtol=1e-6, err_msg=name
        )


def loss_of(out, truth):
    """The value of each image of a batch with this truth."""
    images = jnp.zeros((*truth.shape, 3), jnp.uint8)
    batch = task().training_batch({"image": images, "depth": jnp.asarray(truth)}, jax.random.key(0))
    return task().loss(out, batch)


def test_the_training_loss_is_that_of_the_definition_and_mean_over_images_with_a_valid_pixel():
    depth, truth = random_maps(5)
    valid = (truth > 0.1) & (truth < 10)
    wanted = []
    for predicted, true, mask in zip(depth, truth, valid, strict=True):
        d = np.log(predicted[mask].astype(np.float64)) - np.log(true[mask].astype(np.float64))
        wanted.append(10 * np.sqrt(np.mean(d**2) - 0.85 * np.mean(d) ** 2))
    loss = jax.jit(loss_of)
    np.testing.assert_allclose(loss(output(depth), truth), wanted, rtol=1e-6)
    truth[1] = 0
    without = loss(output(depth), truth)
    assert without[1] == 0
    np.testing.assert_allclose(without.mean(), (wanted[0] + wanted[2]) / 2, rtol=1e-6)
    truth[:] = 0
    assert loss(output(depth), truth).tolist() == [0, 0, 0]


def gradient(depth, truth):
    return jax.grad(lambda x: loss_of(output(x), truth).mean())(jnp.asarray(depth))


def test_the_loss_has_a_finite_gradient_at_equality_with_holes_and_without_a_pixel():
    depth, truth = random_maps(1)
    same = np.where(truth > 0, truth, 3.0)
    assert (gradient(same, truth) == 0).all()
    nearly = gradient(same * (1 + 1e-6 * np.sign(depth - 5)), truth)
    assert np.isfinite(nearly).all() and (nearly != 0).any()
    assert (gradient(depth, np.zeros_like(truth)) == 0).all()
    assert (np.asarray(gradient(depth, truth))[truth == 0] == 0).all()
    black = gradient(np.zeros_like(depth), truth)
    assert np.isfinite(black).all()


def test_the_loss_minds_the_shape_more_than_the_scale():
    truth = np.full((1, 4, 4), 2.0, np.float32)
    valid = jnp.ones(truth.shape, bool)
    scaled = silog(jnp.asarray(truth * 1.5), jnp.asarray(truth), valid)
    np.testing.assert_allclose(scaled, 10 * np.sqrt(0.15) * np.log(1.5), rtol=1e-5)


@pytest.mark.parametrize("hole", [0.0, 1e-4, 10.0, 55.0])
def test_a_pixel_that_is_not_valid_never_counts(hole):
    depth, truth = random_maps(2)
    truth[:, ::3] = 0
    wild = depth.copy()
    wild[truth == 0] = 1e6
    before = score(depth, truth)
    truth[:, ::3] = hole
    after = score(wild, truth)
    for name in before:
        np.testing.assert_array_equal(before[name], after[name], err_msg=name)


def test_padding_is_not_nan_and_nan_is_not_right():
    depth, truth = random_maps(3)
    truth[2], depth[0] = 0, np.nan
    values = score(depth, truth)
    assert np.isfinite([x[1:] for x in values.values()]).all()
    assert np.isnan(values["abs_rel"][0])


def counted(crop, size):
    return np.asarray(task(crop=crop).scored(np.full((1, *size), 5.0, np.float32)))[0]


def test_the_crops_are_those_of_eigen_and_garg():
    eigen = np.zeros((480, 640), bool)
    eigen[45:471, 41:601] = True
    np.testing.assert_array_equal(counted("eigen", (480, 640)), eigen)
    # As in the code of BTS for KITTI: shares of the sides, rounded down.
    garg = np.zeros((352, 1216), bool)
    rows, columns = (
        np.array([0.40810811, 0.99189189]) * 352,
        np.array([0.03594771, 0.96405229]) * 1216,
    )
    garg[int(rows[0]) : int(rows[1]), int(columns[0]) : int(columns[1])] = True
    np.testing.assert_array_equal(counted("garg", (352, 1216)), garg)
    assert counted("none", (7, 9)).all()
    half = np.argwhere(counted("eigen", (240, 320)))
    assert (half.min(axis=0) == [22, 20]).all() and (half.max(axis=0) == [234, 299]).all()


def test_crops_end_where_the_references_end_at_every_size():
    """Garg's as BTS and NeWCRFs compute it, in float64; Eigen's in integers. At 370 rows an end is just below 367."""
    for side in range(1, 2001):
        rows, columns = crop_box("garg", side, side)
        ends = [int(x * side) for x in (0.40810811, 0.99189189, 0.03594771, 0.96405229)]
        assert [rows.start, rows.stop, columns.start, columns.stop] == ends, side
        rows, columns = crop_box("eigen", side, side)
        ends = [45 * side // 480, 471 * side // 480, 41 * side // 640, 601 * side // 640]
        assert [rows.start, rows.stop, columns.start, columns.stop] == ends, side


def test_depth_beyond_what_the_network_can_say_is_neither_learnt_from_nor_scored():
    depth, truth = random_maps(5)
    far = np.where(truth == 0, np.inf, truth).astype(np.float32)
    own, beside = task(), {"weight": jnp.ones(3)}
    near, both = ({**beside, "depth": jnp.asarray(x)} for x in (truth, far))
    np.testing.assert_array_equal(own.loss(output(depth), near), own.loss(output(depth), both))
    np.testing.assert_array_equal(own.scored(truth), own.scored(far))


def test_an_image_that_cannot_be_scored_is_named():
    _, truth = random_maps(4, batch=3, size=(48, 64))
    mask = np.array([1, 1, 0], np.float32)
    truth[2] = 0
    task(crop="eigen").check_batch({"depth": truth, "mask": mask}, 40)
    outside = truth.copy()
    outside[1, 4:47, 4:60] = 0  # what is left lies outside the crop
    task().check_batch({"depth": outside, "mask": mask}, 40)
    with pytest.raises(DataError, match=r"evaluation image 41 has no pixel .* crop 'eigen'"):
        task(crop="eigen").check_batch({"depth": outside, "mask": mask}, 40)


def test_the_flipped_average_mirrors_back():
    class Ramp:
        """Predicts brightness plus a ramp from left to right, which mirroring turns around."""

        def __call__(self, images, *, key):
            ramp = jnp.broadcast_to(jnp.arange(4.0)[None, None], images.shape[:3])
            return output(images[..., 0] + ramp)

    pixels = jnp.arange(4, dtype=jnp.uint8).reshape(1, 1, 4, 1).repeat(3, axis=3)
    key = jax.random.key(0)
    plain = task().predict(Ramp(), {"image": pixels}, key).depth
    both = task(flip_average=True).predict(Ramp(), {"image": pixels}, key).depth
    normalised = (np.arange(4) / 255 - 0.5) / 0.25
    np.testing.assert_allclose(plain[0, 0], normalised + np.arange(4), atol=1e-6)
    np.testing.assert_allclose(both[0, 0], normalised + 1.5, atol=1e-6)


def test_distillation_is_the_distance_of_logarithms():
    student = output(np.full((2, 3, 3), 4.0, np.float32))
    teacher = output(np.full((2, 3, 3), 2.0, np.float32))
    np.testing.assert_allclose(task().distillation(student, teacher), np.log(2), rtol=1e-6)
    assert (task().distillation(student, student) == 0).all()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"crop": "eigne"}, "did you mean 'eigen'"),
        ({"min_depth": 0.0}, "min_depth=0.0 must be above 0"),
        ({"min_train_depth": -1.0}, "min_train_depth=-1.0 must be above 0"),
    ],
)
def test_wrong_options_are_named(options, says):
    with pytest.raises(ConfigError, match=says):
        dataclasses.replace(DepthOptions(), **options)
