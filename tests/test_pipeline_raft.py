"""The pipeline against processor and model called directly, and what it makes of other inputs."""

import json
import pathlib

import numpy as np
import PIL.Image
import pytest
import torch
from test_modeling_raft import tiny_config
from torch.utils.data import Dataset
from transformers import AutoModel, pipeline

from flow_data import visualize
from flow_inference import FlowVideo
from modeling_raft import OpticalFlowPipeline, RaftForOpticalFlow, RaftImageProcessor
from modeling_raft.pipeline_raft import draw_flow, save_pretrained_with_pipeline

SIZE = (70, 90)  # not multiples of 8: padded, and cut again


def frames(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


PAIR = frames(2, *SIZE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("saved")
    save_pretrained_with_pipeline(RaftForOpticalFlow(tiny_config()), RaftImageProcessor(), folder)
    return folder


@pytest.fixture(scope="module")
def pipe(folder) -> OpticalFlowPipeline:
    """For those who have the package there is nothing to trust."""
    pipe = pipeline("optical-flow", model=folder, device="cpu")
    assert type(pipe) is OpticalFlowPipeline and type(pipe.model) is RaftForOpticalFlow
    return pipe


def direct(pipe, pair, **options) -> torch.Tensor:
    """What the pipeline should give, without it."""
    inputs = pipe.image_processor([pair[0], pair[1]], return_tensors="pt")
    with torch.no_grad():
        outputs = pipe.model(**inputs, **options)
    (result,) = pipe.image_processor.post_process_optical_flow(outputs, target_sizes=[pair[0].shape[:2]])
    return result["flow"]


def test_a_pair_equals_processor_and_model(pipe):
    result = pipe((PAIR[0], PAIR[1]))
    assert set(result) == {"flow"} and result["flow"].shape == (2, *SIZE)
    assert result["flow"].dtype == torch.float32 and result["flow"].device.type == "cpu"
    assert torch.equal(result["flow"], direct(pipe, PAIR))
    assert result["flow"].untyped_storage().nbytes() == result["flow"].nbytes  # no padded batch behind it
    more = pipe((PAIR[0], PAIR[1]), num_flow_updates=5)["flow"]
    assert torch.equal(more, direct(pipe, PAIR, num_flow_updates=5)) and not torch.equal(more, result["flow"])


def test_every_kind_of_frame(pipe, tmp_path):
    expected = direct(pipe, PAIR)
    images = [PIL.Image.fromarray(frame) for frame in PAIR]
    paths = [tmp_path / "1.png", tmp_path / "2.png"]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    for pair in (
        tuple(images),
        tuple(paths),
        tuple(map(str, paths)),
        (images[0], paths[1]),
        tuple(image.convert("RGBA") for image in images),
        PAIR,
        tuple(PAIR.transpose(0, 3, 1, 2)),
        tuple(PAIR.astype(np.float32)),
        np.ascontiguousarray(PAIR[..., ::-1])[..., ::-1],  # OpenCV's frames
        torch.from_numpy(PAIR),
        tuple(torch.from_numpy(PAIR).permute(0, 3, 1, 2)),
    ):
        assert torch.equal(pipe(pair)["flow"], expected)


def test_grey_frames_are_rgb_ones_of_equal_channels(pipe):
    grey = PAIR[..., 0]
    expected = direct(pipe, np.repeat(grey[..., None], 3, axis=-1))
    assert torch.equal(pipe(tuple(grey))["flow"], expected)
    assert torch.equal(pipe(tuple(PIL.Image.fromarray(frame) for frame in grey))["flow"], expected)


class Pairs(Dataset):
    """Of two sizes."""

    pairs = [frames(2, *size, seed=seed) for seed, size in enumerate([SIZE, (64, 66), SIZE, SIZE, (64, 66)])]

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, i):
        return tuple(self.pairs[i])


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
@pytest.mark.parametrize("kind", ["list", "generator", "data set"])
def test_several_pairs_of_any_sizes_and_batches(pipe, kind, batch_size):
    pairs = Pairs()
    inputs = {"list": list(pairs), "generator": (pair for pair in pairs), "data set": pairs}[kind]
    results = pipe(inputs, batch_size=batch_size, num_flow_updates=2, return_image=True)
    assert isinstance(results, list) == (kind == "list")
    results = list(results)
    assert len(results) == len(pairs)
    for result, pair in zip(results, pairs, strict=True):
        # Larger batches may be computed in another order.
        torch.testing.assert_close(result["flow"], direct(pipe, pair, num_flow_updates=2), rtol=1e-4, atol=1e-4)
        assert (result["image"].height, result["image"].width) == pair[0].shape[:2]


def test_pairs_of_one_size_are_computed_together(pipe, monkeypatch):
    batches = []
    forward = pipe.model.forward
    monkeypatch.setattr(pipe.model, "forward", lambda x, **options: batches.append(len(x)) or forward(x, **options))
    pipe([tuple(PAIR)] * 5, batch_size=2)
    assert batches == [2, 2, 1]
    next(iter(pipe(Pairs(), batch_size=3)))
    assert batches[3:] == [2, 1]
    pipe(np.stack([PAIR, PAIR]))
    assert batches[5:] == [1, 1]
    assert pipe([]) == []


def test_image_is_that_of_predict_flow(pipe):
    result = pipe(tuple(PAIR), return_image=True)
    assert result["image"].mode == "RGB"
    np.testing.assert_array_equal(np.asarray(result["image"]), visualize.draw_flow(result["flow"]))
    incomplete = torch.randn(2, 8, 9, generator=torch.Generator().manual_seed(0))
    incomplete[0, 2, 3] = torch.nan
    incomplete[1, 4, 5] = torch.inf
    for flow in (incomplete, torch.zeros(2, 8, 9)):
        np.testing.assert_array_equal(draw_flow(flow).permute(1, 2, 0).numpy(), visualize.draw_flow(flow))


def test_options_can_be_given_once_for_all(pipe):
    again = pipeline("optical-flow", model=pipe.model, image_processor=pipe.image_processor, num_flow_updates=5,
                     return_image=True, device="cpu")  # fmt: skip
    result = again(tuple(PAIR))
    assert torch.equal(result["flow"], direct(pipe, PAIR, num_flow_updates=5)) and "image" in result
    result = again(tuple(PAIR), num_flow_updates=2, return_image=False)
    assert torch.equal(result["flow"], direct(pipe, PAIR, num_flow_updates=2)) and "image" not in result


def test_a_model_in_training_is_not_changed_by_what_it_predicts():
    model = RaftForOpticalFlow(tiny_config()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pipe = pipeline("optical-flow", model=model, image_processor=RaftImageProcessor(), device="cpu")
    pipe(tuple(PAIR))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("options", [{"device": "cpu"}, {"device": -1}, {"device_map": "cpu"}, {"device_map": "auto"}])
@pytest.mark.parametrize("dtype", [torch.float16, "bfloat16"])
def test_dtype_and_device(folder, pipe, dtype, options):
    half = pipeline("optical-flow", model=str(folder), dtype=dtype, **options)
    assert str(half.model.dtype).removeprefix("torch.") == str(dtype).removeprefix("torch.")
    flow, reference = half(tuple(PAIR))["flow"], direct(pipe, PAIR)
    assert flow.dtype == torch.float32 and flow.device.type == "cpu"
    assert 0 < (flow - reference).abs().max() < 0.1 * reference.abs().max()


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        (PIL.Image.fromarray(PAIR[0]), "an input is not a pair but Image: one pair of frames is a tuple"),
        ("frame.png", "not a pair but str"),
        (PAIR[0], r"not a pair but ndarray \(70, 90, 3\)"),
        (frames(3, *SIZE), "holds 3 frames, not 2"),
        ([PAIR[0], PAIR[1]], r"entry 0 of the list is not a pair but ndarray \(70, 90, 3\).*several pairs are a list"),
        (["1.png", "2.png"], "entry 0 of the list is not a pair but str"),
        ([tuple(PAIR), PAIR[0]], "entry 1 of the list is not a pair"),
        ((PAIR[0],), "the tuple holds 1 frames, not 2"),
        ((), "the tuple holds 0 frames"),
        (tuple(frames(3, *SIZE)), "the tuple holds 3 frames"),
        ((tuple(PAIR), tuple(PAIR)), "the tuple holds a tuple, not a frame"),
        ((PAIR[0], None), "the tuple holds a NoneType, not a frame"),
        ((PAIR[0], PAIR[1, :-1]), r"must have one size \(height, width\); got \(70, 90\) and \(69, 90\)"),
        ((PAIR[0, :0], PAIR[1, :0]), r"frame 1 is empty: its shape is \(0, 90, 3\)"),
        ((PAIR[0] * np.nan,) * 2, "frame 1 must hold finite numbers; it has NaN or infinities"),
        ((PAIR[0] / 127.5 - 1,) * 2, "frame 1: float frames must be in 0..1 or 0..255"),
    ],
)  # fmt: skip
def test_mistakes_are_named(pipe, inputs, said):
    with pytest.raises(ValueError, match=said):
        pipe(inputs)


