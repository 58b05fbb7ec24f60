"""bf16 and fp16 around the model, with torch's own autocast and scaler on the CPU, and inside a real run."""

import math
from collections.abc import Sequence
from pathlib import Path

import cv2
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tiny_run import flags, log_lines, train
from torch import Tensor

import train_flow
from flow_training import processes
from modeling_raft import RaftConfig, RaftForOpticalFlow, modeling_raft
from modeling_raft.convert_raft_checkpoint import load_raft
from modeling_raft.kernels_raft import FLOAT16_MAX, cast_saturating, relu_saturating

SIZES = {"small": RaftConfig.small, "large": RaftConfig}
HALVES = [torch.float16, torch.bfloat16]
# The layers of either model with fewer channels: a CPU computes float16 one number at a time.
NARROW = {"feature_dim": 64, "hidden_dim": 32, "context_dim": 32, "encoder_widths": [16, 16, 24, 32]}
NARROW |= {"motion_corr_widths": [32], "motion_flow_widths": [32, 16], "motion_dim": 30, "flow_head_dim": 32}


def new_model(size: str, **overrides) -> RaftForOpticalFlow:
    torch.manual_seed(0)
    return RaftForOpticalFlow(SIZES[size](freeze_batch_norm=True, **overrides))


def random_inputs(height: int = 64, width: int = 72) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "pixel_values": torch.rand(1, 2, 3, height, width, generator=generator) * 2 - 1,
        "labels": torch.full((1, 2, height, width), 3.0),
    }


def enlarge_features(model: RaftForOpticalFlow, factor: float) -> None:
    with torch.no_grad():
        model.feature_encoder.projection.weight *= factor
        model.feature_encoder.projection.bias *= factor


# ---- what is too large for float16 ----


