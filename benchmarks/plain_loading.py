"""Files -> training samples in the plain way, with Pillow, NumPy, OpenCV and the plain augmentation: the baseline.

Nothing is checked here beyond what the readers do by themselves.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from flow_data.sample import FlowSample


class PlainPairs(Dataset):
    """What `flow_data.sampling.TrainingPairs` is, for one source, from a list of paths.

    Args:
        rows: `image1`, `image2` and `flow` paths of each pair.
        augment: sample, generator -> sample.
        seed: of the run.
    """

    def __init__(
        self, rows: list[dict[str, str]], augment: Callable[[FlowSample, np.random.Generator], FlowSample], seed: int
    ):
        self.rows, self.augment, self.seed = rows, augment, seed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        number, position = key
        sample = self.augment(read_plainly(self.rows[position]), np.random.default_rng([self.seed, number]))
        frames = np.stack([sample.image1, sample.image2]).astype(np.float32)
        return {
            "pixel_values": torch.from_numpy(2 * (frames / 255) - 1).permute(0, 3, 1, 2).contiguous(),
            "labels": torch.from_numpy(sample.flow).permute(2, 0, 1).contiguous(),
            "valid": torch.from_numpy(sample.valid),
        }


def read_plainly(row: dict[str, str]) -> FlowSample:
    """Read the three files of a pair."""
    image1, image2 = (np.array(Image.open(row[key]).convert("RGB")) for key in ("image1", "image2"))
    read = {".flo": read_flo, ".pfm": read_pfm, ".png": read_kitti}[Path(row["flow"]).suffix]
    return FlowSample(image1, image2, *read(row["flow"]))


def read_flo(path: str) -> tuple[np.ndarray, np.ndarray]:
    width, height = np.fromfile(path, np.int32, count=2, offset=4)
    flow = np.fromfile(path, np.float32, offset=12).reshape(height, width, 2)
    return flow, np.ones((height, width), bool)


def read_pfm(path: str) -> tuple[np.ndarray, np.ndarray]:
    data = Path(path).read_bytes()
    header = re.match(rb"PF\n(\d+) (\d+)\n-1.0\n", data)
    assert header is not None, path
    width, height = int(header[1]), int(header[2])
    rows = np.frombuffer(data, np.float32, offset=header.end()).reshape(height, width, 3)
    return np.flipud(rows)[..., :2].copy(), np.ones((height, width), bool)


def read_kitti(path: str) -> tuple[np.ndarray, np.ndarray]:
    codes = np.asarray(cv2.imread(path, cv2.IMREAD_ANYDEPTH | cv2.IMREAD_COLOR))[..., ::-1].astype(np.float32)
    valid = codes[..., 2] > 0
    return ((codes[..., :2] - 2**15) / 64) * valid[..., None], valid
