"""Apple's GPUs (MPS) and Intel's (XPU): every operator that prediction and training use has a kernel there.

Nothing here runs on such a device. The list is the one that PyTorch is built from, and installs: for every operator in
`native_functions.yaml`, the devices that have a kernel, where it is not composed of other operators. What a kernel
does not take, such as float64 on MPS, is checked beside it.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import torchgen
import yaml
from test_modeling_raft import SMALL_IMAGE, images, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flow_inference import FlowVideo
from flow_inference.warm_start import forward_interpolate
from flow_training.metrics import error_sums
from flow_training.optimization import ExponentialMovingAverage, make_optimizer
from modeling_raft import RaftForOpticalFlow

LIST = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
# Kernels of the CPU for what has another operator on a GPU of either kind; the list says so under CUDA, too.
OF_THE_CPU = {"mkldnn_convolution", "_fused_adamw_.tensor_lr"}
COMPOSED = {"CompositeExplicitAutograd", "CompositeImplicitAutograd", "CompositeExplicitAutogradNonFunctional"}


class UsedOperators(TorchDispatchMode):
    """Names of the operators that run while this is entered, with overloads; and of those that make float64."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()
        self.of_float64: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == "aten":  # others are what a profiler or Python adds
            name = func.name().removeprefix("aten::")
            self.names.add(name)
            tensors = [each for each in tree_leaves(result) if isinstance(each, torch.Tensor)]
            if any(tensor.dtype == torch.float64 for tensor in tensors):
                self.of_float64.add(name)
        return result


@pytest.fixture(scope="module")
def operators() -> dict[str, dict]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return {entry["func"].partition("(")[0]: entry for entry in yaml.load(LIST.read_text(), loader)}


def has_kernel(operators: dict[str, dict], name: str, device: str) -> bool:
    """Whether the list has a kernel of the operator for a device, or composes it of others."""
    entry = operators[name]
    delegate = entry.get("structured_delegate")
    if delegate is not None:
        return has_kernel(operators, delegate, device)
    if "dispatch" not in entry:
        return not entry.get("structured")  # composed of other operators, which are used as well
    devices = {each.strip() for key in entry["dispatch"] for each in key.split(",")}
    return bool(devices & (COMPOSED | {device}))


def train() -> None:
    """A step in float32 and one in bf16, with both kinds of upsampling, of correlation and of keeping activations."""
    for convex in (True, False):
        for correlation in ("dense", "on_demand"):
            config = tiny_config(num_flow_updates=2, correlation=correlation, convex_upsampling=convex)
            model = RaftForOpticalFlow(config)
            if convex:
                model.activation_checkpointing_enable()
            average = ExponentialMovingAverage(model, 0.9)
            optimizer = make_optimizer(model.parameters(), 1e-4, 1e-5)
            labels, valid = torch.ones(1, 2, 64, 72), torch.ones(1, 64, 72, dtype=torch.bool)
            for dtype in (None, torch.bfloat16):
                with torch.autocast("cpu", dtype, enabled=dtype is not None):
                    output = model(images(*SMALL_IMAGE), labels=labels, valid=valid)
                output.loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                average.update(model)
                error_sums(output.flow.detach(), labels, valid)


def predict() -> None:
    """A video with warm start, occlusion and resized frames."""
    frames = [np.random.default_rng(i).integers(0, 256, (72, 88, 3), dtype=np.uint8) for i in range(3)]
    for convex in (True, False):
        model = RaftForOpticalFlow(tiny_config(convex_upsampling=convex)).eval()
        for options in ({"max_side": 80, "mixed_precision": "no"}, {"min_side": 96, "mixed_precision": "bf16"}):
            assert len(list(FlowVideo(model, frames, num_flow_updates=2, backward=True, **options))) == 2
    forward_interpolate(8 * torch.randn(1, 2, 24, 24, generator=torch.Generator().manual_seed(0)))  # leaves gaps


@pytest.fixture(scope="module", params=[predict, train])
def used(request) -> UsedOperators:
    with UsedOperators() as used:
        request.param()
    return used


@pytest.mark.slow
@pytest.mark.parametrize("device", ["MPS", "XPU"])
def test_every_operator_has_a_kernel(used, device, operators):
    assert len(used.names) > 40
    if sum(device in str(entry.get("dispatch")) for entry in operators.values()) < 100:  # PyTorch 2.11 has 29 of XPU
        pytest.skip(f"the list of PyTorch {torch.__version__} leaves {device} out")
    assert {name for name in used.names - OF_THE_CPU if not has_kernel(operators, name, device)} == set()


def test_nothing_is_computed_in_float64(used):
    """MPS has no such numbers."""
    assert used.of_float64 == set()


def test_a_missing_kernel_is_seen(operators):
    """Of an operator that MPS lacks, and XPU as well."""
    assert not has_kernel(operators, "linalg_eig", "MPS") and has_kernel(operators, "linalg_eig", "CUDA")
    assert not has_kernel(operators, "_linalg_eigvals", "XPU")
