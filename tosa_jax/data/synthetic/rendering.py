"""Renders boxes, spheres and cylinders exactly: rays of a pinhole camera meet them in closed form.

World axes: x and y along the floor, z up; metres. Camera axes: x right, y down, z forward, as in NYU Depth V2. The
direction of a ray has a forward component of 1. So the parameter of a point on it is the point's z-depth: the distance
along the optical axis, which depth sensors report, not the distance to the camera.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

Vector = Float[np.ndarray, "3"]
Rotation = Float[np.ndarray, "3 3"]
Rays = Float[np.ndarray, "3 *pixels"]
Coords = Float[np.ndarray, "2 *pixels"]
Values = Float[np.ndarray, "*pixels"]

ROOM_FACES = ("x low", "x high", "y low", "y high", "floor", "ceiling")
"""The names of the surfaces 0 to 5 of `Hits.surface`."""

# The colour camera that took NYU Depth V2, at 480x640 (Silberman et al. 2012, toolbox `camera_params.m`): focal lengths
# and principal point in pixels, x before y.
_NYU_SIZE = (480, 640)
_NYU_FOCAL = (518.857901, 519.469611)
_NYU_CENTRE = (325.582449, 253.736166)

_NEAR = 0.05  # metres in front of the camera; the image of what is closer may have any size


@dataclass(frozen=True, kw_only=True)
class Camera:
    """A pinhole camera. The centre of a pixel has integer coordinates.

    height, width  of the image, pixels.
    focal          focal lengths of x and y, pixels.
    centre         principal point (x, y), pixels.
    position       in the world, metres.
    axes           its columns are the camera's right, down and forward directions in the world.
    """

    height: int
    width: int
    focal: tuple[float, float]
    centre: tuple[float, float]
    position: Vector
    axes: Rotation

    def directions(self) -> Float[np.ndarray, "3 h w"]:
        """Direction of the ray through each pixel's centre, in world axes; its forward component is 1."""
        x = (np.arange(self.width) - self.centre[0]) / self.focal[0]
        y = (np.arange(self.height) - self.centre[1]) / self.focal[1]
        right, down, forward = (axis[:, None, None] for axis in self.axes.T)
        return right * x[None, None, :] + down * y[None, :, None] + forward

    def rectangle(self, corners: Float[np.ndarray, "3 n"]) -> tuple[slice, slice] | None:
        """Rows and columns that contain the image of the corners' convex hull; None: it is not in view."""
        x, y, z = self.axes.T @ (corners - self.position[:, None])
        if z.max() < _NEAR:
            return None
        if z.min() < _NEAR:  # partly behind the camera: its image may fill all pixels
            return slice(0, self.height), slice(0, self.width)
        u = x / z * self.focal[0] + self.centre[0]
        v = y / z * self.focal[1] + self.centre[1]
        rows, columns = (
            slice(max(math.floor(at.min()), 0), min(math.ceil(at.max()) + 1, size))
            for at, size in ((v, self.height), (u, self.width))
        )
        return (rows, columns) if rows.start < rows.stop and columns.start < columns.stop else None


def nyu_camera(height: int, width: int, position: Vector, axes: Rotation) -> Camera:
    """The camera of NYU Depth V2, for its images resized to height x width pixels."""
    # Of x and y. A centre moves too, since the outer edge lies half a pixel before the first centre.
    x, y = width / _NYU_SIZE[1], height / _NYU_SIZE[0]
    return Camera(
        height=height,
        width=width,
        focal=(_NYU_FOCAL[0] * x, _NYU_FOCAL[1] * y),
        centre=((_NYU_CENTRE[0] + 0.5) * x - 0.5, (_NYU_CENTRE[1] + 0.5) * y - 0.5),
        position=position,
        axes=axes,
    )


