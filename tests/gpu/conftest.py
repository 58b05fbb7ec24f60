"""The device of the GPU tests, and sizes that fit it: on a CPU the same code runs on tiny models and frames."""

import os
from collections.abc import Iterator

import pytest
import torch

# cuBLAS is deterministic with it, and reads it when it is first used.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    name = request.config.getoption("--device")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


@pytest.fixture(scope="session")
def on_gpu(device: torch.device) -> bool:
    """False on a CPU: take a tiny case, and leave out what only a GPU has."""
    return device.type != "cpu"


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """For tests of what only CUDA has."""
    if device.type != "cuda":
        pytest.skip(f"it is about CUDA; the device is {device}")
    return device


@pytest.fixture(autouse=True)
def float32_is_float32(device: torch.device) -> Iterator[None]:
    """TF32 is off unless a test turns it on, and compiled code does not pass from test to test."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
