"""Parts of the model as CUDA graphs, with a stand-in for graphs that runs on a CPU (tests/gpu has real ones)."""

import numpy as np
import pytest
import torch
from moving_shapes import moving_shapes

from flow_inference import FlowVideo, cuda_graphs, pretrained_path
from flow_inference.cuda_graphs import MOST_GRAPHS, GraphRecorder, recorder_of
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


@pytest.mark.parametrize("options", [{"warm_start": False}, {}, {"warm_start": False, "batch_size": 2}])
def test_a_video_has_the_same_flow(options, model, recorded, monkeypatch):
    frames = moving_shapes(6, 136, 150, [(2, 1), (-4, 2)]).frames
    options = options | {"mixed_precision": "no", "num_flow_updates": 3, "warm_num_flow_updates": 2}
    expected = [pair.flow for pair in FlowVideo(model, frames, **options)]
    recorder = GraphRecorder()
    monkeypatch.setattr("flow_inference.estimator.recorder_of", lambda _: recorder)
    monkeypatch.setattr("flow_inference.estimator.can_record_updates", lambda *_: True)
    ours = [pair.flow for pair in FlowVideo(model, frames, **options)]
    for flow, other in zip(ours, expected, strict=True):
        assert torch.equal(flow, other)
    assert set(recorded) == ({1, 4} if "warm_start" in options else {1, 5})  # a warm start is the fifth tensor
    list(FlowVideo(model, frames, **options))  # records what the first time asked for once
    before = list(recorded)
    list(FlowVideo(model, frames, **options))
    assert recorded == before


def test_what_is_asked_for_twice_is_recorded_and_replays_do_not_share_results(model, recorded):
    recorder, calls = GraphRecorder(), []

    def part(tensor):
        calls.append(1)
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


def test_there_is_none_on_a_cpu(model):
    assert recorder_of(model) is None
    video = FlowVideo(model, [np.zeros((64, 64, 3), np.uint8)] * 2)
    assert video.new_estimator(64, 64).recorder is None
