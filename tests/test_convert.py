"""Weights from princeton and torchvision, and our own through save_pretrained and the Hub's custom code."""

import copy
import json
import runpy
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_modeling_raft import BUILDERS, images, tiny_config
from tiny_run import PROJECT
from torchvision.models import resnet18
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from modeling_raft import RaftConfig, RaftForOpticalFlow, RaftImageProcessor
from modeling_raft.convert_raft_checkpoint import convert_file, convert_state_dict, load_raft, main
from modeling_raft.weight_layouts import module_names


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


def assert_same_weights(model, expected):
    assert model.dtype == torch.float32 and not model.training
    for (name, ours), theirs in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def prefixed(prefix, state_dict):
    return {prefix + name: tensor for name, tensor in state_dict.items()}


@pytest.fixture(scope="module")
def small():
    """A small RAFT, and its weights under princeton's names."""
    model = RaftForOpticalFlow(RaftConfig.small())
    return model, {name.removeprefix("module."): weight for name, weight in princeton_state_dict(model).items()}


@pytest.fixture(scope="module")
def large():
    """A large RAFT, and its weights under princeton's names; its counters of batches are large, too."""
    model = RaftForOpticalFlow(RaftConfig())
    for name, tensor in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            tensor.fill_(2**60 + 1)  # which no float holds
    return model, {name.removeprefix("module."): weight for name, weight in princeton_state_dict(model).items()}


