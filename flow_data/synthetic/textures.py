"""Textures for synthetic pairs: windows of a pool of drawn images, or of the user's own images.

The pool is drawn lazily, each image once in a process, as a pure function of (seed, split, index). A use of it is a
window at a random place, zoom and rotation with colors of its own, so that few images make many textures.

Shapes: `S S` image of the pool, `h w` window, `H W` image.
"""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from flow_data.file_names import natural_order
from flow_data.shipped_files import find_shipped

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm"}
IMAGE_ZOOM = (0.7, 2.0)  # image pixels per frame pixel, where the image is large enough
IMAGE_ANGLE = (-0.2, 0.2)  # radians

SMALLEST_WINDOW = 16  # pixels per side: a smaller one would be mirrored very often
POOL_SIDE = 512  # pixels of an image of the pool
POOL_LEVELS = 3  # of its pyramid, each half as large as the one before
POOL_ZOOM = (0.3, 2.5)  # pool pixels per frame pixel: from blurred to as sharp as the frame can be
UPRIGHT = 0.5  # share of windows that are nearly upright or turned by a multiple of 90 degrees, as man-made scenes are
SHADED = 0.35  # share of windows with a gradient of light over them
# Half of the sizes that natural images have are below this many pixels; Lee, Mumford and Huang (IJCV 2001) find sizes
# of objects in natural images to follow r ** -3, which makes the statistics of images independent of their scale.
LEAF_EXPONENT = 3.0
SMALLEST_LEAF = (1.5, 6.0)  # radius in pool pixels
NOISE_SLOPE = (0.8, 1.5)  # amplitude ~ f ** -slope; natural images have 0.8 to 1.5 (Tolhurst et al. 1992)


class Texture(NamedTuple):
    """A window, and how the plane that it fills is mapped to it.

    Args:
        window: `(h, w, 3)` uint8, mirrored at its borders.
        scale: Window pixels per frame pixel.
        angle: Of the window against the frame, radians.
    """

    window: np.ndarray
    scale: float
    angle: float


class Pool(NamedTuple):
    """Which textures a pair is drawn with.

    Args:
        seed: Of the whole data set.
        stream: Index of the split, so that splits share no texture.
        size: Number of images.
    """

    seed: int
    stream: int
    size: int


# ---- windows of the pool ----


def cut_pool(
    rng: np.random.Generator, pool: Pool, size: tuple[float, float], kinds: tuple[str, ...] | None = None
) -> Texture:
    """Cut a random window out of a random image of the pool and color it at random.

    Args:
        rng: Source of the random numbers.
        pool: Which images there are.
        size: (height, width) of the area to fill, frame pixels; where the window is smaller, its mirror images follow.
        kinds: Only images of these kinds; None: of all.
    """
    number = int(rng.integers(pool.size))
    while kinds is not None and pool_kind(number) not in kinds:
        number = (number + 1) % pool.size
    zoom = float(np.exp(rng.uniform(*np.log(POOL_ZOOM))))
    angle = rng.uniform(0, 2 * np.pi)
    if rng.random() < UPRIGHT:
        angle = np.pi / 2 * np.floor(angle / (np.pi / 2)) + rng.normal(0, 0.08)
    levels = pool_image(pool, number)
    level = int(np.clip(np.ceil(np.log2(zoom) - 0.15), 0, POOL_LEVELS - 1))
    scale = min(zoom / 2**level, 1.1)
    image = levels[level]
    turned = abs(np.cos(angle)) + abs(np.sin(angle))
    height, width = (
        min(max(SMALLEST_WINDOW, int(np.ceil(side * scale * turned)) + 8), image.shape[0]) for side in size
    )
    top, left = rng.integers(0, image.shape[0] - height + 1), rng.integers(0, image.shape[1] - width + 1)
    window = image[top : top + height, left : left + width]
    flip = int(rng.integers(-1, 3))
    window = recolor(rng, window if flip == 2 else cv2.flip(window, flip))
    if rng.random() < SHADED:
        light = rng.uniform(50, 175, size=(2, 2)) if rng.random() < 0.7 else rng.uniform(50, 175, size=(3, 3))
        field = cv2.resize(light.astype(np.uint8), (width, height), interpolation=cv2.INTER_LINEAR)
        window = cv2.multiply(window, cv2.merge([field] * 3), scale=1 / 128)
    return Texture(window, scale, angle)


