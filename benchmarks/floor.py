"""The least that a computation must do, operations and bytes, and the time that a device takes for them at its best.

Counted are convolutions, matrix products and lookups as they run, forward and backward: their operations, and the
bytes of each input and each output once, as if everything between them were done in passing. No version of the
algorithm takes less time than the larger of operations over the device's rate and bytes over its bandwidth.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.candidates import HALVES, in_precision
from benchmarks.rounds import seconds_of

PRODUCTS = {"mm", "bmm", "addmm", "baddbmm"}
LOOKUPS = {"gather", "scatter_add", "scatter_add_"}


class CountWork(TorchDispatchMode):
    """Count what runs while this is entered.

    Attributes:
        operations: dtype -> multiplications and additions.
        bytes: Read and written.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: dict[torch.dtype, int] = defaultdict(int)
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name().removeprefix("aten::").partition(".")[0]
        if name == "convolution":
            self._add(result.numel() * args[1][0].numel(), args[:2], result)
        elif name == "convolution_backward":
            # As many operations for the gradient of the input, and for that of the weights, as forward.
            asked = sum(args[10][:2])
            self._add(asked * args[0].numel() * args[2][0].numel(), args[:3], result)
        elif name in PRODUCTS:
            left, right = args[-2:]
            self._add(left.numel() * right.shape[-1], (left, right), result)
        elif name in LOOKUPS:
            self.bytes += 2 * args[2].numel() * args[0].element_size()  # the index follows from the flow
        return result

    def _add(self, products: int, inputs: Any, outputs: Any) -> None:
        tensors = [tensor for tensor in tree_leaves((inputs, outputs)) if isinstance(tensor, Tensor)]
        self.operations[tensors[0].dtype] += 2 * products
        self.bytes += sum(tensor.nbytes for tensor in tensors)


def count_work(call: Callable[[], Any]) -> CountWork:
    """Count the work of a call."""
    with CountWork() as work:
        call()
    return work


def measure_ceilings(device: torch.device, side: int, copied_bytes: int) -> dict[str, float]:
    """Measure what the device can do at its best, in the medians of five calls.

    Args:
        device: Any.
        side: Of the square matrices that are multiplied; random ones, since zeros take less power.
        copied_bytes: Size of the tensor that is copied.

    Returns:
        Operations a second in each of fp32, tf32, fp16, bf16; and under `bandwidth`, bytes read and written a second.
    """
    ceilings = {}
    for precision in ("fp32", "tf32", "fp16", "bf16"):
        dtype = HALVES.get(precision, torch.float32)
        left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        with in_precision("tf32" if precision == "tf32" else "fp32", device):
            ceilings[precision] = 2 * side**3 / _median_seconds(lambda: left @ right, device)  # noqa: B023
    source = torch.randn(copied_bytes // 4, device=device)
    target = torch.empty_like(source)
    ceilings["bandwidth"] = 2 * source.nbytes / _median_seconds(lambda: target.copy_(source), device)
    return ceilings


def _median_seconds(call: Callable[[], Any], device: torch.device) -> float:
    for _ in range(2):
        seconds_of(call, device)
    return sorted(seconds_of(call, device) for _ in range(5))[2]


def floor_seconds(work: CountWork, precision: str, ceilings: dict[str, float]) -> float:
    """The time that the work takes at best, seconds.

    Args:
        work: As counted.
        precision: Of the candidate; what it computes in float32 all the same counts as float32.
        ceilings: Of `measure_ceilings`.
    """
    single = "tf32" if precision == "tf32" else "fp32"
    names = {torch.float16: "fp16", torch.bfloat16: "bf16"}
    compute = sum(count / ceilings[names.get(dtype, single)] for dtype, count in work.operations.items())
    return max(compute, work.bytes / ceilings["bandwidth"])
