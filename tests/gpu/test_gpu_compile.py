"""torch.compile takes the model whole, once for a size, and CUDA graphs take its inference, with the same flow."""

from collections.abc import Callable

import pytest
import torch
from torch._dynamo.utils import counters

from benchmarks.candidates import make_pairs
from modeling_raft import RaftConfig, RaftForOpticalFlow

pytestmark = pytest.mark.gpu
UPDATES = 2


@pytest.fixture
def backend(on_gpu: bool) -> str:
    """On a CPU, without the code generator, which takes minutes there; graphs and recompilations are the same."""
    return "inductor" if on_gpu else "aot_eager"


def make_model(device: torch.device, **overrides) -> RaftForOpticalFlow:
    torch.manual_seed(0)
    overrides |= {} if device.type != "cpu" else {"encoder_widths": [16, 16, 24, 32], "hidden_dim": 32}
    return RaftForOpticalFlow(RaftConfig(num_flow_updates=UPDATES, freeze_batch_norm=True, **overrides)).to(device)


def compile_counted(function: Callable, **options) -> Callable:
    """Compile without graph breaks, counting from zero."""
    torch._dynamo.reset()
    counters.clear()
    return torch.compile(function, fullgraph=True, dynamic=False, **options)


def assert_one_graph() -> None:
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"], counters


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@torch.no_grad()
def test_inference_is_one_graph(precision, device, backend):
    model = make_model(device).eval()
    compiled = compile_counted(model, backend=backend)
    pixel_values = make_pairs(1, 128, 160)[0].to(device)
    dtype = torch.bfloat16 if precision == "bf16" else None
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        for shift in (0.0, 0.1, -0.1):
            flow, expected = (run(pixel_values + shift).flow for run in (compiled, model))
            # Compiled code keeps some sums of half precision in float32, which eager code rounds.
            assert (flow - expected).abs().mean() < (1e-3 if dtype is None else 0.1)
    assert_one_graph()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_is_one_graph(checkpointing, device, backend):
    """Forward, loss and backward; with weights that change in between."""
    model = make_model(device).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    compiled = compile_counted(model, backend=backend)
    pixel_values, labels = (tensor.to(device) for tensor in make_pairs(2, 128, 160))
    valid = torch.ones(labels[:, 0].shape, dtype=torch.bool, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    for _ in range(3):
        results = []
        for run in (model, compiled):
            model.zero_grad()
            loss = run(pixel_values, labels=labels, valid=valid).loss
            loss.backward()
            gradient = torch.cat([weight.grad.flatten() for weight in model.parameters()])
            results.append((loss.detach(), gradient))
        (eager_loss, eager_gradient), (loss, gradient) = results
        torch.testing.assert_close(loss, eager_loss, rtol=1e-4, atol=0)
        assert (gradient - eager_gradient).norm() < 1e-3 * eager_gradient.norm()
        optimizer.step()
    assert_one_graph()


@torch.no_grad()
def test_reduced_overhead_is_the_same_flow(cuda):
    """torch.compile with CUDA graphs, which replays into the same memory: results are copied before the next call."""
    model = make_model(cuda).eval()
    compiled = compile_counted(model, mode="reduce-overhead")
    pixel_values = make_pairs(1, 128, 160)[0].to(cuda)
    for shift in (0.0, 0.1, -0.1, 0.2):
        torch.compiler.cudagraph_mark_step_begin()
        flow = compiled(pixel_values + shift).flow.clone()
        assert (flow - model(pixel_values + shift).flow).abs().mean() < 1e-3
    assert_one_graph()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@torch.no_grad()
def test_inference_is_captured_as_a_cuda_graph(dtype, cuda):
    """Without a compiler: nothing in the forward pass waits for the host, so that its kernels can be replayed."""
    from benchmarks.cuda_graph import capture

    model = make_model(cuda, correlation="dense").eval()
    pixel_values = make_pairs(1, 128, 160)[0].to(cuda)

    def run() -> torch.Tensor:
        with torch.autocast("cuda", dtype, enabled=dtype is not None):
            return model(pixel_values).flow

    replay = capture(run)
    for shift in (0.1, -0.1):
        pixel_values += shift
        torch.testing.assert_close(replay(), run(), atol=1e-3 if dtype is None else 0.1, rtol=0)
