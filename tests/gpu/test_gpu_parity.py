"""Flow, loss and gradients on the device are those of torchvision there, and of float64 on the CPU."""

import pytest
import torch
from torchvision.models.optical_flow import raft_large, raft_small

from benchmarks.candidates import make_pairs
from flow_data.shipped_files import find_model
from flow_inference import pretrained_path
from modeling_raft import RaftForOpticalFlow, sequence_loss
from modeling_raft.convert_raft_checkpoint import convert_state_dict, load_raft
from modeling_raft.correlation_raft import DenseCorrelation, OnDemandCorrelation, pixel_grid

pytestmark = pytest.mark.gpu
PEERS = {"large": raft_large, "small": raft_small}

# Pixels by which the flow of 12 updates may differ from torchvision's in float32: the largest difference in float32,
# the mean in the others. They have 10 (TF32, fp16) or 7 (bf16) bits after the first, where float32 has 23.
LARGEST_IN_FLOAT32 = 1e-3
MEAN = {"tf32": 0.02, "fp16": 0.05, "bf16": 0.3}


def models(size: str, device: torch.device) -> tuple[torch.nn.Module, RaftForOpticalFlow]:
    """torchvision's model with random weights, and ours with the same."""
    torch.manual_seed(0)
    peer = PEERS[size]().eval()
    return peer.to(device), convert_state_dict(peer.state_dict()).eval().to(device)


@pytest.mark.parametrize("precision", ["fp32", *MEAN])
@pytest.mark.parametrize("size", PEERS)
@torch.no_grad()
def test_flow_is_torchvisions(size, precision, device, on_gpu):
    height, width = (440, 1024) if on_gpu else (128, 136)
    pixel_values = make_pairs(2 if on_gpu else 1, height, width)[0].to(device)
    peer, model = models(size, device)
    expected = peer(pixel_values[:, 0], pixel_values[:, 1], num_flow_updates=12)[-1]
    if precision == "tf32":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision)
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        flow = model(pixel_values, num_flow_updates=12).flow
    assert flow.dtype == torch.float32 and expected.abs().mean() > 0.1
    difference = (flow - expected).abs()
    print(f"{size} {precision}: mean {difference.mean():.2g} px, largest {difference.max():.2g} px")
    if precision == "fp32":
        assert difference.max() < LARGEST_IN_FLOAT32
    else:
        assert difference.mean() < MEAN[precision]


@pytest.mark.parametrize("correlation", ["dense", "on_demand"])
@pytest.mark.parametrize("size", PEERS)
def test_loss_and_gradients_are_torchvisions(size, correlation, device, on_gpu):
    height, width = (256, 320) if on_gpu else (128, 136)
    pixel_values, labels = (tensor.to(device) for tensor in make_pairs(1, height, width))
    peer, model = models(size, device)
    model.config.correlation = correlation
    predictions = peer(pixel_values[:, 0], pixel_values[:, 1], num_flow_updates=3)
    expected = sequence_loss(predictions, labels)
    loss = model(pixel_values, labels=labels, num_flow_updates=3).loss
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    expected.backward()
    loss.backward()
    # The peer's gradients take the way that its weights take, since names differ.
    gradients = {name: torch.zeros_like(buffer) for name, buffer in peer.named_buffers()}
    converted = convert_state_dict(gradients | {name: weight.grad for name, weight in peer.named_parameters()})
    theirs = torch.cat([weight.flatten().cpu() for weight in converted.parameters()])
    ours = torch.cat([weight.grad.flatten().cpu() for weight in model.parameters()])
    difference = (ours - theirs).norm() / theirs.norm()
    print(f"{size} {correlation}: gradients differ by {difference:.2g} of their norm")
    assert difference < 1e-3


@pytest.mark.parametrize("Correlation", [DenseCorrelation, OnDemandCorrelation])
def test_correlation_and_its_gradients_are_those_of_float64(Correlation, device, on_gpu):
    """With flow that jumps from pixel to pixel and leaves the frame; two lookups add up."""
    batch, channels, height, width = (2, 256, 55, 128) if on_gpu else (2, 8, 19, 24)
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(batch, channels, height, width, generator=generator) for _ in range(2)]
    flows = [scale * torch.randn(batch, 2, height, width, generator=generator) for scale in (1, 12)]
    results = []
    for target, dtype, kind in ((device, torch.float32, Correlation), (torch.device("cpu"), torch.float64, None)):
        features = [fmap.clone().to(target, dtype).requires_grad_() for fmap in maps]
        correlation = (kind or DenseCorrelation)(*features, num_levels=2, radius=3)
        grid = pixel_grid(batch, height, width, dtype, target)
        windows = [correlation.lookup(grid + flow.to(target, dtype)) for flow in flows]
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(window.shape, generator=generator).to(window) for window in windows]
        torch.autograd.backward(windows, weights)
        results.append([tensor.detach().cpu().double() for tensor in (*windows, *(fmap.grad for fmap in features))])
    for ours, expected in zip(*results, strict=True):
        assert (ours - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_features_100_times_larger_stay_finite(dtype, device, on_gpu):
    """Correlations are 10,000 times larger, far beyond float16."""
    _, model = models("small", device)
    with torch.no_grad():
        model.feature_encoder.projection.weight *= 100
        model.feature_encoder.projection.bias *= 100
    pixel_values, labels = (tensor.to(device) for tensor in make_pairs(1, 128, 160))
    with torch.autocast(device.type, dtype):
        output = model.train()(pixel_values, labels=labels, num_flow_updates=4)
    assert output.loss.isfinite() and output.flow.isfinite().all()


@torch.no_grad()
def test_the_shipped_weights_give_the_flow_of_the_cpu(device, on_gpu):
    """In the precision that a user gets, on frames of a moving texture; the error of the weights is far larger."""
    path = find_model(str(pretrained_path()))
    pixel_values = make_pairs(1, 256 if on_gpu else 128, 320 if on_gpu else 136)[0]
    expected = load_raft(path).eval().double()(pixel_values.double()).flow.float()
    model = load_raft(path).eval().to(device)
    flow = model(pixel_values.to(device)).flow.cpu()
    assert expected.abs().mean() > 1
    assert (flow - expected).abs().max() < 0.01
