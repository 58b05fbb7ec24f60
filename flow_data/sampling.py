"""Which pair comes next: a run-long order that depends on the seed alone, and the mix of sources it draws from.

Positions and augmentations follow from (seed, number of the sample in the run), so they are the same in every process
and worker, different in every epoch, and known without replaying what came before.
"""

import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from flow_data.features import to_sample
from flow_data.out_of_memory import is_out_of_memory
from flow_data.sample import FlowSample

MAX_NOISE = 5.0  # sigma of 255 gray levels; princeton-vl/RAFT, train.py, --add_noise
PIXEL_VALUES = 2 * (np.arange(256, dtype=np.float32) / 255) - 1  # of each gray level, as the model takes it
# Streams of random numbers that must not repeat each other, separated by a second word of the seed.
ORDER, AUGMENTATION, NOISE_SIGMA, NOISE, REPLACEMENT = range(5)
MAX_REPLACEMENTS = 100  # bad pairs in a row: then it is not the pairs that are bad


class SampleError(ValueError):
    """A pair cannot be read; the message names its source and what is wrong with it."""


class MixSource(NamedTuple):
    """A source in the mix.

    Args:
        name: Of the source.
        dataset: Its rows.
        repeats: How often each row occurs in an epoch.
        augment: What happens to a sample, given its random generator.
    """

    name: str
    dataset: Any
    repeats: int
    augment: Callable[[FlowSample, np.random.Generator], FlowSample]


class RunSampler(Sampler[tuple[int, int]]):
    """Yields (sample number, position in the mix) from one sample of the run to another, over epochs.

    Args:
        epoch_length: Positions in the mix; each occurs once an epoch.
        seed: Of the run.
        start: Number of the first sample: 0, or where a resumed run continues.
        stop: Number after the last sample.
    """

    def __init__(self, epoch_length: int, seed: int, start: int, stop: int):
        self.epoch_length, self.seed, self.start, self.stop = epoch_length, seed, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for number in range(self.start, self.stop):
            if number // self.epoch_length != epoch:
                epoch = number // self.epoch_length
                order = np.random.default_rng([self.seed, ORDER, epoch]).permutation(self.epoch_length)
            yield number, int(order[number % self.epoch_length])


class TrainingPairs(Dataset):
    """The mix: position -> augmented pair, as the model takes it.

    Args:
        sources: Their rows times repeats, one after the other, are the positions.
        seed: Of the run.
        noise_batch_size: Add noise whose sigma is one for each so many consecutive samples (an optimizer step's);
            None: no noise.
        skip_bad: Take another pair, drawn from the seed and the sample's number, where one cannot be read.
        needs_flow: A pair without ground truth is one that cannot be read; False takes it without `labels`.
    """

    def __init__(
        self,
        sources: Sequence[MixSource],
        seed: int,
        noise_batch_size: int | None = None,
        skip_bad: bool = False,
        needs_flow: bool = True,
    ):
        self.sources, self.seed = sources, seed
        self.noise_batch_size, self.skip_bad, self.needs_flow = noise_batch_size, skip_bad, needs_flow
        self.ends = np.cumsum([len(source.dataset) * source.repeats for source in sources])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """Load and augment one pair.

        Args:
            key: (sample number, position), as `RunSampler` yields them.

        Returns:
            `number`; `id`; `pixel_values` `(2, 3, H, W)` float32 in [-1, 1]; `labels` `(2, H, W)` float32, pixels;
            `valid` `(H, W)` bool, both absent without ground truth; `pixel_values_without_photo_aug`, like
            `pixel_values`, where the augmentation keeps these frames; `replaced`, what was wrong with the pair in
            whose place this one is, or "".

        Raises:
            SampleError: The pair cannot be read, and `skip_bad` is off or too many others cannot be read either.
            MemoryError: Memory ran out.
        """
        number, position = key
        problem = ""
        for attempt in range(MAX_REPLACEMENTS + 1):
            try:
                return self._load(number, position) | {"replaced": problem}
            except (ValueError, OSError) as error:
                if is_out_of_memory(error):  # which says nothing about the pair
                    raise MemoryError(str(error)) from error
                problem = problem or f"{self._source_of(position)[0].name}: {error}"
            if not self.skip_bad:
                raise SampleError(problem)
            position = int(np.random.default_rng([self.seed, REPLACEMENT, number, attempt]).integers(len(self)))
        raise SampleError(f"{problem}; {MAX_REPLACEMENTS} others that were tried cannot be read either")

    def _load(self, number: int, position: int) -> dict[str, Any]:
        source, row_number = self._source_of(position)
        row = source.dataset[row_number]
        sample = source.augment(
            to_sample(row, self.needs_flow), np.random.default_rng([self.seed, AUGMENTATION, number])
        )

        if self.noise_batch_size is None:
            pixel_values = _to_pixel_values(sample.image1, sample.image2)
        else:
            frames = np.stack([sample.image1, sample.image2]).astype(np.float32)
            frames = self._add_noise(frames, number, step=number // self.noise_batch_size)
            pixel_values = torch.from_numpy(2 * (frames / 255) - 1).permute(0, 3, 1, 2).contiguous()
        item = {"number": number, "id": f"{source.name}/{row['id']}", "pixel_values": pixel_values}
        if sample.flow is not None:
            item["labels"] = torch.from_numpy(sample.flow).permute(2, 0, 1).contiguous()
            valid = np.ones(sample.size, bool) if sample.valid is None else sample.valid
            item["valid"] = torch.from_numpy(np.ascontiguousarray(valid))
        if sample.images_without_photo_aug is not None:
            item["pixel_values_without_photo_aug"] = _to_pixel_values(*sample.images_without_photo_aug)
        return item

    def _source_of(self, position: int) -> tuple[MixSource, int]:
        """The source of a position, and the number of its row."""
        source_number = int(np.searchsorted(self.ends, position, side="right"))
        source = self.sources[source_number]
        # position - end is negative, a count backwards from the source's last row: its remainder is the row
        return source, (position - int(self.ends[source_number])) % len(source.dataset)

    def _add_noise(self, frames: np.ndarray, number: int, step: int) -> np.ndarray:
        sigma = np.random.default_rng([self.seed, NOISE_SIGMA, step]).uniform(0, MAX_NOISE)
        draws = np.random.default_rng([self.seed, NOISE, number]).standard_normal(frames.shape, dtype=np.float32)
        return np.clip(frames + np.float32(sigma) * draws, 0, 255)


def _to_pixel_values(image1: np.ndarray, image2: np.ndarray) -> torch.Tensor:
    """Both frames as `(2, 3, H, W)` float32 in [-1, 1], by a table for each plane, which takes a third of the time."""
    pixel_values = np.empty((2, 3, *image1.shape[:2]), np.float32)
    for image, planes in zip((image1, image2), pixel_values, strict=True):
        for plane, scaled in zip(cv2.split(image), planes, strict=True):
            cv2.LUT(plane, PIXEL_VALUES, dst=scaled)
    return torch.from_numpy(pixel_values)


def use_one_thread(worker_id: int) -> None:
    """For DataLoader workers: the threads of OpenCV and torch in each of them would fight for the same cores."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def prepare_worker(worker_id: int) -> None:
    """For the workers of a run: one thread each, and none ends before the run ends it."""
    use_one_thread(worker_id)
    for number in (signal.SIGTERM, signal.SIGINT):  # what schedulers and Ctrl-C send to all processes of a group
        signal.signal(number, signal.SIG_IGN)
