"""Parts of the model as CUDA graphs: their kernels are recorded once for each size, and launched together.

Flow of one pair leaves a GPU idle most of the time, while the host launches well over a thousand kernels one by one
(docs/gpu.md). The kernels of a graph are the same, and so is the flow. A graph keeps the memory that its kernels use.
"""

import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from modeling_raft import RaftForOpticalFlow
from modeling_raft.correlation_raft import dense_bytes

SWITCH = "RAFT_CUDA_GRAPHS"  # environment variable; 0 leaves all this out
MOST_GRAPHS = 8  # for a model; the one that was used longest ago is given up first
MEMORY_SHARE = 16  # a volume of all pairs of more than 1 / 16 of the GPU's memory is not kept in a graph

Part = Callable[..., tuple[Tensor, ...]]


@dataclass
class _Recording:
    inputs: list[Tensor]
    graph: Any
    outputs: tuple[Tensor, ...]

    def replay(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        for target, source in zip(self.inputs, tensors, strict=True):
            target.copy_(source)
        self.graph.replay()
        return tuple(output.clone() for output in self.outputs)  # the next replay overwrites them


class GraphRecorder:
    """Runs parts of a model, and records what is run more than once with the same shapes and settings."""

    def __init__(self) -> None:
        self._recordings: OrderedDict[Any, _Recording | None] = OrderedDict()
        self._failed: set[Any] = set()
        self._lock = Lock()  # threads may share a model; a replay reads and writes the same memory as the one before

    def run(self, model: RaftForOpticalFlow, name: str, part: Part, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return `part(*tensors)`.

        Args:
            model: Whose weights the part reads.
            name: Of the part with all that it depends on but the tensors and the precision.
            part: Neither reads from the device nor chooses by what is there.
            tensors: On the model's device.
        """
        key = (name, tuple((tensor.shape, tensor.dtype) for tensor in tensors), _settings(model))
        with self._lock:
            if key in self._failed or key not in self._recordings:
                self._recordings.setdefault(key, None)  # recorded when it is asked for again; libraries are warm then
                self._make_room()
                return part(*tensors)
            self._recordings.move_to_end(key)
            recording = self._recordings[key]
            if recording is None:
                try:
                    recording = self._recordings[key] = _record(part, tensors)
                except RuntimeError:  # what cannot be recorded, or no memory for it
                    self._failed.add(key)
                    return part(*tensors)
            return recording.replay(tensors)

    def _make_room(self) -> None:
        while len(self._recordings) > MOST_GRAPHS:
            self._recordings.popitem(last=False)


_recorders: WeakKeyDictionary[RaftForOpticalFlow, GraphRecorder] = WeakKeyDictionary()


def recorder_of(model: RaftForOpticalFlow) -> GraphRecorder | None:
    """Return what records the parts of a model; None where that is not possible, or not wanted."""
    whole = model.update_block._compiled_call_impl is None and getattr(model, "hf_device_map", None) is None
    if model.device.type != "cuda" or not whole or os.environ.get(SWITCH) == "0":
        return None
    return _recorders.setdefault(model, GraphRecorder())


def can_record_updates(model: RaftForOpticalFlow, features: Tensor) -> bool:
    """Whether updates from features `(B, C, h, w)` can be recorded: all pairs are correlated, in little memory."""
    total = torch.cuda.get_device_properties(features.device).total_memory
    needed = dense_bytes(features, model.config.corr_levels, trains=False)
    return model.config.correlation != "on_demand" and needed <= total / MEMORY_SHARE


def _settings(model: RaftForOpticalFlow) -> tuple[Any, ...]:
    """All else that a recording depends on: weights where they are, precision, algorithms, the stream in use."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    precision = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
    flags = (matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, torch.are_deterministic_algorithms_enabled())
    weights = tuple(tensor.data_ptr() for tensor in model.parameters())
    return precision, *flags, torch.cuda.current_stream(model.device).stream_id, weights


def _record(part: Part, tensors: tuple[Tensor, ...]) -> _Recording:
    inputs, graph = [tensor.clone() for tensor in tensors], torch.cuda.CUDAGraph()
    torch.clear_autocast_cache()  # casts of weights belong into the graph, as weights may change
    # Other threads go on using the GPU: those that write results.
    with torch.cuda.device(inputs[0].device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = part(*inputs)
    torch.clear_autocast_cache()  # and are not to be used outside of it
    return _Recording(inputs, graph, outputs)
