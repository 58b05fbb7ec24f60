"""Inspect training data: statistics of a source, and a contact sheet of pairs before and after augmentation.

python -m flow_data.preview kitti_2015 --data_dir datasets/KITTI --crop_size 288 960 --zoom_range -0.2 0.4 --no_flip
python -m flow_data.preview synthetic --synthetic_displacement 1 60 --num_pairs 8
"""

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from flow_data.arguments import add_source_arguments, add_synthetic_flags, check_source_arguments, synthetic_options
from flow_data.datasets import DATASETS, is_sparse, load_source
from flow_data.optional_packages import require_packages
from flow_data.sample import FlowSample

# What needs torch, OpenCV or datasets is imported in the functions that use it, so that --help takes no time.
CELL_HEIGHT = 128  # pixels of the contact sheet
MAX_SHEET_WIDTH = 2000
DRAWS = 2  # augmentations of each pair that are shown
SPEED_BINS = 2.0 ** np.arange(-7, 14, 0.05)  # pixels; a histogram, as the speeds of all pairs fill the memory


class Statistics(NamedTuple):
    """Statistics of some pairs of a source.

    Args:
        num_pairs: number of pairs that they are taken from.
        sizes: (height, width) -> how many pairs have it.
        share_valid: known pixels of all pixels.
        mean_flow: (x, y) over known pixels, pixels.
        mean_speed: length of the flow, pixels, over known pixels.
        median_speed: median length of the flow, pixels, over known pixels, to 4 %.
        high_speed: which 5 % of the known pixels exceed, to 4 %.
        max_speed: greatest length of the flow, pixels, over known pixels.
    """

    num_pairs: int
    sizes: Counter[tuple[int, int]]
    share_valid: float
    mean_flow: tuple[float, float]
    mean_speed: float
    median_speed: float
    high_speed: float
    max_speed: float


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    require_packages("flow_data.preview")
    from flow_data.augmentation import augment_dense, augment_sparse
    from flow_data.features import to_sample
    from flow_data.images import disable_image_decoding
    from flow_data.synthetic import synthetic
    from flow_data.visualize import stack_rows

    try:
        split = args.split or DATASETS[args.source].training_split
        if args.source == "synthetic":
            dataset = synthetic(synthetic_options(vars(args), args.data_dir), split)
        else:
            dataset = load_source(args.source, args.data_dir, split)
        rows = disable_image_decoding(dataset)
        statistics = measure(rows, spread(len(dataset), args.max_pairs))
        print(describe(args.source, split, len(dataset), statistics))
        augment = augment_sparse if is_sparse(args.source, dataset) else augment_dense
        samples = [rows[index] for index in spread(len(dataset), args.num_pairs)]
        sheet = []
        for index, row in enumerate(samples):
            sample = to_sample(row)
            draws = [
                augment(
                    sample,
                    np.random.default_rng([args.seed, index, draw]),
                    crop_size=tuple(args.crop_size),
                    zoom_range=tuple(args.zoom_range),
                    flip=not args.no_flip,
                )
                for draw in range(DRAWS)
            ]
            sheet.append(draw_row(row["id"], [sample, *draws]))
        args.output.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(stack_rows(sheet)).save(args.output)
    except (ValueError, OSError) as error:
        sys.exit(f"flow_data.preview: error: {error}")
    print(f"{args.output}: {len(sheet)} pairs (frame 1, frame 2, flow), and each augmented {DRAWS} times")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m flow_data.preview", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data_dir_help = "the data set's own folder; for synthetic: images to cut textures from"
    add_source_arguments(parser, data_dir_help, split_help="default: the training split")
    parser.add_argument("--output", type=Path, help="contact sheet to write; default: preview_SOURCE.png")
    parser.add_argument("--num_pairs", type=int, default=4, help="pairs on the sheet")
    parser.add_argument("--max_pairs", type=int, default=100, help="pairs that the statistics are taken from")
    parser.add_argument("--crop_size", type=int, nargs=2, default=[384, 512], help="height and width, as in training")
    parser.add_argument("--zoom_range", type=float, nargs=2, default=[-0.2, 0.5], help="log2, as in training")
    parser.add_argument("--no_flip", action="store_true", help="as in training")
    parser.add_argument("--seed", type=int, default=0, help="of the augmentation")
    add_synthetic_flags(parser)
    args = parser.parse_args(argv)
    check_source_arguments(parser, args, positive=("num_pairs", "max_pairs"))
    if args.output is not None and args.output.suffix.lower() not in Image.registered_extensions():
        parser.error(f"--output: no image format has the suffix of {args.output}")
    if args.output is None:
        args.output = Path(f"preview_{args.source}.png")
    return args


def spread(length: int, wanted: int) -> list[int]:
    """Up to `wanted` indices below `length`, evenly apart, as neighbors are often frames of one scene."""
    return np.linspace(0, length - 1, min(length, wanted)).round().astype(int).tolist()


