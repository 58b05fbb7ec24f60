"""The model against torchvision's, and its promises as a PreTrainedModel."""

import copy
import math

import pytest
import torch
from torchvision.models.optical_flow import raft as torchvision_raft
from torchvision.models.optical_flow import raft_large, raft_small
from transformers import Trainer, TrainingArguments

from modeling_raft import RaftConfig, RaftForOpticalFlow, correlation_raft, sequence_loss
from modeling_raft.convert_raft_checkpoint import convert_state_dict
from modeling_raft.correlation_raft import warp
from modeling_raft.loss_raft import SequenceLoss

BUILDERS = {"large": raft_large, "small": raft_small}
SMALL_IMAGE = (1, 2, 3, 64, 72)


def torchvision_and_ours(size: str) -> tuple[torch.nn.Module, RaftForOpticalFlow]:
    torch.manual_seed(0)
    oracle = BUILDERS[size]().eval()
    for module in oracle.modules():  # statistics other than 0 and 1, so that BatchNorm's matter
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return oracle, convert_state_dict(oracle.state_dict())


def tiny_config(**overrides) -> RaftConfig:
    """A real RAFT in all its parts, small enough to run in milliseconds."""
    tiny = {
        "feature_dim": 16,
        "hidden_dim": 16,
        "context_dim": 16,
        "encoder_widths": [8, 8, 12, 16],
        "corr_radius": 2,
        "motion_corr_widths": [16, 16],
        "motion_flow_widths": [16, 16],
        "motion_dim": 18,
        "flow_head_dim": 16,
        "num_flow_updates": 3,
    }
    return RaftConfig(**{**tiny, **overrides})


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("size", ["large", "small"])
@pytest.mark.parametrize(("height", "width", "updates"), [(128, 128, 1), (136, 184, 4), (256, 136, 12)])
def test_flow_equals_torchvision(size, height, width, updates):
    oracle, model = torchvision_and_ours(size)
    pixel_values = images(2, 2, 3, height, width)
    with torch.no_grad():
        expected = oracle(pixel_values[:, 0], pixel_values[:, 1], num_flow_updates=updates)
        output = model(pixel_values, num_flow_updates=updates, output_flow_predictions=True)
    assert len(output.flow_predictions) == len(expected) == updates
    for ours, theirs in zip(output.flow_predictions, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)
    assert output.flow is output.flow_predictions[-1]


@pytest.fixture
def torchvision_in_double(monkeypatch):
    """torchvision makes its coordinates in float32, whatever the weights are."""
    make_coords_grid = torchvision_raft.make_coords_grid
    monkeypatch.setattr(
        torchvision_raft, "make_coords_grid", lambda *args, **kw: make_coords_grid(*args, **kw).double()
    )
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("size", [pytest.param("large", marks=pytest.mark.slow), "small"])
def test_gradients_equal_torchvision(size, torchvision_in_double):
    oracle, model = torchvision_and_ours(size)
    oracle, model = oracle.double().train(), model.double().train()
    pixel_values = images(2, 2, 3, 128, 136).double()
    labels = 20 * torch.randn(2, 2, 128, 136, dtype=torch.float64)
    valid = torch.rand(2, 128, 136) < 0.7

    predictions = oracle(pixel_values[:, 0], pixel_values[:, 1], num_flow_updates=3)
    gamma = model.config.loss_gamma
    oracle_loss = sum(
        gamma ** (2 - i) * (valid[:, None] * (flow_pred - labels).abs()).mean()
        for i, flow_pred in enumerate(predictions)
    )
    oracle_loss.backward()
    output = model(pixel_values, labels=labels, valid=valid, num_flow_updates=3)
    output.loss.backward()

    torch.testing.assert_close(output.loss, oracle_loss, rtol=1e-9, atol=0)
    theirs = convert_state_dict(
        {name: weight.grad for name, weight in oracle.named_parameters()} | dict(oracle.named_buffers())
    )
    theirs = dict(theirs.named_parameters())
    for name, weight in model.named_parameters():
        difference = (weight.grad - theirs[name]).norm()
        assert difference <= 1e-3 * theirs[name].norm() + 1e-9, name


def test_parameter_counts_are_the_published_ones():
    assert RaftForOpticalFlow(RaftConfig()).num_parameters() == 5_257_536
    assert RaftForOpticalFlow(RaftConfig.small()).num_parameters() == 990_162