def test_confidence_is_that_of_flow_in_both_directions(pipe):
    """Of one pair and of a batch; beside FlowVideo, which estimates both directions on its own."""
    pair = (PAIR[0], PAIR[1])
    plain, result = pipe(pair), pipe(pair, return_confidence=True)
    assert "occluded" not in plain and torch.equal(result["flow"], plain["flow"])
    (expected,) = FlowVideo(pipe.model, pair, warm_start=False, backward=True, duplicate_tolerance=None)
    assert result["occluded"].dtype == torch.bool and torch.equal(result["occluded"], expected.occluded)
    torch.testing.assert_close(result["consistency_error"], expected.consistency_error, atol=1e-3, rtol=1e-3)
    first, _, last = pipe([pair, pair[::-1], pair], batch_size=3, return_confidence=True)
    for again in (first, last):
        assert again["consistency_error"].shape == result["flow"].shape[1:]
        assert (again["occluded"] != result["occluded"]).float().mean() < 0.01  # rounding


def test_mistakes_in_calls_and_files_are_named(pipe, folder, tmp_path):
    with pytest.raises(ValueError, match=r"takes one argument: one pair of frames is a tuple, pipe\(\(frame1"):
        pipe(PAIR[0], PAIR[1])
    with pytest.raises(
        ValueError, match="has no argument iters; it has num_flow_updates, return_image, intensity_range"
    ):
        pipe(tuple(PAIR), iters=12)
    with pytest.raises(ValueError, match="has no argument retrun_image"):
        pipeline("optical-flow", model=folder, retrun_image=True)
    with pytest.raises(ValueError, match="num_flow_updates must be at least 1; got 0"):
        pipe(tuple(PAIR), num_flow_updates=0)
    with pytest.raises(FileNotFoundError, match="nowhere.png.: no such file"):
        pipe((tmp_path / "nowhere.png", PAIR[1]))
    PIL.Image.fromarray(PAIR[0]).save(tmp_path / "damaged.png")
    (tmp_path / "damaged.png").write_bytes((tmp_path / "damaged.png").read_bytes()[:-2000])
    with pytest.raises(ValueError, match="damaged.png"):
        pipe((tmp_path / "damaged.png", PAIR[1]))


def test_every_way_of_saving_takes_the_pipeline_along(folder, pipe, tmp_path):
    """The model's own, too, which is all that model.push_to_hub calls; and from whatever it was loaded."""
    loaded, automatic = RaftForOpticalFlow.from_pretrained(folder), AutoModel.from_pretrained(folder)
    new = RaftForOpticalFlow(loaded.config)
    new.load_state_dict(loaded.state_dict())
    for name, model in {"loaded": loaded, "automatic": automatic, "new": new}.items():
        model.save_pretrained(tmp_path / name)
        pipe.image_processor.save_pretrained(tmp_path / name)
    pipe.save_pretrained(tmp_path / "pipeline")
    expected = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert "pipeline_raft.py" in expected and "preprocessor_config.json" in expected
    for other in tmp_path.iterdir():
        assert {path.name: path.read_bytes() for path in other.iterdir()} == expected, other.name
    info = json.loads(expected["config.json"])["custom_pipelines"]
    assert info == {
        "optical-flow": {"impl": "pipeline_raft.OpticalFlowPipeline", "pt": ["AutoModel"], "type": "image"}
    }
