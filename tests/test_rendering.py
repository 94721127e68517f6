"""The renderer: exact distances, checked by other formulas than its own, and rooms that a seed decides."""

import itertools
import math

import numpy as np
import pytest

from tosa_jax.data import speed
from tosa_jax.data.synthetic.rendering import (
    Box,
    Camera,
    Cylinder,
    Sphere,
    cast,
    looking,
    nyu_camera,
)
from tosa_jax.data.synthetic.rooms import MAX_DEPTH, random_scene, render_room, shade

UPRIGHT = np.eye(3)
AXES = looking(0.4, -0.25, 0.1)
ROOM = Box(np.array([0.0, 0.0, 1.3]), np.array([3.0, 2.0, 1.3]), UPRIGHT)
EYE = np.array([-2.0, 0.3, 1.5])


def camera(axes=AXES, position=EYE, size=(48, 64)) -> Camera:
    return nyu_camera(*size, position, axes)


def back_projected(view: Camera, depth: np.ndarray) -> np.ndarray:
    """World points [h w 3], by the textbook: x = (u - cx) z / fx."""
    v, u = np.mgrid[: view.height, : view.width]
    x = (u - view.centre[0]) * depth / view.focal[0]
    y = (v - view.centre[1]) * depth / view.focal[1]
    return np.stack([x, y, depth], -1) @ view.axes.T + view.position


def random_rotation(seed: int) -> np.ndarray:
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return q * np.linalg.det(q)


def test_axes_are_right_handed_and_look_where_they_should():
    np.testing.assert_allclose(AXES.T @ AXES, UPRIGHT, atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(AXES), 1)
    right, down, forward = looking(0, 0, 0).T
    np.testing.assert_allclose(
        [right, down, forward], [[0, -1, 0], [0, 0, -1], [1, 0, 0]], atol=1e-12
    )
    assert looking(0, 0.3, 0)[2, 2] == pytest.approx(math.sin(0.3))  # up
    assert looking(math.pi / 2, 0, 0)[1, 2] == pytest.approx(1)
    assert looking(0, 0, 0.1)[2, 0] < 0  # turned clockwise, its right side goes down


def test_intrinsics_are_those_of_nyu_and_scale_as_resizing_does():
    full = camera(size=(480, 640))
    assert full.focal == pytest.approx((518.857901, 519.469611))
    assert full.centre == pytest.approx((325.582449, 253.736166))
    small = camera(size=(120, 200))
    # The outer edges, half a pixel before the first and behind the last centre, see the same.
    for name, size in (("height", 1), ("width", 0)):
        for edge in (-0.5, None):
            slopes = [
                ((getattr(c, name) - 0.5 if edge is None else edge) - c.centre[size])
                / c.focal[size]
                for c in (full, small)
            ]
            assert slopes[0] == pytest.approx(slopes[1])


def test_a_wall_straight_ahead_is_everywhere_as_far():
    hits = cast(camera(looking(0, 0, 0)), ROOM, [])
    wall = hits.surface == 1
    assert wall.sum() > 500
    np.testing.assert_allclose(hits.depth[wall], 5.0, atol=1e-12)  # from x = -2 to x = 3
    np.testing.assert_array_equal(hits.normals[:, wall].T, np.tile([-1.0, 0, 0], (wall.sum(), 1)))


