"""A drawn world of rooms: coloured solids on a floor, scanned and photographed, with the exact class of every point.

What a solid is takes both: points have coordinates and no colour, as a laser scanner gives them, and the colour is in the photographs
alone; shapes can be told in either. Rays are cast through the pixels of every view, so that depth, class and what hides what are exact.

Letters: N points, V views, R rays.
"""

import io
import zlib
from itertools import product
from typing import NamedTuple

import numpy as np
from PIL import Image


SHAPES = ("ball", "pillar")
COLORS = {"red": (0.85, 0.2, 0.2), "green": (0.2, 0.7, 0.25), "blue": (0.2, 0.35, 0.85)}
ROOM_CLASSES = ("floor", "wall", *(f"{color} {shape}" for color, shape in product(COLORS, SHAPES)))
ROOM_VIEWS = 4
ROOM_POINTS = 512
# A world of so many rooms, unless fewer are asked for.
MOST_ROOMS = {"train": 400}
_OTHER_ROOMS = 100

_SIDE = 4.0  # metres, of the floor
_WALL_HEIGHT = 2.0
_WALLED = 0.6  # part of the rooms that have walls: where every scene has a class, tags say nothing of it
_PIXELS = 48
_FIELD = np.tan(np.radians(35.0))  # half of what a camera sees, at a distance of 1
_SKY = 0.93
_NEAR = 1e-4


class Solid(NamedTuple):
    """Something on the floor: index of its class, shape, middle of its base (x, y), half its width, its height, metres."""

    label: int
    shape: str
    x: float
    y: float
    half: float
    height: float


class Camera(NamedTuple):
    """Where a view is from, and its axes (3,3): right, down, forward."""

    place: np.ndarray
    axes: np.ndarray


def furnished(rng):
    """Two to five solids apart from each other."""
    solids = []
    for _ in range(rng.integers(2, 6)):
        label = int(rng.integers(2, len(ROOM_CLASSES)))
        shape = ROOM_CLASSES[label].split()[1]
        half = rng.uniform(0.3, 0.45) if shape == "ball" else rng.uniform(0.15, 0.25)
        height = 2 * half if shape == "ball" else rng.uniform(1.0, 1.5)
        for _ in range(30):
            x, y = rng.uniform(half + 0.1, _SIDE - half - 0.1, 2)
            if all(np.hypot(x - o.x, y - o.y) > 1.4 * (half + o.half) for o in solids):
                solids.append(Solid(label, shape, x, y, half, height))
                break
    return solids


def camera(rng, corner):
    """A camera near a corner of the floor, at the height of eyes, that looks at the middle of the room."""
    place = np.array([*(np.array(corner) * _SIDE * 0.92 + _SIDE * 0.04), 1.6]) + rng.uniform(-0.15, 0.15, 3)
    forward = np.array([_SIDE / 2, _SIDE / 2, 0.4]) + rng.uniform(-0.3, 0.3, 3) - place
    forward /= np.linalg.norm(forward)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    return Camera(place, np.stack([right, np.cross(forward, right), forward]))


def _slabs(origin, rays, low, high):
    """Distance (R,) at which rays enter an upright box, inf if they do not."""
    with np.errstate(divide="ignore", invalid="ignore"):
        bounds = np.sort(np.stack([(low - origin) / rays, (high - origin) / rays]), axis=0)
    near, far = bounds[0].max(axis=1), bounds[1].min(axis=1)
    return np.where((near <= far) & (near > _NEAR), near, np.inf)


def _round(origin, rays, solid):
    """Distance (R,) at which rays meet a ball, or the side or the top of a pillar."""
    flat = solid.shape == "pillar"
    centre = np.array([solid.x, solid.y, 0.0 if flat else solid.half])
    axes = slice(0, 2) if flat else slice(0, 3)
    apart, along = (origin - centre)[axes], rays[:, axes]
    a, b, c = (along**2).sum(1), along @ apart, (apart**2).sum() - solid.half**2
    inside = b**2 - a * c
    distance = (-b - np.sqrt(np.maximum(inside, 0))) / np.maximum(a, 1e-12)
    distance = np.where((inside > 0) & (distance > _NEAR), distance, np.inf)
    if not flat:
        return distance
    with np.errstate(divide="ignore", invalid="ignore"):
        height = origin[2] + distance * rays[:, 2]
        distance = np.where((height >= 0) & (height <= solid.height), distance, np.inf)
        top = (solid.height - origin[2]) / rays[:, 2]
        x, y = (origin[n] + top * rays[:, n] - centre[n] for n in (0, 1))
    on_top = (top > _NEAR) & (x**2 + y**2 <= solid.half**2)
    return np.minimum(distance, np.where(on_top, top, np.inf))


