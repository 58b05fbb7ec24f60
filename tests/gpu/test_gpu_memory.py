"""What `correlation="auto"` reckons with is what the dense way takes, at its peak."""

import pytest
import torch

from modeling_raft.correlation_raft import DenseCorrelation, dense_bytes, pixel_grid

pytestmark = pytest.mark.gpu
LEVELS, RADIUS, CHANNELS = 4, 4, 256


def peak_bytes(device: torch.device, call) -> int:
    """How much memory a call takes at its peak, above what is there before; on a CPU, of what it returns."""
    if device.type != "cuda":
        return call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("size", [(55, 128), (46, 62), (136, 240)])
def test_the_estimate_is_the_peak(trains, size, device, on_gpu):
    height, width = size if on_gpu else (size[0] // 4, size[1] // 4)
    batch = 2 if trains else 1
    maps = [torch.randn(batch, CHANNELS, height, width, device=device).requires_grad_(trains) for _ in range(2)]
    estimate = dense_bytes(maps[0], LEVELS, trains)

    def correlate() -> int:
        correlation = DenseCorrelation(*maps, LEVELS, RADIUS)
        centroids = pixel_grid(batch, height, width, torch.float32, device)
        windows = [correlation.lookup(centroids + i) for i in range(2)]
        taken = correlation.volume.nbytes
        if trains:
            torch.autograd.backward([window.sum() for window in windows])
            taken *= 2  # the gradient of the volume, which is gone by now
        return taken

    correlate()  # takes what libraries keep for themselves
    peak = peak_bytes(device, correlate)
    # Beside the volume are the features of the pyramid, and what a lookup takes: indices and patches of all pixels.
    pixels = batch * height * width
    beside = pixels * LEVELS * ((2 * RADIUS + 2) ** 2 * (8 + 8 + 4) + 3 * 4 * CHANNELS) + 2**21
    beside = beside if on_gpu else 0  # what is measured on a CPU is the volume alone
    print(f"{height} x {width}, trains {trains}: estimate {estimate / 1e6:.1f} MB, peak {peak / 1e6:.1f} MB")
    assert 0.95 * estimate <= peak <= 1.05 * estimate + (2 if trains else 1) * beside
