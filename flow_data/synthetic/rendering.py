"""Drawing layers into frames, and the exact flow and occlusion between them.

Shapes: `H W` frame, `h w` box in it. Points are (x, y), pixel centers whole numbers. Boxes are (top, bottom, left,
right).
"""

from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np

from flow_data.synthetic.motion import STILL, Motion, project
from flow_data.synthetic.scenes import Layer
from flow_data.synthetic.textures import SMALLEST_WINDOW

SUPERSAMPLING = 4  # per axis, for anti-aliased edges
GRID_STEP = 4  # pixels between the points at which the inverse of a deformation is computed; cubic in between
BLUR_STEP = 1.5  # pixels between the positions that motion blur averages
MAX_BLUR_STEPS = 12
MOST_MIRRORED = 16  # mirror images of a window in a row
SHARPNESS = 0.6  # of receding planes: 1 never aliases but blurs them across, as reductions are isotropic
MIRRORED = cv2.BORDER_REFLECT  # whose period is the same for a window and its reductions


class Masks(NamedTuple):
    """Where the layers are in a frame.

    Args:
        boxes: Of each layer, (top, bottom, left, right), None where it is out of the frame.
        covers: Of each layer, `(h, w)` float32, the share of each pixel of its box that it covers; None as above. The
            background's are None and mean everywhere.
        strokes: In the same way, the line along the outline; None where it has none.
        label: `(H, W)` uint16, the index of the frontmost layer that covers at least half of the pixel.
    """

    boxes: list[tuple[int, int, int, int] | None]
    covers: list[np.ndarray | None]
    strokes: list[np.ndarray | None]
    label: np.ndarray


def find_masks(layers: list[Layer], motions: list[Motion] | None, size: tuple[int, int]) -> Masks:
    """Where layers are in a frame of (height, width): in frame 2 with their motions, in frame 1 without."""
    height, width = size
    boxes: list = [(0, height, 0, width)]
    covers: list = [None]
    strokes: list = [None]
    label = np.zeros(size, np.uint16)
    for index in range(1, len(layers)):
        layer, motion = layers[index], STILL if motions is None else motions[index]
        rings = [motion.forward(ring) for ring in layer.rings] if motions is not None else layer.rings
        points = np.concatenate(rings)
        margin = layer.stroke
        left, top = np.clip(np.floor(points.min(axis=0) - margin), 0, (width, height)).astype(int).tolist()
        right, bottom = np.clip(np.ceil(points.max(axis=0) + margin) + 1, 0, (width, height)).astype(int).tolist()
        if left >= right or top >= bottom:
            boxes.append(None)
            covers.append(None)
            strokes.append(None)
            continue
        rings = [ring - (left, top) for ring in rings]
        cover = coverage(rings, (bottom - top, right - left))
        stroke = coverage(rings, cover.shape, layer.stroke) if layer.stroke else None
        if stroke is not None:
            cover = np.maximum(cover, stroke)
        label[top:bottom, left:right][cover >= 0.5] = index
        boxes.append((top, bottom, left, right))
        covers.append(cover)
        strokes.append(stroke)
    return Masks(boxes, covers, strokes, label)


def coverage(rings: list[np.ndarray], size: tuple[int, int], stroke: float = 0.0) -> np.ndarray:
    """The share of each pixel, float32 `(h, w)`, inside polygons `(N, 2)` by the even-odd rule, or along their sides.

    Args:
        rings: The polygons.
        size: (height, width).
        stroke: Width of a line along the sides, pixels; 0 fills the polygons instead.
    """
    height, width = size
    fine = np.zeros((height * SUPERSAMPLING, width * SUPERSAMPLING), np.uint8)
    reach = 2.0**22 / SUPERSAMPLING  # fixed-point numbers end there
    points = [
        np.rint(np.clip((ring + 0.5) * SUPERSAMPLING - 0.5, -reach, reach) * 256).astype(np.int32) for ring in rings
    ]
    if stroke:
        cv2.polylines(fine, points, True, 255, thickness=max(1, round(stroke * SUPERSAMPLING)), shift=8)
    else:
        cv2.fillPoly(fine, points, 255, shift=8)
    return cv2.resize(fine, (width, height), interpolation=cv2.INTER_AREA) * np.float32(1 / 255)


