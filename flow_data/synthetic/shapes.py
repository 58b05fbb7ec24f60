"""Outlines of what moves in synthetic pairs: solid, with holes, thin, or ragged as foliage.

An outline is a list of rings, polygons `(N, 2)` around (0, 0), filled by the even-odd rule: a ring within a ring is a
hole. Units are the shape's radius.
"""

from collections.abc import Callable

import cv2
import numpy as np

Rings = list[np.ndarray]

THIN = (1.2, 5.0)  # pixels that bars, lines and branches are wide; a thinner one has no pixel of its own
SMOOTH_EVERY = 3.0  # pixels between corners that a deformation moves apart


def draw_outline(rng: np.random.Generator, radius: float, kind: str | None = None) -> Rings:
    """Draw an outline within `radius` pixels of (0, 0).

    Args:
        rng: Source of the random numbers.
        radius: Pixels.
        kind: One of SHAPES; None: drawn by its share.
    """
    if kind is None:
        kind = KINDS[int(np.searchsorted(SHARES, rng.random()))]
    rings = SHAPES[kind](rng, radius)
    squeezed = (1.0, rng.uniform(0.45, 1)) if kind in SQUEEZED else (1.0, 1.0)
    angle = rng.uniform(0, 2 * np.pi)
    if kind in UPRIGHT and rng.random() < 0.6:
        angle = np.pi / 2 * rng.integers(4) + rng.normal(0, 0.06)
    rings = [ring * squeezed for ring in rings]
    longest = max(np.hypot(ring[:, 0], ring[:, 1]).max() for ring in rings)
    return [radius / longest * ring @ rotation(angle) for ring in rings]


def rotation(angle: float) -> np.ndarray:
    """The matrix `(2, 2)` of a rotation by `angle` radians."""
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def subdivide(rings: Rings, step: float = SMOOTH_EVERY) -> Rings:
    """The same rings with corners at most `step` apart, so that a deformation can bend their sides."""
    finer = []
    for ring in rings:
        sides = np.roll(ring, -1, axis=0) - ring
        counts = np.clip(np.ceil(np.hypot(sides[:, 0], sides[:, 1]) / step), 1, 400).astype(int)
        side = np.repeat(np.arange(len(ring)), counts)
        share = (np.arange(len(side)) - (np.cumsum(counts) - counts)[side]) / counts[side]
        finer.append(ring[side] + sides[side] * share[:, None])
    return finer


def _ellipse(rng: np.random.Generator, radius: float) -> Rings:
    return [_circle(48)]


def _circle(corners: int) -> np.ndarray:
    angles = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _polygon(rng: np.random.Generator, radius: float) -> Rings:
    corners = int(rng.integers(3, 9))
    angles = 2 * np.pi * (np.arange(corners) + rng.uniform(0, 0.8, size=corners)) / corners
    return [np.stack([np.cos(angles), np.sin(angles)], axis=1) * rng.uniform(0.5, 1, size=(corners, 1))]


def _blob(rng: np.random.Generator, radius: float) -> Rings:
    angles, waves = np.linspace(0, 2 * np.pi, 64, endpoint=False), np.arange(2, 8)
    phases, heights = rng.uniform(0, 2 * np.pi, size=6), rng.uniform(0, 0.6, size=6) / waves
    radii = 1 + np.cos(waves * angles[:, None] + phases) @ heights
    return [_circle(64) * radii[:, None]]


def _star(rng: np.random.Generator, radius: float) -> Rings:
    points = int(rng.integers(4, 12))
    return [_circle(2 * points) * np.tile([1, rng.uniform(0.3, 0.85)], points)[:, None]]


def _box(rng: np.random.Generator, radius: float) -> Rings:
    height = np.exp(rng.uniform(np.log(0.15), 0))
    return [np.array([[-1, -height], [1, -height], [1, height], [-1, height]])]


def _ring(rng: np.random.Generator, radius: float) -> Rings:
    """A solid shape with one to four holes: wheels, handles, chairs."""
    outer = (_ellipse, _blob, _box)[int(rng.integers(3))](rng, radius)[0]
    if rng.random() < 0.5:
        return [outer, outer[::-1] * rng.uniform(0.5, 0.93)]
    holes = [_circle(20) * rng.uniform(0.1, 0.28) + center for center in 0.5 * _circle(int(rng.integers(2, 5)))]
    return [outer, *(hole * (1, np.abs(outer[:, 1]).max()) for hole in holes)]


