"""Flow as two gray JPEG images, one of x and one of y, as programs of action recognition read it.

A value v in [-bound, bound] is stored as the gray level round(255 (v + bound) / (2 bound)), as denseflow writes it;
longer flow is clipped. A level is 2 bound / 255 px wide (0.16 px for 20 px), to which JPEG adds its own loss.
"""

import os
from pathlib import Path

import numpy as np
from PIL import Image

from flow_data.atomic_write import atomic_write

BOUND = 20.0  # pixels, the default of denseflow and of the models that were trained on its output
QUALITY = 95  # of JPEG; OpenCV's default, with which denseflow writes


def write_flow_jpeg(
    x_path: str | os.PathLike[str], y_path: str | os.PathLike[str], flow: np.ndarray, bound: float = BOUND
) -> float:
    """Write flow as two images, each completely or not at all.

    Args:
        x_path: Of the image of x, ending in .jpg; its folder exists.
        y_path: Of the image of y.
        flow: `(H, W, 2)` floating, pixels. What is not finite is written as 0.
        bound: Pixels at which x and y are clipped.

    Returns:
        Share of the pixels, 0 to 1, whose flow is clipped or not finite.

    Raises:
        OSError: An image cannot be written.
    """
    finite = np.isfinite(flow).all(axis=-1)
    clipped = ~finite | (np.abs(np.where(finite[..., None], flow, 0)) > bound).any(axis=-1)
    levels = np.rint(255 * (np.where(finite[..., None], flow, 0).clip(-bound, bound) + bound) / (2 * bound))
    for path, component in zip((x_path, y_path), np.moveaxis(levels.astype(np.uint8), -1, 0), strict=True):
        with atomic_write(Path(path)) as partial:
            Image.fromarray(np.ascontiguousarray(component)).save(partial, format="JPEG", quality=QUALITY)
    return float(clipped.mean())


def read_flow_jpeg(
    x_path: str | os.PathLike[str], y_path: str | os.PathLike[str] | None = None, bound: float = BOUND
) -> np.ndarray:
    """Read flow that was written as two images.

    Args:
        x_path: Of the image of x, `flow_x_00001.jpg` for example.
        y_path: Of the image of y; None: the name of `x_path` with `flow_y_` in place of `flow_x_`.
        bound: Pixels, as they were written with.

    Returns:
        `(H, W, 2)` float32, pixels; clipped flow has the length of the bound.

    Raises:
        OSError: An image cannot be read.
        ValueError: The images are not gray, or differ in size; or `y_path` must be given.
    """
    x_path = Path(x_path)
    if y_path is None:
        if not x_path.name.startswith("flow_x_"):
            raise ValueError(f"{x_path}: must begin with flow_x_ where y_path is not given")
        y_path = x_path.with_name(f"flow_y_{x_path.name.removeprefix('flow_x_')}")
    components = []
    for path in (x_path, Path(y_path)):
        with Image.open(path) as image:
            if image.mode != "L":
                raise ValueError(f"{path}: must be a gray image; got the mode {image.mode}")
            components.append(np.asarray(image))
    if components[0].shape != components[1].shape:
        raise ValueError(f"{y_path}: must have the size of {x_path.name}")
    return (np.stack(components, axis=-1).astype(np.float32) * np.float32(2 * bound / 255) - np.float32(bound)).astype(
        np.float32
    )
