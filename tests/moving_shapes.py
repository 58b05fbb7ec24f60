"""A synthetic video whose flow, and what is occluded, is known exactly: discs that glide over a gliding background."""

from typing import NamedTuple

import cv2
import numpy as np


class MovingShapes(NamedTuple):
    """Frames `(N, H, W, 3)` uint8; flow `(N - 1, H, W, 2)` and occlusion `(N - 1, H, W)` of all but the last."""

    frames: np.ndarray
    flow: np.ndarray
    occluded: np.ndarray
    layers: np.ndarray  # (N, H, W): which layer each pixel shows, 0 the background


def moving_shapes(
    num_frames: int, height: int, width: int, velocities: list[tuple[int, int]], seed: int = 0
) -> MovingShapes:
    """Draw a video.

    Args:
        velocities: (x, y) pixels a frame, whole numbers: the background's first, then one for each disc.
    """
    rng = np.random.default_rng(seed)
    margin = num_frames * max(max(map(abs, velocity)) for velocity in velocities)
    textures = [_texture(rng, height + 2 * margin, width + 2 * margin) for _ in velocities]
    radius = min(height, width) // 5
    starts = [(width * (i + 1) // (len(velocities) + 1), height // 2) for i in range(len(velocities))]
    y, x = np.mgrid[:height, :width]
    frames, layers = [], []
    for t in range(num_frames):
        frame = np.zeros((height, width, 3), np.uint8)
        layer = np.zeros((height, width), int)
        for number, ((u, v), texture) in enumerate(zip(velocities, textures, strict=True)):
            left, top = margin - t * u, margin - t * v
            image = texture[top : top + height, left : left + width]
            centre_x, centre_y = starts[number][0] + t * u, starts[number][1] + t * v
            inside = (x - centre_x) ** 2 + (y - centre_y) ** 2 <= radius**2 if number else np.ones_like(x, bool)
            frame[inside], layer[inside] = image[inside], number
        frames.append(frame)
        layers.append(layer)
    flows, occluded = [], []
    for layer, following in zip(layers[:-1], layers[1:], strict=True):
        flow = np.array(velocities, np.float32)[layer]
        to_x, to_y = (np.stack([x, y]) + flow.transpose(2, 0, 1)).astype(int)
        outside = (to_x < 0) | (to_x >= width) | (to_y < 0) | (to_y >= height)
        hidden = following[to_y.clip(0, height - 1), to_x.clip(0, width - 1)] != layer
        flows.append(flow)
        occluded.append(outside | hidden)
    empty = np.zeros((0, height, width))
    return MovingShapes(
        np.stack(frames),
        np.stack(flows) if flows else empty[..., None].repeat(2, -1),
        np.stack(occluded) if occluded else empty.astype(bool),
        np.stack(layers),
    )


def _texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Blobs of many sizes and colors."""
    texture = np.zeros((height, width, 3), np.float32)
    for blur in (2, 5, 12):
        noise = cv2.GaussianBlur(rng.normal(size=(height, width, 3)).astype(np.float32), (0, 0), blur)
        texture += noise / noise.std()
    texture = 128 + 40 * texture
    return texture.clip(0, 255).astype(np.uint8)
