"""FlowVideo on the device: pair by pair the same flow, and the warm start that a CPU takes."""

import threading

import numpy as np
import pytest
import torch
from PIL import Image

from flow_data.shipped_files import find_model
from flow_inference import FlowVideo, pretrained_path
from flow_inference.cuda_graphs import SWITCH, recorder_of
from flow_inference.prediction import predict_pair
from modeling_raft.convert_raft_checkpoint import load_raft

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def frames(on_gpu):
    """A texture that moves by 4 and 2 pixels a frame."""
    height, width, count = (256, 320, 5) if on_gpu else (128, 136, 3)
    coarse = np.random.default_rng(0).integers(0, 256, (height // 8 + 8, width // 8 + 8, 3), dtype=np.uint8)
    texture = np.asarray(Image.fromarray(coarse).resize((width + 64, height + 64), Image.Resampling.BICUBIC))
    return [np.ascontiguousarray(texture[2 * i : 2 * i + height, 4 * i : 4 * i + width]) for i in range(count)]


@pytest.fixture(scope="module")
def model(device):
    return load_raft(find_model(str(pretrained_path()))).eval().to(device)


def test_pair_by_pair_is_the_same_flow(model, frames, device):
    video = FlowVideo(model, frames, warm_start=False, mixed_precision="no")
    for pair, frame1, frame2 in zip(video, frames[:-1], frames[1:], strict=True):
        assert pair.flow.device.type == device.type
        expected = predict_pair(model, frame1, frame2)
        assert expected.abs().mean() > 1
        torch.testing.assert_close(pair.flow.cpu(), expected, atol=1e-3, rtol=0)


def test_a_warm_start_is_that_of_the_cpu(model, frames, device):
    """In float32; and in the precision that a user gets, which may be bf16, to a twentieth of a pixel."""
    on_cpu = load_raft(find_model(str(pretrained_path()))).eval()
    expected = [pair.flow for pair in FlowVideo(on_cpu, frames, mixed_precision="no")]
    for precision, limit in (("no", 0.01), (None, 0.05)):
        pairs = list(FlowVideo(model, frames, mixed_precision=precision))
        assert [pair.warm for pair in pairs] == [False] + [True] * (len(pairs) - 1)
        for pair, flow in zip(pairs, expected, strict=True):
            assert (pair.flow.cpu() - flow).abs().mean() < limit


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("warm_start", [False, True])
def test_cuda_graphs_give_the_flow_without_them(warm_start, precision, cuda, frames, monkeypatch):
    """Also after weights have changed in place, and while another thread uses the GPU."""
    model = load_raft(find_model(str(pretrained_path()))).eval().to(cuda)
    frames = frames * 2

    def flows() -> list[torch.Tensor]:
        video = FlowVideo(model, frames, warm_start=warm_start, mixed_precision=precision)
        return [pair.flow.cpu() for pair in video]

    ended = threading.Event()

    def work_beside() -> None:
        while not ended.is_set():
            torch.ones(1000, device=cuda).sum().item()

    for factor in (1.0, 1.01):
        with torch.no_grad():
            for weight in model.update_block.parameters():
                weight *= factor
        monkeypatch.setenv(SWITCH, "1")
        thread = threading.Thread(target=work_beside)
        thread.start()
        try:
            ours = flows()
        finally:
            ended.set()
            thread.join()
            ended.clear()
        recorder = recorder_of(model, 1, 256, 320)
        assert len(recorder._recordings) >= 3
        monkeypatch.delenv(SWITCH)
        for flow, expected in zip(ours, flows(), strict=True):
            print(f"differs by {(flow - expected).abs().max():.2g} px")
            assert (flow - expected).abs().mean() < 1e-3


def test_weights_that_move_are_recorded_again(cuda, frames, monkeypatch):
    monkeypatch.setenv(SWITCH, "1")
    model = load_raft(find_model(str(pretrained_path()))).eval().to(cuda)
    first = [pair.flow.cpu() for pair in FlowVideo(model, frames, warm_start=False, mixed_precision="no")]
    model.to("cpu")
    torch.cuda.empty_cache()
    model.to(cuda)
    again = [pair.flow.cpu() for pair in FlowVideo(model, frames, warm_start=False, mixed_precision="no")]
    for flow, expected in zip(again, first, strict=True):
        torch.testing.assert_close(flow, expected, atol=1e-3, rtol=0)
