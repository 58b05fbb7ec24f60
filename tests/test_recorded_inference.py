"""Parts of the model as CUDA graphs, with a stand-in for graphs that runs on a CPU (tests/gpu has real ones)."""

import copy
from types import SimpleNamespace

import pytest
import torch
from moving_shapes import moving_shapes

from flow_inference import FlowVideo, cuda_graphs, pretrained_path
from flow_inference.cuda_graphs import MOST_GRAPHS, SWITCH, GraphRecorder, recorder_of
from modeling_raft.convert_raft_checkpoint import load_raft


@pytest.fixture(scope="module")
def model():
    return load_raft(str(pretrained_path())).eval()


class FakeGraph:
    """Reads and writes the same memory in each replay, as a graph does."""

    def __init__(self, part, inputs):
        self.part, self.inputs, self.outputs = part, inputs, [output.clone() for output in part(*inputs)]

    @torch.no_grad()
    def replay(self):
        for output, result in zip(self.outputs, self.part(*self.inputs), strict=True):
            output.copy_(result)


@pytest.fixture
def recorded(monkeypatch):
    """The parts that were recorded, as numbers of input tensors."""
    seen = []

    def record(part, tensors):
        seen.append(len(tensors))
        inputs = [tensor.clone() for tensor in tensors]
        graph = FakeGraph(part, inputs)
        return cuda_graphs._Recording(inputs, graph, tuple(graph.outputs))

    monkeypatch.setattr(cuda_graphs, "_record", record)
    monkeypatch.setattr(cuda_graphs, "_settings", lambda _: torch.is_autocast_enabled("cpu"))
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"warm_start": False}, {}, {"warm_start": False, "batch_size": 2}])
def test_a_video_has_the_same_flow(options, model, recorded, monkeypatch):
    frames = moving_shapes(6, 136, 150, [(2, 1), (-4, 2)]).frames
    options = options | {"mixed_precision": "no", "num_flow_updates": 3, "warm_num_flow_updates": 2}
    expected = [pair.flow for pair in FlowVideo(model, frames, **options)]
    recorder = GraphRecorder()
    monkeypatch.setattr("flow_inference.estimator.recorder_of", lambda *_: recorder)
    ours = [pair.flow for pair in FlowVideo(model, frames, **options)]
    for flow, other in zip(ours, expected, strict=True):
        assert torch.equal(flow, other)
    assert set(recorded) == ({1, 4} if "warm_start" in options else {1, 5})  # a warm start is the fifth tensor
    list(FlowVideo(model, frames, **options))  # records what the first time asked for once
    before = list(recorded)
    list(FlowVideo(model, frames, **options))
    assert recorded == before


def test_what_is_asked_for_twice_is_recorded_and_replays_do_not_share_results(model, recorded):
    recorder = GraphRecorder()

    def part(tensor):
        return (2 * tensor,)

    results = [recorder.run(model, "double", part, torch.full((3,), float(i)))[0] for i in range(4)]
    assert [result.tolist() for result in results] == [[2.0 * i] * 3 for i in range(4)]
    assert recorded == [1]
    recorder.run(model, "double", part, torch.zeros(4))  # another shape
    recorder.run(model, "other", part, torch.zeros(3))
    assert recorded == [1]


def test_the_oldest_recording_makes_room(model, recorded):
    recorder = GraphRecorder()
    for size in range(1, MOST_GRAPHS + 2):
        for _ in range(2):
            recorder.run(model, "part", lambda tensor: (tensor + 1,), torch.zeros(size))
    assert len(recorded) == MOST_GRAPHS + 1 and len(recorder._recordings) == MOST_GRAPHS
    recorder.run(model, "part", lambda tensor: (tensor + 1,), torch.zeros(MOST_GRAPHS + 1))
    assert len(recorded) == MOST_GRAPHS + 1


def test_what_cannot_be_recorded_runs_as_it_is(model, monkeypatch):
    attempts = []

    def fail(part, tensors):
        attempts.append(1)
        raise torch.OutOfMemoryError("no memory for a graph")

    monkeypatch.setattr(cuda_graphs, "_record", fail)
    monkeypatch.setattr(cuda_graphs, "_settings", lambda _: None)
    recorder = GraphRecorder()
    for value in range(4):
        (result,) = recorder.run(model, "part", lambda tensor: (tensor + 1,), torch.tensor(float(value)))
        assert result == value + 1
    assert len(attempts) == 1


def test_graphs_give_way_where_memory_runs_out(model, recorded):
    recorder = GraphRecorder()
    for _ in range(2):
        recorder.run(model, "small", lambda tensor: (tensor + 1,), torch.zeros(3))
    assert recorder._recordings

    def large(tensor):
        if recorder._recordings:
            raise torch.OutOfMemoryError("graphs have the memory")
        return (tensor + 2,)

    (result,) = recorder.run(model, "large", large, torch.zeros(3))
    assert result.tolist() == [2, 2, 2] and not recorder._recordings

    def too_large(tensor):
        raise torch.OutOfMemoryError("there is not enough")

    with pytest.raises(torch.OutOfMemoryError, match="not enough"):
        recorder.run(model, "too large", too_large, torch.zeros(3))


def test_there_is_none_on_a_cpu(model, monkeypatch):
    monkeypatch.setenv(SWITCH, "1")
    assert recorder_of(model, 1, 64, 64) is None


def test_graphs_are_asked_for_and_need_room_and_dense_correlation(model, monkeypatch):
    class OnGpu:
        """A model on a GPU, as far as it is asked."""

        device, update_block = torch.device("cuda"), SimpleNamespace(_compiled_call_impl=None)
        config = SimpleNamespace(feature_dim=128, corr_levels=4, correlation="auto")

    monkeypatch.setattr(torch, "empty", lambda *_, **__: torch.zeros(1))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=16e9))
    monkeypatch.setattr(cuda_graphs, "choose_implementation", lambda *_: chosen)
    chosen, gpu = "dense", OnGpu()
    assert recorder_of(gpu, 1, 440, 1024) is None  # not asked for
    monkeypatch.setenv(SWITCH, "1")
    assert recorder_of(gpu, 1, 440, 1024) is recorder_of(gpu, 2, 440, 1024) is not None
    assert recorder_of(gpu, 8, 440, 1024) is None and recorder_of(gpu, 1, 1088, 1920) is None  # 2.1 and 5.7 GB
    chosen = "on_demand"
    assert recorder_of(gpu, 1, 440, 1024) is None
    gpu.config = SimpleNamespace(feature_dim=128, corr_levels=4, correlation="dense")
    assert recorder_of(gpu, 1, 440, 1024) is not None
    gpu.update_block = SimpleNamespace(_compiled_call_impl=len)
    assert recorder_of(gpu, 1, 440, 1024) is None


def test_a_recording_is_of_precision_modes_and_weights(model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(stream_id=0))
    seen = {cuda_graphs._settings(model)}
    with torch.inference_mode():
        seen.add(cuda_graphs._settings(model))
    with torch.backends.cudnn.flags(deterministic=True):
        seen.add(cuda_graphs._settings(model))
    before, torch.backends.cuda.matmul.fp32_precision = torch.backends.cuda.matmul.fp32_precision, "tf32"
    seen.add(cuda_graphs._settings(model))
    torch.backends.cuda.matmul.fp32_precision = before
    seen.add(cuda_graphs._settings(copy.deepcopy(model)))
    assert len(seen) == 5