def test_smallest_image_works():
    output = RaftForOpticalFlow(tiny_config()).eval()(images(1, 2, 3, 64, 64))
    assert output.flow.shape == (1, 2, 64, 64)
    assert output.flow.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pixel_values": images(1, 2, 3, 64, 70)}, "multiples of 8; got 64 x 70"),
        ({"pixel_values": images(1, 2, 3, 56, 72)}, "at least 64 with 4 correlation levels.*got 56 x 72"),
        ({"pixel_values": images(2, 3, 64, 64)}, r"\(batch, 2, 3, height, width\); got \(2, 3, 64, 64\)"),
        ({"pixel_values": torch.zeros(SMALL_IMAGE, dtype=torch.uint8)}, "floating point.*uint8"),
        ({"labels": torch.zeros(1, 2, 64, 64)}, r"labels must be \(1, 2, 64, 72\); got \(1, 2, 64, 64\)"),
        ({"valid": torch.ones(1, 2, 64, 72)}, r"valid must be \(1, 64, 72\); got \(1, 2, 64, 72\)"),
        ({"initial_flow": torch.zeros(1, 2, 64, 72)}, r"initial_flow must be \(1, 2, 8, 9\); got \(1, 2, 64, 72\)"),
        ({"num_flow_updates": 0}, "num_flow_updates must be at least 1; got 0"),
        ({"labels": None}, "valid must be None where labels are missing"),
        ({"prediction_loss": lambda i, flow: flow.sum()}, "prediction_loss must be None where labels are given"),
    ],
)
def test_bad_input_is_refused(changes, message):
    inputs = {
        "pixel_values": images(*SMALL_IMAGE),
        "labels": torch.zeros(1, 2, 64, 72),
        "valid": torch.ones(1, 64, 72),
    }
    with pytest.raises(ValueError, match=message):
        RaftForOpticalFlow(tiny_config())(**(inputs | changes))


def test_initial_flow_continues_where_updates_stopped():
    """Without the recurrent state's memory (update gate shut), n updates and then m are n + m updates."""
    model = RaftForOpticalFlow(tiny_config()).eval()
    for gru in model.update_block.grus:
        gru.update_gate.weight.data.zero_()
        gru.update_gate.bias.data.fill_(-1e9)
    pixel_values = images(*SMALL_IMAGE)
    with torch.no_grad():
        first = model(pixel_values, num_flow_updates=2)
        then = model(pixel_values, num_flow_updates=3, initial_flow=first.low_res_flow)
        at_once = model(pixel_values, num_flow_updates=5)
    assert first.low_res_flow.abs().max() > 1e-3
    torch.testing.assert_close(then.flow, at_once.flow)


def test_frozen_batch_norm_survives_train():
    model = RaftForOpticalFlow(tiny_config(freeze_batch_norm=True))
    before = copy.deepcopy(dict(model.named_buffers()))
    assert any("running_mean" in name for name in before)
    for _ in range(2):
        model(images(*SMALL_IMAGE))
        model.train()
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
    assert model.context_encoder.stem.norm.weight.requires_grad
    assert model.context_encoder.training

    thawed = RaftForOpticalFlow(tiny_config())
    thawed(images(*SMALL_IMAGE))
    assert not torch.equal(
        thawed.context_encoder.stem.norm.running_mean, before["context_encoder.stem.norm.running_mean"]
    )


def test_dropout_drops_whole_channels_while_training_only():
    model = RaftForOpticalFlow(tiny_config(dropout=0.5))
    torch.manual_seed(0)
    dropped = (model.feature_encoder(images(1, 3, 64, 64)) == 0).flatten(2)
    assert dropped.all(-1).any() and torch.equal(dropped.all(-1), dropped.any(-1))
    assert not (model.eval().feature_encoder(images(1, 3, 64, 64)) == 0).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_flow_and_correlation_in_float32(dtype, monkeypatch):
    seen = []

    class Spy(correlation_raft.DenseCorrelation):
        def lookup(self, centroids):
            seen.append((centroids.dtype, self.volume.dtype))
            return super().lookup(centroids)

    monkeypatch.setitem(correlation_raft.IMPLEMENTATIONS, "dense", Spy)
    torch.manual_seed(0)
    model = RaftForOpticalFlow(RaftConfig.small()).eval()
    pixel_values = images(1, 2, 3, 64, 96)
    with torch.no_grad():
        reference = model(pixel_values).flow
        with torch.autocast("cpu", dtype=dtype):
            features = model.feature_encoder(pixel_values[:, 0])
            output = model(pixel_values)
    assert features.dtype == dtype
    assert set(seen) == {(torch.float32, torch.float32)}
    assert output.flow.dtype == torch.float32
    assert (output.flow - reference).abs().max() < 0.05 * reference.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_run_without_autocast(dtype):
    model = RaftForOpticalFlow(tiny_config()).eval().to(dtype)
    output = model(images(*SMALL_IMAGE).to(dtype))
    assert output.flow.dtype == torch.promote_types(dtype, torch.float32)


def test_activation_checkpointing_gives_the_same_gradients():
    model = RaftForOpticalFlow(tiny_config(freeze_batch_norm=True)).double()
    inputs = {"pixel_values": images(*SMALL_IMAGE).double(), "labels": torch.ones(1, 2, 64, 72).double()}
    model(**inputs).loss.backward()
    expected = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()

    model.activation_checkpointing_enable()
    calls = []
    hook = model.update_block.flow_head.register_forward_pre_hook(lambda *_: calls.append(1))
    model(**inputs).loss.backward()
    hook.remove()
    assert len(calls) == 2 * model.config.num_flow_updates  # every update ran again in the backward pass
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, expected[name], rtol=1e-9, atol=1e-12)