def looking(yaw: float, pitch: float, roll: float) -> Rotation:
    """Axes of a camera that looks along x, turned by `yaw` to y, by `pitch` up and by `roll` clockwise, radians."""
    cos, sin = math.cos(yaw), math.sin(yaw)
    ahead, right = np.array([cos, sin, 0.0]), np.array([sin, -cos, 0.0])
    up = np.array([0.0, 0.0, 1.0])
    forward = math.cos(pitch) * ahead + math.sin(pitch) * up
    down = math.sin(pitch) * ahead - math.cos(pitch) * up
    cos, sin = math.cos(roll), math.sin(roll)
    return np.stack([cos * right + sin * down, cos * down - sin * right, forward], axis=1)


class Solid(ABC):
    """A convex body. Its local frame: local point = rotation.T @ (point - centre)."""

    centre: Vector
    rotation: Rotation

    @abstractmethod
    def half_extent(self) -> Vector:
        """Half the sides of the local box around it, metres."""

    @abstractmethod
    def span(self, origin: Vector, rays: Rays) -> tuple[Values, Values]:
        """Parameters at which local rays enter and leave it. For a ray that misses it, enter > leave or is infinite."""

    @abstractmethod
    def surface(self, points: Rays) -> tuple[Rays, Coords]:
        """Outward unit normals of local points on it, and their two coordinates along the surface, metres."""


@dataclass(frozen=True)
class Box(Solid):
    """A block with sides of 2 * `half`."""

    centre: Vector
    half: Vector
    rotation: Rotation

    def half_extent(self) -> Vector:
        return self.half

    def span(self, origin: Vector, rays: Rays) -> tuple[Values, Values]:
        low, high = _slab(self.half[0], origin[0], rays[0])
        for axis in (1, 2):
            enter, leave = _slab(self.half[axis], origin[axis], rays[axis])
            low, high = np.maximum(low, enter), np.minimum(high, leave)
        return low, high

    def face(self, points: Rays) -> Int[np.ndarray, "*pixels"]:
        """The face nearest to each local point: 2 * axis, plus 1 on the high side."""
        shares = np.abs(points) / self.half.reshape(3, *[1] * (points.ndim - 1))
        axis = shares.argmax(axis=0)
        return 2 * axis + (np.take_along_axis(points, axis[None], axis=0)[0] > 0)

    def surface(self, points: Rays) -> tuple[Rays, Coords]:
        face = self.face(points)
        along = np.where(face < 2, points[1], points[0])
        # The second coordinate of a side face is its height.
        return _FACE_NORMALS[:, face], np.stack([along, np.where(face < 4, points[2], points[1])])


_FACE_NORMALS = np.array([[-1, 1, 0, 0, 0, 0], [0, 0, -1, 1, 0, 0], [0, 0, 0, 0, -1, 1]], float)


@dataclass(frozen=True)
class Sphere(Solid):
    """A ball of `radius`."""

    centre: Vector
    radius: float
    rotation: Rotation

    def half_extent(self) -> Vector:
        return np.full(3, self.radius)

    def span(self, origin: Vector, rays: Rays) -> tuple[Values, Values]:
        return _quadratic(origin, rays, self.radius)

    def surface(self, points: Rays) -> tuple[Rays, Coords]:
        normals = points / self.radius
        around = np.arctan2(normals[1], normals[0])
        return normals, self.radius * np.stack([around, np.arcsin(np.clip(normals[2], -1, 1))])


@dataclass(frozen=True)
class Cylinder(Solid):
    """A round column of `radius` along its own z, 2 * `half_height` high."""

    centre: Vector
    radius: float
    half_height: float
    rotation: Rotation

    def half_extent(self) -> Vector:
        return np.array([self.radius, self.radius, self.half_height])

    def span(self, origin: Vector, rays: Rays) -> tuple[Values, Values]:
        enter, leave = _quadratic(origin[:2], rays[:2], self.radius)
        low, high = _slab(self.half_height, origin[2], rays[2])
        return np.maximum(enter, low), np.minimum(leave, high)

    def surface(self, points: Rays) -> tuple[Rays, Coords]:
        x, y, z = points
        # The nearer of the two surfaces: a point at the rim belongs to either.
        end = self.half_height - np.abs(z) < self.radius - np.hypot(x, y)
        sides = np.stack([x / self.radius, y / self.radius, np.zeros_like(z)])
        ends = np.stack([np.zeros_like(z), np.zeros_like(z), np.sign(z)])
        around = self.radius * np.arctan2(y, x)
        return np.where(end, ends, sides), np.where(end, points[:2], np.stack([around, z]))


