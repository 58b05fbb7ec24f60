"""Visual similarity of the pixels of two frames (paper section 3.2): which of two ways computes it."""

import torch
from torch import Tensor
from transformers.utils import logging

from .correlation_dense_raft import DenseCorrelation
from .correlation_on_demand_raft import OnDemandCorrelation
from .memory_raft import device_memory

logger = logging.get_logger(__name__)

IMPLEMENTATIONS: dict[str, type[DenseCorrelation | OnDemandCorrelation]] = {
    "dense": DenseCorrelation,
    "on_demand": OnDemandCorrelation,
}


def pixel_grid(batch: int, height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Coordinates of every grid point, `(batch, 2, height, width)` as (x, y)."""
    y, x = torch.meshgrid(
        torch.arange(height, dtype=dtype, device=device),
        torch.arange(width, dtype=dtype, device=device),
        indexing="ij",
    )
    return torch.stack([x, y]).expand(batch, 2, height, width)


def make_correlation(
    kind: str, fmap1: Tensor, fmap2: Tensor, num_levels: int, radius: int
) -> DenseCorrelation | OnDemandCorrelation:
    """The correlation of two frames.

    Args:
        kind: `"dense"`, `"on_demand"`, or `"auto"`: dense while its volume, and the gradient of it if there is one,
            takes no more than half of the memory that is free.
        fmap1, fmap2, num_levels, radius: As `DenseCorrelation` takes them.
    """
    if kind == "auto":
        kind = _choose(fmap1, fmap2, num_levels)
    if kind not in IMPLEMENTATIONS:
        raise ValueError(f"correlation must be auto or one of {', '.join(IMPLEMENTATIONS)}; got {kind!r}")
    return IMPLEMENTATIONS[kind](fmap1, fmap2, num_levels, radius)


def _choose(fmap1: Tensor, fmap2: Tensor, num_levels: int) -> str:
    if torch.compiler.is_compiling():  # what is free now is nothing to compile into a graph
        return "dense"
    batch, _, height, width = fmap1.shape
    trains = torch.is_grad_enabled() and (fmap1.requires_grad or fmap2.requires_grad)
    columns = sum((height >> level) * (width >> level) for level in range(num_levels))
    needed = batch * height * width * columns * max(fmap1.element_size(), 4) * (2 if trains else 1)
    # A run that is resumed computes as it did: its choice does not depend on what else fills the memory.
    free, total = device_memory(fmap1.device)
    limit = total / 4 if trains else free / 2
    kind = "dense" if needed <= limit else "on_demand"
    logger.debug(
        "correlation of %d x %d x %d grid pixels: %s, as the volume of all pairs takes %.2f GB of at most %.2f GB",
        batch, height, width, kind, needed / 1e9, limit / 1e9,
    )  # fmt: skip
    return kind
