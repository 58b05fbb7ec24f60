"""Samples per second that one core decodes, augments and loads, beside the same recipe in the plain way.

    python -m benchmarks.bench_data --data_root ~/datasets --output bench_data.json

Each stage is measured in pairs: ours, the baseline, and again, in one process with one thread, so that whatever else
the machine does touches both. The ratio is the median of the ratios within the pairs. Data sets that are not below
`--data_root` are replaced by synthetic ones (`synthetic_data.py`); the table names them. The baseline is
`plain_loading.py` and `tests/plain_augmentation.py`.
"""

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib import metadata
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from datasets import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks.machine import describe_machine
from benchmarks.options import positive, write_json
from benchmarks.own_process import in_new_process, peak_bytes
from benchmarks.plain_loading import PlainPairs, read_plainly
from benchmarks.synthetic_data import write_pairs
from flow_data.augmentation import augment_dense, augment_sparse, draw_dense, draw_sparse
from flow_data.datasets import DATASETS, load_source
from flow_data.features import OpticalFlow, to_sample
from flow_data.images import disable_image_decoding
from flow_data.sample import FlowSample
from flow_data.sampling import MixSource, TrainingPairs, use_one_thread
from tests.plain_augmentation import apply_plainly

SEED = 1234
BATCH_SIZE = 4
SYNTHETIC_PAIRS = 4
MAX_PAIRS = 8  # of real data: few enough to stay in the page cache, so that no disk is measured
WARM_UP = 30  # samples after which memory should not grow


class Recipe(NamedTuple):
    """What a data set is measured with; sizes are (height, width).

    Args:
        source: name in `flow_data.datasets`.
        frame_size: of synthetic frames.
        crop_size: as in configs/, like the two that follow.
        zoom_range: log2.
        sparse: kind of ground truth.
        flip: whether samples are flipped.
        target: samples per second that are asked for, as a multiple of the baseline's.
    """

    source: str
    frame_size: tuple[int, int]
    crop_size: tuple[int, int]
    zoom_range: tuple[float, float]
    sparse: bool
    flip: bool
    target: float