def _slab(half: float, origin: float, rays: Values) -> tuple[Values, Values]:
    """Where rays enter and leave the space between -half and half on one axis."""
    # A ray parallel to the slab divides by 0 and leaves at infinity.
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = (-half - origin) / rays, (half - origin) / rays
    return np.minimum(low, high), np.maximum(low, high)


def _quadratic(origin: np.ndarray, rays: np.ndarray, radius: float) -> tuple[Values, Values]:
    """Where rays enter and leave a sphere (three axes) or an infinite cylinder (two axes); a miss is (inf, -inf)."""
    a = (rays * rays).sum(axis=0)
    b = np.tensordot(origin, rays, axes=1)
    root = b * b - a * (origin @ origin - radius * radius)
    hit = root > 0
    root = np.sqrt(np.where(hit, root, 0))
    a = np.maximum(a, 1e-12)  # 0 where a ray runs along a cylinder's axis
    return np.where(hit, (-b - root) / a, np.inf), np.where(hit, (-b + root) / a, -np.inf)


@dataclass(frozen=True)
class Hits:
    """What each pixel shows.

    depth    z-depth, metres.
    surface  0 to 5: a face of the room (`ROOM_FACES`); 6 + k: solid k.
    points   in the world, metres.
    normals  unit vectors, towards the camera's side of the surface.
    coords   the point along its surface, metres; on walls the second is the height above the floor.
    """

    depth: Float[np.ndarray, "h w"]
    surface: Int[np.ndarray, "h w"]
    points: Float[np.ndarray, "3 h w"]
    normals: Float[np.ndarray, "3 h w"]
    coords: Float[np.ndarray, "2 h w"]


def cast(camera: Camera, room: Box, solids: Sequence[Solid]) -> Hits:
    """Casts one ray a pixel, from a camera inside `room` (a box along the world's axes), to the nearest surface.

    A solid is tested only against the pixels of the rectangle around its image.
    """
    directions = camera.directions()
    _, depth = room.span(camera.position - room.centre, directions)
    owner = np.full(depth.shape, -1)
    places = [_draw(camera, solid, k, directions, depth, owner) for k, solid in enumerate(solids)]
    points = camera.position[:, None, None] + directions * depth
    local = points - room.centre[:, None, None]
    surface = room.face(local)
    normals, coords = room.surface(local)
    normals *= -1  # the room is seen from within
    coords[1] += np.where(surface < 4, room.half[2], 0)
    for k, (solid, place) in enumerate(zip(solids, places, strict=True)):
        if place is None:
            continue
        seen = owner[place] == k
        here = points[:, *place][:, seen]
        turned, along = solid.surface(solid.rotation.T @ (here - solid.centre[:, None]))
        surface[place][seen] = len(ROOM_FACES) + k
        normals[:, *place][:, seen] = solid.rotation @ turned
        coords[:, *place][:, seen] = along
    return Hits(depth, surface, points, normals, coords)


def _draw(
    camera: Camera,
    solid: Solid,
    number: int,
    directions: Rays,
    depth: Float[np.ndarray, "h w"],
    owner: Int[np.ndarray, "h w"],
) -> tuple[slice, slice] | None:
    """Updates `depth` and `owner` where solid `number` is nearest. Returns its rectangle; None: it is not in view."""
    signs = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]).T
    corners = solid.centre[:, None] + solid.rotation @ (signs * solid.half_extent()[:, None])
    place = camera.rectangle(corners)
    if place is None:
        return None
    rays = directions[:, *place]
    rays = (solid.rotation.T @ rays.reshape(3, -1)).reshape(rays.shape)
    enter, leave = solid.span(solid.rotation.T @ (camera.position - solid.centre), rays)
    nearest = (enter > 0) & (enter < leave) & (enter < depth[place])
    depth[place][nearest] = enter[nearest]
    owner[place][nearest] = number
    return place
