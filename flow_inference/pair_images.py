"""Images that explain the flow of one pair of frames: arrows, the warped frame, what is occluded, how flow disagrees.

All are `(H, W, 3)` uint8, RGB. Colors of flow itself are in `flow_data.visualize`.
"""

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flow_data.optional_packages import needs_extra
from flow_data.visualize import draw_flow, draw_legend, pad_image
from flow_inference.video import VideoFlow
from flow_inference.visualization import WHITE_ERROR
from modeling_raft.correlation_raft import warp

ARROWS_A_SIDE = 24  # arrows along the longer side of an image
ARROW_COLOR, ARROW_OUTLINE = (255, 230, 60), (30, 30, 30)  # seen on bright and on dark frames
OCCLUDED_COLOR = (230, 30, 120)
OCCLUDED_OPACITY = 0.65
MARK_COLOR, MARK_OUTLINE = (0, 240, 255), (0, 0, 0)
LEGEND_SHARE = 0.4  # of an image's height that its legend may take


def resize_image(image: np.ndarray, side: int) -> np.ndarray:
    """Resize an image to a longer side, in proportion, to be shown.

    Args:
        image: `(H, W, 3)` uint8.
        side: Pixels.
    """
    height, width = image.shape[:2]
    scale = side / max(height, width)
    size = max(1, round(scale * width)), max(1, round(scale * height))
    method = Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(image).resize(size, method))


def warp_back(frame2: np.ndarray, flow: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Warp frame 2 to frame 1: where flow is right and nothing is occluded, it looks like frame 1.

    Args:
        frame2: `(H, W, 3)` uint8.
        flow: `(2, H, W)`, from frame 1 to frame 2, pixels.

    Returns:
        The warped frame, black where flow leaves the frame; and `(H, W)` bool, False there.
    """
    pixels = torch.from_numpy(np.ascontiguousarray(frame2)).permute(2, 0, 1)[None].float()
    warped, inside = warp(pixels, flow.detach().float().cpu()[None])
    image = warped[0].permute(1, 2, 0).round().clamp(0, 255).byte().numpy()
    mask = inside[0].numpy()
    return np.where(mask[..., None], image, 0).astype(np.uint8), mask


def draw_difference(frame1: np.ndarray, frame2: np.ndarray, flow: Tensor) -> np.ndarray:
    """Absolute difference between frame 1 and frame 2 warped back; black where flow leaves the frame.

    Args:
        frame1, frame2: `(H, W, 3)` uint8.
        flow: `(2, H, W)`, from frame 1 to frame 2, pixels.
    """
    warped, inside = warp_back(frame2, flow)
    difference = np.abs(frame1.astype(np.int16) - warped.astype(np.int16))
    return np.where(inside[..., None], difference, 0).astype(np.uint8)


def draw_occlusion(frame1: np.ndarray, occluded: Tensor) -> np.ndarray:
    """Paint the pixels of frame 1 that frame 2 does not show, on a gray frame 1.

    Args:
        frame1: `(H, W, 3)` uint8.
        occluded: `(H, W)` bool.
    """
    gray = np.asarray(Image.fromarray(frame1).convert("L").convert("RGB")).astype(np.float32)
    painted = (1 - OCCLUDED_OPACITY) * gray + OCCLUDED_OPACITY * np.array(OCCLUDED_COLOR, np.float32)
    return np.where(occluded.cpu().numpy()[..., None], painted, gray).astype(np.uint8)


def draw_consistency_error(error: Tensor, white_error: float = WHITE_ERROR) -> np.ndarray:
    """Draw the forward-backward error in grays: black is none, white `white_error` or more, or out of the frame.

    Args:
        error: `(H, W)`, pixels (`flow_inference.consistency.consistency_error`); may be infinite.
        white_error: Pixels.

    Raises:
        ValueError: `white_error` is not a positive number.
    """
    if not (math.isfinite(white_error) and white_error > 0):
        raise ValueError(f"white_error must be a positive number of pixels; got {white_error}")
    share = (error.float().cpu() / white_error).nan_to_num(nan=1.0, posinf=1.0).clamp(0, 1)
    return (share * 255).byte().numpy()[..., None].repeat(3, axis=2)


def draw_arrows(image: np.ndarray, flow: Tensor, count: int = ARROWS_A_SIDE) -> np.ndarray:
    """Draw flow as arrows on a grid, each from a pixel to where it goes. What moves less than half a pixel is a dot.

    Args:
        image: `(h, w, 3)` uint8, frame 1 or its flow in colors, perhaps reduced.
        flow: `(2, H, W)`, pixels of the frame, whatever the size of the image.
        count: Arrows along the longer side.

    Raises:
        ValueError: `count` is below 1.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1; got {count}")
    with needs_extra("video"):
        import cv2
    image = image.copy()
    (height, width), (rows, columns) = image.shape[:2], flow.shape[-2:]
    step = max(height, width) / count
    stroke = max(1, round(max(height, width) / 700))
    scale = np.array([width / columns, height / rows])
    vectors = flow.detach().float().cpu().numpy()
    for y in np.arange(step / 2, height, step):
        for x in np.arange(step / 2, width, step):
            vector = vectors[:, int(y * rows / height), int(x * columns / width)]
            if not np.isfinite(vector).all():
                continue
            start = np.array([x, y])
            # 4 bits of a fraction: OpenCV draws between pixels, too. Arrows that leave the image are cut by it.
            ends = [np.clip(point, -4 * width, 5 * width) for point in (start, start + vector * scale)]
            first, second = (tuple(round(float(value)) for value in point) for point in ends)
            for color, thickness in ((ARROW_OUTLINE, stroke + 2), (ARROW_COLOR, stroke)):
                if np.hypot(*vector) < 0.5:
                    cv2.circle(image, first, thickness, color, -1, cv2.LINE_AA)
                else:
                    cv2.arrowedLine(image, first, second, color, thickness, cv2.LINE_AA, tipLength=0.3)
    return image


def mark_pixel(image: np.ndarray, x: float, y: float, size: tuple[int, int]) -> np.ndarray:
    """Draw a cross hair around a pixel, or at the edge of the image where the place is outside of it.

    Args:
        image: `(h, w, 3)` uint8, a frame, perhaps reduced.
        x, y: Pixel of the frame; (0, 0) is the center of the first one.
        size: (height, width) of the frame.
    """
    with needs_extra("video"):
        import cv2
    image = image.copy()
    height, width = image.shape[:2]
    column = round(min(max((x + 0.5) * width / size[1] - 0.5, 0), width - 1))
    row = round(min(max((y + 0.5) * height / size[0] - 0.5, 0), height - 1))
    stroke = max(1, round(max(height, width) / 400))
    arm = max(6, round(max(height, width) / 30))
    for color, thickness in ((MARK_OUTLINE, stroke + 3), (MARK_COLOR, stroke)):
        cv2.circle(image, (column, row), arm // 2, color, thickness, cv2.LINE_AA)
        for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1)):
            inner = column + dx * arm // 2, row + dy * arm // 2
            cv2.line(image, inner, (column + dx * arm, row + dy * arm), color, thickness, cv2.LINE_AA)
    return image