def paint(layers: list[Layer], masks: Masks, motions: list[Motion], second: bool, shutter: float = 0.0) -> np.ndarray:
    """Draw a frame, `(H, W, 3)` uint8.

    Args:
        layers: Back to front.
        masks: Of this frame.
        motions: From frame 1 to frame 2.
        second: Whether this is frame 2.
        shutter: For which share of the time between frames the shutter is open: how far things blur as they move.
    """
    size = masks.label.shape
    image = np.empty((*size, 3), np.uint8)
    for layer, motion, box, cover, stroke in zip(
        layers, motions, masks.boxes, masks.covers, masks.strokes, strict=True
    ):
        if box is None:
            continue
        velocity = _velocity(motion, box, second) if shutter else None
        if velocity is not None and cover is not None:
            box, cover, stroke = _grow(box, cover, stroke, shutter * _speed(velocity, box), size)
        top, bottom, left, right = box
        area = bottom - top, right - left
        filling = fill(layer, motion if second else STILL, left, top, area)
        if stroke is not None:
            ink = np.full_like(filling, layer.stroke_color)
            filling = cv2.blendLinear(ink, filling, stroke, 1 - stroke)
        if velocity is not None:
            filling, cover = _blur(filling, cover, velocity, box, shutter)
        target = image[top:bottom, left:right]
        if cover is None:
            target[:] = filling
        else:
            target[:] = cv2.blendLinear(filling, target, cover, 1 - cover)
    return image


def fill(layer: Layer, motion: Motion, left: int, top: int, size: tuple[int, int]) -> np.ndarray:
    """The texture of a moved layer in the box of (height, width) at (left, top), `(h, w, 3)` uint8."""
    offset = np.eye(3)
    offset[:2, 2] = left, top
    if motion.waves is not None:
        rows, columns = (enlarging(side) for side in size)
        x, y = (np.arange(-1, matrix.shape[1] - 1) * float(GRID_STEP) for matrix in (columns, rows))
        coarse = project(layer.to_texture, motion.backward(np.stack(np.meshgrid(x + left, y + top), axis=-1)))
        x, y = (rows @ coarse[..., axis].astype(np.float32) @ columns.T for axis in (0, 1))
        return cv2.remap(layer.window, x, y, cv2.INTER_CUBIC, borderMode=MIRRORED)
    matrix = layer.to_texture @ np.linalg.inv(motion.matrix) @ offset
    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    matrix = matrix / np.abs(matrix[2]).max()
    if np.abs(matrix[2, :2] * size[::-1]).max() < 1e-7 * abs(matrix[2, 2]):
        affine = matrix[:2] / matrix[2, 2]
        return cv2.warpAffine(layer.window, affine, size[::-1], flags=flags, borderMode=MIRRORED)
    if np.abs(matrix[2, :2] * size[::-1]).max() < 0.3 * abs(matrix[2, 2]):
        return cv2.warpPerspective(layer.window, matrix, size[::-1], flags=flags, borderMode=MIRRORED)
    return _fill_receding(layer.window, matrix, size)


@lru_cache(maxsize=512)
def enlarging(length: int) -> np.ndarray:
    """The matrix `(length, N)` float32 that interpolates from every GRID_STEP-th place, one before the first on.

    Cubic convolution with a = -1/2 (Keys 1981), exact for parabolas; that of OpenCV, -3/4, is not even so for lines.
    """
    places = np.arange(length) / GRID_STEP + 1
    distance = np.abs(places[:, None] - np.arange(int(places[-1]) + 3))
    near = 1.5 * distance**3 - 2.5 * distance**2 + 1
    far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    return np.where(distance < 1, near, np.where(distance < 2, far, 0)).astype(np.float32)


