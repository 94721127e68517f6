"""Random rooms in the style of NYU Depth V2: a uint8 image and its exact z-depth, as a function of a seed.

They have the cues by which people judge distance, in the sizes of real rooms: tiles and planks on the floor, doors two
metres high, ceilings at 2.4 to 2.9 m, a camera at 1.4 to 1.6 m with a lamp that lights near things more, and shadows
where things stand on the floor.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from jaxtyping import Float, UInt8

from tosa_jax.data.synthetic.rendering import (
    Box,
    Camera,
    Cylinder,
    Hits,
    Rotation,
    Solid,
    Sphere,
    Vector,
    cast,
    looking,
    nyu_camera,
)

MAX_DEPTH = 10.0
"""Largest z-depth, metres: no room is longer from corner to corner."""

_WALLS, _FLOOR, _CEILING = slice(0, 4), 4, 5
_ENDLESS = 1e3  # metres: a tile larger than any surface
_CLEARANCE = 0.8  # metres between the camera and the nearest solid
_LAMP, _FLASH = 1.0, 3.0  # light close to the lamp of the room, and to that of the camera
_EXPOSURE = 0.35  # always the same, so that brightness tells distance
_SHADES = 256  # number of different tiles of a surface


@dataclass(frozen=True, kw_only=True)
class Material:
    """A surface of rows of tiles. Stripes, planks and plain paint are tiles of other sizes.

    colour        reflectance, linear RGB in 0..1.
    tile          size of a tile along the two coordinates of the surface, metres.
    joint         width of the lines between tiles, metres.
    joint_colour  reflectance of these lines, as a factor of `colour`.
    shift         offset of a row against the one below, as a share of a tile.
    variation     largest relative difference in brightness of a tile from `colour`.
    """

    colour: tuple[float, ...]
    tile: tuple[float, float] = (_ENDLESS, _ENDLESS)
    joint: float = 0.0
    joint_colour: float = 0.5
    shift: float = 0.0
    variation: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A door, a window or a picture: a rectangle on a wall, from low to high along the wall and upwards, metres."""

    colour: tuple[float, ...]
    along: tuple[float, float]
    up: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A room with a camera in it.

    room, solids    the geometry.
    materials       of the six faces, then of the solids.
    panels          one for each of the four walls.
    position, axes  of the camera.
    lamp            position of the lamp; a second lamp is at the camera.
    ambient         light that comes from all directions.
    seed            of the brightness of tiles.
    """

    room: Box
    solids: Sequence[Solid]
    materials: Sequence[Material]
    panels: Sequence[Panel]
    position: Vector
    axes: Rotation
    lamp: Vector
    ambient: float
    seed: int

    def camera(self, height: int, width: int) -> Camera:
        """The camera, with the field of view of NYU Depth V2's."""
        return nyu_camera(height, width, self.position, self.axes)


def render_room(
    seed: Sequence[int], height: int, width: int
) -> tuple[UInt8[np.ndarray, "height width 3"], Float[np.ndarray, "height width"]]:
    """A random room: RGB image, and exact z-depth in metres (float64, at most `MAX_DEPTH`).

    The room depends on `seed` alone: another height and width show the same room.
    """
    scene_seed, noise_seed = np.random.SeedSequence(list(seed)).spawn(2)
    scene = random_scene(np.random.default_rng(scene_seed))
    camera = scene.camera(height, width)
    hits = cast(camera, scene.room, scene.solids)
    light = shade(scene, camera, hits)
    return _develop(light, np.random.default_rng(noise_seed)), hits.depth


def random_scene(rng: np.random.Generator) -> Scene:
    """A room of 2.6 to 5.4 by 3 to 8.2 m with up to twelve solids on its floor, seen from near a wall."""
    wide, long = (low * (high / low) ** rng.random() for low, high in ((2.6, 5.4), (3.0, 8.2)))
    half = np.array([wide, long, rng.uniform(2.4, 2.9)]) / 2
    # The camera is on an ellipse near the walls and looks across the middle.
    angle = rng.uniform(-math.pi, math.pi)
    position = (
        np.array([math.cos(angle), math.sin(angle), 0.0]) * (half - 0.3) * rng.uniform(0.6, 1)
    )
    position[2] = rng.uniform(1.4, 1.6)
    yaw = math.atan2(-position[1], -position[0]) + rng.uniform(-0.6, 0.6)
    solids = []
    for _ in range(rng.integers(4, 13)):
        solid = _random_solid(rng, half, position, yaw)
        if (
            math.hypot(*(solid.centre - position)[:2]) - math.hypot(*solid.half_extent())
            > _CLEARANCE
        ):
            solids.append(solid)
    walls = _random_wall(rng)
    materials = [walls, walls, walls, walls, _random_floor(rng), _random_ceiling(rng)]
    return Scene(
        room=Box(np.array([0.0, 0.0, half[2]]), half, np.eye(3)),
        solids=solids,
        materials=materials + [_random_finish(rng) for _ in solids],
        panels=[_random_panel(rng, length) for length in half[[1, 1, 0, 0]]],
        position=position,
        axes=looking(yaw, rng.normal(-0.2, 0.06), rng.normal(0, 0.02)),
        lamp=np.array([*(rng.uniform(-0.5, 0.5, 2) * half[:2]), 2 * half[2] - 0.3]),
        ambient=rng.uniform(0.1, 0.25),
        seed=int(rng.integers(2**31)),
    )


