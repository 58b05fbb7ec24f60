"""How much memory there is."""

import os
from pathlib import Path

import torch

CONTAINER = Path("/sys/fs/cgroup")  # where Linux says what a container may use (version 2 of its control groups)


def device_memory(device: torch.device) -> tuple[int, int]:
    """Bytes that are free on a device, and that it has; of what PyTorch cannot ask, a cautious guess."""
    if device.type in ("cuda", "xpu"):
        backend = getattr(torch, device.type)
        free, total = backend.mem_get_info(device)
        # What PyTorch has taken and not given out is as good as free.
        return free + backend.memory_reserved(device) - backend.memory_allocated(device), total
    if device.type == "mps":
        total = torch.mps.recommended_max_memory()
        return max(0, total - torch.mps.current_allocated_memory()), total
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return host_memory()
    return 4 * 2**30, 8 * 2**30


def host_memory(container: Path = CONTAINER, meminfo: Path = Path("/proc/meminfo")) -> tuple[int, int]:
    """Bytes that are free in this machine or container, and that it has."""
    total = free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for line in _lines(meminfo):
        if line.startswith("MemAvailable:"):
            free = 1024 * int(line.split()[1])
    limit = next(iter(_lines(container / "memory.max")), "max").strip()
    if limit.isdigit() and int(limit) < total:
        total = int(limit)
        # Not the file cache, which gives way.
        used = sum(int(line.split()[1]) for line in _lines(container / "memory.stat") if line.split()[0] == "anon")
        free = min(free, total - used)
    return free, total


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
