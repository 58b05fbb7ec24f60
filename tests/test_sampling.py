"""The order of samples and their augmentation: functions of (seed, number of the sample) and nothing else."""

import tracemalloc
from collections import Counter
from functools import partial

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from flow_data.augmentation import augment_dense, augment_sparse
from flow_data.sample import FlowSample
from flow_data.sampling import MixSource, RunSampler, SampleError, TrainingPairs, use_one_thread


class Rows:
    """Rows whose flow tells which one it is."""

    def __init__(self, length: int, base: int):
        self.length, self.base = length, base

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        if not 0 <= i < self.length:
            raise IndexError(i)
        image = Image.fromarray(np.full((8, 16, 3), 100 + i, dtype=np.uint8))
        flow = np.full((8, 16, 2), self.base + i, dtype=np.float32)
        return {
            "id": str(i),
            "image1": image,
            "image2": image,
            "flow": {"flow": flow, "valid": np.ones((8, 16), dtype=bool)},
        }


def shift(sample, rng):
    return sample._replace(flow=sample.flow + rng.random(dtype=np.float32) / 2)


def unchanged(sample, rng):
    return sample


def mix(augment=unchanged, noise_batch_size=None, seed=7) -> TrainingPairs:
    sources = [MixSource("a", Rows(3, 0), 4, augment), MixSource("b", Rows(5, 100), 1, augment)]
    return TrainingPairs(sources, seed, noise_batch_size)


def test_an_epoch_has_exact_shares():
    pairs = mix()
    assert len(pairs) == 3 * 4 + 5
    for epoch in range(2):
        sampler = RunSampler(len(pairs), seed=7, start=epoch * len(pairs), stop=(epoch + 1) * len(pairs))
        counts = Counter((pairs[key]["id"], int(pairs[key]["labels"][0, 0, 0])) for key in sampler)
        expected = {(f"a/{i}", i): 4 for i in range(3)} | {(f"b/{i}", 100 + i): 1 for i in range(5)}
        assert counts == expected


def test_order_depends_on_seed_and_epoch_only():
    def order(seed, start, stop):
        return list(RunSampler(10, seed, start, stop))

    run = order(1, 0, 35)
    assert [number for number, _ in run] == list(range(35))
    assert order(1, 13, 35) == run[13:]  # a resumed run continues in the middle of an epoch
    epochs = [[position for _, position in run[i : i + 10]] for i in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert order(2, 0, 35) != run


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_samples_do_not_depend_on_workers(num_workers):
    pairs = mix(shift, noise_batch_size=4)
    keys = list(RunSampler(len(pairs), 7, 5, 29))
    loader = DataLoader(pairs, batch_size=4, sampler=keys, num_workers=num_workers)
    for name in ("pixel_values", "labels", "valid"):
        loaded = torch.cat([batch[name] for batch in loader])
        assert torch.equal(loaded, torch.stack([pairs[key][name] for key in keys])), name


def test_augmentation_differs_between_epochs_and_seeds():
    pairs = mix(shift)
    first, again, later = pairs[(0, 2)], pairs[(0, 2)], pairs[(17, 2)]
    assert torch.equal(first["labels"], again["labels"])
    assert not torch.equal(first["labels"], later["labels"])
    assert not torch.equal(first["labels"], mix(shift, seed=8)[(0, 2)]["labels"])


def test_pixels_are_scaled_as_the_model_wants_them():
    sample = mix()[(0, 1)]
    assert sample["pixel_values"].shape == (2, 3, 8, 16) and sample["pixel_values"].dtype == torch.float32
    torch.testing.assert_close(sample["pixel_values"], torch.full((2, 3, 8, 16), 2 * 101 / 255 - 1))
    assert sample["labels"].shape == (2, 8, 16) and sample["valid"].dtype == torch.bool


def test_pixel_values_of_every_gray_level_and_place():
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (2, 16, 48, 3), dtype=np.uint8)
    frames[0, ..., 1] = np.arange(768).reshape(16, 48) % 256
    sample = FlowSample(*frames, rng.normal(size=(16, 48, 2)).astype(np.float32), rng.random((16, 48)) < 0.5)
    pairs = mix(lambda _, rng: sample)[(0, 0)]
    expected = 2 * (torch.from_numpy(frames).permute(0, 3, 1, 2).double() / 255) - 1
    torch.testing.assert_close(pairs["pixel_values"].double(), expected, rtol=0, atol=1e-6)
    assert torch.equal(pairs["labels"], torch.from_numpy(sample.flow).permute(2, 0, 1))
    assert torch.equal(pairs["valid"], torch.from_numpy(sample.valid))
    assert all(pairs[key].is_contiguous() for key in ("pixel_values", "labels", "valid"))


class Threads(torch.utils.data.Dataset):
    """The threads that OpenCV and torch have where a sample is made."""

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return torch.tensor([cv2.getNumThreads(), torch.get_num_threads()])


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_have_one_thread(start):
    before = cv2.getNumThreads(), torch.get_num_threads()
    loader = DataLoader(Threads(), num_workers=2, worker_init_fn=use_one_thread, multiprocessing_context=start)
    assert torch.cat(list(loader)).tolist() == [[1, 1]] * 4
    assert (cv2.getNumThreads(), torch.get_num_threads()) == before