def test_saturation_touches_only_what_float16_cannot_hold():
    x = torch.tensor([-math.inf, -1e6, -3.5, -0.0, 0.0, 1e-5, 3.5, 65504.0, 1e6, math.inf, math.nan])
    limited = cast_saturating(x, torch.float16)
    expected = x.half().clamp(-65504, 65504)
    torch.testing.assert_close(limited, expected, rtol=0, atol=0, equal_nan=True)
    assert limited[:-1].isfinite().all() and limited[-1].isnan()
    torch.testing.assert_close(
        relu_saturating(x.half()), F.relu(x.half()).clamp(max=FLOAT16_MAX), rtol=0, atol=0, equal_nan=True
    )
    for dtype in (torch.float32, torch.bfloat16, torch.float64):  # an infinity there is an error, and must be visible
        torch.testing.assert_close(cast_saturating(x, dtype), x.to(dtype), rtol=0, atol=0, equal_nan=True)
        positive = relu_saturating(x.to(dtype, copy=True))
        torch.testing.assert_close(positive, F.relu(x.to(dtype)), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_saturating_relu_has_the_gradient_of_relu(dtype):
    values = torch.tensor([-2.0, -0.0, 0.0, 1e-3, 5.0, 60000.0])
    x, same = values.to(dtype).requires_grad_(), values.to(dtype).requires_grad_()
    relu_saturating(x * 1).sum().backward()
    F.relu(same * 1).sum().backward()
    assert torch.equal(x.grad, same.grad)
    infinite = torch.tensor([math.inf], dtype=torch.float16, requires_grad=True)
    relu_saturating(infinite * 1).sum().backward()
    assert infinite.grad == 0


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_ordinary_features_are_untouched_in_float16(size, monkeypatch):
    model, inputs = new_model(size, **NARROW), random_inputs()

    def run() -> tuple[Tensor, list[Tensor]]:
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            output = model(**inputs, num_flow_updates=2)
        (256 * output.loss).backward()
        return output.flow, [weight.grad for weight in model.parameters()]

    flow, gradients = run()
    monkeypatch.setattr(modeling_raft, "cast_saturating", lambda x, dtype: x.to(dtype))
    monkeypatch.setattr(modeling_raft, "relu_saturating", F.relu)
    plain_flow, plain_gradients = run()
    assert torch.equal(flow, plain_flow)
    for ours, plain in zip(gradients, plain_gradients, strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_float16_trains_with_features_100_times_larger(size):
    """Correlations are 10,000 times larger, far beyond float16; the scaler finds a scale, and steps are taken."""
    model, inputs = new_model(size, **NARROW), random_inputs()
    enlarge_features(model, 100)
    largest = []
    hook = model.update_block.register_forward_pre_hook(lambda _, args: largest.append(args[1].abs().max().item()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    scaler = torch.amp.GradScaler("cpu")
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for _ in range(30):
        with torch.autocast("cpu", dtype=torch.float16):
            output = model(**inputs, num_flow_updates=2)
        assert output.loss.isfinite() and output.flow.isfinite().all()
        scaler.scale(output.loss).backward()
        scaler.unscale_(optimizer)
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() >= scale:  # not skipped
            break
        optimizer.zero_grad()
    hook.remove()
    assert max(largest) > 2 * FLOAT16_MAX  # else this tests nothing
    assert scaler.get_scale() >= scale, "every step overflowed"
    for name, weight in model.named_parameters():
        assert weight.grad.isfinite().all() and weight.isfinite().all(), name
    changed = model.feature_encoder.stem.conv.weight
    assert changed.grad.norm() > 0  # the way to the features is not shut by saturation
    assert not torch.equal(changed, before["feature_encoder.stem.conv.weight"])


# ---- what stays in float32 ----


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", SIZES)
def test_outputs_coordinates_and_loss_are_float32_under_autocast(size, dtype):
    model = new_model(size)
    seen = {}
    for part in (model.update_block, model.upsampler):
        part.register_forward_pre_hook(
            lambda module, args: seen.setdefault(type(module).__name__, []).extend(x.dtype for x in args)
        )
    with torch.autocast("cpu", dtype=dtype):
        output = model(**random_inputs(), num_flow_updates=1, output_flow_predictions=True)
    # hidden, correlations, flow, what updates share; then hidden, flow
    shared = [dtype] * 5 * len(model.update_block.grus)
    assert seen.pop("UpdateBlock") == [dtype, torch.float32, torch.float32, *shared]
    assert list(seen.values()) == [[dtype, torch.float32]]
    for tensor in (output.loss, output.flow, output.low_res_flow, *output.flow_predictions):
        assert tensor.dtype == torch.float32


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", SIZES)
def test_small_changes_of_a_wide_flow_are_not_lost(size, dtype):
    """Neither sum nor upsampling rounds to half precision, where 300 has neighbours 0.25 or 2 away."""
    model = new_model(size).eval()
    head = model.update_block.flow_head[-1]
    with torch.no_grad():
        head.weight.zero_()
        head.bias.fill_(2.0**-10)
        with torch.autocast("cpu", dtype=dtype):
            output = model(
                random_inputs()["pixel_values"], num_flow_updates=3, initial_flow=torch.full((1, 2, 8, 9), 300.0)
            )
    expected = 300 + 3 * 2.0**-10
    assert (output.low_res_flow == expected).all()
    inner = output.flow[..., 8:-8, 8:-8]  # at the rim, the convex upsampler sees zeros
    torch.testing.assert_close(inner, torch.full_like(inner, 8 * expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", SIZES)
def test_models_with_half_weights(size, dtype, tmp_path):
    model, inputs = new_model(size).eval(), random_inputs()
    model.save_pretrained(tmp_path)
    half = RaftForOpticalFlow.from_pretrained(tmp_path, dtype=dtype).eval()
    assert half.dtype == dtype
    with torch.no_grad():
        reference = model(**inputs, num_flow_updates=2)
        output = half(**inputs, num_flow_updates=2)
        for name in ("loss", "flow", "low_res_flow"):
            assert output[name].dtype == torch.float32
            torch.testing.assert_close(output[name], reference[name], rtol=0.05, atol=0.1)
        halved = half(**{name: tensor.to(dtype) for name, tensor in inputs.items()}, num_flow_updates=2)
        assert halved.loss.dtype == torch.float32
        torch.testing.assert_close(halved.loss, output.loss, rtol=1e-5, atol=0)
        enlarge_features(half, 100)
        assert half(**inputs, num_flow_updates=2).flow.isfinite().all()


# ---- how far from float32 ----


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "similarity"), [(torch.float16, 0.999), (torch.bfloat16, 0.99)])
@pytest.mark.parametrize("size", SIZES)
def test_gradients_are_those_of_float32(size, dtype, similarity):
    """With activation checkpointing or not: a recomputed update must see the same autocast."""
    model, inputs = new_model(size, **NARROW), random_inputs()

    def gradient(enabled: bool) -> Tensor:
        model.zero_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            loss = model(**inputs, num_flow_updates=2).loss
        (256 * loss).backward()
        return torch.cat([weight.grad.flatten() for weight in model.parameters()]) / 256

    reference, mixed = gradient(False), gradient(True)
    assert mixed.isfinite().all()
    assert F.cosine_similarity(mixed.double(), reference.double(), dim=0) > similarity
    assert mixed.norm() == pytest.approx(reference.norm().item(), rel=0.02)
    model.activation_checkpointing_enable()
    torch.testing.assert_close(gradient(True), mixed, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["raft-small.pth", "raft-sintel.pth"])
def test_published_weights_on_a_real_pair(weights, sample_data, sample_weights):
    """The flow under autocast against the flow in float32, in pixels, where the flow itself is 4 px (Chairs 00001)."""
    model = load_raft(str(sample_weights / weights)).eval()
    files = [sample_data / f"FlyingChairs_release/data/00001_img{i}.ppm" for i in (1, 2)]
    frames = [torch.from_numpy(cv2.imread(str(path))[..., ::-1].copy()).permute(2, 0, 1) for path in files]
    pixel_values = torch.stack(frames)[None, :, :, 96:224, 160:320] / 127.5 - 1
    with torch.no_grad():
        reference = model(pixel_values, num_flow_updates=12).flow
        assert reference.norm(dim=1).mean() > 1
        for dtype, limit in ((torch.float16, 0.02), (torch.bfloat16, 0.15)):
            with torch.autocast("cpu", dtype=dtype):
                flow = model(pixel_values, num_flow_updates=12).flow
            difference = (flow - reference).norm(dim=1).mean().item()
            print(f"{weights} {dtype}: {difference:.4f} px")
            assert 0 < difference < limit


# ---- complete runs ----


@pytest.mark.slow
def test_bf16_learns_a_pair_as_float32_does(tmp_path):
    """Real processes, one synthetic pair over and over (only its colors change)."""
    losses = {}
    for precision in ("no", "bf16"):
        result = train(
            tmp_path / precision,
            "--no_flip",
            mixed_precision=precision,
            synthetic_num_pairs="1",
            synthetic_image_size="64 72",
            zoom_range="0 0",
            total_batch_size="1",
            max_train_steps="100",
        )
        assert result.returncode == 0, result.stderr
        losses[precision] = [line["loss"] for line in log_lines(tmp_path / precision)]
    for precision, of_run in losses.items():
        means = [sum(of_run[i : i + 20]) / 20 for i in range(0, 100, 20)]
        print(f"{precision}: loss of the first step {of_run[0]:.4f}, means of 20 steps {means}")
        assert means[-1] < 0.5 * means[0]
    # Later, steps on single pairs part ways; both go down.
    assert losses["bf16"][:5] == pytest.approx(losses["no"][:5], rel=0.03)
    assert losses["bf16"][0] != losses["no"][0]


class WatchedScaler(torch.amp.GradScaler):
    """torch's scaler; notes what each step did to the weights: (scale, learning rate, changed)."""

    def __init__(self, init_scale: float, device: str = "cpu"):
        super().__init__(device, init_scale=init_scale, growth_interval=4)
        self.steps: list[tuple[float, float, bool]] = []

    def step(self, optimizer, *args, **kwargs):
        (group,) = optimizer.param_groups
        before = [weight.detach().clone() for weight in group["params"]]
        result = super().step(optimizer, *args, **kwargs)
        changed = not all(map(torch.equal, before, group["params"]))
        self.steps.append((self.get_scale(), group["lr"], changed))
        return result


def expected_scales(changed: Sequence[bool]) -> list[float]:
    """The scale that each step is taken with: it halves with every overflow, and doubles after 4 steps without."""
    scales, good = [2.0**24], 0
    for taken in changed:
        good = good + 1 if taken else 0
        scales.append(scales[-1] / 2 if not taken else 2 * scales[-1] if good == 4 else scales[-1])
        good %= 4
    return scales[:-1]


@pytest.fixture
def run_in_float16(monkeypatch):
    """train_flow.py in this process, with what accelerate sets up for fp16 on a GPU put on the CPU."""
    make_accelerator = train_flow.make_accelerator
    monkeypatch.setattr(processes, "check_precision", lambda accelerator: None)

    def run(output_dir: Path, **settings: str) -> WatchedScaler:
        AcceleratorState._reset_state(reset_partial_state=True)
        scaler = WatchedScaler(init_scale=2.0**24)

        def make(config):
            accelerator, config = make_accelerator(config)
            assert accelerator.mixed_precision == "fp16" and accelerator.scaler is None
            accelerator.native_amp, accelerator.scaler = True, scaler
            return accelerator, config

        monkeypatch.setattr(train_flow, "make_accelerator", make)
        fast = {"per_device_train_batch_size": "2", "num_flow_updates": "1"}  # float16 is slow on a CPU
        train_flow.main(flags(output_dir, mixed_precision="fp16", **fast | settings))
        return scaler

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.slow
def test_a_run_skips_steps_that_overflow_in_float16(run_in_float16, tmp_path):
    num_steps = 24
    fixed = {"max_train_steps": str(num_steps), "checkpointing_steps": "4", "ema_decay": "0.9"}
    fixed |= {"total_batch_size": "2", "per_device_train_batch_size": "1"}  # two micro-batches
    scaler = run_in_float16(tmp_path / "whole", **fixed)
    scales, learning_rates, changed = zip(*scaler.steps, strict=True)
    assert len(scaler.steps) == num_steps  # skipped ones are counted
    first = changed.index(True)
    assert first >= 2 and not all(changed[first:]) and changed.count(True) > 10, scaler.steps
    print(f"{changed.count(False)} of {num_steps} steps skipped, scale {scales[first]:.0f} at the first that was not")

    assert list(scales) == expected_scales(changed)

    # A skipped step does not advance the schedule: steps that are taken see all its rates, in order.
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=3e-4)
    schedule = train_flow.make_schedule(optimizer, 3e-4, num_steps)
    for learning_rate, taken in zip(learning_rates, changed, strict=True):
        assert learning_rate == schedule.get_last_lr()[0]
        if taken:
            optimizer.step()
            schedule.step()

    lines = log_lines(tmp_path / "whole")
    assert [line["step"] for line in lines] == list(range(1, num_steps + 1))
    assert [line.get("skipped_steps", 0) for line in lines] == [0 if taken else 1 for taken in changed]
    assert [line["learning_rate"] for line in lines] == list(learning_rates)
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert all((line["grad_norm"] > 0) == taken for line, taken in zip(lines, changed, strict=True))

    progress = torch.load(tmp_path / "whole" / f"checkpoint-{num_steps}" / "custom_checkpoint_1.pkl")
    assert progress["ema"]["num_updates"] == changed.count(True)  # nor does it count for the average of the weights

    # The scale, and how long it has been good for, are part of a checkpoint: in the middle of the skipped steps too.
    for start in (4, 16):
        again = tmp_path / f"from-{start}"
        checkpoint = str(tmp_path / "whole" / f"checkpoint-{start}")
        resumed = run_in_float16(again, resume_from_checkpoint=checkpoint, **fixed)
        assert resumed.steps == scaler.steps[start:]
        ours, theirs = (load_file(path / "model.safetensors") for path in (again, tmp_path / "whole"))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_a_run_whose_every_step_overflows_publishes_nothing(run_in_float16, tmp_path):
    with pytest.raises(SystemExit, match="every step was skipped"):
        run_in_float16(tmp_path / "run", max_train_steps="2")
    assert not (tmp_path / "run" / "model.safetensors").exists()
