"""Motion of synthetic layers: a homography of the plane after a smooth deformation of it.

A point p of frame 1 is seen at H(p + u(p)) in frame 2, where u is a sum of plane waves. Both directions are exact: the
homography has an inverse, and the waves are so flat that a fixed-point iteration inverts them.

Shapes: `L` layers, `N` points, `K` waves. Points are (x, y) in pixels, homographies act on (x, y, 1).
"""

from typing import NamedTuple

import numpy as np

MAX_STRAIN = 0.5  # spectral norm of the linear part of a motion's generator; beyond, frames are hardly alike
MAX_WAVE_STRAIN = 0.3  # of a deformation: a contraction, so the iteration that inverts it converges
MAX_PERSPECTIVE = 0.25  # change of the homography's denominator over the frame
TOLERANCE = 1e-3  # pixels, of an inverted deformation


class Waves(NamedTuple):
    """A deformation u(p) = sum over k of amplitude_k * sin(frequency_k . p + phase_k).

    Args:
        frequency: `(K, 2)`, radians a pixel.
        phase: `(K,)`, radians.
        amplitude: `(K, 2)`, pixels.
    """

    frequency: np.ndarray
    phase: np.ndarray
    amplitude: np.ndarray

    def at(self, points: np.ndarray) -> np.ndarray:
        """The displacement u of points `(..., 2)`."""
        return np.sin(points @ self.frequency.T + self.phase) @ self.amplitude

    def strain(self) -> float:
        """A bound of the spectral norm of u's derivative."""
        return float((np.linalg.norm(self.frequency, axis=1) * np.linalg.norm(self.amplitude, axis=1)).sum())

    def invert(self, moved: np.ndarray) -> np.ndarray:
        """The points p whose p + u(p) is `moved` `(..., 2)`, to TOLERANCE.

        Raises:
            ArithmeticError: If the deformation folds, which those of `draw_waves` do not.
        """
        points = moved - self.at(moved)
        for _ in range(60):
            step = moved - self.at(points) - points
            points = points + step
            if np.abs(step).max(initial=0) * MAX_WAVE_STRAIN < TOLERANCE:
                return points
        raise ArithmeticError("a deformation could not be inverted")


class Motion(NamedTuple):
    """How a layer moves from frame 1 to frame 2: `matrix` `(3, 3)` after `waves`, None for a rigid one."""

    matrix: np.ndarray
    waves: Waves | None = None

    def forward(self, points: np.ndarray) -> np.ndarray:
        """Where points `(..., 2)` of frame 1 are in frame 2."""
        return project(self.matrix, points if self.waves is None else points + self.waves.at(points))

    def backward(self, points: np.ndarray) -> np.ndarray:
        """Where points `(..., 2)` of frame 2 were in frame 1."""
        flat = project(np.linalg.inv(self.matrix), points)
        return flat if self.waves is None else self.waves.invert(flat)


STILL = Motion(np.eye(3))


def project(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Apply a homography `(3, 3)`, or one for each point `(..., 3, 3)`, to points `(..., 2)`."""
    if matrix.ndim == 2:
        mapped = points @ matrix[:, :2].T + matrix[:, 2]
        return mapped[..., :2] / mapped[..., 2:]
    x, y = points[..., 0], points[..., 1]
    across, down, depth = (matrix[..., i, 0] * x + matrix[..., i, 1] * y + matrix[..., i, 2] for i in range(3))
    return np.stack([across / depth, down / depth], axis=-1)


def exponential(generators: np.ndarray) -> np.ndarray:
    """Matrix exponentials of `(L, 3, 3)`: Taylor's series of 1/64 of the generator, squared six times."""
    scaled = generators / 64
    result = term = np.broadcast_to(np.eye(3), scaled.shape)
    for order in range(1, 9):
        term = term @ scaled / order
        result = result + term
    for _ in range(6):
        result = result @ result
    return result


def draw_waves(rng: np.random.Generator, wavelength: float, amplitude: float) -> Waves:
    """Draw a smooth deformation.

    Args:
        rng: Source of the random numbers.
        wavelength: Of the longest wave, pixels; the others have from half of it on.
        amplitude: Length of the longest displacement, pixels; less where it would bend things too much.
    """
    count = int(rng.integers(1, 4))
    lengths = wavelength * np.append(1.0, rng.uniform(0.5, 1, size=count - 1))
    turns = rng.uniform(0, 2 * np.pi, size=(2, count))
    frequency = 2 * np.pi / lengths[:, None] * np.stack([np.cos(turns[0]), np.sin(turns[0])], axis=1)
    amplitudes = lengths / lengths.sum() * amplitude
    waves = Waves(
        frequency,
        rng.uniform(0, 2 * np.pi, size=count),
        amplitudes[:, None] * np.stack([np.cos(turns[1]), np.sin(turns[1])], axis=1),
    )
    excess = max(waves.strain() / MAX_WAVE_STRAIN, 1.0)
    return waves._replace(amplitude=waves.amplitude / excess)


def match_displacement(flow_length, target: float, highest: float) -> float:
    """Find the scale of all motions at which the mean flow is `target` pixels.

    Args:
        flow_length: Function of the scale that gives the mean length of the flow, nearly proportional to it.
        target: Pixels.
        highest: The largest scale that is allowed.

    Returns:
        A scale at which the mean is within 1 % of the target, unless limits of the motions prevent that.
    """
    low, high, scale = 0.0, highest, min(target, highest)
    for _ in range(12):
        length = flow_length(scale)
        if abs(length - target) <= 0.01 * target:
            break
        low, high = (scale, high) if length < target else (low, scale)
        guess = scale * target / max(length, 1e-9)
        if high - low < 1e-6 * high:
            break
        scale = guess if low < guess < high else (low + high) / 2
    return scale
