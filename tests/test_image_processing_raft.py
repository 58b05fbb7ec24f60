"""The image processor: what it does to pixels, what it undoes, and what it refuses."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from modeling_raft import RaftImageProcessor, RaftOutput


def frame(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def princeton_padding(height, width, mode):
    """The rule of InputPadder in princeton-vl/RAFT, written down from its description (left, right, top, bottom)."""
    extra_height, extra_width = -height % 8, -width % 8
    left, right = extra_width // 2, extra_width - extra_width // 2
    if mode == "bottom":
        return left, right, 0, extra_height
    return left, right, extra_height // 2, extra_height - extra_height // 2


@settings(deadline=None, max_examples=40)
@given(height=st.integers(64, 100), width=st.integers(64, 100), mode=st.sampled_from(["split", "bottom"]))
def test_values_and_padding_are_the_published_ones(height, width, mode):
    image1, image2 = frame(height, width), frame(height, width, seed=1)
    pixel_values = RaftImageProcessor(height_padding=mode)([image1, image2], return_tensors="pt").pixel_values
    left, right, top, bottom = princeton_padding(height, width, mode)
    for ours, image in zip(pixel_values[0], (image1, image2), strict=True):
        padded = np.pad(image, ((top, bottom), (left, right), (0, 0)), mode="edge")
        expected = torch.from_numpy(2 * (padded / 255.0) - 1).permute(2, 0, 1).float()
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


@settings(deadline=None, max_examples=40)
@given(height=st.integers(5, 100), width=st.integers(5, 100), mode=st.sampled_from(["split", "bottom"]))
def test_post_processing_takes_the_padding_off(height, width, mode):
    processor = RaftImageProcessor(height_padding=mode)
    image = frame(height, width)
    pixel_values = processor([image, image], return_tensors="pt").pixel_values
    assert pixel_values.shape[-2] % 8 == pixel_values.shape[-1] % 8 == 0
    assert min(pixel_values.shape[-2:]) >= 64
    outputs = RaftOutput(flow=pixel_values[:, 0, :2])  # two color channels as flow: what comes back is the image
    flow = processor.post_process_optical_flow(outputs, target_sizes=[(height, width)])[0]["flow"]
    expected = torch.from_numpy(image[..., :2]).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(flow, expected, atol=1e-6, rtol=0)


def test_all_kinds_of_pairs_are_the_same(tmp_path):
    image1, image2 = frame(64, 80), frame(64, 80, seed=1)
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path, image in zip(paths, (image1, image2), strict=True):
        Image.fromarray(image).save(path)
    processor = RaftImageProcessor()
    expected = processor([image1, image2], return_tensors="pt").pixel_values
    assert expected.shape == (1, 2, 3, 64, 80) and expected.dtype == torch.float32
    both = np.stack([image1, image2])
    for pair in (
        (image1, image2),
        [[image1, image2]],
        [(image1, image2)],
        [Image.fromarray(image1), Image.fromarray(image2)],
        paths,
        [str(path) for path in paths],
        both,
        both[None],
        torch.from_numpy(both).permute(0, 3, 1, 2),
        [torch.from_numpy(image1), torch.from_numpy(image2)],
    ):
        assert torch.equal(processor(pair, return_tensors="pt").pixel_values, expected)
    two = processor([[image1, image2], [image2, image1]], return_tensors="pt").pixel_values
    assert torch.equal(two[0], expected[0]) and torch.equal(two[1], expected[0].flip(0))


def test_grey_and_transparent_images_become_rgb():
    grey = frame(64, 64)[..., 0]
    as_rgb = np.repeat(grey[..., None], 3, axis=2)
    processor = RaftImageProcessor()
    expected = processor([as_rgb, as_rgb], return_tensors="pt").pixel_values
    for image in (grey, Image.fromarray(grey), Image.fromarray(as_rgb).convert("RGBA")):
        assert torch.equal(processor([image, image], return_tensors="pt").pixel_values, expected)


def test_options_survive_saving(tmp_path):
    RaftImageProcessor(height_padding="bottom").save_pretrained(tmp_path)
    assert RaftImageProcessor.from_pretrained(tmp_path).height_padding == "bottom"


@pytest.mark.parametrize("images", [[frame(64, 64)], [], [[frame(64, 64)] * 3], [frame(64, 64), [frame(64, 64)]]])
def test_what_is_no_pair_is_refused(images):
    with pytest.raises(ValueError, match="pair"):
        RaftImageProcessor()(images, return_tensors="pt")


def test_different_sizes_are_refused():
    with pytest.raises(ValueError, match=r"one size.*\(64, 64\), \(64, 72\)"):
        RaftImageProcessor()([frame(64, 64), frame(64, 72)], return_tensors="pt")


def test_padding_chosen_in_the_call_is_taken_off_again():
    processor, image = RaftImageProcessor(), frame(68, 70)
    options = {"height_padding": "bottom", "min_size": 80}
    pixel_values = processor([image, image], return_tensors="pt", **options).pixel_values
    outputs = RaftOutput(flow=pixel_values[:, 0, :2])
    flow = processor.post_process_optical_flow(outputs, [(68, 70)], **options)[0]["flow"]
    torch.testing.assert_close(flow, torch.from_numpy(image[..., :2]).permute(2, 0, 1) / 127.5 - 1, atol=1e-6, rtol=0)


def test_wrong_target_sizes_are_refused():
    processor, outputs = RaftImageProcessor(), RaftOutput(flow=torch.zeros(1, 2, 64, 72))
    with pytest.raises(ValueError, match="padded to 64 x 80, but the flow is 64 x 72"):
        processor.post_process_optical_flow(outputs, target_sizes=[(60, 75)])
    with pytest.raises(ValueError, match="one .* a pair, 1; got 2"):
        processor.post_process_optical_flow(outputs, target_sizes=[(64, 72)] * 2)
    with pytest.raises(ValueError, match="'split' or 'bottom'; got 'top'"):
        RaftImageProcessor(height_padding="top")