def test_the_floor_seen_level_by_similar_triangles():
    view = camera(looking(0, 0, 0))
    hits = cast(view, ROOM, [])
    rows, columns = np.nonzero(hits.surface == 4)
    assert len(rows) > 300
    wanted = EYE[2] * view.focal[1] / (rows - view.centre[1])
    np.testing.assert_allclose(hits.depth[rows, columns], wanted, rtol=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_wall_pixels_lie_on_their_planes(seed):
    scene = random_scene(np.random.default_rng(seed))
    view = scene.camera(48, 64)
    hits = cast(view, scene.room, scene.solids)
    points = back_projected(view, hits.depth)
    np.testing.assert_allclose(points, hits.points.transpose(1, 2, 0), atol=1e-9)
    x, y, z = 2 * scene.room.half
    planes = [(0, -x / 2), (0, x / 2), (1, -y / 2), (1, y / 2), (2, 0), (2, z)]
    for face, (axis, at) in enumerate(planes):
        on = points[hits.surface == face]
        assert np.abs(on[:, axis] - at).max(initial=0) < 1e-4
    inside = np.abs(points - scene.room.centre) <= scene.room.half + 1e-9
    assert inside.all()  # the other end of the room is behind the wall
    assert len(np.unique(hits.surface)) > 4


def test_a_sphere_by_the_law_of_cosines():
    ball = Sphere(np.array([1.0, -0.2, 0.9]), 0.6, random_rotation(1))
    view = camera()
    hits = cast(view, ROOM, [ball])
    rays = back_projected(view, np.ones((48, 64))) - EYE
    lengths = np.linalg.norm(rays, axis=-1)
    to_ball = ball.centre - EYE
    distance = np.linalg.norm(to_ball)
    cos = rays @ to_ball / (lengths * distance)
    miss = distance * np.sqrt(1 - cos**2)  # from the ray to the centre
    np.testing.assert_array_equal(hits.surface == 6, miss < ball.radius)
    seen = hits.surface == 6
    assert seen.sum() > 100
    along = distance * cos - np.sqrt(np.maximum(ball.radius**2 - miss**2, 0))
    np.testing.assert_allclose(hits.depth[seen], (along / lengths)[seen], atol=1e-4)
    outward = (hits.points - ball.centre[:, None, None]) / ball.radius
    np.testing.assert_allclose(hits.normals[:, seen], outward[:, seen], atol=1e-9)


def outside(solid, points: np.ndarray) -> np.ndarray:
    """Distances of world points [n 3] to a solid, below 0 within it (Quilez, "distance functions")."""
    local = (points - solid.centre) @ solid.rotation
    if isinstance(solid, Sphere):
        return np.linalg.norm(local, axis=1) - solid.radius
    if isinstance(solid, Cylinder):
        over = np.stack(
            [
                np.hypot(local[:, 0], local[:, 1]) - solid.radius,
                np.abs(local[:, 2]) - solid.half_height,
            ],
            1,
        )
    else:
        over = np.abs(local) - solid.half_extent()
    return np.linalg.norm(np.maximum(over, 0), axis=1) + np.minimum(over.max(1), 0)


def posed(seed: int) -> list:
    place = np.array([0.6, 0.1, 1.0])
    turn = random_rotation(seed)
    return [
        Box(place, np.array([0.3, 0.5, 0.2]), turn),
        Cylinder(place, 0.3, 0.5, turn),
        Sphere(place, 0.4, turn),
    ]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kind", [0, 1, 2])
def test_solids_of_any_pose_by_marching_along_the_rays(kind, seed):
    solid = posed(seed)[kind]
    view = camera(size=(24, 32))
    hits = cast(view, ROOM, [solid])
    rays = (back_projected(view, np.ones((24, 32))) - EYE).reshape(-1, 3)
    lengths = np.linalg.norm(rays, axis=1)
    depth = np.zeros(len(rays))
    for _ in range(300):  # a step as long as the way is certainly free
        depth += outside(solid, EYE + rays * depth[:, None]) / lengths
        depth = np.minimum(depth, 20)
    seen = hits.surface.ravel() == 6
    assert seen.sum() > 20
    marched = depth < 19
    assert (seen != marched).sum() <= 2  # a ray along the rim marches for ever
    np.testing.assert_allclose(hits.depth.ravel()[seen & marched], depth[seen & marched], atol=1e-4)


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_normals_are_the_gradient_of_the_distance(kind):
    solid = posed(3)[kind]
    hits = cast(camera(), ROOM, [solid])
    seen = hits.surface == 6
    points, normals = hits.points[:, seen].T, hits.normals[:, seen].T
    np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1)
    assert (np.einsum("nd,nd->n", normals, points - EYE) < 1e-9).all()  # towards the camera
    np.testing.assert_allclose(outside(solid, points + 0.01 * normals), 0.01, atol=1e-9)


@pytest.mark.parametrize("kind", [0, 1])
def test_coordinates_along_a_surface_are_metres(kind):
    solid = posed(3)[kind]
    hits = cast(camera(size=(96, 128)), ROOM, [solid])
    seen = hits.surface == 6
    points, normals, coords = (x[:, seen].T for x in (hits.points, hits.normals, hits.coords))
    steps = np.linalg.norm(np.diff(points, axis=0), axis=1)
    turned = 1 - np.einsum("nd,nd->n", normals[1:], normals[:-1])
    near = (steps < 0.05) & (turned < 0.01)
    moved = np.linalg.norm(np.diff(coords, axis=0), axis=1)
    near &= moved < 1  # not where a cylinder's angle starts again
    assert near.sum() > 500
    np.testing.assert_allclose(moved[near], steps[near], rtol=0.01, atol=1e-6)


def test_the_nearer_solid_hides_the_farther_one():
    near, far = (Sphere(EYE + d * AXES[:, 2], 0.3, UPRIGHT) for d in (1.0, 2.0))
    for solids, number in (([near, far], 0), ([far, near], 1)):
        hits = cast(camera(), ROOM, solids)
        assert hits.surface[25, 32] == 6 + number
        assert hits.depth[25, 32] == pytest.approx(0.7, abs=0.01)