def _fill_receding(window: np.ndarray, matrix: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Fill with a texture whose scale changes much over the box: reduced where it is far, or it would flicker.

    Trilinear interpolation in a pyramid (Williams, "Pyramidal parametrics", 1983).
    """
    height, width = size
    deepest = 0
    while all(side % 2 ** (deepest + 1) == 0 and side >> deepest > SMALLEST_WINDOW for side in window.shape[:2]):
        deepest += 1
    x, y = np.meshgrid(np.linspace(0, width - 1, 9), np.linspace(0, height - 1, 17))
    mapped = matrix @ np.stack([x, y, np.ones_like(x)]).reshape(3, -1)
    depth = np.where(np.abs(mapped[2]) < 1e-9, 1e-9, mapped[2])
    # Texture pixels per frame pixel: the derivative of mapped[:2] / depth by x and by y
    steps = (matrix[:2, :2, None] - (mapped[:2] / depth)[:, None] * matrix[2, :2, None]) / depth
    along_x, along_y = np.hypot(steps[0], steps[1])
    scale = np.maximum(np.minimum(along_x, along_y), SHARPNESS * np.maximum(along_x, along_y))
    level = np.clip(np.log2(np.maximum(scale, 1e-6)), 0, deepest).reshape(x.shape).astype(np.float32)
    level = cv2.resize(level, (width, height), interpolation=cv2.INTER_LINEAR)
    columns, rows = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)[:, None]
    across, down, depth = ((row[0] * columns + row[2]) + row[1] * rows for row in matrix.astype(np.float32))
    depth[np.abs(depth) < 1e-6] = 1e-6
    # Where the plane is not drawn, as beyond the horizon, points may be anywhere; mirroring them would take long.
    across, down = (
        np.clip(place / depth, -MOST_MIRRORED * side, MOST_MIRRORED * side)
        for place, side in ((across, window.shape[1]), (down, window.shape[0]))
    )
    lowest, highest = int(level.min()), int(np.ceil(level.max()))
    result: np.ndarray = np.empty(0)
    for number in range(highest + 1):
        if number >= lowest:
            shrink = np.float32(2.0**-number)
            x, y = ((place + np.float32(0.5)) * shrink - np.float32(0.5) for place in (across, down))
            layer = cv2.remap(window, x, y, cv2.INTER_LINEAR, borderMode=MIRRORED)
            share = np.clip(level - (number - 1), 0, 1)
            result = layer if number == lowest else cv2.blendLinear(layer, result, share, 1 - share)
        window = cv2.resize(window, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    return result


# ---- motion blur ----


def _velocity(motion: Motion, box: tuple[int, int, int, int], second: bool) -> np.ndarray:
    """The affine map `(2, 3)` from points of a frame to their flow, from frame 1 on, or up to frame 2, in a box."""
    top, bottom, left, right = box
    center = np.array([(left + right - 1) / 2, (top + bottom - 1) / 2])
    points = center + [(0, 0), (1, 0), (0, 1)]
    flow = points - motion.backward(points) if second else motion.forward(points) - points
    linear = np.stack([flow[1] - flow[0], flow[2] - flow[0]], axis=1)
    return np.column_stack([linear, flow[0] - linear @ center])


def _speed(velocity: np.ndarray, box: tuple[int, int, int, int]) -> float:
    """The longest flow at the corners of a box, pixels."""
    top, bottom, left, right = box
    corners = np.array([(left, top, 1), (left, bottom, 1), (right, top, 1), (right, bottom, 1)])
    return float(np.linalg.norm(corners @ velocity.T, axis=1).max())


def _grow(box, cover: np.ndarray, stroke: np.ndarray | None, length: float, size: tuple[int, int]):
    """Enlarge a box, and the masks in it, by half of `length` on each side, within the frame."""
    top, bottom, left, right = box
    margin = int(np.ceil(length / 2)) + 1
    larger = max(top - margin, 0), min(bottom + margin, size[0]), max(left - margin, 0), min(right + margin, size[1])
    sides = top - larger[0], larger[1] - bottom, left - larger[2], larger[3] - right
    cover = cv2.copyMakeBorder(cover, *sides, cv2.BORDER_CONSTANT, value=0)
    if stroke is not None:
        stroke = cv2.copyMakeBorder(stroke, *sides, cv2.BORDER_CONSTANT, value=0)
    return larger, cover, stroke


def _blur(
    filling: np.ndarray,
    cover: np.ndarray | None,
    velocity: np.ndarray,
    box: tuple[int, int, int, int],
    shutter: float,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Average a layer and its cover over the positions that it takes while the shutter is open."""
    length = shutter * _speed(velocity, box)
    if length < 0.7:
        return filling, cover
    top, _, left, _ = box
    local = velocity.copy()
    local[:, 2] += velocity[:, :2] @ (left, top)
    steps = min(int(np.ceil(length / BLUR_STEP)) + 1, MAX_BLUR_STEPS)
    size = filling.shape[1::-1]
    patch = filling if cover is None else cv2.merge([*cv2.split(filling), (cover * 255 + 0.5).astype(np.uint8)])
    total = np.zeros(patch.shape, np.float32)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    for time in shutter * np.linspace(-0.5, 0.5, steps):
        matrix = np.eye(3)[:2] - time * local
        cv2.accumulate(cv2.warpAffine(patch, matrix, size, flags=flags, borderMode=cv2.BORDER_REPLICATE), total)
    if cover is None:
        return cv2.convertScaleAbs(total, alpha=1 / steps), None
    colors = cv2.convertScaleAbs(total[..., :3], alpha=1 / steps)
    return colors, total[..., 3] * np.float32(1 / (255 * steps))


# ---- ground truth ----


def find_flow(masks: Masks, motions: list[Motion]) -> np.ndarray:
    """The flow `(H, W, 2)` float32 of the layer that is in front in each pixel of frame 1, whose masks these are."""
    height, width = masks.label.shape
    flow = np.empty((height, width, 2), np.float32)
    for index, (motion, box) in enumerate(zip(motions, masks.boxes, strict=True)):
        if box is None:
            continue
        top, bottom, left, right = box
        mask = masks.label[top:bottom, left:right] == index
        if mask.any():
            vectors = box_flow(motion, box).view(np.complex64)  # as numbers, in half of the time
            np.copyto(flow.view(np.complex64)[top:bottom, left:right], vectors, where=mask[..., None])
    return flow


def box_flow(motion: Motion, box: tuple[int, int, int, int]) -> np.ndarray:
    """The flow of a layer in a box of frame 1, `(h, w, 2)` float32, wherever it is.

    In single precision around the middle of the box, so that rounding stays below 1e-4 px.
    """
    top, bottom, left, right = box
    middle = np.array([(left + right) // 2, (top + bottom) // 2], float)
    x = np.arange(left, right, dtype=np.float32) - np.float32(middle[0])
    y = (np.arange(top, bottom, dtype=np.float32) - np.float32(middle[1]))[:, None]
    to_middle = np.eye(3)
    to_middle[:2, 2] = -middle
    matrix = to_middle @ motion.matrix @ np.linalg.inv(to_middle)
    matrix = (matrix / matrix[2, 2]).astype(np.float32)
    flow = np.zeros((bottom - top, right - left, 2), np.float32)
    if motion.waves is not None:
        phases = motion.waves.phase + motion.waves.frequency @ middle
        for frequency, phase, amplitude in zip(motion.waves.frequency, phases, motion.waves.amplitude, strict=True):
            (along, down), start = frequency.astype(np.float32), np.float32(phase % (2 * np.pi))
            swing = np.sin((along * x + start) + down * y)
            flow[..., 0] += np.float32(amplitude[0]) * swing
            flow[..., 1] += np.float32(amplitude[1]) * swing
        x, y = x + flow[..., 0], y + flow[..., 1]
    # H(p + u) - p with the identity taken out of H: differences of small numbers, not of large ones
    excess = matrix - np.eye(3, dtype=np.float32)
    depth = excess[2, 0] * x + excess[2, 1] * y
    flow[..., 0] += _excess(excess[0], x, y, x, depth)
    flow[..., 1] += _excess(excess[1], x, y, y, depth)
    return flow


def _excess(row: np.ndarray, x: np.ndarray, y: np.ndarray, own: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """(row . (x, y, 1) + own) / (1 + depth) - own, where `depth` is 0 for affine motions."""
    moved = (row[0] * x + row[2]) + row[1] * y
    return moved if not depth.any() else (moved - own * depth) / (1 + depth)


def find_occlusion(flow: np.ndarray, label1: np.ndarray, label2: np.ndarray) -> np.ndarray:
    """Which pixels of frame 1 frame 2 does not show, `(H, W)` bool: a layer in front hides them, or they leave it.

    Args:
        flow: `(H, W, 2)`.
        label1: `(H, W)`, index of the frontmost layer in frame 1.
        label2: The same of frame 2.
    """
    height, width = label1.shape
    x = np.arange(width, dtype=np.float32) + flow[..., 0]
    y = np.arange(height, dtype=np.float32)[:, None] + flow[..., 1]
    outside = np.iinfo(np.uint16).max  # in front of everything
    front = cv2.remap(label2, x, y, cv2.INTER_NEAREST, borderMode=cv2.BORDER_CONSTANT, borderValue=outside)
    return front > label1