def measure(rows: Any, indices: list[int]) -> Statistics:
    """Compute statistics of some rows.

    Args:
        rows: of a source, with ground truth.
        indices: of the rows.

    Raises:
        ValueError: damaged, or without ground truth.
        OSError: a file cannot be read.
    """
    from tqdm.auto import tqdm

    from flow_data.features import to_sample

    sizes: Counter[tuple[int, int]] = Counter()
    pixels = known = 0
    sums, longest = np.zeros(3), 0.0
    histogram = np.zeros(len(SPEED_BINS) + 1, np.int64)
    for index in tqdm(indices, desc="reading", leave=False):
        sample = to_sample(rows[index])
        flow = sample.flow[sample.valid].astype(np.float64)
        speed = np.linalg.norm(flow, axis=-1)
        sizes[sample.valid.shape] += 1
        pixels += sample.valid.size
        known += len(speed)
        sums += [*flow.sum(axis=0), speed.sum()]
        longest = max(longest, speed.max(initial=0))
        histogram += np.bincount(np.searchsorted(SPEED_BINS, speed), minlength=len(histogram))
    mean_x, mean_y, mean_speed = (float(value) for value in sums / max(known, 1))
    shares = histogram.cumsum() / max(known, 1)
    median, high = (
        float(min(SPEED_BINS[min(int(np.searchsorted(shares, share)), len(SPEED_BINS) - 1)], longest))
        for share in (0.5, 0.95)
    )
    return Statistics(len(indices), sizes, known / pixels, (mean_x, mean_y), mean_speed, median, high, float(longest))


def describe(source: str, split: str, num_pairs: int, statistics: Statistics) -> str:
    """The statistics as lines of text."""
    sizes = ", ".join(f"{height} x {width} ({count})" for (height, width), count in statistics.sizes.most_common(5))
    more = len(statistics.sizes) - 5
    seen = "all of them" if statistics.num_pairs == num_pairs else f"{statistics.num_pairs} of them, evenly apart"
    speed = mean_flow = "-"
    if statistics.share_valid > 0:
        speed = (
            f"mean {statistics.mean_speed:.2f} px, median {statistics.median_speed:.2f}, "
            f"95 % below {statistics.high_speed:.2f}, max {statistics.max_speed:.2f}"
        )
        mean_flow = f"x {statistics.mean_flow[0]:+.2f} px, y {statistics.mean_flow[1]:+.2f} px"
    nothing = "" if statistics.share_valid > 0 else ": no pixel has valid ground truth, there is nothing to learn from"
    return "\n".join(
        [
            f"{source}, split {split}: {num_pairs} pairs; statistics of {seen}",
            f"  size (h x w)  {sizes}{f' and {more} more' if more > 0 else ''}",
            f"  speed         {speed}",
            f"  mean flow     {mean_flow}",
            f"  valid         {100 * statistics.share_valid:.1f} %{nothing}",
        ]
    )


def draw_row(name: str, samples: list[FlowSample]) -> np.ndarray:
    """Samples side by side, or below each other where they are wide; each as frame 1, frame 2, flow, with captions.

    Args:
        name: caption of the first.
        samples: the pair as it is, then its augmentations.

    Returns:
        `(H, W, 3)` uint8.
    """
    import torch

    from flow_data.visualize import draw_flow, join_row, mask_invalid, stack_rows

    rows = []
    for sample in samples:
        longest = f"up to {np.linalg.norm(sample.flow, axis=-1).max():.0f} px" if sample.valid.any() else "not valid"
        colors = mask_invalid(draw_flow(torch.from_numpy(sample.flow).permute(2, 0, 1)), sample.valid)
        height, width = sample.valid.shape
        captions = (name if sample is samples[0] else "augmented", f"{height} x {width}", longest)
        images = (sample.image1, sample.image2, colors)
        rows.append(join_row([_cell(*cell) for cell in zip(images, captions, strict=True)]))
    side_by_side = join_row(rows)
    return side_by_side if side_by_side.shape[1] <= MAX_SHEET_WIDTH else stack_rows(rows)


def _cell(image: np.ndarray, caption: str) -> np.ndarray:
    """An image of `CELL_HEIGHT` with its caption in the corner, white on a dark band."""
    width = max(round(image.shape[1] * CELL_HEIGHT / image.shape[0]), 1)
    import cv2

    cell = cv2.resize(image, (width, CELL_HEIGHT), interpolation=cv2.INTER_AREA)
    cell[:14] = cell[:14] // 3
    return cv2.putText(cell, caption, (3, 10), cv2.FONT_HERSHEY_SIMPLEX, 0.33, (255, 255, 255), 1, cv2.LINE_AA)


if __name__ == "__main__":
    main()
