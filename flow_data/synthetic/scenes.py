"""What is in a synthetic pair and how it moves: flat layers before each other, or a camera between planes in depth.

Layered scenes generalize FlyingChairs (Dosovitskiy et al., ICCV 2015): a camera that pans, zooms, turns and tilts, and
shapes with motions of their own on top of it, few of them much faster than the others, as Mayer et al. (IJCV 2018)
and AutoFlow (Sun et al., CVPR 2021) found to matter. Depth scenes have a ground, walls, a far background and upright
things on the ground, with the homographies that a camera's true motion induces on planes (Hartley and Zisserman,
equation 13.2): what KITTI shows, and fast tracking shots.

Shapes: `H W` frame, `L` layers from back to front. Points are (x, y) in pixels of frame 1.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from flow_data.synthetic.motion import (
    MAX_PERSPECTIVE,
    MAX_STRAIN,
    MAX_WAVE_STRAIN,
    Motion,
    Waves,
    draw_waves,
    exponential,
)
from flow_data.synthetic.shapes import Rings, draw_outline, rotation, subdivide
from flow_data.synthetic.textures import CARTOON_KINDS, Texture

Cut = Callable[[np.random.Generator, tuple[float, float], tuple[str, ...] | None], Texture]

RADIUS_RANGE = (0.02, 0.35)  # of a shape, relative to the frame's sqrt(H * W), log-uniform: tiny things to large ones
CARTOONS = 0.12  # share of pairs of flat areas with dark outlines
OUTLINE_WIDTH = (1.0, 3.5)  # pixels
# Kinds of camera: (share, size of its translation, of its linear part, of its perspective), relative to each other.
CAMERAS = (
    (0.35, 1.0, 0.1, 0.0),  # pans
    (0.35, 1.0, 0.5, 0.3),
    (0.12, 0.3, 1.0, 0.3),  # zooms and turns
    (0.18, 0.1, 0.05, 0.0),  # rests
)
SPREAD = 0.9  # of the logarithm of a shape's own speed, which makes the tail of displacements heavy
FAST = (0.12, 3.0, 25.0)  # share of shapes that are faster still, and by which factors, log-uniform
FASTEST = 0.2  # of the frame's diagonal: a shape's own displacement stays below; 100 px at 384x512 are 0.16
SPIN = 0.35  # displacement of a shape's rim by its rotation and stretch, relative to its translation
SHORTEST_WAVE = 40.0  # pixels, of the longest wave of a deformation
WAVE_SIZE = (0.1, 0.6)  # displacement by a deformation, relative to the translation


class Layer(NamedTuple):
    """A textured plane, cut out by an outline, as it stands in frame 1.

    Args:
        window: `(h, w, 3)` uint8 texture, mirrored at its borders.
        to_texture: `(3, 3)` from frame points to texture points.
        rings: Outline, polygons `(N, 2)` filled by the even-odd rule; empty: everywhere.
        center: `(2,)`, of the outline.
        stroke: Width of a line along the outline, pixels; 0: none.
        stroke_color: `(3,)` uint8.
    """

    window: np.ndarray
    to_texture: np.ndarray
    rings: Rings
    center: np.ndarray
    stroke: float = 0.0
    stroke_color: tuple[int, int, int] = (0, 0, 0)


class Scene(NamedTuple):
    """Layers, back to front, and their motions at a given scale, which may be up to `max_scale`."""

    layers: list[Layer]
    motions: Callable[[float], list[Motion]]
    max_scale: float


def draw_layered(rng: np.random.Generator, size: tuple[int, int], num_shapes: int, cut: Cut, nonrigid: float) -> Scene:
    """Draw a background and shapes in front of it.

    Args:
        rng: Source of the random numbers.
        size: (height, width) of the frame.
        num_shapes: How many shapes.
        cut: Gives textures.
        nonrigid: Probability that a layer deforms.
    """
    height, width = size
    unit, center = np.sqrt(height * width), np.array([width / 2, height / 2])
    cartoon = rng.random() < CARTOONS
    kinds = CARTOON_KINDS if cartoon else None
    stroke = rng.uniform(*OUTLINE_WIDTH) if cartoon else 0.0
    color = rng.integers(0, 50, size=3)
    layers = [flat_layer(cut(rng, (1.1 * height, 1.1 * width), kinds), center, [])]
    radii = unit * np.exp(rng.uniform(np.log(RADIUS_RANGE[0]), np.log(RADIUS_RANGE[1]), size=num_shapes))
    wavy = rng.random(num_shapes + 1) < nonrigid
    for radius, bends in zip(radii, wavy[1:], strict=True):
        place = rng.uniform(-0.05, 1.05, size=2) * (width, height)
        rings = [ring + place for ring in draw_outline(rng, radius)]
        layer = flat_layer(cut(rng, (2 * radius, 2 * radius), kinds), place, subdivide(rings) if bends else rings)
        layers.append(layer._replace(stroke=stroke, stroke_color=tuple(color.tolist())))

    reach = np.append(np.hypot(height, width) / 2, np.maximum(radii, unit / 20))
    centers = np.array([layer.center for layer in layers])
    shares, *sizes = np.array(CAMERAS).T
    move, bend, tilt = (values[np.searchsorted(np.cumsum(shares)[:-1], rng.random())] for values in sizes)
    camera = np.zeros((3, 3))
    camera[:2, :2] = bend * _draw_linear(rng) / reach[0]
    camera[:2, 2] = move * _draw_direction(rng)
    camera[2, :2] = tilt * rng.normal(size=2) / reach[0] ** 2

    speeds = np.exp(SPREAD * rng.standard_normal(len(layers)))
    fast = rng.random(len(layers)) < FAST[0]
    speeds[fast] = np.exp(rng.uniform(np.log(FAST[1]), np.log(FAST[2]), size=fast.sum()))
    speeds[0] = 0
    shifts = speeds[:, None] * np.array([_draw_direction(rng) for _ in layers])
    linear = np.array([_draw_linear(rng) for _ in layers]) * SPIN * (speeds / reach)[:, None, None]
    waves: list[Waves | None] = [None] * len(layers)
    for i in np.flatnonzero(wavy):
        amplitude = rng.uniform(*WAVE_SIZE) * (speeds[i] if i else 1.0)
        waves[i] = draw_waves(rng, max(reach[i] * rng.uniform(1, 3), SHORTEST_WAVE), amplitude)
    fastest = FASTEST * np.hypot(height, width)

    def motions(scale: float) -> list[Motion]:
        """The exponential of the camera's generator and a shape's own; each within its limits."""
        own = np.zeros((len(layers), 3, 3))
        lengths = scale * np.linalg.norm(shifts, axis=1)
        own[:, :2, :2] = linear * limit(scale * np.linalg.norm(linear, ord=2, axis=(1, 2)), MAX_STRAIN, scale)
        own[:, :2, 2] = shifts * limit(lengths, fastest, scale)[..., 0]
        own[:, :2, 2] -= np.einsum("lij,lj->li", own[:, :2, :2], centers)
        whole = np.zeros((3, 3))
        whole[:2, :2] = camera[:2, :2] * limit(scale * np.linalg.norm(camera[:2, :2], ord=2), MAX_STRAIN, scale)
        whole[:2, 2] = camera[:2, 2] * scale
        tilts = scale * np.abs(camera[2, :2]).sum() * (height + width)
        whole[2, :2] = camera[2, :2] * limit(tilts, MAX_PERSPECTIVE, scale).ravel()
        to_center = np.eye(3)
        to_center[:2, 2] = -center
        matrices = exponential(np.linalg.inv(to_center) @ whole @ to_center + own)
        return [
            Motion(matrix, wave if wave is None else _scaled(wave, scale))
            for matrix, wave in zip(matrices, waves, strict=True)
        ]

    return Scene(layers, motions, max_scale=4 * np.hypot(height, width))


def limit(values: np.ndarray | np.floating, highest: float, scale: float) -> np.ndarray:
    """The factor `scale`, less where it takes `values` (at that scale) above `highest`; `(..., 1, 1)`."""
    return (scale * np.minimum(1, highest / np.maximum(values, 1e-12)))[..., None, None]


def _scaled(waves: Waves, scale: float) -> Waves:
    return waves._replace(amplitude=waves.amplitude * min(scale, MAX_WAVE_STRAIN / max(waves.strain(), 1e-12)))


def _draw_direction(rng: np.random.Generator) -> np.ndarray:
    """A unit vector; horizontal motion prevails, as in footage."""
    angle = rng.uniform(0, 2 * np.pi)
    vector = np.array([np.cos(angle), np.sin(angle)]) * (1, rng.uniform(0.2, 1))
    return vector / np.hypot(*vector)


def _draw_linear(rng: np.random.Generator) -> np.ndarray:
    """Zoom, rotation and a little shear, `(2, 2)`, of unit size."""
    zoom, turn = rng.normal(size=2)
    return zoom * np.eye(2) + turn * np.array([[0, -1], [1, 0]]) + 0.3 * rng.normal(size=(2, 2))


def flat_layer(texture: Texture, center: np.ndarray, rings: Rings) -> Layer:
    """A layer with the middle of its window at `center`."""
    to_texture = np.eye(3)
    to_texture[:2, :2] = texture.scale * rotation(texture.angle)
    to_texture[:2, 2] = np.array(texture.window.shape[1::-1]) / 2 - to_texture[:2, :2] @ center
    return Layer(texture.window, to_texture, rings, center)


# ---- depth ----

FOCAL_LENGTH = (0.6, 1.3)  # frame widths; KITTI's is 0.58, a short telephoto lens 1.3
HORIZON = (0.3, 0.6)  # frame heights from the top
FAR = (6.0, 30.0)  # distance of the background; the nearest ground in view is at 1
NEAR = 0.35  # distance of the nearest ground and walls that are drawn: a travelling camera uncovers them
WALL = 0.55  # probability of a wall, for each side
TRAVEL = (0.6, 0.75)  # shares of pairs in which the camera moves forward, forward or backward; else sideways
TURN = (0.03, 0.08, 0.03)  # standard deviations of its pitch, yaw and roll, radians per unit of length
MOVING = (0.5, 0.5)  # share of things that move on their own, and the standard deviation of how far, relative to it
REDUCIBLE = 32  # windows of planes can be halved so often that one side of so many pixels becomes one
MAX_TRAVEL = 0.5  # units of length between two frames
MAX_APPROACH = 0.85  # of the distance to anything that is drawn: all of it stays before the camera


class Plane(NamedTuple):
    """Where a layer is in space: normal . X = distance, as the camera of frame 1 sees it (x right, y down, z ahead).

    `points` `(N, 3)` bound what is drawn of it.
    """

    normal: tuple[float, float, float]
    distance: float
    points: np.ndarray


def draw_ego_motion(
    rng: np.random.Generator, size: tuple[int, int], num_shapes: int, cut: Cut, nonrigid: float
) -> Scene:
    """Draw planes in depth, and upright shapes that stand between them, with a camera that travels.

    Lengths are in units of the distance of the nearest ground in view. Arguments are those of `draw_layered`.
    """
    height, width = size
    focal, horizon = width * rng.uniform(*FOCAL_LENGTH), height * rng.uniform(*HORIZON)
    camera = np.array([[focal, 0, width * rng.uniform(0.35, 0.65)], [0, focal, horizon], [0, 0, 1]])
    ground = (height - horizon) / focal  # from the camera down to it

    planes = _draw_room(rng, size, focal, ground)
    density = focal * rng.uniform(0.3, 0.8)  # of the texture of near planes, pixels per unit of length
    layers = [
        _cover_plane(cut(rng, size, None), plane, camera, focal / plane.distance if index == 0 else density)
        for index, plane in enumerate(planes)
    ]
    layers[0] = layers[0]._replace(rings=[])
    end = float(planes[1].points[:, 2].max())
    waves: list[Waves | None] = [None] * len(layers)
    for distance in np.sort(np.exp(rng.uniform(0, np.log(end), size=num_shapes)))[::-1].tolist():
        radius = min(height / distance * np.exp(rng.uniform(np.log(0.05), np.log(0.6))), 0.45 * height)
        lift = radius * (rng.uniform(0.6, 1.2) if rng.random() < 0.8 else rng.uniform(1, 4))
        center = np.array([rng.uniform(-0.1, 1.1) * width, horizon + focal * ground / distance - lift])
        rings = [ring + center for ring in draw_outline(rng, radius)]
        wave = None
        if rng.random() < nonrigid:
            rings = subdivide(rings)
            amplitude = rng.uniform(*WAVE_SIZE) * focal / distance
            wave = draw_waves(rng, max(radius * rng.uniform(1, 3), SHORTEST_WAVE), amplitude)
        layers.append(flat_layer(cut(rng, (2 * radius, 2 * radius), None), center, rings))
        corners = np.array([(*(center + radius * corner), 1.0) for corner in SQUARE]) @ np.linalg.inv(camera).T
        planes.append(Plane((0.0, 0.0, 1.0), distance, corners * distance))
        waves.append(wave)

    forward = float(rng.random())
    if forward < TRAVEL[1]:
        shift = np.array([rng.normal(0, 0.08), rng.normal(0, 0.04), -1.0 if forward < TRAVEL[0] else 1.0])
    else:
        shift = np.array([rng.choice([-1.0, 1.0]), rng.normal(0, 0.1), rng.normal(0, 0.2)])
    shifts = np.tile(shift, (len(layers), 1))
    moving = rng.random(len(layers)) < MOVING[0]
    moving[: len(layers) - num_shapes] = False
    shifts[moving] += rng.normal(0, MOVING[1], size=(int(moving.sum()), 3)) * (1, 0.15, 1)
    pitch, yaw, roll = rng.normal(0, TURN)
    spin = np.array([[0, -roll, yaw], [roll, 0, -pitch], [-yaw, pitch, 0]])
    max_scale = MAX_TRAVEL
    for plane, shift in zip(planes, shifts, strict=True):
        approach = -(plane.points @ spin.T + shift)[:, 2]
        max_scale = min(max_scale, float((MAX_APPROACH * plane.points[:, 2] / np.maximum(approach, 1e-3)).min()))
    inverse = np.linalg.inv(camera)

    def motions(scale: float) -> list[Motion]:
        """K (R + t n^T / d) K^-1 of each plane, for X' = R X + t."""
        turned = exponential(scale * spin[None])[0]
        return [
            Motion(
                camera @ (turned + np.outer(scale * shift, plane.normal) / plane.distance) @ inverse,
                wave if wave is None else _scaled(wave, scale),
            )
            for plane, shift, wave in zip(planes, shifts, waves, strict=True)
        ]

    return Scene(layers, motions, max_scale)


