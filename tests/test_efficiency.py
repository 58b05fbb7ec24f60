"""What makes the model fast and lean must not change what it computes: torchvision's flow, loss and gradients."""

import pytest
import torch
from test_modeling_raft import SMALL_IMAGE, images, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.optical_flow import raft_large, raft_small

from modeling_raft import RaftConfig, RaftForOpticalFlow, sequence_loss
from modeling_raft.convert_raft_checkpoint import convert_state_dict
from modeling_raft.modeling_raft import EncoderConv, InstanceNorm

WAITS_FOR_DEVICE = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "lift_fresh")


@pytest.mark.slow
@pytest.mark.parametrize("make_peer", [raft_large, raft_small])
@pytest.mark.parametrize("correlation", ["dense", "on_demand"])
def test_loss_and_gradients_are_torchvisions(make_peer, correlation):
    torch.manual_seed(0)
    peer = make_peer().train()
    model = convert_state_dict(peer.state_dict()).train()
    model.config.correlation = correlation
    pixel_values, labels = images(1, 2, 3, 128, 136), 3 * torch.randn(1, 2, 128, 136)
    predictions = peer(pixel_values[:, 0], pixel_values[:, 1], num_flow_updates=3)
    expected = sequence_loss(predictions, labels)
    output = model(pixel_values, labels=labels, num_flow_updates=3)
    torch.testing.assert_close(output.flow, predictions[-1], atol=1e-3, rtol=0)
    torch.testing.assert_close(output.loss, expected)
    expected.backward()
    output.loss.backward()
    # Names differ, so the peer's gradients take the way that its weights take.
    gradients = {name: torch.zeros_like(buffer) for name, buffer in peer.named_buffers()}
    gradients |= {name: weight.grad for name, weight in peer.named_parameters()}
    converted = convert_state_dict(gradients)
    theirs = torch.cat([weight.flatten() for weight in converted.parameters()])
    ours = torch.cat([weight.grad.flatten() for weight in model.parameters()])
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("dtype", "training", "atol"),
    [
        (torch.float32, False, 5e-6),
        (torch.float32, True, 5e-6),
        (torch.float64, True, 1e-12),
        (torch.bfloat16, False, 0.05),  # numbers above 4 are 0.03 apart
        (torch.bfloat16, True, 0.05),
    ],
)
def test_instance_norm_is_exact_in_either_memory_format(memory_format, dtype, training, atol):
    torch.manual_seed(0)
    x, weight = (torch.randn(2, 16, 96, 128).to(dtype) for _ in range(2))
    x = (x + 3).contiguous(memory_format=memory_format).requires_grad_(training)
    doubles = x.detach().double().requires_grad_(training)
    expected = torch.nn.functional.instance_norm(doubles)
    ours = InstanceNorm(16)(x)
    torch.testing.assert_close(ours.double(), expected, atol=atol, rtol=0)
    if training:
        (ours * weight).sum().backward()
        (expected * weight).sum().backward()
        torch.testing.assert_close(x.grad.double(), doubles.grad, atol=atol, rtol=0)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("kernel_size", "stride"), [(1, 1), (1, 2), (3, 2)])
