"""What an inference will take, near enough to leave out what cannot fit."""

import torch

from benchmarks.candidates import Candidate
from modeling_raft.memory_raft import device_memory

BYTES_PER_PIXEL = 600  # of both images' encoding, in float32: large, for caution
PYRAMID = 4 / 3  # of the volume of all pairs that it begins with


def estimate_bytes(candidate: Candidate, height: int, width: int, one_pair: bool = False) -> float:
    """Memory of inference of a single pair, or of one after the other, in bytes."""
    volume = 4 * (height // 8 * (width // 8)) ** 2
    if candidate.library == "torchvision":
        # It scales a copy of the volume, and keeps the pyramid of one pair until the next one's is made.
        volumes = 2 if one_pair else 2 + PYRAMID
    else:
        volumes = 0 if "on_demand" in candidate.options else PYRAMID
    return volumes * volume + BYTES_PER_PIXEL * height * width


def fits(candidate: Candidate, height: int, width: int, device: torch.device, free: int | None = None) -> bool:
    """Whether the estimate is within what is free (bytes; None: now, on the device)."""
    if free is None:
        free = device_memory(device)[0]
    return estimate_bytes(candidate, height, width) <= free
