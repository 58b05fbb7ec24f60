"""How a camera sees a frame: light, exposure, fog, focus, noise, compression. The flow stays as it is.

A pair has one tone; what differs between its frames is mostly slight, in a few pairs strong. Sun et al. (CVPR 2021,
2022) find that such changes decide how well synthetic training carries over to real footage.

Shapes: `H W` frame.
"""

from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np

LEVELS = np.arange(256) / 255
STEADY = 0.45  # share of pairs with one exposure for both frames, as most cameras keep it
TONE = (0.3, 0.15, 0.06, 0.06, 0.06)  # standard deviations over pairs: log gamma, log gain, those of the channels
CHANGE = 0.035  # standard deviation of the logarithms of gain and gamma between frames, at strength 1
STRONG_CHANGE = (0.1, 5.0)  # share of pairs that change so many times more
LIGHT = 0.2  # share of pairs whose light falls differently in both frames
SHADOW = 0.12  # share of pairs with a shadow's edge that moves on its own
FOG = 0.08  # share of pairs
BLUR = (0.2, 0.35, 1.4)  # share of pairs with defocus, and its range of sigma in pixels
NOISE = (0.4, 1.0, 9.0)  # share of pairs with sensor noise, and its range of sigma in gray levels, log-uniform
JPEG = (0.15, 35, 95)  # share of pairs, range of quality
SHUTTER = (0.25, 0.1, 0.7)  # share of pairs with motion blur, range of the share of time that the shutter is open


class Appearance(NamedTuple):
    """What is done to a frame, in this order; None for nothing.

    Args:
        curves: `(1, 256, 3)` uint8, the value of each level in each channel.
        light: `(h, w)` float32 gains on a coarse grid over the frame.
        shadow: Polygon `(N, 2)`, relative to the frame's size, and the gain in it.
        fog: `(h, w)` float32 shares on a coarse grid, and its color.
        blur: Sigma of defocus, pixels.
        noise: Sigma in gray levels, and where in the tile of noise it comes from.
        quality: Of JPEG.
    """

    curves: np.ndarray | None = None
    light: np.ndarray | None = None
    shadow: tuple[np.ndarray, float] | None = None
    fog: tuple[np.ndarray, np.ndarray] | None = None
    blur: float = 0.0
    noise: tuple[float, int] | None = None
    quality: int | None = None


def draw_shutter(rng: np.random.Generator, strength: float) -> float:
    """Draw for which share of the time between two frames the shutter is open; often 0, which is no motion blur."""
    share, low, high = SHUTTER
    return strength * rng.uniform(low, high) if rng.random() < share else 0.0


def draw_appearances(rng: np.random.Generator, strength: float) -> tuple[Appearance, Appearance]:
    """Draw how frame 1 and frame 2 look.

    Args:
        rng: Source of the random numbers.
        strength: 0 leaves both frames as they are painted, 1 is the default; it scales every effect.
    """
    if strength == 0:
        return Appearance(), Appearance()
    change = strength * CHANGE
    if rng.random() < STRONG_CHANGE[0]:
        change *= STRONG_CHANGE[1]
    elif rng.random() < STEADY:
        change = 0.0
    tone = strength * rng.normal((0.15, -0.03, 0, 0, 0), TONE)  # darker: clipped light has no texture
    tones = [tone + change * rng.normal(size=5) * (1, 1, 0.4, 0.4, 0.4) for _ in range(2)]
    frames = [Appearance(curves=make_curves(tone)) for tone in tones]

    if rng.random() < LIGHT:
        spread = 0.25 * strength * rng.random()
        base = rng.normal(size=(3, 3))
        frames = [
            frame._replace(light=np.exp(spread * (base + 0.25 * rng.normal(size=(3, 3)))).astype(np.float32))
            for frame in frames
        ]
    if rng.random() < SHADOW:
        angles = np.sort(rng.uniform(0, 2 * np.pi, size=rng.integers(3, 8)))
        ring = rng.uniform(0, 1, size=2) + rng.uniform(0.15, 0.8) * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        gain = 1 - strength * rng.uniform(0.1, 0.6)
        shift = rng.normal(0, 0.04, size=2)
        frames = [frame._replace(shadow=(ring + i * shift, gain)) for i, frame in enumerate(frames)]
    if rng.random() < FOG:
        color = np.full(3, rng.uniform(60, 255)) + rng.normal(0, 12, size=3)
        base, density = rng.normal(size=(4, 4)), strength * rng.uniform(0.1, 0.6)
        frames = [
            frame._replace(fog=(density / (1 + np.exp(-base - 0.3 * rng.normal(size=(4, 4)))), color))
            for frame in frames
        ]
    if rng.random() < BLUR[0]:
        sigma = rng.uniform(*BLUR[1:])
        other = sigma if rng.random() < 0.6 else rng.uniform(0, BLUR[2])
        frames = [frame._replace(blur=strength * value) for frame, value in zip(frames, (sigma, other), strict=True)]
    if rng.random() < NOISE[0]:
        sigma = strength * np.exp(rng.uniform(*np.log(NOISE[1:])))
        frames = [frame._replace(noise=(sigma, int(rng.integers(NOISE_TILE)))) for frame in frames]
    if rng.random() < JPEG[0]:
        quality = int(100 - strength * (100 - rng.integers(*JPEG[1:])))
        frames = [frame._replace(quality=quality) for frame in frames]
    return frames[0], frames[1]


