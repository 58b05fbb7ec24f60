"""Weights from princeton and torchvision, and our own through save_pretrained and the Hub's custom code."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_modeling_raft import BUILDERS, images, tiny_config
from tiny_run import PROJECT
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from modeling_raft import RaftConfig, RaftForOpticalFlow, RaftImageProcessor
from modeling_raft.convert_raft_checkpoint import convert_file, convert_state_dict, load_raft, main, module_names


def princeton_state_dict(model: RaftForOpticalFlow) -> dict[str, torch.Tensor]:
    """The weights under the original's names: `module.` before each, norms of shortcuts registered twice."""
    names = {ours: princeton for ours, princeton, _ in module_names(model.config)}
    weights = {}
    for name, tensor in model.state_dict().items():
        module, _, kind = name.rpartition(".")
        princeton = names[module]
        weights[f"module.{princeton}.{kind}"] = tensor
        if princeton.endswith("downsample.1"):
            weights[f"module.{princeton.removesuffix('downsample.1')}norm3.{kind}"] = tensor
    return weights


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("size", ["large", "small"])
def test_torchvision_weights_convert(size, prefix, tmp_path):
    state_dict = BUILDERS[size]().state_dict()
    path = tmp_path / "weights.pth"
    torch.save({prefix + name: tensor for name, tensor in state_dict.items()}, path)
    model = convert_file(path)
    assert model.config == (RaftConfig() if size == "large" else RaftConfig.small())
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in BUILDERS[size]().parameters())


@pytest.mark.parametrize("config", [RaftConfig(), RaftConfig.small()])
def test_princeton_names_convert(config):
    model = RaftForOpticalFlow(config)
    weights = princeton_state_dict(model)
    for state_dict in (weights, {name.removeprefix("module."): tensor for name, tensor in weights.items()}):
        converted = convert_state_dict(state_dict)
        for (name, ours), theirs in zip(model.state_dict().items(), converted.state_dict().values(), strict=True):
            assert torch.equal(ours, theirs), name


@pytest.mark.parametrize(("name", "large"), [("raft-small.pth", False), ("raft-sintel.pth", True)])
def test_original_files_convert_and_load(name, large, sample_weights, tmp_path, capsys):
    main([str(sample_weights / name), str(tmp_path)])
    assert ("large" if large else "small") in capsys.readouterr().out
    model = RaftForOpticalFlow.from_pretrained(tmp_path)
    original = torch.load(sample_weights / name, map_location="cpu", weights_only=True)
    # whatever the names, the very same numbers (a norm that is registered twice counts once)
    theirs = sorted(float(tensor.double().sum()) for key, tensor in original.items() if ".norm3." not in key)
    assert theirs == sorted(float(tensor.double().sum()) for tensor in model.state_dict().values())
    assert RaftImageProcessor.from_pretrained(tmp_path).do_pad