RECIPES = {
    "chairs": Recipe("flying_chairs", (384, 512), (368, 496), (-0.1, 1.0), sparse=False, flip=True, target=2.0),
    "sintel": Recipe("sintel_clean", (436, 1024), (368, 768), (-0.2, 0.6), sparse=False, flip=True, target=3.0),
    "things": Recipe("flying_things_clean", (540, 960), (400, 720), (-0.4, 0.8), sparse=False, flip=True, target=3.0),
    "kitti": Recipe("kitti_2015", (375, 1242), (288, 960), (-0.2, 0.4), sparse=True, flip=False, target=2.0),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", type=Path, help="folder of real data sets; what is not in it is synthetic")
    parser.add_argument("--datasets", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--repetitions", type=positive, default=15, help="pairs of measurements of each stage")
    parser.add_argument("--samples", type=positive, default=16, help="samples of a measurement")
    parser.add_argument("--memory_samples", type=positive, default=200, help="samples over which memory is watched")
    parser.add_argument("--worker", action="store_true", help="measure the loader with a worker process, too")
    parser.add_argument("--quick", action="store_true", help="a short, noisy run")
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args(argv)
    if arguments.data_root is not None and not arguments.data_root.is_dir():
        parser.error(f"--data_root: there is no folder {arguments.data_root}")
    if arguments.quick:
        arguments.repetitions, arguments.samples, arguments.memory_samples = 3, 8, 60
    use_one_thread(0)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.datasets:
            recipe = RECIPES[name]
            root, content = find_data(recipe, arguments.data_root, Path(folder))
            results.append({"dataset": name, "content": content} | measure(recipe, root, arguments))
    report = {"machine": describe_machine(), "environment": describe_environment(), "results": results}
    print(format_report(report))
    if arguments.output is not None:
        write_json(arguments.output, report)


def find_data(recipe: Recipe, data_root: Path | None, synthetic_root: Path) -> tuple[Path, str]:
    """The folder of a data set, and whether its pairs are real or synthetic."""
    folder = str(DATASETS[recipe.source].folder)
    if data_root is not None:
        try:
            load_source(recipe.source, data_root / folder, "all")
            return data_root / folder, "real"
        except OSError:
            pass
    write_pairs(recipe.source, synthetic_root, recipe.frame_size, SYNTHETIC_PAIRS)
    return synthetic_root / folder, "synthetic"


def open_rows(recipe: Recipe, root: Path) -> Any:
    dataset = load_source(recipe.source, root, "all")
    return disable_image_decoding(dataset.select(range(min(MAX_PAIRS, len(dataset)))))


def augmentations(recipe: Recipe) -> tuple[Callable[..., FlowSample], Callable[..., FlowSample]]:
    """Ours and the baseline, with the recipe's numbers."""
    ours = partial(
        augment_sparse if recipe.sparse else augment_dense,
        crop_size=recipe.crop_size,
        zoom_range=recipe.zoom_range,
        flip=recipe.flip,
    )
    return ours, partial(augment_plainly, recipe=recipe)


def augment_plainly(sample: FlowSample, rng: np.random.Generator, recipe: Recipe) -> FlowSample:
    draw = draw_sparse if recipe.sparse else draw_dense
    augmentation = draw(rng, sample.valid.shape, recipe.crop_size, recipe.zoom_range, recipe.flip)
    return apply_plainly(sample, augmentation, recipe.sparse)


def measure(recipe: Recipe, root: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time all stages of one data set, and watch the memory of a process that loads it."""
    rows = open_rows(recipe, root)
    stored = rows.cast_column("image1", Image(decode=False)).cast_column("flow", OpticalFlow(decode=False))
    paths = [{key: row[key]["path"] for key in ("image1", "image2", "flow")} for row in stored]
    ours, plain = augmentations(recipe)
    samples = [to_sample(row) for row in rows]
    keys = list(islice(enumerate(cycle(range(len(rows)))), arguments.samples))
    pairs = TrainingPairs([MixSource(recipe.source, rows, 1, ours)], SEED)
    plain_pairs = PlainPairs(paths, plain, SEED)

    def run(function: Callable[[int, int], Any]) -> Callable[[], None]:
        def run_all() -> None:
            for number, position in keys:
                function(number, position)

        return run_all

    stages: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
        "decode": (run(lambda _, i: to_sample(rows[i])), run(lambda _, i: read_plainly(paths[i]))),
        "augmentation": (
            run(lambda n, i: ours(samples[i], np.random.default_rng([SEED, n]))),
            run(lambda n, i: plain(samples[i], np.random.default_rng([SEED, n]))),
        ),
        "whole": (partial(load, pairs, keys, 0), partial(load, plain_pairs, keys, 0)),
    }
    if arguments.worker:
        # Workers start anew for every measurement, so there must be enough samples for that not to count.
        many = list(islice(enumerate(cycle(range(len(rows)))), 8 * arguments.samples))
        stages["worker"] = (partial(load, pairs, many, 1), partial(load, plain_pairs, many, 1))
    sizes = [Path(path).stat().st_size for row in paths for path in (row["image1"], row["image2"])]
    result: dict[str, Any] = {
        "frame_size": list(samples[0].valid.shape),
        "crop_size": list(recipe.crop_size),
        "target": recipe.target,
        "pairs": len(rows),
        "mean_image_bytes": round(sum(sizes) / len(sizes)),
    }
    for stage, (our_run, plain_run) in stages.items():
        count = len(keys) * (8 if stage == "worker" else 1)
        result[stage] = compare(our_run, plain_run, arguments.repetitions, count)
    result["memory"] = in_new_process(watch_memory, recipe, root, arguments.memory_samples)
    return result


def load(dataset: Dataset, keys: list[tuple[int, int]], num_workers: int) -> None:
    loader: Iterable[Any] = DataLoader(
        dataset,
        batch_size=BATCH_SIZE,
        sampler=keys,
        num_workers=num_workers,
        worker_init_fn=use_one_thread if num_workers else None,
    )
    for _ in loader:
        pass


def compare(ours: Callable[[], None], plain: Callable[[], None], repetitions: int, samples: int) -> dict[str, Any]:
    """Samples per second of both, and the median of their ratios in pairs of measurements, with its quartiles."""
    ours()
    plain()
    times = np.array([(seconds(ours), seconds(plain)) for _ in range(repetitions)])
    our_rate, plain_rate = samples / np.median(times, axis=0)
    low, ratio, high = np.percentile(times[:, 1] / times[:, 0], (25, 50, 75))
    rates = {"ours_per_s": our_rate, "baseline_per_s": plain_rate, "ratio": ratio, "quartiles": (low, high)}
    return {key: np.round(value, 2).tolist() for key, value in rates.items()}


def seconds(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def watch_memory(recipe: Recipe, root: Path, samples: int) -> dict[str, Any]:
    """Peak memory of a process that loads samples, after the first few of them and after all."""
    use_one_thread(0)
    rows = open_rows(recipe, root)
    pairs = TrainingPairs([MixSource(recipe.source, rows, 1, augmentations(recipe)[0])], SEED)
    peaks = []
    for number in range(samples):
        pairs[(number, number % len(rows))]
        peaks.append(peak_megabytes())
    return {"samples": samples, "warm_up": WARM_UP, "peak_mb": peaks[-1], "growth_mb": peaks[-1] - peaks[WARM_UP - 1]}


def peak_megabytes() -> float:
    return round(peak_bytes() / 2**20, 1)


def describe_environment() -> dict[str, Any]:
    versions: dict[str, str | None] = {}
    for package in ("numpy", "torch", "torchvision", "opencv-python-headless", "pillow", "datasets", "kornia-rs"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    threads = {"opencv": cv2.getNumThreads(), "torch": torch.get_num_threads()}
    return {"python": platform.python_version(), "machine": platform.machine(), "threads": threads} | versions


def format_report(report: dict[str, Any]) -> str:
    """A Markdown table, one line for each data set and stage."""
    lines = [
        "| data set | pairs | stage | ours /s | baseline /s | ratio | quartiles | target |",
        "|---|---|---|---:|---:|---:|---|---:|",
    ]
    for result in report["results"]:
        (height, width), (crop_height, crop_width) = result["frame_size"], result["crop_size"]
        kilobytes = result["mean_image_bytes"] / 1000
        name = f"{result['dataset']} {height}x{width} -> {crop_height}x{crop_width}"
        pairs = f"{result['pairs']} {result['content']}, {kilobytes:.0f} kB a frame"
        for stage in ("decode", "augmentation", "whole", "worker"):
            if stage in result:
                rates = result[stage]
                target = f"{result['target']:.1f}" if stage == "whole" else ""
                low, high = rates["quartiles"]
                lines.append(
                    f"| {name} | {pairs} | {stage} | {rates['ours_per_s']:.1f} | {rates['baseline_per_s']:.1f} "
                    f"| {rates['ratio']:.2f} | {low:.2f} to {high:.2f} | {target} |"
                )
    lines.append("")
    for result in report["results"]:
        memory = result["memory"]
        lines.append(
            f"Memory of a process that loads {result['dataset']}: peak {memory['peak_mb']:.0f} MB, of which "
            f"{memory['growth_mb']:.1f} MB came after the first {memory['warm_up']} of {memory['samples']} samples."
        )
    lines.append(f"\nEnvironment: {json.dumps(report['environment'])}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
