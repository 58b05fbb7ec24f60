"""Export: what torch.export and ONNX give, beside the model itself, on batches and sizes other than the traced one."""

import sys
import types

import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from test_modeling_raft import images, tiny_config

from modeling_raft import RaftForOpticalFlow, RaftImageProcessor
from modeling_raft import export_onnx as module
from modeling_raft.convert_raft_checkpoint import load_raft
from modeling_raft.export_onnx import dynamic_shapes, export_onnx, main

UPDATES = 2

pytestmark = pytest.mark.slow  # an export takes 20 s


def run(path, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Flow and low_res_flow from onnxruntime."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    outputs = session.run(["flow", "low_res_flow"], {"pixel_values": pixel_values.numpy()})
    return tuple(map(torch.from_numpy, outputs))


@pytest.fixture(scope="module")
def tiny() -> RaftForOpticalFlow:
    torch.manual_seed(0)
    model = RaftForOpticalFlow(tiny_config())
    model(images(2, 2, 3, 64, 72))  # moves BatchNorm's statistics away from 0 and 1
    return model.eval()


@pytest.fixture(scope="module")
def tiny_file(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "sub" / "tiny.onnx"
    assert export_onnx(tiny, path, num_flow_updates=UPDATES) < 1e-4
    return path


@torch.no_grad()
def test_torch_export_takes_other_batches_and_sizes(tiny):
    traced = {"pixel_values": images(2, 2, 3, 136, 144), "num_flow_updates": 1}
    shapes = dynamic_shapes(tiny) | {"num_flow_updates": None}
    program = torch.export.export(tiny, (), traced, dynamic_shapes=shapes).module()
    for shape in ((2, 2, 3, 128, 200), (3, 2, 3, 152, 128)):
        pixel_values = images(*shape)
        ours = program(pixel_values=pixel_values, num_flow_updates=1)
        expected = tiny(pixel_values, num_flow_updates=1)
        torch.testing.assert_close(ours.flow, expected.flow)
        torch.testing.assert_close(ours.low_res_flow, expected.low_res_flow)


@torch.no_grad()
def test_nothing_breaks_the_graph(tiny):
    pixel_values = images(1, 2, 3, 64, 72)
    compiled = torch.compile(tiny, backend="eager", fullgraph=True)
    ours = compiled(pixel_values, num_flow_updates=1)
    torch.testing.assert_close(ours.flow, tiny(pixel_values, num_flow_updates=1).flow)


@pytest.mark.parametrize("shape", [(1, 2, 3, 64, 64), (1, 2, 3, 200, 72), (3, 2, 3, 80, 128)])
def test_onnx_is_the_model_on_any_batch_and_size(shape, tiny, tiny_file):
    pixel_values = images(*shape)
    with torch.no_grad():
        expected = tiny(pixel_values, num_flow_updates=UPDATES)
    flow, low_res_flow = run(tiny_file, pixel_values)
    assert expected.flow.abs().max() > 1
    torch.testing.assert_close(flow, expected.flow, atol=1e-4, rtol=0)
    torch.testing.assert_close(low_res_flow, expected.low_res_flow, atol=1e-4, rtol=0)


def test_a_file_says_what_it_holds(tiny_file):
    proto = onnx.load(tiny_file)
    facts = {entry.key: entry.value for entry in proto.metadata_props}
    assert facts["num_flow_updates"] == str(UPDATES) and facts["min_image_size"] == "64"
    names = [value.name for value in (*proto.graph.input, *proto.graph.output)]
    assert names == ["pixel_values", "flow", "low_res_flow"] and facts.keys() > set(names)
    assert [opset.version for opset in proto.opset_import] == [18]
    assert b".py" not in tiny_file.read_bytes()  # no traceback, whose paths are nobody's business
    assert list(tiny_file.parent.iterdir()) == [tiny_file]


def test_export_leaves_the_model_as_it_was(tiny_file, tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: types.SimpleNamespace(model_proto=onnx.load(tiny_file)))
    monkeypatch.setattr(module, "difference_in_onnxruntime", lambda *_: None)  # as where it is not installed
    model = RaftForOpticalFlow(tiny.config).double()
    assert export_onnx(model, tmp_path / "model.onnx") is None
    assert model.training and model.dtype == torch.float64 and model.config.correlation == "auto"


@pytest.mark.parametrize("difference", [0.02, float("nan")])
def test_a_file_that_differs_replaces_nothing(difference, tiny, tiny_file, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: types.SimpleNamespace(model_proto=onnx.load(tiny_file)))
    monkeypatch.setattr(module, "difference_in_onnxruntime", lambda *_: difference)
    path = tmp_path / "model.onnx"
    path.write_text("an older one")
    with pytest.raises(ValueError, match="differs by .* more than 0.01 px"):
        export_onnx(tiny, path)
    assert path.read_text() == "an older one" and list(tmp_path.iterdir()) == [path]


def test_the_check_sees_other_weights(tiny, tiny_file):
    other = RaftForOpticalFlow(tiny.config).eval()
    with torch.no_grad():
        assert module.difference_in_onnxruntime(module.FixedUpdates(other, UPDATES), tiny_file) > 0.1
        assert module.difference_in_onnxruntime(module.FixedUpdates(tiny, UPDATES), tiny_file) < 1e-4
        assert module.difference_in_onnxruntime(module.FixedUpdates(tiny, UPDATES + 1), tiny_file) > 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opset": 17}, "opset must lie between 18 and .* got 17"),
        ({"opset": 1000}, "opset must lie between 18 and .* got 1000"),
        ({"num_flow_updates": 0}, "num_flow_updates must be at least 1; got 0"),
    ],
)
def test_numbers_out_of_range_are_refused(options, message, tiny, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_onnx(tiny, tmp_path / "model.onnx", **options)


def test_a_folder_and_a_missing_package_are_said(tiny, tmp_path, monkeypatch):
    with pytest.raises(IsADirectoryError, match="name a file"):
        export_onnx(tiny, tmp_path)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match="pip install onnx onnxscript onnxruntime"):
        export_onnx(tiny, tmp_path / "model.onnx")


def test_published_weights_on_real_pairs(sample_data, sample_weights, tmp_path, capsys):
    path = tmp_path / "small.onnx"
    main([str(sample_weights / "raft-small.pth"), str(path), "--num_flow_updates", "1"])
    assert "in onnxruntime its flow is torch's to" in capsys.readouterr().out
    model, processor = load_raft(sample_weights / "raft-small.pth"), RaftImageProcessor()
    pairs = {
        (384, 512): [sample_data / f"FlyingChairs_release/data/00001_img{i}.ppm" for i in (1, 2)],
        (384, 424): [sample_data / f"Middlebury/other-data/Venus/frame{i}.png" for i in (10, 11)],
    }
    for size, files in pairs.items():
        pixel_values = processor([Image.open(file) for file in files], return_tensors="pt").pixel_values
        assert pixel_values.shape[-2:] == size
        with torch.no_grad():
            expected = model(pixel_values, num_flow_updates=1).flow
        assert expected.abs().max() > 5
        torch.testing.assert_close(run(path, pixel_values)[0], expected, atol=0.01, rtol=0)
