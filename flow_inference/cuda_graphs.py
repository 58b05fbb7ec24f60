"""Parts of the model as CUDA graphs: their kernels are recorded once for each size, and launched together.

Flow of one pair leaves a GPU idle most of the time, while the host launches well over a thousand kernels one by one
(docs/gpu.md). The kernels of a graph are the same. A graph keeps the memory that its kernels use.
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
from modeling_raft.configuration_raft import DOWNSAMPLE_FACTOR
from modeling_raft.correlation_raft import choose_implementation, dense_bytes

SWITCH = "RAFT_CUDA_GRAPHS"  # environment variable: 1 turns graphs on
MOST_GRAPHS = 8  # for a model; the one that was used longest ago is given up first
MOST_KEYS = 64  # of calls that are not recorded (yet) and remembered
MEMORY_SHARE = 16  # frames whose volume of all pairs takes more than 1 / 16 of the GPU's memory are not recorded

Part = Callable[..., tuple[Tensor, ...]]
_capture_lock = Lock()  # a capture forbids others in the process


@dataclass(eq=False)
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
        self._recordings: OrderedDict[Any, _Recording] = OrderedDict()
        self._seen: OrderedDict[Any, bool] = OrderedDict()  # key -> whether it may be recorded
        self._lock = Lock()  # threads may share a model; a replay reads and writes the same memory as the one before

    def run(self, model: RaftForOpticalFlow, name: str, part: Part, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return `part(*tensors)`.

        Args:
            model: Whose weights the part reads.
            name: Of the part with all that it depends on but the tensors and the precision.
            part: Neither reads from the device, nor copies from the host, nor chooses by what is there.
            tensors: On the model's device.
        """
        key = (name, tuple((tensor.shape, tensor.dtype) for tensor in tensors), _settings(model))
        with self._lock:
            if key in self._recordings:
                self._recordings.move_to_end(key)
                return self._recordings[key].replay(tensors)
            if self._seen.get(key):  # asked for again, and libraries are warm by now
                recording = _try_to_record(part, tensors)
                if recording is not None:
                    self._recordings[key] = recording
                    _drop_oldest(self._recordings, MOST_GRAPHS)
                    return recording.replay(tensors)
            self._seen[key] = key not in self._seen
            _drop_oldest(self._seen, MOST_KEYS)
            return self._run_unrecorded(part, tensors)

    def _run_unrecorded(self, part: Part, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Run a part as it is; where memory runs out, once more without the graphs, which keep theirs."""
        try:
            return part(*tensors)
        except torch.OutOfMemoryError:
            if not self._recordings:
                raise
        self._recordings.clear()
        torch.cuda.empty_cache()
        return part(*tensors)


_recorders: WeakKeyDictionary[RaftForOpticalFlow, GraphRecorder] = WeakKeyDictionary()


def recorder_of(model: RaftForOpticalFlow, batch: int, height: int, width: int) -> GraphRecorder | None:
    """Return what records the parts of a model for frames of a size.

    None where it is not asked for (`RAFT_CUDA_GRAPHS=1`) or not possible: on other devices, with compiled or offloaded
    modules, for large frames, and where not all pairs are correlated.

    Args:
        model: In eval mode.
        batch: Frames or pairs.
        height: Of the padded frames, pixels.
        width: Of the padded frames, pixels.
    """
    if os.environ.get(SWITCH) != "1" or model.device.type != "cuda":
        return None
    if model.update_block._compiled_call_impl is not None or getattr(model, "hf_device_map", None) is not None:
        return None
    height, width, config = height // DOWNSAMPLE_FACTOR, width // DOWNSAMPLE_FACTOR, model.config
    features = torch.empty(1, device=model.device).expand(batch, config.feature_dim, height, width)
    total = torch.cuda.get_device_properties(model.device).total_memory
    if dense_bytes(features, config.corr_levels, trains=False) > total / MEMORY_SHARE:
        return None
    kind = config.correlation
    if kind == "auto":
        kind = choose_implementation(features, features, config.corr_levels)
    return _recorders.setdefault(model, GraphRecorder()) if kind == "dense" else None


def _settings(model: RaftForOpticalFlow) -> tuple[Any, ...]:
    """All else that a recording depends on: precision, algorithms, modes, the stream in use, and where weights are."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    precision = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
    flags = (
        matmul.fp32_precision,
        cudnn.conv.fp32_precision,  # type: ignore[attr-defined]  # missing in torch's annotations
        cudnn.deterministic,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_inference_mode_enabled(),
        model.training,
    )
    weights = tuple(tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers()))
    return precision, flags, torch.cuda.current_stream(model.device).stream_id, weights


def _try_to_record(part: Part, tensors: tuple[Tensor, ...]) -> _Recording | None:
    """Record a part; None where that fails, for lack of memory above all."""
    try:
        with _capture_lock:
            return _record(part, tensors)
    except RuntimeError:
        return None


def _record(part: Part, tensors: tuple[Tensor, ...]) -> _Recording:
    inputs, graph, device = [tensor.clone() for tensor in tensors], torch.cuda.CUDAGraph(), tensors[0].device
    torch.clear_autocast_cache()  # casts of weights belong into the graph, as weights may change
    with torch.cuda.device(device):
        stream = torch.cuda.Stream(device)  # torch's own would be that of the first device
        # Left in any case, also where the capture fails. Other threads go on using the GPU: those that write results.
        with (
            torch.cuda.stream(stream),
            torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
        ):
            outputs = part(*inputs)
    torch.clear_autocast_cache()  # and are not to be used outside of it
    return _Recording(inputs, graph, outputs)


def _drop_oldest(entries: OrderedDict[Any, Any], most: int) -> None:
    while len(entries) > most:
        entries.popitem(last=False)