WRAPPED = {
    "compiled": lambda weights: prefixed("_orig_mod.", weights),
    "compiled and parallel": lambda weights: prefixed("_orig_mod.module.", weights),
    "parallel and compiled": lambda weights: prefixed("module._orig_mod.", weights),
    "in a module": lambda weights: prefixed("model.raft.", weights),
    "in a parallel module": lambda weights: prefixed("module.raft.model._orig_mod.", weights),
    "in a module of another name": lambda weights: prefixed("flow_estimator.", weights),
    "beside a loss": lambda weights: {"criterion.weight": torch.zeros(3), **prefixed("raft.", weights)},
    "parts compiled": lambda weights: {name.replace("fnet.", "fnet._orig_mod."): w for name, w in weights.items()},
    "one part parallel": lambda weights: {("module." * ("cnet" in name)) + name: w for name, w in weights.items()},
    "Lightning": lambda weights: {
        "state_dict": prefixed("model.", weights),
        "hyper_parameters": {"lr": 1},
        "epoch": 3,
    },
    "averaged by torch": lambda weights: {
        "model_ema": {"n_averaged": torch.tensor(3), **prefixed("module.", weights)}
    },
    "twice": lambda weights: {"model": prefixed("module.", weights), "best": weights},
    "twice under other names": lambda weights: {**prefixed("one.", weights), **prefixed("other.", weights)},
    "with other values": lambda weights: {**weights, "epoch": 3, "optimizer": {"exp_avg": weights}},
    "parameters": lambda weights: {name: torch.nn.Parameter(weight) for name, weight in weights.items()},
    "double": lambda weights: {name: weight.double() for name, weight in weights.items()},
    **{
        name: lambda weights, name=name: {"epoch": 3, name: weights, "optimizer": {"state": {0: weights}}}
        for name in ("state_dict", "model", "model_state_dict", "net", "params", "params_ema", "weights", "module")
    },
    "nested": lambda weights: {"state_dict": {"model": {"module": weights}}},
    "under another name": lambda weights: {"my": {"network": prefixed("module.", weights)}},
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_weights_are_found_wherever_trainers_put_them(kind, small, tmp_path):
    model, weights = small
    path = tmp_path / "checkpoint.ckpt"
    torch.save(WRAPPED[kind](weights), path)
    assert_same_weights(load_raft(path), model)


@pytest.mark.parametrize("size", ["large", "small"])
def test_wrapped_weights_of_torchvision(size, tmp_path):
    peer = BUILDERS[size]()
    torch.save({"model": prefixed("module.", peer.state_dict()), "args": {"lr": 1}}, tmp_path / "model_5.pth.tar")
    model = load_raft(tmp_path / "model_5.pth.tar")
    pixel_values = images(1, 2, 3, 128, 128)
    with torch.no_grad():
        expected = peer.eval()(*pixel_values.unbind(1), num_flow_updates=2)[-1]
        torch.testing.assert_close(model(pixel_values, num_flow_updates=2).flow, expected, atol=1e-3, rtol=0)


def test_precisions_become_float32(large):
    model, weights = large
    assert_same_weights(convert_state_dict(weights), model)  # and whole numbers stay exact
    for dtype in (torch.float16, torch.bfloat16):
        converted = convert_state_dict({name: w.to(dtype) if "num" not in name else w for name, w in weights.items()})
        assert converted.dtype == torch.float32
        expected = model.context_encoder.projection.weight.to(dtype).float()
        assert torch.equal(converted.context_encoder.projection.weight, expected)
    old = {name: weight for name, weight in weights.items() if "num_batches_tracked" not in name}  # torch 0.4
    assert torch.equal(
        convert_state_dict(old).feature_encoder.stem.conv.weight, model.feature_encoder.stem.conv.weight
    )


@pytest.mark.parametrize(
    ("put", "taken", "said"),
    [
        (lambda a, b: {"params": a, "params_ema": b}, "b", "'params_ema.', not those under params."),
        (
            lambda a, b: {"model": a, "model_ema": prefixed("module.", b)},
            "b",
            "'model_ema.module.', not those under m",
        ),
        (
            lambda a, b: {"state_dict": {**prefixed("net.", a), **prefixed("net_ema.", b)}},
            "b",
            "not those under state",
        ),
        (lambda a, b: {"generator_ema": b, "generator": a}, "b", "'generator_ema.', not those under generator."),
        (
            lambda a, b: {"params": a, "params_ema": {**b, "head.weight": torch.zeros(1)}},
            "a",
            "not those under params_e",
        ),
        (lambda a, b: {"model": b, "state_dict": a}, "a", "'state_dict.', not those under model."),
        (lambda a, b: {"state_dict": {**prefixed("raft.", a), **prefixed("teacher.", b)}}, "a", "'state_dict.raft.'"),
        (lambda a, b: {"net": {**prefixed("raft.", a), "loss.w": torch.zeros(1)}}, "a", "leaving out loss.w"),
        (lambda a, b: {"solver": a}, "a", "'solver.'"),
    ],
)
def test_a_choice_is_logged(put, taken, said, small, caplog):
    model, weights = small
    other = {name: weight + 1 for name, weight in weights.items()}
    converted = convert_state_dict(put(*((weights, other) if taken == "a" else (other, weights))))
    assert_same_weights(converted, model)
    assert said in caplog.text


def test_what_is_plain_is_not_logged(small, tmp_path, caplog):
    moments = {name: weight + 1 for name, weight in small[1].items()}
    content = {"state_dict": prefixed("module.", small[1]), "epoch": 3, "optimizer": {"exp_avg": moments}}
    torch.save(content, tmp_path / "checkpoint.pth")
    load_raft(tmp_path / "checkpoint.pth")
    assert caplog.text == ""


def test_models_that_differ_are_not_chosen_from(small):
    model, weights = small
    other = {name: weight + 1 for name, weight in weights.items()}
    for content, under in (
        ({**prefixed("student.", weights), **prefixed("teacher.", other)}, "student., teacher."),
        ({**prefixed("module.", weights), **other}, "module., no prefix"),
    ):
        with pytest.raises(ValueError, match=f"holds RAFT models that differ, under {under}: save the state dict"):
            convert_state_dict(content)


def zeros(*shape):
    return torch.zeros(shape)


MISFITS = {
    "5 correlation levels": (
        lambda weights: {**weights, "update_block.encoder.convc1.weight": zeros(256, 405, 1, 1)},
        ["look like princeton's large RAFT with 5 correlation levels of radius 4", "168 of its 169 tensors fit"],
    ),
    "another radius": (
        lambda weights: {**weights, "update_block.encoder.convc1.weight": zeros(256, 196, 1, 1)},
        ["princeton's large RAFT with 4 correlation levels of radius 3"],
    ),
    "GMA": (
        lambda weights: {**weights, "att.to_qk.weight": zeros(1), "update_block.aggregator.gamma": zeros(1)},
        ["look like GMA", "princeton's large RAFT", "not known (2): att.to_qk.weight, update_block.aggregator.gamma"],
    ),
    "SEA-RAFT": (
        lambda weights: {
            **prefixed("module.", {"fnet.conv1.weight": zeros(64, 3, 7, 7), "cnet.final_conv.weight": zeros(1)}),
            **prefixed("module.", {"upsample_weight.0.weight": zeros(1), "init_conv.weight": zeros(1)}),
        },
        ["look like SEA-RAFT", "under 'state_dict.module.'", "missing (153)"],
    ),
    "GMFlow": (
        lambda weights: {
            f"{name}.weight": zeros(1)
            for name in ("backbone.conv1", "transformer.layers.0.self_attn.q_proj", "feature_flow_attn.q_proj")
        },
        ["look like GMFlow", "nearest: ", "there are 3 tensors: backbone.conv1.weight"],
    ),
    "a ResNet": (
        lambda weights: resnet18().state_dict(),
        ["look like a ResNet", "none of its 1", "there are 122 tensors"],
    ),
    "without an encoder": (
        lambda weights: {name: weight for name, weight in weights.items() if not name.startswith("cnet.")},
        ["look like princeton's large RAFT without 92 of its tensors", "missing (92): cnet.conv1.weight"],
    ),
    "one without a tensor, one of another shape, one more": (
        lambda weights: {
            **{name: weight for name, weight in weights.items() if name != "fnet.conv2.bias"},
            "cnet.conv1.weight": zeros(64, 3, 5, 5),
            "extra.weight": zeros(1),
        },
        [
            "missing (1): fnet.conv2.bias",
            "of another shape or type (1): cnet.conv1.weight is (64, 3, 5, 5), not (64, 3, 7, 7)",
            "not known (1): extra.weight",
        ],
    ),
    "torchvision's, and a head": (
        lambda weights: {**BUILDERS["small"]().state_dict(), "head.weight": zeros(1)},
        ["torchvision's small RAFT with 1 more tensor,", "106 of its 106 tensors fit", "not known (1): head.weight"],
    ),
    "other names": (
        lambda weights: {f"{i}.weight": weight for i, weight in enumerate(weights.values())},
        ["princeton's large RAFT under other names"],
    ),
    "whole numbers": (
        lambda weights: {name: weight.to(torch.int8) for name, weight in weights.items()},
        ["of another shape or type (", "fnet.conv1.weight is torch.int8"],
    ),
    "our own of other sizes": (
        lambda weights: RaftForOpticalFlow(tiny_config()).state_dict(),
        ["this project's large RAFT with other shapes", "needs its config.json beside the file"],
    ),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_a_misfit_is_described_in_five_lines(kind, large, tmp_path):
    make, parts = MISFITS[kind]
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": make(large[1])}, path)
    with pytest.raises(ValueError) as error:
        load_raft(path)
    text = str(error.value)
    assert text.startswith(f"{path}: ") and len(text.splitlines()) <= 5 and max(map(len, text.splitlines())) < 400
    assert "nearest: " in text
    for part in parts:
        assert part in text, text


def test_files_without_a_state_dict_are_refused(tmp_path):
    path = tmp_path / "other.pth"
    for content, message in (
        ([torch.zeros(2)], "it is a list"),
        ({"epoch": 3, "lr": 1e-4}, "it is a dict of epoch, lr"),
        ({1: torch.zeros(2)}, "it is a dict of 1"),
        (torch.zeros(2), "it is a Tensor"),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=f"holds no state dict .*: {message}") as error:
            convert_file(path)
        assert str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_weights_that_are_no_numbers_are_refused(value, small, tmp_path):
    model, weights = small
    bias = weights["fnet.conv2.bias"].double().clone()
    bias[3] = value  # 1e300 is none in float32
    torch.save({**weights, "fnet.conv2.bias": bias}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"1 of 106 tensors hold NaN or infinity \(fnet\.conv2\.bias\)"):
        load_raft(tmp_path / "weights.pth")
    broken = copy.deepcopy(model)
    broken.feature_encoder.projection.bias.data = bias.float()
    broken.save_pretrained(tmp_path / "folder")
    with pytest.raises(ValueError, match=r"hold NaN or infinity \(feature_encoder\.projection\.bias\)"):
        load_raft(tmp_path / "folder")


@pytest.mark.slow
def test_our_own_files_load_like_their_folder(tmp_path):
    model = RaftForOpticalFlow(tiny_config(dropout=0.25)).eval()
    folder = tmp_path / "folder"
    model.save_pretrained(folder)
    (folder / "model.safetensors").rename(folder / "weights.bin")  # by content, not by name
    torch.save({"model": prefixed("_orig_mod.", model.state_dict())}, folder / "checkpoint.safetensors")
    for name in ("weights.bin", "checkpoint.safetensors"):
        loaded = load_raft(folder / name, loss_gamma=0.7, dropout=0.5)
        assert_same_weights(loaded, model)
        assert loaded.config.corr_radius == model.config.corr_radius and loaded.config.loss_gamma == 0.7
        assert loaded.feature_encoder.dropout.p == 0.5
    # The published sizes need no configuration; one of another program is passed over.
    published = RaftForOpticalFlow(RaftConfig.small()).eval()
    for i, config in enumerate((None, '{"model_type": "bert"}', '{"model_type": "raft", "encoder_widths": [1]}', "{")):
        (tmp_path / str(i)).mkdir()
        if config is not None:
            (tmp_path / str(i) / "config.json").write_text(config)
        torch.save(published.state_dict(), tmp_path / str(i) / "last")
        assert_same_weights(load_raft(tmp_path / str(i) / "last"), published)


def test_sources_that_are_not_there_are_told_from_repositories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("raft-things.pth", "runs/last.CKPT", "best.pth.tar", str(tmp_path / "model.safetensors")):
        with pytest.raises(FileNotFoundError, match=f"^no such file: {name}$"):
            load_raft(name)
    for name in ("./raft", "~/raft", str(tmp_path / "raft"), "runs/today/raft"):
        with pytest.raises(FileNotFoundError, match=f"^no such file or folder: {name}$"):
            load_raft(name)
    with pytest.raises(
        OSError, match="user/raft-v1.5 is no folder with a model, and no repository that can be reached"
    ):
        load_raft("user/raft-v1.5")
    with pytest.raises(ValueError, match="https://example.org/raft.pth is a URL: download the file"):
        load_raft("https://example.org/raft.pth")


def test_folders_of_unfinished_downloads(tmp_path):
    RaftForOpticalFlow(tiny_config()).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    for damaged, message in (
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "is a Git LFS pointer"),
        (content[:-100], "is cut short: "),
        (b"", "is empty"),
    ):
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"^{weights} {message}"):
            load_raft(tmp_path)
    weights.write_bytes(content)
    (tmp_path / "config.json").unlink()
    with pytest.raises(OSError, match="has no config.json: give a file of weights in it itself .model.safetensors"):
        load_raft(tmp_path)


