"""Textures for synthetic pairs: drawn at random, or cut from a folder of the user's own pictures.

Shapes: `h w` texture, `H W` picture.
"""

from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from flow_data.pairing import natural_order

PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm"}
PICTURE_ZOOM = (0.7, 2.0)  # picture pixels per texture pixel, where the picture is large enough


def draw_texture(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Draw colour noise of many octaves over stripes, checks, tiles or spots, uint8 `(h, w, 3)`.

    Noise on every scale gives each place a look of its own; the pattern adds edges that are long and repeat.
    """
    height, width = size
    persistence = rng.uniform(0.72, 0.95)  # amplitude of an octave relative to the next coarser one
    noise: np.ndarray = np.zeros((1, 1, 3), np.float32)
    for octave in range(min(6, max(size).bit_length()), -1, -1):
        cells = (height >> octave) + 1, (width >> octave) + 1
        noise = cv2.resize(noise, cells[::-1], interpolation=cv2.INTER_LINEAR) / persistence
        noise = noise + rng.random((*cells, 3), np.float32) - 0.5
    mix = rng.normal(0.7, 0.5, size=(3, 3))  # off 0, hence brightness in common
    noise = cv2.transform(noise[:height, :width], mix)
    noise *= rng.uniform(22, 35) / noise.std()  # grey levels: enough to match, little enough to clip rarely
    base = rng.uniform(70, 185, size=3).astype(np.float32)
    tint = rng.normal(0, 30, size=3).astype(np.float32)
    return np.clip(base + noise + _draw_pattern(rng, size)[..., None] * tint, 0, 255).astype(np.uint8)


def _draw_pattern(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """A grey pattern in -1..1, `(h, w)` or what broadcasts to it."""
    height, width = size
    kind = rng.choice(["plain", "stripes", "checks", "tiles", "spots"])
    if kind == "plain":
        return np.zeros((1, 1), np.float32)
    if kind == "spots":
        spots = rng.normal(0, 1, size=(height // 10 + 3, width // 10 + 3)).astype(np.float32)
        return np.clip(4 * cv2.resize(spots, (width, height), interpolation=cv2.INTER_CUBIC) - 1.6, -1, 1)
    across, down = _draw_bands(rng, width)[None], _draw_bands(rng, height)[:, None]
    return {"stripes": across, "checks": across * down, "tiles": np.minimum(across, down)}[kind]


def _draw_bands(rng: np.random.Generator, length: int) -> np.ndarray:
    """A line that swings between -1 and 1, in bands of uneven width."""
    knots = np.cumsum(rng.uniform(0.4, 1.6, size=length // 4 + 8) * rng.uniform(5, 16)) - 20
    signs = 1 - 2 * (np.arange(len(knots)) % 2)
    return np.clip(3 * np.interp(np.arange(length), knots, signs), -1, 1).astype(np.float32)


def cut_texture(rng: np.random.Generator, picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Cut a part out of a picture, zoomed and perhaps mirrored, uint8 `(h, w, 3)`. Small pictures are enlarged."""
    fit = min(picture.shape[0] / size[0], picture.shape[1] / size[1])
    zoom = min(fit, np.exp(rng.uniform(*np.log(PICTURE_ZOOM))))
    height, width = max(1, int(size[0] * zoom)), max(1, int(size[1] * zoom))
    top, left = rng.integers(0, picture.shape[0] - height + 1), rng.integers(0, picture.shape[1] - width + 1)
    part = picture[top : top + height, left : left + width]
    if rng.random() < 0.5:
        part = np.ascontiguousarray(part[:, ::-1])
    return cv2.resize(part, size[::-1], interpolation=cv2.INTER_AREA if zoom > 1 else cv2.INTER_CUBIC)


@lru_cache(maxsize=8)
def list_pictures(folder: str) -> tuple[str, ...]:
    """The pictures below a folder, in natural order.

    Raises:
        ValueError: If there is no such folder or no picture in it.
    """
    expected = f"expected a folder with pictures ({', '.join(sorted(PICTURE_SUFFIXES))})"
    if not Path(folder).is_dir():
        raise ValueError(f"textures: {folder} is not a folder; {expected}")
    found = [p for p in Path(folder).rglob("*") if p.suffix.lower() in PICTURE_SUFFIXES and not p.name.startswith(".")]
    if not found:
        raise ValueError(f"textures: no picture in {folder}; {expected}")
    return tuple(sorted(map(str, found), key=natural_order))


@lru_cache(maxsize=8)  # for folders of few pictures; decoding takes longer than the rest of a pair
def read_picture(path: str) -> np.ndarray:
    """Read a picture as `(H, W, 3)` uint8.

    Raises:
        ValueError: If it cannot be read; the message names the file.
    """
    try:
        with Image.open(path) as picture:
            if picture.mode.startswith("I;16"):  # Pillow would clip 16-bit grey to white
                return cv2.cvtColor((np.array(picture) >> 8).astype(np.uint8), cv2.COLOR_GRAY2RGB)
            return np.array(picture.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"textures: {path} is not a readable picture: {error}") from error
