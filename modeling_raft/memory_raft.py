"""How much memory is free, and how much there is in total."""

import os
from pathlib import Path

import torch

CONTAINER = Path("/sys/fs/cgroup")  # where Linux has the memory limits of a container (cgroup v2)


def device_memory(device: torch.device) -> tuple[int, int]:
    """Return the free and the total bytes of a device; a cautious guess for devices that PyTorch cannot query."""
    if device.type in ("cuda", "xpu"):
        backend = getattr(torch, device.type)
        free, total = backend.mem_get_info(device)
        # Memory that PyTorch has reserved and not allocated is free as well.
        return free + backend.memory_reserved(device) - backend.memory_allocated(device), total
    if device.type == "mps":
        total = torch.mps.recommended_max_memory()
        return max(0, total - torch.mps.current_allocated_memory()), total
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return host_memory()
    return 4 * 2**30, 8 * 2**30


def host_memory(container: Path = CONTAINER, meminfo: Path = Path("/proc/meminfo")) -> tuple[int, int]:
    """Return the free and the total bytes of this machine, or of the container that limits them."""
    total = free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for line in _lines(meminfo):
        if line.startswith("MemAvailable:"):
            free = 1024 * int(line.split()[1])
    limit = next(iter(_lines(container / "memory.max")), "max").strip()
    if limit.isdigit() and int(limit) < total:
        total = int(limit)
        # The file cache does not count as used, since the kernel frees it on demand.
        used = sum(int(line.split()[1]) for line in _lines(container / "memory.stat") if line.split()[0] == "anon")
        free = min(free, total - used)
    return free, total


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
