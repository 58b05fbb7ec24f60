"""In which precision a model is run where nobody says."""

from contextlib import AbstractContextManager, nullcontext

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, mixed_precision: str | None) -> AbstractContextManager:
    """The context to run a model in.

    Args:
        device: Of the model.
        mixed_precision: `"no"`, `"bf16"`, `"fp16"`; None: as it is where this is called.

    Raises:
        ValueError: It is none of these, or fp16 on a CPU, which has no use of it.
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
    """Whether the hardware has instructions for bfloat16, which elsewhere is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return device.type == "cpu" and any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