def _random_solid(
    rng: np.random.Generator, room_half: Vector, position: Vector, yaw: float
) -> Solid:
    """A solid of a usual size in front of the camera, upright or tilted, with its lowest point on the floor."""
    kind = rng.choice(["box", "cabinet", "cylinder", "sphere"], p=[0.4, 0.2, 0.25, 0.15])
    fallen = kind != "cabinet" and rng.random() < 0.3
    tilt = rng.uniform(-math.pi / 2, math.pi / 2, 2) if fallen else np.zeros(2)
    # The columns are a camera's forward, left and up directions.
    rotation = looking(rng.uniform(-math.pi, math.pi), *tilt)[:, [2, 0, 1]] * np.array([1, -1, -1])
    origin = np.zeros(3)
    if kind == "sphere":
        solid = Sphere(origin, rng.uniform(0.12, 0.35), rotation)
    elif kind == "cylinder":
        solid = Cylinder(origin, rng.uniform(0.12, 0.3), rng.uniform(0.2, 0.5), rotation)
    elif kind == "box":
        solid = Box(origin, rng.uniform([0.15, 0.15, 0.15], [0.45, 0.4, 0.45]), rotation)
    else:
        solid = Box(origin, rng.uniform([0.3, 0.2, 0.8], [0.6, 0.3, 1.0]), rotation)
    reach = _reach(solid)
    angle, distance = yaw + rng.uniform(-0.5, 0.5), rng.uniform(1.2, 6.0)
    ahead = position[:2] + distance * np.array([math.cos(angle), math.sin(angle)])
    free = np.maximum(room_half[:2] - reach[:2], 0)
    return replace(solid, centre=np.array([*np.clip(ahead, -free, free), reach[2]]))


def _reach(solid: Solid) -> Vector:
    """How far a solid reaches from its centre along the world's axes."""
    if isinstance(solid, Sphere):
        return solid.half_extent()
    if isinstance(solid, Cylinder):
        axis = np.abs(solid.rotation[:, 2])
        return solid.radius * np.sqrt(np.maximum(1 - axis**2, 0)) + solid.half_height * axis
    return np.abs(solid.rotation) @ solid.half_extent()


def _paint(rng: np.random.Generator, low: float, high: float, tint: float) -> tuple[float, ...]:
    """A reflectance between `low` and `high`; its channels differ by up to the share `tint`."""
    return tuple((rng.uniform(low, high) * (1 - tint * rng.random(3))).tolist())


def _random_wall(rng: np.random.Generator) -> Material:
    colour = _paint(rng, 0.45, 0.8, 0.35)
    kind = rng.choice(["paint", "stripes", "bricks", "tiles"], p=[0.4, 0.2, 0.2, 0.2])
    if kind == "stripes":
        return Material(colour=colour, tile=(0.2, _ENDLESS), variation=0.25)
    if kind == "bricks":
        return Material(colour=colour, tile=(0.4, 0.2), joint=0.02, shift=0.5, variation=0.15)
    if kind == "tiles":
        return Material(colour=colour, tile=(0.3, 0.3), joint=0.015, variation=0.05)
    return Material(colour=colour)


def _random_floor(rng: np.random.Generator) -> Material:
    colour = _paint(rng, 0.2, 0.6, 0.5)
    if rng.random() < 0.5:
        side = rng.choice([0.3, 0.4, 0.5])
        return Material(colour=colour, tile=(side, side), joint=0.02, variation=0.3)
    return Material(colour=colour, tile=(1.2, 0.15), joint=0.008, shift=0.37, variation=0.3)


def _random_ceiling(rng: np.random.Generator) -> Material:
    colour = _paint(rng, 0.75, 0.9, 0.08)
    if rng.random() < 0.5:
        return Material(colour=colour)
    return Material(colour=colour, tile=(0.6, 0.6), joint=0.03, joint_colour=0.7)


def _random_finish(rng: np.random.Generator) -> Material:
    colour = _paint(rng, 0.1, 0.8, 0.85)
    if rng.random() < 0.5:
        return Material(colour=colour)
    return Material(colour=colour, tile=(_ENDLESS, 0.1), variation=0.5)