def test_encoder_convolution_is_torchs_in_either_memory_format(memory_format, kernel_size, stride):
    torch.manual_seed(0)
    conv = EncoderConv(8, 12, kernel_size, stride, padding=kernel_size // 2).bfloat16()
    x = torch.randn(1, 8, 9, 14).bfloat16().contiguous(memory_format=memory_format).requires_grad_()
    ours = conv(x)
    weight = torch.randn_like(ours)
    results = [ours, *torch.autograd.grad((ours * weight).sum(), [x, conv.weight, conv.bias])]
    doubles = [tensor.detach().double().requires_grad_() for tensor in (x, conv.weight, conv.bias)]
    expected = torch.nn.functional.conv2d(*doubles, stride, kernel_size // 2)
    expected = [expected, *torch.autograd.grad((expected * weight).sum(), doubles)]
    for result, reference in zip(results, expected, strict=True):
        torch.testing.assert_close(result.double(), reference, atol=0.05, rtol=0.01)


class ConvolutionInputs(TorchDispatchMode):
    """Which convolutions got their input channels last."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "convolution" in func.name():
            self.channels_last.append(args[0].stride(1) == 1)
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        self.channels_last: list[bool] = []
        return super().__enter__()


@pytest.mark.parametrize("correlation", ["dense", "on_demand"])
@pytest.mark.parametrize("make_config", [RaftConfig, RaftConfig.small])
def test_half_precision_stays_channels_last_on_cpus(make_config, correlation):
    """One tensor in the other order, and torch reorders what meets it, in every update."""
    model = RaftForOpticalFlow(make_config(correlation=correlation)).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), ConvolutionInputs() as seen:
        model(images(1, 2, 3, 128, 136), num_flow_updates=2)
    assert len(seen.channels_last) > 40
    assert seen.channels_last.count(False) == 2  # images come as they are, to two encoders


@pytest.mark.parametrize("keep_gradients", [True, False])
def test_updates_that_keep_gradients_get_the_usual_order(keep_gradients):
    """Also of frozen encoders, whose own results need none."""
    model = RaftForOpticalFlow(tiny_config()).eval().requires_grad_(False)
    image = images(1, 2, 3, 64, 72)[:, 0]
    with torch.set_grad_enabled(keep_gradients), torch.autocast("cpu", torch.bfloat16):
        encoded = [model.encode_features(image), *model.encode_context(image)]
    for tensor in encoded:
        assert tensor.dtype == torch.bfloat16 and (tensor.stride(1) == 1) != keep_gradients


def loss_and_gradients(model, **options):
    inputs = {"pixel_values": images(*SMALL_IMAGE).double(), "labels": torch.ones(1, 2, 64, 72).double()}
    model.zero_grad()
    loss = model(**inputs, **options).loss
    loss.backward()
    return loss.detach(), [weight.grad.clone() for weight in model.parameters()]


@pytest.mark.parametrize("freeze_batch_norm", [True, False])
def test_recomputing_changes_neither_gradients_nor_statistics(freeze_batch_norm):
    """Predictions that nobody asked for are computed again in the backward pass; with checkpointing, all is."""
    torch.manual_seed(0)
    config = tiny_config(freeze_batch_norm=freeze_batch_norm, convex_upsampling=True, context_norm="batch")
    plain = RaftForOpticalFlow(config).double()
    lean = RaftForOpticalFlow(config).double()
    lean.load_state_dict(plain.state_dict())
    lean.activation_checkpointing_enable()
    expected = loss_and_gradients(plain, output_flow_predictions=True)
    calls = []
    modules = {"mask": lean.upsampler.mask_head, "head": lean.update_block.flow_head}
    modules |= {"encoder": lean.feature_encoder.stages[1][0], "context": lean.context_encoder.stages[1][0]}
    for name, module in modules.items():
        module.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    loss, gradients = loss_and_gradients(lean)
    updates = config.num_flow_updates
    assert calls.count("mask") == 2 * updates - 1  # the last prediction is an output
    assert calls.count("head") == 2 * updates and calls.count("encoder") == 2
    # Again, its BatchNorm would count the batch twice.
    assert calls.count("context") == (2 if freeze_batch_norm else 1)
    torch.testing.assert_close(loss, expected[0])
    torch.testing.assert_close(gradients, expected[1], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(dict(lean.named_buffers()), dict(plain.named_buffers()))


def kept_for_backward(model, **options) -> int:
    """Bytes of activations that the backward pass of a training step waits for."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    inputs = {"pixel_values": images(*SMALL_IMAGE)}
    if "prediction_loss" not in options:
        inputs["labels"] = torch.ones(1, 2, 64, 72)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(**inputs, **options)
    assert output.loss.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("options", [{}, {"prediction_loss": lambda i, flow: flow.square().mean()}])
@pytest.mark.parametrize(("checkpointing", "channels"), [(False, 1300), (True, 150)])
def test_an_update_keeps_little(checkpointing, channels, options):
    """Correlations are 100 channels, masks of upsampling 576, and what is made of them would be 1800 more."""
    model = RaftForOpticalFlow(tiny_config(convex_upsampling=True))
    if checkpointing:
        model.activation_checkpointing_enable()
    few, many = (kept_for_backward(model, num_flow_updates=updates, **options) for updates in (2, 12))
    assert 100 * 8 * 9 * 4 < (many - few) / 10 < channels * 8 * 9 * 4


class Operators(TorchDispatchMode):
    """Names of all operators that run while this is entered."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_waits_for_the_device(checkpointing):
    """No number is fetched from it, none is sent to it, and no shape depends on one; in bf16, too."""
    model = RaftForOpticalFlow(tiny_config(convex_upsampling=True, correlation="dense"))
    if checkpointing:
        model.activation_checkpointing_enable()
    labels, valid = torch.ones(1, 2, 64, 72), torch.ones(1, 64, 72, dtype=torch.bool)
    with Operators() as operators, torch.autocast("cpu", torch.bfloat16):
        model(images(*SMALL_IMAGE), labels=labels, valid=valid).loss.backward()
    assert "convolution" in operators.names
    assert not operators.names & set(WAITS_FOR_DEVICE)
    model.config.correlation = "on_demand"  # this one says that it waits
    with Operators() as operators:
        model(images(*SMALL_IMAGE), labels=labels, valid=valid)
    assert operators.names & set(WAITS_FOR_DEVICE)


@pytest.mark.slow
def test_compiles_into_one_graph():
    """Without a break, to predict and to train; and the graph computes the same."""
    torch._dynamo.reset()
    model = RaftForOpticalFlow(tiny_config(convex_upsampling=True, num_flow_updates=2)).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    pixel_values, labels = images(*SMALL_IMAGE), torch.ones(1, 2, 64, 72)
    with torch.no_grad():
        torch.testing.assert_close(compiled(pixel_values).flow, model(pixel_values).flow)
    results = []
    for run in (compiled.train(), model):
        model.zero_grad()
        loss = run(pixel_values, labels=labels).loss
        loss.backward()
        results.append([loss.detach(), *(weight.grad.clone() for weight in model.parameters())])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