def test_misfits_are_listed():
    weights = princeton_state_dict(RaftForOpticalFlow(RaftConfig.small()))
    weights.pop("module.fnet.conv2.bias")
    weights["module.extra.weight"] = torch.zeros(1)
    weights["module.cnet.conv1.weight"] = torch.zeros(32, 3, 5, 5)
    with pytest.raises(ValueError) as error:
        convert_state_dict(weights)
    for part in ("fnet.conv2.bias is missing", "extra.weight is not known", "conv1.weight is (32, 3, 5, 5), not (32"):
        assert part in str(error.value)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "other.pth"
    for content, message in (
        ({"layer.weight": torch.zeros(2)}, "do not fit"),
        ([torch.zeros(2)], "no state dict"),
        ({"a": 3}, "no state dict"),
        (tiny_config, "cannot be read"),  # needs unpickling of a function
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=message) as error:
            convert_file(path)
        assert str(path) in str(error.value)
    torch.save({1: torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="no state dict"):
        convert_file(path)
    whole = tmp_path / "whole.pth"
    torch.save(BUILDERS["small"]().state_dict(), whole)
    for damaged in (b"no weights at all", b"hello world\n", b"", whole.read_bytes()[:5000]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="cannot be read"):
            convert_file(path)
    with pytest.raises(FileNotFoundError):
        convert_file(tmp_path / "missing.pth")


def test_nothing_but_tensors_is_unpickled(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("unpickled",)

    torch.save({"fnet.conv1.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="cannot be read"):
        convert_file(tmp_path / "evil.pth")


def test_command_line_reports_errors_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        main([str(tmp_path / "missing.pth"), str(tmp_path / "out")])
    assert error.value.code == 2
    assert "missing.pth" in capsys.readouterr().err


@pytest.mark.parametrize(
    "config", [tiny_config(loss_gamma=0.85, freeze_batch_norm=True), RaftConfig.small(dropout=0.1)]
)
def test_save_and_load_is_exact(config, tmp_path):
    model = RaftForOpticalFlow(config).eval()
    model.save_pretrained(tmp_path)
    loaded, report = RaftForOpticalFlow.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert loaded.config.to_diff_dict() == config.to_diff_dict()
    for (name, ours), theirs in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    pixel_values = images(1, 2, 3, 64, 64)
    assert torch.equal(model(pixel_values).flow, loaded(pixel_values).flow)


def test_load_raft_takes_folders_and_files(tmp_path):
    model = RaftForOpticalFlow(RaftConfig.small()).half()
    model.save_pretrained(tmp_path / "folder")
    torch.save(princeton_state_dict(model), tmp_path / "file.pth")
    for source in (tmp_path / "folder", tmp_path / "file.pth"):
        loaded = load_raft(source, loss_gamma=0.7)
        assert loaded.dtype == torch.float32 and not loaded.training
        assert loaded.config.loss_gamma == 0.7
        assert torch.equal(loaded.feature_encoder.projection.weight, model.feature_encoder.projection.weight.float())


def test_auto_classes_know_the_package(tmp_path):
    RaftForOpticalFlow(tiny_config()).save_pretrained(tmp_path)
    RaftImageProcessor().save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is RaftForOpticalFlow
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is RaftImageProcessor
    assert isinstance(AutoConfig.from_pretrained(tmp_path), RaftConfig)


STRANGER = """
import json, sys
import torch
try:
    import modeling_raft
except ImportError:
    pass
else:
    sys.exit("the package can be imported: this process proves nothing")
from transformers import AutoConfig, AutoImageProcessor, AutoModel
folder = sys.argv[1]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
image = torch.arange(64 * 72 * 3, dtype=torch.uint8).reshape(64, 72, 3).numpy()
inputs = processor([image, image[::-1].copy()], return_tensors="pt")
with torch.no_grad():
    outputs = model(**inputs)
flow = processor.post_process_optical_flow(outputs, target_sizes=[(64, 72)])[0]["flow"]
model.save_pretrained(sys.argv[2])
print(json.dumps([type(model).__module__, config.corr_radius, flow.double().sum().item()]))
"""


@pytest.mark.slow
def test_a_process_without_the_package_loads_it_as_remote_code(tmp_path):
    torch.manual_seed(0)
    model, processor = RaftForOpticalFlow(tiny_config()).eval(), RaftImageProcessor()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        *(path.name for path in (PROJECT / "modeling_raft").glob("*_raft.py")),
    }
    command = [sys.executable, "-I", "-c", BLOCK_PACKAGE + STRANGER, tmp_path / "model", tmp_path / "again"]
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    )
    assert result.returncode == 0, result.stderr
    module, radius, total = json.loads(result.stdout.splitlines()[-1])
    assert module.startswith("transformers_modules.") and radius == 2

    image = torch.arange(64 * 72 * 3, dtype=torch.uint8).reshape(64, 72, 3).numpy()
    with torch.no_grad():
        outputs = model(**processor([image, image[::-1].copy()], return_tensors="pt"))
    # Not to the bit: the processes may run different numbers of threads.
    assert outputs.flow.double().sum().item() == pytest.approx(total, rel=1e-6)
    assert (tmp_path / "again" / "modeling_raft.py").is_file()  # and can be shared on from there


# An editable installation puts the package on the path of every process of this environment; take it off.
BLOCK_PACKAGE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "modeling_raft":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
"""


def test_weights_that_do_not_fit_are_never_replaced_by_random_ones(tmp_path):
    RaftForOpticalFlow(tiny_config()).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    bias = weights.pop("context_encoder.projection.bias")
    for changed, message in (
        (weights, "missing keys: context_encoder.projection.bias"),
        (weights | {"context_encoder.projection.bias": bias[:3].clone()}, "mismatched keys: .*projection.bias"),
        (weights | {"context_encoder.projection.bias": bias, "extra": bias.clone()}, "unexpected keys: extra"),
    ):
        save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            load_raft(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=str(tmp_path)):
        load_raft(tmp_path)


def test_other_models_and_nothing_at_all_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="a model of type bert, not raft"):
        load_raft(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "raft", "encoder_widths": [1, 2]}')
    with pytest.raises(ValueError, match="encoder_widths needs 4 entries"):
        load_raft(tmp_path)
    with pytest.raises(OSError, match="nowhere is no folder with a model"):
        load_raft(tmp_path / "nowhere")
