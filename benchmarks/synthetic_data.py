"""Data sets of synthetic pairs in the published layouts and encodings, for benchmarks without the real ones.

What decoding takes depends on what is in a file, so the frames are textured (`flow_data.synthetic`), and as much
blurred as brings the PNG files to the size of real ones (FlyingThings3D 0.7 MB, Sintel 0.6 MB, KITTI 0.85 MB).
"""

from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from flow_data.flow_io import write_flow
from flow_data.synthetic import SyntheticOptions, render_pair

VALID_SHARE = 0.2  # of KITTI's pixels


class Layout(NamedTuple):
    """Where the files of pair number `n` go, below the data root, and how much its frames are blurred (px)."""

    image1: str
    image2: str
    flow: str
    blur: float


THINGS = "FlyingThings3D/{}/TRAIN/A/{{n:04d}}/{}/{}"
LAYOUTS = {
    "flying_chairs": Layout(
        "FlyingChairs_release/data/{n:05d}_img1.ppm",
        "FlyingChairs_release/data/{n:05d}_img2.ppm",
        "FlyingChairs_release/data/{n:05d}_flow.flo",
        blur=0,
    ),
    "sintel_clean": Layout(
        "Sintel/training/clean/scene_{n}/frame_0001.png",
        "Sintel/training/clean/scene_{n}/frame_0002.png",
        "Sintel/training/flow/scene_{n}/frame_0001.flo",
        blur=1.2,
    ),
    "flying_things_clean": Layout(
        THINGS.format("frames_cleanpass", "left", "0006.png"),
        THINGS.format("frames_cleanpass", "left", "0007.png"),
        THINGS.format("optical_flow", "into_future/left", "OpticalFlowIntoFuture_0006_L.pfm"),
        blur=1.2,
    ),
    "kitti_2015": Layout(
        "KITTI/training/image_2/{n:06d}_10.png",
        "KITTI/training/image_2/{n:06d}_11.png",
        "KITTI/training/flow_occ/{n:06d}_10.png",
        blur=0,
    ),
}


def write_pairs(source: str, root: Path, size: tuple[int, int], count: int) -> None:
    """Write `count` pairs of (height, width) below `root`."""
    layout = LAYOUTS[source]
    for n in range(count):
        image1, image2, flow = render_pair(SyntheticOptions(image_size=size), seed=0, index=n).sample[:3]
        valid = np.ones(size, bool)
        if layout.flow.endswith(".png"):
            valid = np.random.default_rng(n).random(size) < VALID_SHARE
        for place, image in ((layout.image1, image1), (layout.image2, image2)):
            if layout.blur > 0:
                image = cv2.GaussianBlur(image, (0, 0), layout.blur)
            path = root / place.format(n=n)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
        path = root / layout.flow.format(n=n)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_flow(path, flow, valid)
