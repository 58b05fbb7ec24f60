"""Whether candidates compute the same flow: timings of different computations cannot be compared."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from benchmarks.candidates import Candidate

TOLERANCE = 1e-3  # pixels, in float32; what bf16 differs by is reported


def estimate_flows(candidates: Sequence[Candidate], pixel_values: Tensor, num_flow_updates: int) -> dict[str, Tensor]:
    """The flow `(B, 2, H, W)` of each candidate, by its name."""
    return {c.name: c.inference(pixel_values, num_flow_updates)().float().cpu() for c in candidates}


def check_flows(candidates: Sequence[Candidate], flows: Mapping[str, Tensor]) -> dict[str, float]:
    """Largest difference of each flow from that of the first candidate of its size, in pixels.

    Raises:
        ValueError: One in float32 differs by more than rounding explains.
    """
    differences = {}
    for candidate in candidates:
        reference = next(other for other in candidates if other.size == candidate.size)
        difference = (flows[candidate.name] - flows[reference.name]).abs().max().item()
        # `not <=` is true of what is not a number, too.
        if candidate.precision == "fp32" and not difference <= TOLERANCE:
            raise ValueError(
                f"{candidate.name} and {reference.name} do not compute the same: their flow differs by "
                f"{difference:.3g} px, and {TOLERANCE:g} px is allowed"
            )
        differences[candidate.name] = difference
    return differences


def check_losses(losses: Mapping[str, float], reference: str) -> None:
    """Refuse losses that are not that of the reference: to 1e-3 of it, in bf16 to 2 %.

    Raises:
        ValueError: One is another loss.
    """
    for name, loss in losses.items():
        allowed = 0.02 if "bf16" in name else 1e-3
        if not abs(loss - losses[reference]) <= allowed * abs(losses[reference]):
            raise ValueError(f"{name} has the loss {loss:.6g}, and {reference} has {losses[reference]:.6g}")