def _random_panel(rng: np.random.Generator, wall_half: float) -> Panel:
    kind = rng.choice(["door", "window", "picture"])
    sides = {"door": (0.9, 0.0, 2.0), "window": (1.2, 0.9, 2.1), "picture": (0.7, 1.3, 1.8)}
    wide, low, high = sides[kind]
    colour = (1.9, 2.0, 2.1) if kind == "window" else _paint(rng, 0.1, 0.6, 0.7)
    left = rng.uniform(-wall_half, wall_half - wide)
    return Panel(colour=colour, along=(left, left + wide), up=(low, high))


def shade(scene: Scene, camera: Camera, hits: Hits) -> Float[np.ndarray, "3 h w"]:
    """Linear light from each pixel, float32: reflectance times diffuse light, less in corners and under solids."""
    points, normals = hits.points.astype(np.float32), hits.normals.astype(np.float32)
    light = np.full(hits.depth.shape, scene.ambient, np.float32)
    for place, strength in ((scene.lamp, _LAMP), (scene.position, _FLASH)):
        to_light = place.astype(np.float32)[:, None, None] - points
        square = (to_light * to_light).sum(axis=0)
        facing = np.maximum((to_light * normals).sum(axis=0), 0) / np.sqrt(square)
        # It falls more slowly than the inverse square: the faces of the room reflect light.
        light += facing * (strength / (1 + 0.35 * square))
    light *= _corners(scene, points) * _contacts(scene, hits.surface, points)
    return _reflectance(scene, camera, hits) * light


def _corners(scene: Scene, points: np.ndarray) -> np.ndarray:
    """A factor that darkens points within some 20 cm of a wall, the floor or the ceiling."""
    gap = scene.room.half[:, None, None] - np.abs(points - scene.room.centre[:, None, None])
    dark = 0.3 * np.exp(gap.astype(np.float32) / -0.2)
    return (1 - dark[0]) * (1 - dark[1]) * (1 - dark[2])


def _contacts(scene: Scene, surface: np.ndarray, points: np.ndarray) -> np.ndarray:
    """A factor that darkens the floor under and around solids."""
    light = np.ones(surface.shape, np.float32)
    floor = surface == _FLOOR
    x, y = points[0][floor], points[1][floor]
    under = np.ones_like(x)
    for solid in scene.solids:
        radius = np.hypot(*_reach(solid)[:2])
        square = (x - np.float32(solid.centre[0])) ** 2 + (y - np.float32(solid.centre[1])) ** 2
        under *= 1 - 0.6 * np.exp(square * np.float32(-1.5 / radius**2))
    light[floor] = under
    return light


def _reflectance(scene: Scene, camera: Camera, hits: Hits) -> np.ndarray:
    """The colours of tiles, joints and panels, float32 [3 h w]."""
    of = {
        f.name: np.asarray([getattr(m, f.name) for m in scene.materials], np.float32)
        for f in fields(Material)
    }
    surface, (a, b) = hits.surface, hits.coords.astype(np.float32)
    wide, high = of["tile"].T[:, surface]
    row = np.floor(b / high)
    across = a / wide + of["shift"][surface] * row
    column = np.floor(across)
    # As a lens would blur them, a joint narrower than a pixel is drawn a pixel wide and fainter in
    # proportion, and tiles of less than two pixels become their mean.
    pixel = hits.depth.astype(np.float32) / np.float32(camera.focal[0])
    joint = of["joint"][surface]
    drawn = np.where(joint > 0, np.maximum(joint, pixel), 0)
    in_joint = ((across - column) * wide < drawn) | (b - row * high < drawn)
    shades = np.random.default_rng(scene.seed).uniform(-1, 1, _SHADES).astype(np.float32)
    number = (37 * row + 101 * column + 59 * surface).astype(np.int64) % _SHADES
    visible = np.clip(np.minimum(wide, high) / (2 * pixel) - 0.5, 0, 1)
    detail = of["variation"][surface] * shades[number]
    line = (of["joint_colour"][surface] - 1) * (joint / np.maximum(joint, pixel))
    detail = np.where(in_joint, line, detail) * visible
    colour = of["colour"].T[:, surface] * (1 + detail)
    for wall, panel in enumerate(scene.panels):
        (left, right), (low, up) = panel.along, panel.up
        inside = (surface == wall) & (a > left) & (a < right) & (b > low) & (b < up)
        colour[:, inside] = np.asarray(panel.colour, np.float32)[:, None]
    return colour


def _develop(light: Float[np.ndarray, "3 h w"], rng: np.random.Generator) -> np.ndarray:
    """Applies exposure, gamma 2.2 and sensor noise: uint8 [h w 3]."""
    exposed = np.clip(light * np.float32(_EXPOSURE), 0, 1) ** np.float32(1 / 2.2)
    exposed += 0.015 * rng.standard_normal(light.shape, dtype=np.float32)
    return np.clip(np.rint(exposed.transpose(1, 2, 0) * 255), 0, 255).astype(np.uint8)