SQUARE = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])


def _draw_room(rng: np.random.Generator, size: tuple[int, int], focal: float, ground: float) -> list[Plane]:
    """A far background, a ground, and up to two walls along the way."""
    height, width = size
    far = float(np.exp(rng.uniform(*np.log(FAR))))
    end, wide = far * rng.uniform(0.5, 1), 2 * width / focal  # wider than the frame, which may move
    corners = [(x * z, ground, z) for x, z in ((-wide, NEAR), (wide, NEAR), (wide, end), (-wide, end))]
    planes = [
        Plane((0.0, 0.0, 1.0), far, np.array([(0.0, 0.0, far)])),
        Plane((0.0, 1.0, 0.0), ground, np.array(corners)),
    ]
    for side in (-1.0, 1.0):
        if rng.random() < WALL:
            aside = width / focal * float(np.exp(rng.uniform(np.log(0.35), np.log(2.0))))
            top = ground - height / focal * np.exp(rng.uniform(np.log(0.3), np.log(4)))
            stop = end * rng.uniform(0.4, 1)
            corners = [(side * aside, y, z) for y, z in ((ground, NEAR), (ground, stop), (top, stop), (top, NEAR))]
            planes.append(Plane((side, 0.0, 0.0), aside, np.array(corners)))
    return planes


def _cover_plane(texture: Texture, plane: Plane, camera: np.ndarray, density: float) -> Layer:
    """A layer of what is drawn of a plane; `density` is how many frame pixels a unit of length would fill."""
    normal = np.array(plane.normal)
    first = np.array([0.0, 0, 1]) if normal[2] == 0 else np.array([1.0, 0, 0])
    axes = density * texture.scale * plane.distance * rotation(texture.angle) @ [first, np.cross(normal, first)]
    height, width = (side - side % REDUCIBLE if side > 2 * REDUCIBLE else side for side in texture.window.shape[:2])
    texture = texture._replace(window=texture.window[:height, :width])
    middle = np.array((width, height)) / 2
    to_texture = np.vstack([axes + np.outer(middle, normal), normal]) @ np.linalg.inv(camera)
    seen = plane.points @ camera.T
    rings = [seen[:, :2] / seen[:, 2:]]
    return Layer(texture.window, to_texture, rings, rings[0].mean(axis=0))
