"""A computation whose kernels are recorded once and launched together: what its launches cost, and the host's work."""

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = 3  # calls in which libraries choose their kernels, which cannot be recorded


def capture(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Record a call as a CUDA graph.

    Args:
        call: It must not wait for the device, and reads its inputs from the same memory each time.

    Returns:
        A function that replays it; the result is overwritten by the next replay.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay(read: Callable[[], Tensor] = call) -> Tensor:  # keeps the memory that the graph reads, such as weights
        graph.replay()
        return result

    return replay