def recolor(rng: np.random.Generator, window: np.ndarray) -> np.ndarray:
    """Turn hues, change saturation, contrast and brightness of a window, as one linear map of its colors."""
    mean, deviation = (value.ravel() for value in cv2.meanStdDev(window))
    turn, saturation = rng.uniform(0, 2 * np.pi), rng.uniform(0, 1.2)
    if rng.random() < 0.5:
        turn = rng.normal(0, 0.3)
    brightness = rng.uniform(20, 220)
    contrast = np.exp(rng.uniform(np.log(0.3), np.log(1.4)))
    room = 0.55 * min(brightness, 255 - brightness) + 10  # about two standard deviations are not clipped
    contrast = min(contrast, room / max(float(deviation.mean()), 1.0))
    gray = np.full((3, 3), 1 / 3)
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
    hue = np.cos(turn) * (np.eye(3) - gray) + np.sin(turn) * cross
    matrix = contrast * (gray + saturation * hue)
    tint = rng.normal(0, 1, size=3)
    base = brightness + (tint - tint.mean()) * (5.0, 15.0, 35.0)[int(rng.integers(3))]
    return cv2.transform(window, np.column_stack([matrix, base - matrix @ mean]))


@lru_cache(maxsize=1024)
def pool_image(pool: Pool, number: int) -> tuple[np.ndarray, ...]:
    """An image of the pool, `(S, S, 3)` uint8, and its reductions by 2, 4, ..."""
    rng = np.random.default_rng(np.random.SeedSequence(pool.seed, spawn_key=(pool.stream, 1, number)))
    if pool_kind(number) == "collage":
        simple = [i for i in range(pool.size) if pool_kind(i) != "collage"]
        chosen = [simple[i] for i in rng.integers(len(simple), size=rng.integers(3, 7))]
        image = draw_collage(rng, [pool_image(pool, i)[0] for i in chosen])
    else:
        image = KINDS[pool_kind(number)](rng, POOL_SIDE)
    levels = [image]
    while len(levels) < POOL_LEVELS:
        levels.append(cv2.resize(levels[-1], None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA))
    return tuple(levels)


def pool_kind(number: int) -> str:
    """The kind of the pool's image `number`: kinds take turns."""
    return TURNS[number % len(TURNS)]


# ---- kinds of images ----


def draw_leaves(rng: np.random.Generator, side: int) -> np.ndarray:
    """Draw dead leaves: shapes with power-law sizes that hide each other until nothing is bare.

    Lee, Mumford and Huang, IJCV 2001; Baradad et al., NeurIPS 2021, learn from them in place of photographs. Leaves
    carry 1/f noise of an amplitude of their own.

    Returns:
        `(side, side, 3)` uint8.
    """
    smallest = float(np.exp(rng.uniform(*np.log(SMALLEST_LEAF))))
    radii = draw_leaf_radii(rng, smallest, side / 4, coverage=3.5, area=side**2)
    leaves = place_leaves(rng, radii, side)
    colors = np.empty((len(radii), 4))
    colors[:, :3] = draw_palette(rng, len(radii))
    colors[:, 3] = rng.choice([0, 40, 90, 200], size=len(radii)) * rng.uniform(0.5, 1.25)
    canvas = np.full((2 * side, 2 * side, 4), 128, np.uint8)
    for points, color in zip(leaves, colors.clip(0, 255).tolist(), strict=True):
        cv2.fillPoly(canvas, [points], color, shift=4)
    image = cv2.resize(canvas, (side, side), interpolation=cv2.INTER_AREA)
    noise = noise_field(int(rng.integers(NOISE_FIELDS)))
    shift = rng.integers(side, size=2)
    grain = np.roll(noise, tuple(shift), axis=(0, 1))[:side, :side] * image[..., 3] * np.float32(22 / 128)
    return np.clip(image[..., :3] + grain[..., None], 0, 255).astype(np.uint8)


def draw_leaf_radii(
    rng: np.random.Generator, smallest: float, largest: float, coverage: float, area: float
) -> np.ndarray:
    """Draw radii with density ~ r ** -3 between two bounds, as many as cover `area` so many times as disks."""
    low, high = smallest ** (1 - LEAF_EXPONENT), largest ** (1 - LEAF_EXPONENT)
    mean_square = 2 * np.log(largest / smallest) / (low - high)  # of r ** -3
    count = int(np.ceil(coverage * area / (np.pi * mean_square)))
    return (low - rng.random(count) * (low - high)) ** (1 / (1 - LEAF_EXPONENT))


