"""The machine and the versions that a measurement was made with, which every result states."""

import datetime
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from flow_inference.devices import computes_bf16_quickly
from modeling_raft.memory_raft import host_memory

PACKAGES = ("torch", "torchvision", "transformers")
CPUINFO = Path("/proc/cpuinfo")


def describe_machine(device: str = "cpu") -> dict[str, Any]:
    """Processor, cores this process may use, memory (GB, 1e9 bytes), GPU if `device` is one, versions, date."""
    on_gpu = torch.device(device).type == "cuda"
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "bf16_instructions": computes_bf16_quickly(torch.device(device)),
        "memory_gb": round(host_memory()[1] / 1e9),
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "gpu_memory_gb": round(torch.cuda.get_device_properties(device).total_memory / 1e9) if on_gpu else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in PACKAGES},
        "date": datetime.date.today().isoformat(),
    }


def describe_as_sentence(machine: dict[str, Any]) -> str:
    """Return the description of a machine as one sentence."""
    gpu = f"{machine['gpu']} ({machine['gpu_memory_gb']} GB), " if machine["gpu"] else ""
    bf16 = "with" if machine["bf16_instructions"] else "without"
    versions = ", ".join(f"{package} {machine[package]}" for package in ("python", *PACKAGES))
    return (
        f"{gpu}{machine['processor']}, {machine['cores']} cores ({machine['instructions']}), "
        f"{machine['memory_gb']} GB, {bf16} instructions for bf16; {machine['system']}, {versions}; {machine['date']}"
    )


def _processor() -> str:
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
