"""Image pairs with exactly known flow, drawn on the fly: textured shapes that move over a textured background.

As in FlyingChairs (Dosovitskiy et al., ICCV 2015) each layer has an affine motion, the shapes' on top of the
background's. A layer is a contour filled with a texture; both lie in frame 1, and the layer's motion carries them to
frame 2, where the depth order is the same. A pair is a pure function of (options, seed, split, index).

Shapes: `H W` frame, `h w` texture, `L` layers, the background first. Points are (x, y), pixel centres whole numbers.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import cv2
import datasets
import numpy as np
from PIL import Image

from flow_data.features import FlowSample
from flow_data.synthetic_textures import cut_texture, draw_texture, list_pictures, read_picture

SPLITS = {"training": 0, "validation": 1, "all": 0}  # `all` leaves what is held out held out

RADIUS_RANGE = (0.06, 0.25)  # of a shape, relative to the frame's sqrt(H * W)
MAX_STRAIN = 0.5  # spectral norm of a motion's linear part less identity; below 1 every motion can be inverted
SUPERSAMPLING = 4  # per axis, for anti-aliased edges
TEXTURE_SCALE = (0.45, 0.75)  # texture pixels per frame pixel: enlarged, hence band-limited, in both frames
PICTURES_PER_PAIR = 3  # of the user's, for all layers
PICTURE_ANGLE = (-0.2, 0.2)  # radians


@dataclass(frozen=True)
class SyntheticOptions:
    """What to draw.

    Attributes:
        image_size: (H, W), at least 32 px each.
        displacement: (lowest, highest) mean length of the valid flow vectors of a pair in pixels, drawn log-uniformly.
        shapes: (fewest, most) foreground shapes.
        textures: Folder of pictures to cut textures from, searched recursively. None draws procedural textures.

    Raises:
        ValueError: If a range is reversed or a number too small.
    """

    image_size: tuple[int, int] = (384, 512)  # that of FlyingChairs
    displacement: tuple[float, float] = (2.0, 30.0)
    shapes: tuple[int, int] = (8, 24)
    textures: str | None = None

    def __post_init__(self) -> None:
        if min(self.image_size) < 32:
            raise ValueError(f"image_size must be (height, width) of at least 32 px each, got {self.image_size}")
        if not 0 < self.displacement[0] <= self.displacement[1]:
            raise ValueError(f"displacement must be (lowest, highest) in px, both above 0, got {self.displacement}")
        if not 0 <= self.shapes[0] <= self.shapes[1]:
            raise ValueError(f"shapes must be (fewest, most), not negative, got {self.shapes}")


class Layer(NamedTuple):
    """A contour filled with a texture, as it stands in frame 1.

    `texture` is `(h, w, 3)` uint8, mirrored at its borders; `to_texture` `(3, 3)` maps frame points to texture points;
    `contour` `(N, 2)` is a polygon around `center` `(2,)`, empty for the background, which is everywhere.
    """

    texture: np.ndarray
    to_texture: np.ndarray
    center: np.ndarray
    contour: np.ndarray


class Rendering(NamedTuple):
    """A frame.

    `image` is `(H, W, 3)` uint8; `layer` `(H, W)` the number of the topmost layer that covers the pixel wholly; `pure`
    `(H, W)` bool, False where a layer above that one covers the pixel in part.
    """

    image: np.ndarray
    layer: np.ndarray
    pure: np.ndarray


def synthetic(
    options: SyntheticOptions, split: str = "training", seed: int = 0, num_pairs: int = 22232
) -> datasets.Dataset:
    """A dataset of pairs that are drawn when they are accessed. Splits never share a pair.

    Args:
        options: What to draw.
        split: "training" or "validation".
        seed: Of the whole dataset, not negative.
        num_pairs: Length; by default that of the training split of FlyingChairs.

    Returns:
        Items `{"id", "image1", "image2", "flow": {"flow", "valid"}}`: PIL images, flow `(H, W, 2)` float32 in pixels,
        valid `(H, W)` bool. `dataset["id"]` draws every pair, `dataset.select_columns("id")["id"]` does not.

    Raises:
        ValueError: If the split is unknown or the folder of textures is missing or empty.
    """
    _stream(split)
    if options.textures is not None:
        list_pictures(options.textures)
    records = {"id": [f"{split}/{i:06d}" for i in range(num_pairs)], "index": list(range(num_pairs))}
    return datasets.Dataset.from_dict(records).with_transform(partial(_draw_batch, options, seed, split))


def _draw_batch(options: SyntheticOptions, seed: int, split: str, batch: dict[str, list]) -> dict[str, list]:
    if "index" not in batch:  # only the ids were asked for
        return batch
    samples = [render_pair(options, seed, index, split) for index in batch["index"]]
    return {
        "id": batch["id"],
        "image1": [Image.fromarray(sample.image1) for sample in samples],
        "image2": [Image.fromarray(sample.image2) for sample in samples],
        "flow": [{"flow": sample.flow, "valid": sample.valid} for sample in samples],
    }


def render_pair(options: SyntheticOptions, seed: int, index: int, split: str = "training") -> FlowSample:
    """Draw one pair. The same arguments give the same bits in every process.

    Returns:
        A sample whose `valid` leaves out the pixels of frame 1 with an edge in them, whose colours are mixed. Pixels
        that are hidden in frame 2, or leave it, stay valid: their motion is known.

    Raises:
        ValueError: If the split is unknown, or a texture cannot be read.
    """
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_stream(split), index)))
    layers = draw_layers(rng, options)
    frame1 = render(layers, np.tile(np.eye(3), (len(layers), 1, 1)), options.image_size)
    target = float(np.exp(rng.uniform(*np.log(options.displacement))))
    motions, flow = draw_motions(rng, layers, frame1, target)
    frame2 = render(layers, motions, options.image_size)
    flow[~frame1.pure] = 0
    return FlowSample(frame1.image, frame2.image, flow.astype(np.float32), frame1.pure)


def _stream(split: str) -> int:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {sorted(SPLITS)}, got {split!r}")
    return SPLITS[split]


# ---- motion ----


def draw_motions(
    rng: np.random.Generator, layers: list[Layer], frame1: Rendering, target: float
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the motion of every layer so that the mean length of the valid flow vectors is `target` pixels.

    A motion is M(p) = p + s * D(p), with D affine. The flow is linear in s, so that s follows from the target.

    Returns:
        Motions `(L, 3, 3)` from points of frame 1 to points of frame 2, and the flow `(H, W, 2)` that they make.
    """
    height, width = frame1.layer.shape
    centers = np.array([layer.center for layer in layers])
    reach = np.hypot(height, width) / np.array([2] + [6] * (len(layers) - 1))
    shifts = rng.normal(size=(len(layers), 2))
    linear = rng.normal(scale=0.3, size=(len(layers), 2, 2)) / reach[:, None, None]
    while True:
        change = np.zeros((len(layers), 3, 3))  # D, of which only the first two rows are not 0
        change[:, :2, :2] = linear
        change[:, :2, 2] = shifts - np.einsum("lij,lj->li", linear, centers)
        change[1:] += change[0]  # what the camera does, the shapes do too
        flow = affine_field(frame1.layer, change)
        lengths = np.hypot(flow[..., 0], flow[..., 1])[frame1.pure]
        scale = target / lengths.mean() if lengths.size else target  # a tiny frame may be nothing but edges
        strain = scale * np.linalg.norm(change[:, :2, :2], ord=2, axis=(1, 2)).max()
        if strain <= MAX_STRAIN:
            return np.eye(3) + scale * change, scale * flow
        linear *= 0.9 * MAX_STRAIN / strain