def place_leaves(rng: np.random.Generator, radii: np.ndarray, side: int) -> np.ndarray:
    """Polygons `(N, 16, 2)` int32 at random places, in 1/16 pixels of a canvas of twice `side`, for `cv2.fillPoly`."""
    templates = np.stack([draw_template(rng) for _ in range(8)])
    if rng.random() < 0.3:
        templates[:] = templates[0]  # one shape, in all sizes
    turns = rng.uniform(0, 2 * np.pi, size=len(radii))
    if rng.random() < 0.3:
        turns = np.pi / 2 * np.floor(turns / (np.pi / 2)) + rng.normal(0, 0.1, size=len(radii))
    rotations = np.stack([np.cos(turns), -np.sin(turns), np.sin(turns), np.cos(turns)], axis=-1).reshape(-1, 2, 2)
    points = templates[rng.integers(len(templates), size=len(radii))] @ rotations * radii[:, None, None]
    points += rng.uniform(-0.05 * side, 1.05 * side, size=(len(radii), 1, 2))
    return np.rint(points * 32).astype(np.int32)


def draw_template(rng: np.random.Generator) -> np.ndarray:
    """An ellipse, box, polygon or blob of unit area's order, `(16, 2)`."""
    angles = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    kind = rng.integers(4)
    if kind == 1:  # a box: the square's radius at each angle
        circle /= np.abs(circle).max(axis=1, keepdims=True) * 1.13
    elif kind == 2:
        corners = rng.integers(3, 7)
        circle = circle[np.sort(rng.permutation(16)[:corners]).repeat(16)[::corners][:16]] * 1.2
    elif kind == 3:
        waves = np.arange(2, 5)
        swing = np.cos(waves * angles[:, None] + rng.uniform(0, 2 * np.pi, size=3)) @ (rng.uniform(0, 0.8, 3) / waves)
        circle *= 1 + swing[:, None]
    squeeze = rng.uniform(0.3, 1)
    return circle * (squeeze**-0.5, squeeze**0.5)


def draw_palette(rng: np.random.Generator, count: int) -> np.ndarray:
    """Colors `(count, 3)` in 0..255 around a few base colors; brightness varies more than hue, as in photographs."""
    bases = rng.integers(2, 9)
    centers = rng.uniform(15, 240, size=(bases, 1)) + rng.normal(0, rng.choice([8, 25, 60]), size=(bases, 3))
    colors = centers[rng.integers(bases, size=count)]
    spread = rng.uniform(3, 40)
    return colors + rng.normal(0, spread, size=(count, 1)) + rng.normal(0, spread / 4, size=(count, 3))


def draw_noise(rng: np.random.Generator, side: int, slope: float | None = None) -> np.ndarray:
    """Draw color noise whose amplitude falls as frequency ** -slope, `(side, side, 3)` uint8."""
    slope = rng.uniform(*NOISE_SLOPE) if slope is None else slope
    field = draw_spectrum(rng, (3, side, side), slope)
    mix = np.eye(3) * rng.uniform(0.1, 0.6) + rng.uniform(0.6, 1)  # mostly brightness in common
    image = np.einsum("cd,dhw->hwc", mix / np.linalg.norm(mix, axis=1, keepdims=True), field)
    return np.clip(128 + 48 * image, 0, 255).astype(np.uint8)


def draw_spectrum(rng: np.random.Generator, shape: tuple[int, ...], slope: float) -> np.ndarray:
    """Gaussian fields of unit variance, amplitude ~ f ** -slope, float32, periodic in the last two axes."""
    height, width = shape[-2:]
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.standard_normal(shape, np.float32)) * (frequency**-slope).astype(np.float32)
    field = np.fft.irfft2(spectrum, s=(height, width)).astype(np.float32)
    return field / field.std(axis=(-2, -1), keepdims=True)


NOISE_FIELDS = 8


@lru_cache(maxsize=NOISE_FIELDS)
def noise_field(number: int) -> np.ndarray:
    """One of a few gray fields `(S, S)` float32 of unit variance, to add to other things; made once in a process."""
    rng = np.random.default_rng([20, number])
    return draw_spectrum(rng, (POOL_SIDE, POOL_SIDE), slope=NOISE_SLOPE[0] + number * 0.1)