def _bars(rng: np.random.Generator, radius: float) -> Rings:
    """Parallel bars, as of a fence; with cross bars a grid."""
    width = _thin(rng, radius)
    step = width * rng.uniform(2, 7)
    count = int(np.clip(2 / step, 1, 9))
    edges = (np.arange(count) - (count - 1) / 2) * step
    if rng.random() < 0.5:
        return [_strip(np.array([[x, -1.0], [x, 1.0]]), width) for x in edges]
    span = edges[-1] + width / 2
    frame = np.array([[-span, -span], [span, -span], [span, span], [-span, span]])
    low, high = edges[:-1] + width / 2, edges[1:] - width / 2
    cells = [
        np.array([[a, c], [a, d], [b, d], [b, c]])
        for a, b in zip(low, high, strict=True)
        for c, d in zip(low, high, strict=True)
    ]
    return [frame, *cells]


def _lines(rng: np.random.Generator, radius: float) -> Rings:
    """One or a few long thin things, straight or bent."""
    rings = []
    for _ in range(rng.integers(1, 4)):
        bend, x = rng.normal(0, 0.3, size=2), np.linspace(-1, 1, 16)
        line = np.stack([x, bend[0] * x**2 + bend[1] * x**3 + rng.uniform(-0.4, 0.4)], axis=1)
        rings.append(_strip(line @ rotation(rng.normal(0, 0.5)), _thin(rng, radius)))
    return rings


def _branches(rng: np.random.Generator, radius: float) -> Rings:
    """A stem with branches on branches."""
    width = 1.5 * _thin(rng, radius)
    rings, ends = [], [(np.array([0.0, 1.0]), -np.pi / 2, 1.0)]
    for _ in range(rng.integers(2, 4)):
        grown = []
        for start, direction, length in ends:
            for _ in range(rng.integers(2, 4)):
                angle = direction + rng.normal(0, 0.5)
                stop = start + 0.7 * length * np.array([np.cos(angle), np.sin(angle)])
                middle = (start + stop) / 2 + rng.normal(0, 0.06, size=2) * length
                rings.append(_strip(np.stack([start, middle, stop]), max(width * length, 1.2 / radius)))
                grown.append((stop, angle, 0.65 * length))
        ends = grown[:8]
    return rings


def _foliage(rng: np.random.Generator, radius: float) -> Rings:
    """Where smooth noise on a mound exceeds a threshold: ragged, with holes and loose parts."""
    cells, side = int(rng.integers(5, 18)), 80
    noise = cv2.resize(rng.standard_normal((cells, cells), np.float32), (side, side), interpolation=cv2.INTER_CUBIC)
    x = np.linspace(-1, 1, side, dtype=np.float32)
    mound = np.hypot(x, x[:, None]) ** 2
    mask = (noise * rng.uniform(0.4, 1.2) > 2.5 * mound - rng.uniform(0.4, 1.4)).astype(np.uint8)
    mask[[0, -1]] = mask[:, [0, -1]] = 0
    contours, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    rings = []
    for contour in sorted(contours, key=len, reverse=True)[:40]:
        ring = contour[:, 0].astype(float)
        if len(ring) >= 8:  # smoothed: the steps of the mask's pixels would show on large shapes
            ring = np.mean([np.roll(ring, shift, axis=0) for shift in (-2, -1, 0, 1, 2)], axis=0)
            rings.append(ring * (2 / side) - 1)
    return rings or _ellipse(rng, radius)


def _thin(rng: np.random.Generator, radius: float) -> float:
    """A width in units of the radius."""
    return min(float(np.exp(rng.uniform(*np.log(THIN)))) / radius, 0.5)


def _strip(line: np.ndarray, width: float) -> np.ndarray:
    """A ring around a line `(N, 2)`."""
    along = np.gradient(line, axis=0)
    across = np.stack([-along[:, 1], along[:, 0]], axis=1) / np.hypot(along[:, :1], along[:, 1:]) * width / 2
    return np.concatenate([line + across, (line - across)[::-1]])


SHAPES: dict[str, Callable[[np.random.Generator, float], Rings]] = {
    "ellipse": _ellipse,
    "polygon": _polygon,
    "blob": _blob,
    "star": _star,
    "box": _box,
    "ring": _ring,
    "bars": _bars,
    "lines": _lines,
    "branches": _branches,
    "foliage": _foliage,
}
KINDS = tuple(SHAPES)
SHARES = np.cumsum([0.12, 0.16, 0.18, 0.05, 0.15, 0.08, 0.07, 0.06, 0.04, 0.09])  # solid things prevail
SQUEEZED = ("ellipse", "polygon", "blob", "star", "ring", "foliage")
UPRIGHT = ("box", "bars", "branches")