def test_examples_from_the_field(sample_weights, tmp_path):
    """Of ../shared/field: one and the same small RAFT as other trainers save it, and three files that are none."""
    script = sample_weights.parent / "field" / "make.py"
    if not script.is_file():
        pytest.skip("the script that makes the examples is not there")
    runpy.run_path(str(script))["checkpoints"](tmp_path / "checkpoints")
    expected = load_raft(sample_weights / "raft-small.pth")
    broken = {"page.pth": "a web page", "pointer.pth": "a Git LFS pointer", "cut.pth": "cut short"}
    for path in (tmp_path / "checkpoints").iterdir():
        if path.name in broken:
            with pytest.raises(ValueError, match=f"{path} is {broken[path.name]}"):
                load_raft(path)
        elif path.name != "half.bin":
            assert_same_weights(load_raft(path), expected)
    half = load_raft(tmp_path / "checkpoints" / "half.bin")
    assert_same_weights(half, copy.deepcopy(expected).half().float())


def test_command_line_reports_errors_in_one_line(small, tmp_path, capsys):
    torch.save(small[1], tmp_path / "weights.pth")
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pth")
    (tmp_path / "file").write_text("mine")
    for source, out_dir, message in (
        ("missing.pth", "out", "no such file: "),
        ("other.pth", "out", "these are not the weights of a RAFT"),
        ("file", "out", "is text that begins 'mine', not weights"),
        (".", "out", "is a folder, not a file of weights"),
        ("weights.pth", "file", "file is not a folder: name one to write to"),
    ):
        with pytest.raises(SystemExit) as error:
            main([str(tmp_path / source), str(tmp_path / out_dir)])
        assert error.value.code == 2
        said = capsys.readouterr().err
        assert message in said and said.startswith("convert_raft_checkpoint: error: ") and "usage" not in said
        assert not (tmp_path / "out").exists() and (tmp_path / "file").read_text() == "mine"


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


def test_other_models_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="a model of type bert, not raft"):
        load_raft(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "raft", "encoder_widths": [1, 2]}')
    with pytest.raises(ValueError, match="encoder_widths must have 4 entries"):
        load_raft(tmp_path)