def draw_beside(frame1: np.ndarray, flow: Tensor, max_length: float) -> np.ndarray:
    """Frame 1 and its flow in colors side by side, with the legend in a corner of the colors where there is room.

    Args:
        frame1: `(H, W, 3)` uint8.
        flow: `(2, H, W)`, pixels.
        max_length: Length that is fully saturated, pixels.

    Returns:
        `(H, 2 * W, 3)` uint8.
    """
    colors = draw_flow(flow.cpu(), max_length)
    height, width = colors.shape[:2]
    legend = draw_legend(max_length, max(1, round(width / 500)))
    legend = pad_image(legend, legend.shape[0] + 2, legend.shape[1] + 2)
    rows, columns = legend.shape[:2]
    if rows <= LEGEND_SHARE * height and 2 * columns <= width:
        colors[height - rows :, :columns] = legend
    return np.concatenate([frame1, colors], axis=1)


def draw_views(pair: VideoFlow, side: int, max_length: float | None = None) -> dict[str, np.ndarray]:
    """Draw all that explains a pair, each image resized to one size, to be shown beside each other.

    Args:
        pair: As `FlowVideo` gives it; what needs backward flow is left out where there is none.
        side: Longer side of the images, pixels.
        max_length: Length that is fully saturated, pixels; None: the longest of the pair.

    Returns:
        `frame1`, `frame2`, `flow`, `arrows`, `warped` (frame 2 warped back), `difference` (of that and frame 1),
        `occlusion`, `consistency` (forward-backward error): `(h, w, 3)` uint8 each.
    """
    flow = pair.flow.cpu()
    frame1 = resize_image(pair.frame1, side)
    views = {
        "frame1": frame1,
        "frame2": resize_image(pair.frame2, side),
        "flow": resize_image(draw_flow(flow, max_length), side),
        "arrows": draw_arrows(frame1, flow),
        "warped": resize_image(warp_back(pair.frame2, flow)[0], side),
        "difference": resize_image(draw_difference(pair.frame1, pair.frame2, flow), side),
    }
    if pair.occluded is not None and pair.consistency_error is not None:
        views["occlusion"] = resize_image(draw_occlusion(pair.frame1, pair.occluded), side)
        views["consistency"] = resize_image(draw_consistency_error(pair.consistency_error), side)
    return views
