"""Frames of any size, and their flow."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flow_inference.estimator import InputPadder
from modeling_raft import RaftImageProcessor


@settings(deadline=None, max_examples=100)
@given(
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.one_of(st.none(), st.integers(128, 2000)),
    st.sampled_from([None, 1, 128]),
)
def test_every_size_fits(height, width, max_side, min_side):
    padder = InputPadder(height, width, max_side, min_side)
    left, right, top, bottom = padder.padding
    padded = padder.resized[0] + top + bottom, padder.resized[1] + left + right
    assert min(padder.resized) >= (min_side or 1) and min(padded) >= 64 and not any(side % 8 for side in padded)
    assert left + right < 8 or padded[1] == 64
    assert top + bottom < 8 or padded[0] == 64
    if max_side is not None:
        assert max(padder.resized) <= max(max_side, 128)
    assert max(padder.resized) <= max(height, width, 1024)
    if min(height, width) >= (min_side or 1) and max(height, width) <= (max_side or 10**9):
        assert padder.resized == (height, width)
    if max(height, width, *padded) < 600:
        assert padder.unpad(torch.zeros(1, 2, *padded)).shape == (1, 2, height, width)


@pytest.mark.parametrize("size", [(133, 150), (64, 64), (37, 70), (3, 200)])
def test_pixels_are_those_of_the_processor(size):
    frame = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    padder = InputPadder(*size)
    expected = RaftImageProcessor()([frame, frame], return_tensors="pt", input_data_format="channels_last")
    assert torch.equal(padder.pad(frame, torch.device("cpu")), expected.pixel_values[:, 0])


@pytest.mark.parametrize(
    ("size", "max_side", "min_side"),
    [((100, 400), None, 128), ((600, 900), 300, None), ((20, 2000), None, 128), ((20, 30), None, None)],
)
def test_flow_is_in_pixels_of_the_frames(size, max_side, min_side):
    """Flow that stretches the resized frame by a tenth stretches the frame by a tenth."""
    padder = InputPadder(*size, max_side, min_side)
    left, right, top, bottom = padder.padding
    height, width = padder.resized
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    flow = torch.nn.functional.pad(0.1 * torch.stack([x, y])[None], (left, right, top, bottom), mode="replicate")
    y, x = torch.meshgrid(torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5, indexing="ij")
    difference = (padder.unpad(flow) - 0.1 * torch.stack([x, y]))[0].abs()
    assert difference[:, 2:-2, 2:-2].max() < 0.02 and difference.max() < 0.2


def test_narrow_frames_keep_their_shape_as_far_as_it_goes():
    assert InputPadder(64, 200, min_side=128).resized == (128, 400)
    assert InputPadder(10, 100, min_side=128).resized == (128, 1024)
    assert InputPadder(10, 3000, min_side=128).resized == (128, 3000)
    assert InputPadder(200, 64, max_side=256, min_side=128).resized == (256, 128)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="max_side must be at least 128; got 100"):
        InputPadder(300, 300, max_side=100, min_side=128)
    with pytest.raises(ValueError, match="max_side must be at least 64; got 63"):
        InputPadder(300, 300, max_side=63)
    with pytest.raises(ValueError, match="min_side must be at least 1; got 0"):
        InputPadder(300, 300, min_side=0)
    with pytest.raises(ValueError, match="0 x 5"):
        InputPadder(0, 5)
    with pytest.raises(ValueError, match=r"uint8 \(130, 140, 3\), as the first; got float32 \(130, 140, 3\)"):
        InputPadder(130, 140).pad(np.zeros((130, 140, 3), np.float32), torch.device("cpu"))