def make_curves(tone: np.ndarray) -> np.ndarray:
    """The curve of each channel, `(1, 256, 3)` uint8, of (log gamma, log gain, log gains of the channels)."""
    gamma, gain = np.exp(tone[0]), np.exp(tone[1] + tone[2:])
    return np.rint(255 * np.clip(gain * LEVELS[:, None] ** gamma, 0, 1)).astype(np.uint8)[None]


def apply_appearance(image: np.ndarray, appearance: Appearance) -> np.ndarray:
    """Make a frame `(H, W, 3)` uint8 look so; the input is left as it is."""
    height, width = image.shape[:2]
    if appearance.curves is not None:
        image = cv2.LUT(image, appearance.curves)
    gain = None if appearance.light is None else _enlarge(appearance.light, image)
    if appearance.shadow is not None:
        ring, factor = appearance.shadow
        mask = np.ones((height // 2 + 1, width // 2 + 1), np.float32)
        cv2.fillPoly(mask, [np.rint(ring * (width / 2, height / 2)).astype(np.int32)], factor)
        shade = cv2.resize(cv2.blur(mask, (5, 5)), (width, height), interpolation=cv2.INTER_LINEAR)
        gain = shade if gain is None else gain * shade
    if gain is not None:
        image = cv2.multiply(image, cv2.merge([gain] * 3), dtype=cv2.CV_8U)
    if appearance.fog is not None:
        share = _enlarge(appearance.fog[0].astype(np.float32), image)
        haze = np.full_like(image, np.clip(appearance.fog[1], 0, 255).astype(np.uint8))
        image = cv2.blendLinear(haze, image, share, 1 - share)
    if appearance.blur > 0.2:
        image = cv2.GaussianBlur(image, (0, 0), appearance.blur)
    if appearance.noise is not None:
        sigma, start = appearance.noise
        noise = noise_tile().take(np.arange(start, start + image.size), mode="wrap").reshape(image.shape)
        image = cv2.addWeighted(image, 1.0, noise, sigma, 0, dtype=cv2.CV_8U)
    if appearance.quality is not None:
        _, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, appearance.quality])
        image = np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR))
    return image


NOISE_TILE = 1 << 21  # numbers


@lru_cache(maxsize=1)
def noise_tile() -> np.ndarray:
    """Normal noise, `(NOISE_TILE,)` float32, drawn once in a process; frames take it from different places."""
    return np.random.default_rng(21).standard_normal(NOISE_TILE, np.float32)


def _enlarge(grid: np.ndarray, image: np.ndarray) -> np.ndarray:
    return cv2.resize(grid, image.shape[1::-1], interpolation=cv2.INTER_LINEAR)