def affine_field(layer: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """Where the map `(L, 3, 3)` of each pixel's `layer` `(H, W)` sends the pixel, `(H, W, 2)`."""
    height, width = layer.shape
    x, y = np.arange(width), np.arange(height)[:, None]
    a, b, c, d, e, f = np.take(maps[:, :2].reshape(-1, 6), layer, axis=0).transpose(2, 0, 1)
    return np.stack([a * x + b * y + c, d * x + e * y + f], axis=-1)


# ---- drawing ----


def render(layers: list[Layer], motions: np.ndarray, size: tuple[int, int]) -> Rendering:
    """Draw the layers, moved by `motions` `(L, 3, 3)`, from back to front into a frame of (height, width)."""
    height, width = size
    to_texture = [layer.to_texture @ back for layer, back in zip(layers, np.linalg.inv(motions), strict=True)]
    image = _fill(layers[0].texture, to_texture[0], 0, 0, size)
    topmost, pure = np.zeros(size, np.uint16), np.ones(size, bool)
    for number in range(1, len(layers)):
        contour = layers[number].contour @ motions[number, :2, :2].T + motions[number, :2, 2]
        left, top = np.clip(np.floor(contour.min(axis=0)).astype(int), 0, (width, height))
        right, bottom = np.clip(np.ceil(contour.max(axis=0)).astype(int) + 1, 0, (width, height))
        if left >= right or top >= bottom:
            continue
        box = np.s_[top:bottom, left:right]
        cover = coverage(contour - (left, top), (bottom - top, right - left))
        filling = _fill(layers[number].texture, to_texture[number], left, top, cover.shape)
        image[box] = cv2.blendLinear(filling, image[box], cover, 1 - cover)
        topmost[box][cover == 1] = number
        pure[box] = (cover == 1) | (pure[box] & (cover == 0))
    return Rendering(image, topmost, pure)


def coverage(contour: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The share of each pixel, float32 `(H, W)`, that lies inside a polygon `(N, 2)`."""
    height, width = size
    fine = np.zeros((height * SUPERSAMPLING, width * SUPERSAMPLING), np.uint8)
    points = (contour + 0.5) * SUPERSAMPLING - 0.5
    cv2.fillPoly(fine, [np.rint(points * 256).astype(np.int32)], 255, shift=8)
    return cv2.resize(fine, (width, height), interpolation=cv2.INTER_AREA) / np.float32(255)


def _fill(texture: np.ndarray, to_texture: np.ndarray, left: int, top: int, size: tuple[int, int]) -> np.ndarray:
    """The texture where `to_texture` `(3, 3)` sends the box of (height, width) at (left, top)."""
    matrix = to_texture[:2].copy()
    matrix[:, 2] += to_texture[:2, :2] @ (left, top)
    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(texture, matrix, size[::-1], flags=flags, borderMode=cv2.BORDER_REFLECT_101)


# ---- layers ----


def draw_layers(rng: np.random.Generator, options: SyntheticOptions) -> list[Layer]:
    """Draw the background and the shapes, from back to front."""
    pictures = []
    if options.textures is not None:
        paths = list_pictures(options.textures)
        pictures = [read_picture(paths[i]) for i in rng.integers(len(paths), size=PICTURES_PER_PAIR)]
    height, width = options.image_size
    layers = [_draw_layer(rng, pictures, np.array([width / 2, height / 2]), options.image_size, np.empty((0, 2)))]
    for _ in range(rng.integers(options.shapes[0], options.shapes[1] + 1)):
        center = rng.uniform(0, (width, height))
        radius = np.sqrt(height * width) * np.exp(rng.uniform(*np.log(RADIUS_RANGE)))
        side = max(16, int(2 * radius))
        layers.append(_draw_layer(rng, pictures, center, (side, side), center + draw_contour(rng, radius)))
    return layers


def _draw_layer(
    rng: np.random.Generator,
    pictures: list[np.ndarray],
    center: np.ndarray,
    size: tuple[int, int],
    contour: np.ndarray,
) -> Layer:
    """Draw a texture for `size` frame pixels around `center`, and how it lies in the frame."""
    if pictures:
        scale, angle = 1.0, rng.uniform(*PICTURE_ANGLE)
        texture = cut_texture(rng, pictures[rng.integers(len(pictures))], size)
    else:
        scale, angle = rng.uniform(*TEXTURE_SCALE), rng.uniform(0, 2 * np.pi)
        texture = draw_texture(rng, (round(size[0] * scale), round(size[1] * scale)))
    to_texture = np.eye(3)
    to_texture[:2, :2] = scale * _rotation(angle)
    to_texture[:2, 2] = np.array(texture.shape[1::-1]) / 2 - to_texture[:2, :2] @ center
    return Layer(texture, to_texture, center, contour)


def _rotation(angle: float) -> np.ndarray:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def draw_contour(rng: np.random.Generator, radius: float) -> np.ndarray:
    """Draw an ellipse, a polygon or a smooth blob around (0, 0), as a polygon `(N, 2)` within `radius`."""
    kind = rng.choice(["ellipse", "polygon", "blob"])
    angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    radii = np.ones(64)
    if kind == "polygon":
        corners = rng.integers(3, 9)
        angles = 2 * np.pi * (np.arange(corners) + rng.uniform(0, 0.8, size=corners)) / corners
        radii = rng.uniform(0.5, 1, size=corners)
    elif kind == "blob":
        waves = np.arange(2, 6)
        phases, heights = rng.uniform(0, 2 * np.pi, size=4), rng.uniform(0, 0.6, size=4) / waves
        radii = 1 + np.cos(waves * angles[:, None] + phases) @ heights
    points = np.stack([np.cos(angles), np.sin(angles)], axis=1) * radii[:, None] / radii.max()
    squeezed = points * (1, rng.uniform(0.4, 1))
    return radius * squeezed @ _rotation(rng.uniform(0, np.pi))