def cast(origin, rays, solids, walled):
    """What rays from one place (3,) in directions (R,3) meet first: distances (R,), inf for nothing, and indices of classes (R,)."""
    thin = 0.02
    boxes = [(0, np.array([0, 0, -thin]), np.array([_SIDE, _SIDE, 0.0]))]
    if walled:
        boxes += [
            (1, np.array([-thin, 0, 0]), np.array([0.0, _SIDE, _WALL_HEIGHT])),
            (1, np.array([0, -thin, 0]), np.array([_SIDE, 0.0, _WALL_HEIGHT])),
        ]
    found = [(label, _slabs(origin, rays, low, high)) for label, low, high in boxes]
    found += [(solid.label, _round(origin, rays, solid)) for solid in solids]
    distances = np.stack([distance for _, distance in found])
    nearest = distances.argmin(axis=0)
    return distances.min(axis=0), np.array([label for label, _ in found])[nearest]


def see(viewer, points):
    """Where a camera sees points (N,3): uv (N,2) in parts of width and height, and depth (N,), below 0 behind it."""
    right, down, forward = (viewer.axes @ (points - viewer.place).T).astype(np.float64)
    depth = np.where(np.abs(forward) < _NEAR, _NEAR, forward)
    return np.stack([right / depth, down / depth], axis=1) / (2 * _FIELD) + 0.5, forward


def draw_room(rng):
    """A room: images (V,H,W,3) uint8, points (N,3) metres, uv (N,V,2), -1 where a view does not see a point, labels (N,)."""
    solids, walled = furnished(rng), rng.random() < _WALLED
    tints = {0: np.array([0.62, 0.55, 0.45]), 1: np.array([0.8, 0.8, 0.75])}
    tints |= {n: np.array(COLORS[name.split()[0]]) for n, name in enumerate(ROOM_CLASSES) if n > 1}
    tints = np.stack([tints[n] + rng.uniform(-0.1, 0.1, 3) for n in range(len(ROOM_CLASSES))])
    steps = ((np.arange(_PIXELS) + 0.5) / _PIXELS - 0.5) * 2 * _FIELD
    across, along = (grid.reshape(-1) for grid in np.meshgrid(steps, steps))
    images, points, labels, cameras = [], [], [], []
    for corner in list(product((0, 1), (0, 1)))[:ROOM_VIEWS]:
        viewer = camera(rng, corner)
        rays = np.stack([across, along, np.ones_like(across)], axis=1) @ viewer.axes
        distances, classes = cast(viewer.place, rays, solids, walled)
        met = np.isfinite(distances)
        shade = np.where(met, 1 / (1 + 0.06 * np.where(met, distances, 0.0)), 1.0)[:, None]
        colors = np.where(met[:, None], tints[classes] * shade, _SKY) + rng.normal(0, 0.02, (len(rays), 3))
        images.append(np.round(255 * colors.clip(0, 1)).astype(np.uint8).reshape(_PIXELS, _PIXELS, 3))
        chosen = rng.choice(
            np.flatnonzero(met), ROOM_POINTS // ROOM_VIEWS, replace=met.sum() < ROOM_POINTS // ROOM_VIEWS
        )
        points.append(viewer.place + distances[chosen, None] * rays[chosen])
        labels.append(classes[chosen])
        cameras.append(viewer)
    points, labels = np.concatenate(points), np.concatenate(labels)
    uv = np.full((len(points), ROOM_VIEWS, 2), -1.0)
    for n, viewer in enumerate(cameras):
        places, depth = see(viewer, points)
        rays = points - viewer.place
        distances, _ = cast(viewer.place, rays, solids, walled)
        seen = (depth > 0) & ((places >= 0) & (places <= 1)).all(axis=1) & (distances > 1 - 1e-3)
        uv[seen, n] = places[seen]
    return np.stack(images), points.astype(np.float32), uv.astype(np.float32), labels


def rooms_dataset(rows, split="train"):
    """Rows of rooms: `room`, `views` (V images), `points` (N x 3) and `uv` (N x V x 2), flattened row by row, and `labels` (N), indices of
    ROOM_CLASSES. The same split is always the same; splits have no room in common."""
    import datasets

    made = []
    for number in range(min(rows, MOST_ROOMS.get(split, _OTHER_ROOMS))):
        images, points, uv, labels = draw_room(np.random.default_rng([zlib.crc32(split.encode()), number]))
        made.append(
            {
                "room": f"{split}-{number:04d}",
                "views": [{"bytes": _png(image), "path": None} for image in images],
                "points": points.reshape(-1),
                "uv": uv.reshape(-1),
                "labels": labels,
            }
        )
    features = datasets.Features(
        {
            "room": datasets.Value("string"),
            "views": datasets.List(datasets.Image()),
            "points": datasets.List(datasets.Value("float32")),
            "uv": datasets.List(datasets.Value("float32")),
            "labels": datasets.List(datasets.Value("int64")),
        }
    )
    return datasets.Dataset.from_list(made, features=features)


def _png(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()
