"""predict_flow.py on files, and the pictures it draws."""

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from test_modeling_raft import tiny_config

import predict_flow
from flow_data.flow_io import read_flow
from flow_data.pictures import draw_flow
from modeling_raft import RaftForOpticalFlow, RaftImageProcessor


@pytest.fixture
def job(tmp_path):
    """Arguments for a pair whose size is no multiple of 8, and the flow that must come out."""
    torch.manual_seed(0)
    model = RaftForOpticalFlow(tiny_config()).eval()
    model.save_pretrained(tmp_path / "model")
    frames = np.random.default_rng(0).integers(0, 256, (2, 67, 90, 3), dtype=np.uint8)
    for name, frame in zip(("a.png", "b.png"), frames, strict=True):
        Image.fromarray(frame).save(tmp_path / name)
    processor = RaftImageProcessor()
    with torch.no_grad():
        outputs = model(**processor(list(frames), return_tensors="pt"), num_flow_updates=2)
    flow = processor.post_process_optical_flow(outputs, [(67, 90)])[0]["flow"].permute(1, 2, 0).numpy()
    arguments = ["--model", tmp_path / "model", tmp_path / "a.png", tmp_path / "b.png", "--num_flow_updates", 2]
    return tmp_path, [str(word) for word in arguments], flow


@pytest.mark.parametrize(("name", "flags", "tolerance"), [
    ("out.flo", [], 0), ("deep/er/out.npy", [], 0), ("out.pfm", [], 0), ("out.png", ["--format", "kitti"], 1 / 128),
])  # fmt: skip
def test_flow_files_hold_the_models_flow(job, name, flags, tolerance):
    folder, arguments, expected = job
    predict_flow.main([*arguments, "--output", str(folder / name), *flags])
    flow, valid = read_flow(folder / name)
    assert valid.all()
    np.testing.assert_allclose(flow, expected, atol=tolerance + 1e-6)


def test_a_png_is_a_colour_picture(job, capsys):
    folder, arguments, expected = job
    predict_flow.main([*arguments, "--output", str(folder / "out.png")])
    picture = np.asarray(Image.open(folder / "out.png"))
    assert np.array_equal(picture, draw_flow(torch.from_numpy(expected).permute(2, 0, 1)))
    assert "mean length" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({2: "missing.png"}, "missing.png"),
        ({2: "broken.png"}, "broken.png): no image"),
        ({2: "other.png"}, "must have one size"),
        ({2: "deep.png"}, "deep.png): expected an 8-bit"),
        ({0: "--output=out.jpg"}, "--output must end in one of"),
        ({0: "--format=kitti"}, "--format kitti writes a .png"),
        ({0: "--num_flow_updates=0"}, "at least 1; got 0"),
    ],
)
def test_mistakes_are_named(job, change, message, capsys):
    folder, arguments, _ = job
    (folder / "broken.png").write_bytes(b"no image")
    Image.fromarray(np.zeros((64, 90, 3), np.uint8)).save(folder / "other.png")
    cv2.imwrite(str(folder / "deep.png"), np.zeros((67, 90), np.uint16))
    ((position, value),) = change.items()
    words = [*arguments, "--output", str(folder / "out.flo")]
    if position:
        words[position + 1] = str(folder / value)
    else:
        words.append(value)
    with pytest.raises(SystemExit) as error:
        predict_flow.main(words)
    assert message in capsys.readouterr().err + str(error.value)
    assert not (folder / "out.flo").exists()