def draw_bands(rng: np.random.Generator, side: int) -> np.ndarray:
    """Draw stripes, checks, tiles, bricks or a grid of lines over smooth noise, `(side, side, 3)` uint8."""
    kind = rng.choice(["stripes", "checks", "tiles", "bricks", "grid"])
    across, down = _draw_band(rng, side)[None], _draw_band(rng, side)[:, None]
    if kind == "stripes":
        pattern = np.broadcast_to(across, (side, side))
    elif kind == "checks":
        pattern = across * down
    elif kind == "tiles":
        pattern = np.minimum(across, down)
    else:
        step = int(np.exp(rng.uniform(np.log(8), np.log(64))))
        line = max(1, round(step * rng.uniform(0.06, 0.25)))
        pattern = np.ones((side, side), np.float32)
        for row, top in enumerate(range(0, side, step)):
            pattern[top : top + line] = -1
            start = (row % 2) * step if kind == "bricks" else 0
            for left in range(start, side, 2 * step if kind == "bricks" else step):
                pattern[top : top + step, left : left + line] = -1
        pattern = cv2.blur(pattern, (2, 2))
    colors = draw_palette(rng, 2)
    share = (pattern[..., None] + 1) / 2
    image = colors[0] * share + colors[1] * (1 - share)
    return _add_grain(rng, image, rng.uniform(2, 25))


def _draw_band(rng: np.random.Generator, length: int) -> np.ndarray:
    """A line that swings between -1 and 1, in bands of more or less even width."""
    width = np.exp(rng.uniform(np.log(4), np.log(40)))
    unevenness = rng.choice([0.02, 0.6])
    knots = np.cumsum(rng.uniform(1 - unevenness, 1 + unevenness, size=length // 2 + 8) * width) - 20
    signs = 1 - 2 * (np.arange(len(knots)) % 2)
    return np.clip(width / 2 * np.interp(np.arange(length), knots, signs), -1, 1).astype(np.float32)


def draw_gradient(rng: np.random.Generator, side: int) -> np.ndarray:
    """Draw colors that change slowly, with hardly any grain: skies, walls, `(side, side, 3)` uint8."""
    knots = int(rng.integers(2, 6))
    colors = draw_palette(rng, knots**2).reshape(knots, knots, 3).astype(np.float32)
    image = cv2.resize(colors, (side, side), interpolation=cv2.INTER_CUBIC)
    return _add_grain(rng, image, rng.uniform(0.5, 10))


def draw_cartoon(rng: np.random.Generator, side: int) -> np.ndarray:
    """Draw large flat areas with dark outlines over each other, `(side, side, 3)` uint8."""
    radii = draw_leaf_radii(rng, rng.uniform(10, 25), side / 3, coverage=3.0, area=side**2)
    leaves = place_leaves(rng, radii, side)
    colors = draw_palette(rng, len(radii)).clip(0, 255).tolist()
    line = [float(value) for value in rng.uniform(0, 60, size=3)]
    widths = rng.integers(2, 9, size=len(radii))
    canvas = np.full((2 * side, 2 * side, 3), 200, np.uint8)
    for points, color, width in zip(leaves, colors, widths.tolist(), strict=True):
        cv2.fillPoly(canvas, [points], color, shift=4)
        cv2.polylines(canvas, [points], True, line, thickness=width, shift=4)
    return cv2.resize(canvas, (side, side), interpolation=cv2.INTER_AREA)


def draw_writing(rng: np.random.Generator, side: int) -> np.ndarray:
    """Draw rows of letters, lines and rings on a calm ground: thin detail, high contrast, `(side, side, 3)` uint8."""
    image = cv2.resize(draw_gradient(rng, side), (2 * side, 2 * side), interpolation=cv2.INTER_LINEAR)
    ink = draw_palette(rng, 3).clip(0, 255).tolist()
    top = 0.0
    while top < 2 * side:
        size = float(np.exp(rng.uniform(np.log(0.5), np.log(3))))
        top += 30 * size
        letters = "".join(map(chr, rng.integers(33, 127, size=int(2 * side / (18 * size)))))
        font, thickness = int(rng.integers(0, 8)), max(1, round(size * rng.uniform(1, 3)))
        cv2.putText(image, letters, (-10, int(top)), font, size, ink[rng.integers(3)], thickness, cv2.LINE_AA)
    for _ in range(rng.integers(0, 40)):
        start, stop = rng.integers(0, 2 * side, size=(2, 2)).tolist()
        cv2.line(image, start, stop, ink[rng.integers(3)], int(rng.integers(1, 8)), cv2.LINE_AA)
    for _ in range(rng.integers(0, 20)):
        center, radius = rng.integers(0, 2 * side, size=2).tolist(), int(rng.integers(5, 80))
        cv2.circle(image, center, radius, ink[rng.integers(3)], int(rng.integers(1, 6)), cv2.LINE_AA)
    return cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)


def draw_collage(rng: np.random.Generator, images: list[np.ndarray]) -> np.ndarray:
    """Fill dead leaves, large ones, with other images `(S, S, 3)`: a scene of many materials."""
    side = images[0].shape[0]
    radii = draw_leaf_radii(rng, rng.uniform(15, 50), side / 2.5, coverage=2.5, area=side**2)
    leaves = place_leaves(rng, radii, side)
    label = np.zeros((2 * side, 2 * side), np.uint8)
    for points, owner in zip(leaves, rng.integers(len(images), size=len(radii)).tolist(), strict=True):
        cv2.fillPoly(label, [points], owner, shift=4)
    result: np.ndarray = np.zeros((side, side, 3), np.uint8)
    for owner, image in enumerate(images):
        mask = cv2.resize((label == owner).view(np.uint8) * 255, (side, side), interpolation=cv2.INTER_AREA)
        turned = np.ascontiguousarray(np.rot90(recolor(rng, image), int(rng.integers(4))))
        result = cv2.add(result, cv2.multiply(turned, cv2.merge([mask] * 3), scale=1 / 255))
    return result


def _add_grain(rng: np.random.Generator, image: np.ndarray, deviation: float) -> np.ndarray:
    side = image.shape[0]
    noise = np.roll(noise_field(int(rng.integers(NOISE_FIELDS))), tuple(rng.integers(POOL_SIDE, size=2)), axis=(0, 1))
    return np.clip(image + deviation * noise[:side, :side, None], 0, 255).astype(np.uint8)


KINDS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "leaves": draw_leaves,
    "noise": draw_noise,
    "bands": draw_bands,
    "gradient": draw_gradient,
    "cartoon": draw_cartoon,
    "writing": draw_writing,
}
# What takes turns in the pool: natural statistics prevail, as in the images that models meet.
TURNS = ("leaves", "collage", "noise", "collage", "leaves", "bands", "gradient", "collage",
         "leaves", "cartoon", "collage", "writing", "leaves", "collage", "noise", "gradient")  # fmt: skip