def test_return_dict_and_order_of_the_tuple():
    model = RaftForOpticalFlow(tiny_config()).eval()
    inputs = {"pixel_values": images(*SMALL_IMAGE), "labels": torch.zeros(1, 2, 64, 72)}
    output = model(**inputs, output_flow_predictions=True)
    as_tuple = model(**inputs, output_flow_predictions=True, return_dict=False)
    assert len(as_tuple) == 4 and list(output) == ["loss", "flow", "low_res_flow", "flow_predictions"]
    assert torch.equal(as_tuple[0], output.loss) and as_tuple[3][-1] is as_tuple[1]
    assert model(images(*SMALL_IMAGE)).loss is None


def test_convolutions_start_as_published():
    torch.manual_seed(0)
    model = RaftForOpticalFlow(RaftConfig())
    for conv in (model.feature_encoder.stem.conv, model.context_encoder.stages[1][0].layers[1].conv):
        fan_out = conv.out_channels * conv.kernel_size[0] ** 2
        assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.03)
    conv = model.update_block.flow_head[0]  # torch's default: uniform in 1 / sqrt(fan in)
    assert conv.weight.abs().max().item() == pytest.approx(1 / math.sqrt(conv.in_channels * 9), rel=0.01)


class Pairs(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return {
            "pixel_values": images(2, 3, 64, 72, seed=i),
            "labels": torch.full((2, 64, 72), 2.0),
            "valid": torch.ones(64, 72, dtype=torch.bool),
        }


@pytest.mark.slow
def test_works_inside_the_transformers_trainer(tmp_path):
    torch.manual_seed(0)
    model = RaftForOpticalFlow(tiny_config())
    args = TrainingArguments(
        output_dir=tmp_path,
        per_device_train_batch_size=2,
        num_train_epochs=3,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        activation_checkpointing=True,
    )
    trainer = Trainer(model=model, args=args, train_dataset=Pairs(), eval_dataset=Pairs())
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    prediction = trainer.predict(Pairs())
    assert prediction.label_ids.shape == (4, 2, 64, 72)
    assert prediction.predictions[0].shape == (4, 2, 64, 72)


def loss_and_gradients(model: RaftForOpticalFlow, **inputs) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), [weight.grad.clone() for weight in model.parameters()]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_prediction_loss_takes_the_place_of_labels(checkpointing):
    """With the sequence loss as `prediction_loss`, loss and gradients are those with labels."""
    torch.manual_seed(0)
    model = RaftForOpticalFlow(tiny_config(freeze_batch_norm=True, loss_gamma=0.7)).double()
    if checkpointing:
        model.activation_checkpointing_enable()
    pixel_values = images(*SMALL_IMAGE).double()
    labels, valid = 3 * torch.randn(1, 2, 64, 72).double(), torch.rand(1, 64, 72) < 0.7
    expected = loss_and_gradients(model, pixel_values=pixel_values, labels=labels, valid=valid)
    prediction_loss = SequenceLoss(labels, valid, model.config.num_flow_updates, gamma=0.7, max_flow=400.0)
    ours = loss_and_gradients(model, pixel_values=pixel_values, prediction_loss=prediction_loss)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def test_prediction_loss_needs_no_ground_truth():
    """A photometric loss of every prediction, made of images and `warp` only, reaches all weights."""
    torch.manual_seed(0)
    model = RaftForOpticalFlow(tiny_config()).double()
    pixel_values = images(*SMALL_IMAGE).double()
    seen = {}

    def photometric(i: int, flow: torch.Tensor) -> torch.Tensor:
        seen.setdefault(i, flow.detach())
        warped, inside = warp(pixel_values[:, 1], flow)
        return 0.5**i * ((warped - pixel_values[:, 0]).abs() * inside[:, None]).mean()

    output = model(pixel_values, prediction_loss=photometric, output_flow_predictions=True)
    expected = sum(photometric(i, flow) for i, flow in enumerate(output.flow_predictions))
    torch.testing.assert_close(output.loss, expected)
    seen.clear()
    loss, gradients = loss_and_gradients(model, pixel_values=pixel_values, prediction_loss=photometric)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(list(seen), [0, 1, 2])
    torch.testing.assert_close(list(seen.values()), [flow.detach() for flow in output.flow_predictions])
    assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_loss_in_forward_uses_the_configuration():
    model = RaftForOpticalFlow(tiny_config(loss_gamma=0.5, loss_max_flow=30.0)).eval()
    labels = 20 * torch.randn(1, 2, 64, 72)
    output = model(images(*SMALL_IMAGE), labels=labels, output_flow_predictions=True)
    expected = sequence_loss(output.flow_predictions, labels, gamma=0.5, max_flow=30.0)
    assert output.loss == expected != sequence_loss(output.flow_predictions, labels, gamma=0.8, max_flow=400.0)
