"""The device and the precision that a model runs in: the defaults, and what a user names."""

from contextlib import AbstractContextManager, nullcontext

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str | None = None, local_rank: int = 0) -> torch.device:
    """Return the device of a name; by default the accelerator that torch finds (CUDA, MPS, XPU, ...), else the CPU.

    Args:
        name: As torch writes it: `"cpu"`, `"cuda"`, `"cuda:1"`, `"mps"`, ...
        local_rank: Of this process among those of its machine, which take one accelerator after the other where the
            name has no index.

    Raises:
        ValueError: There is no such device here.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name is None:
        return torch.device("cpu") if accelerator is None else _nth(accelerator, local_rank)
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be cpu, cuda, cuda:1, mps, xpu, ...; got {name!r}") from error
    if device.type == "cpu" and not device.index:
        return device
    available = []
    if accelerator is not None:
        available = [f"{accelerator.type}:{index}" for index in range(torch.accelerator.device_count())]
    if f"{device.type}:{device.index or 0}" not in available:
        raise ValueError(f"device {name} is not available; available are {', '.join(['cpu', *available])}")
    return _nth(device, local_rank)


def _nth(device: torch.device, local_rank: int) -> torch.device:
    """Return the accelerator of a process; the first process takes torch's own choice."""
    if device.index is not None or local_rank == 0 or device.type == "cpu":
        return device
    return torch.device(device.type, local_rank % torch.accelerator.device_count())


def autocast(device: torch.device, mixed_precision: str | None) -> AbstractContextManager:
    """Return the autocast context to run a model in.

    Args:
        device: Of the model.
        mixed_precision: `"no"`, `"bf16"`, `"fp16"`; None: leave autocast as the caller has set it.

    Raises:
        ValueError: It is none of these, or fp16 on a CPU, where it brings nothing.
    """
    if mixed_precision is None:
        return nullcontext()
    if mixed_precision not in ("no", *DTYPES):
        raise ValueError(f"mixed_precision must be one of no, {', '.join(DTYPES)}; got {mixed_precision}")
    if mixed_precision == "fp16" and device.type == "cpu":
        raise ValueError("mixed_precision fp16 needs a GPU, and this runs on a CPU; use bf16, or no")
    enabled = mixed_precision != "no"
    return torch.autocast(device.type, DTYPES.get(mixed_precision), enabled=enabled)


def computes_bf16_quickly(device: torch.device) -> bool:
    """Return whether the hardware has instructions for bfloat16, which is slower than float32 without them."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return device.type == "cpu" and any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