CARTOON_KINDS = ("cartoon", "gradient")


# ---- the user's images ----


def cut_from_image(rng: np.random.Generator, image: np.ndarray, size: tuple[float, float]) -> Texture:
    """Cut a part for an area of `size` frame pixels out of an image, zoomed and perhaps mirrored.

    Colors stay as they are. Small images are enlarged.
    """
    area = max(SMALLEST_WINDOW, round(size[0])), max(SMALLEST_WINDOW, round(size[1]))
    fit = min(image.shape[0] / area[0], image.shape[1] / area[1])
    zoom = min(fit, np.exp(rng.uniform(*np.log(IMAGE_ZOOM))))
    height, width = max(1, int(area[0] * zoom)), max(1, int(area[1] * zoom))
    top, left = rng.integers(0, image.shape[0] - height + 1), rng.integers(0, image.shape[1] - width + 1)
    part = image[top : top + height, left : left + width]
    if rng.random() < 0.5:
        part = np.ascontiguousarray(part[:, ::-1])
    window = cv2.resize(part, area[::-1], interpolation=cv2.INTER_AREA if zoom > 1 else cv2.INTER_CUBIC)
    return Texture(window, 1.0, rng.uniform(*IMAGE_ANGLE))


@lru_cache(maxsize=8)
def list_images(folder: str) -> tuple[str, ...]:
    """The images below a folder, in natural order; hidden files and folders, such as thumbnails, are left out.

    Args:
        folder: A path, or `find_shipped`'s name of the shipped frames.

    Raises:
        ValueError: If there is no such folder or no image in it.
    """
    root = Path(find_shipped(folder))
    expected = f"expected a folder with images ({', '.join(sorted(IMAGE_SUFFIXES))})"
    if not root.is_dir():
        raise ValueError(f"textures: {folder} is not a folder; {expected}")
    found = [
        path
        for path in root.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
    ]
    if not found:
        raise ValueError(f"textures: no image in {folder}; {expected}")
    return tuple(sorted(map(str, found), key=natural_order))


@lru_cache(maxsize=8)  # for folders of few images; decoding takes longer than the rest of a pair
def read_image(path: str) -> np.ndarray:
    """Read an image as `(H, W, 3)` uint8.

    Raises:
        ValueError: If it cannot be read; the message names the file.
    """
    try:
        with Image.open(path) as image:
            sixteen_bits = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
            if sixteen_bits:  # Pillow would clip 16-bit gray to white
                return cv2.cvtColor((np.array(image) >> 8).astype(np.uint8), cv2.COLOR_GRAY2RGB)
            if image.mode in ("I", "F"):  # would be clipped, too, and their range is unknown
                raise ValueError(f"textures: {path} must have 8 or 16 bits; got 32. Convert it.")
            return np.array(image.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"textures: {path} is not a readable image: {error}") from error