def test_rectangles_leave_out_nothing(monkeypatch):
    scenes = [random_scene(np.random.default_rng(seed)) for seed in range(12)]
    views = [scene.camera(36, 48) for scene in scenes]
    # Two more: one that reaches behind the camera, and one that is behind it.
    around = Box(EYE + AXES @ [0, 0.4, 1.0], np.array([2.0, 0.1, 1.2]), AXES)
    behind = Sphere(EYE - AXES[:, 2] * 0.9, 0.3, UPRIGHT)
    pairs = [(v, s.room, s.solids) for v, s in zip(views, scenes, strict=True)]
    pairs.append((camera(), ROOM, [around, behind]))
    bounded = [cast(*pair) for pair in pairs]
    areas = [
        view.rectangle(s.centre[:, None])
        for view, s in zip(views, scenes, strict=True)
        for s in s.solids
    ]
    assert len(areas) > 40
    monkeypatch.setattr(
        Camera, "rectangle", lambda self, _: (slice(0, self.height), slice(0, self.width))
    )
    for pair, got in zip(pairs, bounded, strict=True):
        whole = cast(*pair)
        np.testing.assert_array_equal(got.depth, whole.depth)
        np.testing.assert_array_equal(got.surface, whole.surface)
        np.testing.assert_array_equal(got.normals, whole.normals)
    assert (bounded[-1].surface == 6).sum() > 50 and not (bounded[-1].surface == 7).any()


def test_a_seed_decides_the_room_and_its_noise():
    image, depth = render_room((0, 7), 24, 32)
    again, same = render_room((0, 7), 24, 32)
    np.testing.assert_array_equal(image, again)
    np.testing.assert_array_equal(depth, same)
    for other in ((0, 8), (1, 7)):
        assert np.abs(render_room(other, 24, 32)[1] - depth).max() > 0.1


def test_other_sizes_show_the_same_room():
    _, fine = render_room((0, 3), 96, 128)
    _, coarse = render_room((0, 3), 48, 64)
    # On a plane 1 / depth is affine in the pixel: the mean of four is that of their middle.
    blocks = (1 / fine).reshape(48, 2, 64, 2).mean(axis=(1, 3))
    close = np.abs(blocks * coarse - 1) < 1e-9
    assert close.mean() > 0.7


def lowest(solid) -> float:
    """The least height of a solid's points: of a box's corners, of a cylinder's rims."""
    if isinstance(solid, Sphere):
        return solid.centre[2] - solid.radius
    if isinstance(solid, Box):
        local = solid.half_extent() * np.array(list(itertools.product((-1, 1), repeat=3)))
    else:
        angle = np.linspace(0, 2 * np.pi, 1000)
        rim = np.stack([np.cos(angle) * solid.radius, np.sin(angle) * solid.radius], 1)
        local = np.concatenate([np.pad(rim, ((0, 0), (0, 1)), constant_values=h) for h in (-1, 1)])
        local[:, 2] *= solid.half_height
    return (local @ solid.rotation.T + solid.centre)[:, 2].min()


def test_rooms_are_within_the_range_and_furnished():
    depths, shares = [], []
    for seed in range(40):
        scene = random_scene(np.random.default_rng(seed))
        hits = cast(scene.camera(24, 32), scene.room, scene.solids)
        depths.append(hits.depth)
        shares.append((hits.surface > 5).mean())
        for solid in scene.solids:
            assert outside(solid, scene.position[None])[0] > 0.8
            assert lowest(solid) == pytest.approx(0, abs=1e-3)  # on the floor
    depths = np.array(depths)
    assert depths.min() > 0.3 and depths.max() < MAX_DEPTH
    assert depths.max() > 7 and np.mean(shares) > 0.2 and np.mean(np.array(shares) > 0.02) > 0.9


def test_light_falls_with_distance_and_shapes_the_solids():
    scene = random_scene(np.random.default_rng(4))
    view = scene.camera(48, 64)
    hits = cast(view, scene.room, scene.solids)
    light = shade(scene, view, hits)
    assert light.dtype == np.float32 and light.min() >= 0 and np.isfinite(light).all()
    image, _ = render_room((0, 4), 48, 64)
    assert image.dtype == np.uint8 and 60 < image.mean() < 200 and image.std() > 15


def test_rates_are_times_turned_over():
    rows = speed.measure_rooms(count=2, rounds=1)
    assert [row["size"] for row in rows] == ["128x160", "480x640"]
    for row in rows:
        assert row["images_per_second_per_core"] * row["milliseconds"] == pytest.approx(1000, 0.02)