@pytest.mark.slow
@pytest.mark.parametrize("augment", [augment_dense, augment_sparse])
def test_nothing_grows_with_the_number_of_samples(augment):
    """No decoded frame and no table is kept: after the first samples, memory is what it was."""
    pairs = mix(partial(augment, crop_size=(24, 40), zoom_range=(-0.2, 0.6)), noise_batch_size=4)
    sizes = []
    tracemalloc.start()
    try:
        for number in range(300):
            pairs[(number, number % len(pairs))]
            if number in (99, 299):
                sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert sizes[1] - sizes[0] < 200 * 500  # bytes; a sample kept would be 14,000


def test_noise_has_one_sigma_a_step_and_its_own_draws():
    clean = mix()
    sigmas = []
    for step in range(200):
        numbers = (2 * step, 2 * step + 1)
        noisy = mix(noise_batch_size=2)
        noise = [(noisy[(n, 0)]["pixel_values"] - clean[(n, 0)]["pixel_values"]) * 127.5 for n in numbers]
        assert not torch.equal(*noise) and not torch.equal(noise[0][0], noise[0][1])  # drawn for each pair and frame
        sigmas.append(torch.stack(noise).std().item())
        assert noise[0].std().item() == pytest.approx(noise[1].std().item(), rel=0.35, abs=0.02)
    # U(0, 5): mean 2.5, standard deviation 1.44; bounds at four standard errors of 200 draws
    assert np.mean(sigmas) == pytest.approx(2.5, abs=4 * 1.45 / 200**0.5)
    assert max(sigmas) < 5.5 and min(sigmas) < 0.3


def test_noise_is_clamped():
    class White(Rows):
        def __getitem__(self, i):
            white = Image.fromarray(np.full((8, 16, 3), 255, dtype=np.uint8))
            return super().__getitem__(i) | {"image1": white, "image2": white}

    pairs = TrainingPairs([MixSource("white", White(1, 0), 1, unchanged)], seed=0, noise_batch_size=1)
    pixel_values = torch.stack([pairs[(n, 0)]["pixel_values"] for n in range(20)])
    assert pixel_values.max() == 1 and pixel_values.min() < 1


def test_a_bad_pair_is_reported_or_replaced_the_same_everywhere():
    class Damaged(Rows):
        def __getitem__(self, i):
            if i == 1:
                raise ValueError("row 1 is bad")
            return super().__getitem__(i)

    def pairs(skip_bad: bool) -> TrainingPairs:
        return TrainingPairs([MixSource("a", Damaged(4, 0), 1, unchanged)], seed=3, skip_bad=skip_bad)

    with pytest.raises(SampleError, match="^a: row 1 is bad$"):
        pairs(False)[(5, 1)]
    assert pairs(False)[(5, 2)]["replaced"] == ""
    sample, again = pairs(True)[(5, 1)], pairs(True)[(5, 1)]
    assert sample["replaced"] == "a: row 1 is bad" and sample["id"] == again["id"] != "a/1"
    assert len({pairs(True)[(number, 1)]["id"] for number in range(40)}) == 3  # not always the same neighbor
    only_bad = TrainingPairs([MixSource("b", [None], 1, unchanged)], seed=3, skip_bad=True)
    only_bad._load = lambda number, position: Damaged(4, 0)[1]
    with pytest.raises(SampleError, match="^b: row 1 is bad; 100 others that were tried cannot be read either"):
        only_bad[(5, 0)]


class NoGroundTruth(Rows):
    def __getitem__(self, i):
        return super().__getitem__(i) | {"flow": None}


def test_pairs_without_ground_truth_are_an_option():
    sources = [MixSource("frames", NoGroundTruth(2, 0), 1, unchanged), MixSource("a", Rows(2, 5), 1, unchanged)]
    with pytest.raises(SampleError, match="^frames: 0: there must be ground-truth flow"):
        TrainingPairs(sources, seed=0)[(0, 0)]
    pairs = TrainingPairs(sources, seed=0, needs_flow=False)
    without, labeled = pairs[(0, 0)], pairs[(1, 2)]
    assert "labels" not in without and "valid" not in without and without["pixel_values"].shape == (2, 3, 8, 16)
    assert labeled["valid"].all() and (labeled["labels"] == 5).all()


def test_a_mask_is_optional():
    pair = mix(lambda sample, rng: sample._replace(valid=None))[(0, 1)]
    assert pair["valid"].all() and pair["valid"].shape == (8, 16)


def test_frames_without_photometric_augmentation_are_an_option():
    sizes = {"crop_size": (8, 16), "zoom_range": (0.0, 0.0), "flip": False}
    jitter = partial(augment_dense, **sizes, keep_without_photo_aug=True)
    pair = mix(jitter, noise_batch_size=2)[(0, 1)]
    assert torch.equal(pair["pixel_values_without_photo_aug"], mix()[(0, 1)]["pixel_values"])  # nor noise
    assert not torch.equal(pair["pixel_values"], pair["pixel_values_without_photo_aug"])
    assert "pixel_values_without_photo_aug" not in mix(partial(augment_dense, **sizes))[(0, 1)]
