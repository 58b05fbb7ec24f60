"""End-point errors of models beside those of classical methods, on real pairs with ground truth, in one table.

    python -m benchmarks.bench_accuracy --data_root ~/datasets --models raft-small.pth@20 my-raft

Each MODEL is a folder, a repository id or a file of weights; `@N` sets its number of flow updates (default: 12). Every
data set below `--data_root` is evaluated on all pairs that it has (split `all`) with the padding of its protocol.
Beside the models stand zero flow, Farnebäck's method with the settings of OpenCV's tutorial, and DIS with its medium
preset (Kroeger et al. 2016), both on gray images, as OpenCV requires.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from tqdm.auto import tqdm

from benchmarks.machine import describe_machine
from benchmarks.options import positive, write_json
from flow_data.datasets import DATASETS, load_source
from flow_data.features import to_sample
from flow_data.sample import FlowSample
from flow_inference.prediction import predict_pair
from flow_training.metrics import error_sums, summarize
from modeling_raft.convert_raft_checkpoint import load_raft

SOURCES = ("flying_chairs", "sintel_clean", "sintel_final", "middlebury", "kitti_2012", "kitti_2015")
METRICS = ("epe_per_image", "epe", "fl_all")

Method = Callable[[FlowSample, str], np.ndarray]  # a pair and its padding -> (H, W, 2) float32, pixels


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", type=Path, required=True, help="folder of the data sets' own folders")
    parser.add_argument("--models", nargs="*", default=[], metavar="MODEL[@UPDATES]")
    parser.add_argument("--num_flow_updates", type=positive, default=12, help="of models without @ (default: 12)")
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    arguments = parser.parse_args(argv)
    try:
        datasets = open_datasets(arguments.data_root)
        methods: dict[str, Method] = {"zero flow": zero_flow, "Farneback": farneback, "DIS, medium": dis}
        for text in arguments.models:
            methods[text] = open_model(text, arguments.num_flow_updates)
    except (ValueError, OSError) as error:
        sys.exit(f"benchmarks.bench_accuracy: error: {error}")
    results = {name: measure(name, dataset, methods) for name, dataset in datasets.items()}
    print(as_table(results, {name: len(dataset) for name, dataset in datasets.items()}))
    if arguments.output is not None:
        write_json(
            arguments.output,
            {"settings": {"models": arguments.models}, "machine": describe_machine("cpu"), "results": results},
        )


def open_datasets(root: Path) -> dict[str, Any]:
    """Every data set of `SOURCES` that is below the folder, with all of its pairs."""
    found = {
        name: load_source(name, folder, "all")
        for name in SOURCES
        if (folder := root / str(DATASETS[name].folder)).exists()
    }
    if not found:
        folders = sorted({str(DATASETS[name].folder) for name in SOURCES})
        raise ValueError(f"--data_root must hold one of {', '.join(folders)}; got {root}")
    return found


def open_model(text: str, default_updates: int) -> Method:
    source, at, updates = text.rpartition("@")
    if not at or not updates.isdecimal():
        source, updates = text, str(default_updates)
    model = load_raft(source).eval()

    def estimate(sample: FlowSample, padding: str) -> np.ndarray:
        flow = predict_pair(model, sample.image1, sample.image2, int(updates), padding)
        return flow.permute(1, 2, 0).numpy()

    return estimate


def zero_flow(sample: FlowSample, _: str) -> np.ndarray:
    return np.zeros((*sample.image1.shape[:2], 2), np.float32)


def farneback(sample: FlowSample, _: str) -> np.ndarray:
    image1, image2 = _gray(sample)
    flow = np.zeros((*image1.shape, 2), np.float32)
    # pyramid scale and levels, window, iterations, polynomial's neighborhood and sigma, flags
    return np.asarray(cv2.calcOpticalFlowFarneback(image1, image2, flow, 0.5, 3, 15, 3, 5, 1.2, 0))


def dis(sample: FlowSample, _: str) -> np.ndarray:
    estimator = cv2.DISOpticalFlow.create(cv2.DISOpticalFlow_PRESET_MEDIUM)
    # Not zeros in place of None: DIS would start from them, and search less far.
    return np.asarray(estimator.calc(*_gray(sample), None))  # type: ignore[call-overload]


def _gray(sample: FlowSample) -> tuple[np.ndarray, np.ndarray]:
    image1, image2 = (np.asarray(cv2.cvtColor(i, cv2.COLOR_RGB2GRAY)) for i in (sample.image1, sample.image2))
    return image1, image2


def measure(name: str, dataset: Any, methods: dict[str, Method]) -> dict[str, dict[str, float]]:
    """Method -> its metrics on a data set; see docs/evaluation.md for what they mean."""
    sums: dict[str, list[torch.Tensor]] = {method: [] for method in methods}
    for row in tqdm(dataset, desc=name, leave=False):
        sample = to_sample(row)
        flow_gt = torch.from_numpy(sample.flow).permute(2, 0, 1)[None].double()
        valid = torch.from_numpy(sample.valid)[None]
        for method, estimate in methods.items():
            flow_pred = (
                torch.from_numpy(estimate(sample, DATASETS[name].protocol.padding)).permute(2, 0, 1)[None].double()
            )
            sums[method].append(error_sums(flow_pred, flow_gt, valid)[0])
    summaries = {method: summarize(torch.stack(rows)) for method, rows in sums.items()}
    return {method: {metric: summary[metric] for metric in METRICS} for method, summary in summaries.items()}


def as_table(results: dict[str, dict[str, dict[str, float]]], num_pairs: dict[str, int]) -> str:
    """Markdown: a row for each method, mean EPE of the pairs in pixels."""
    header = "| | " + " | ".join(f"{name} ({num_pairs[name]})" for name in results) + " |"
    methods = next(iter(results.values()))
    rows = [
        f"| {method} | " + " | ".join(f"{metrics[method]['epe_per_image']:.2f}" for metrics in results.values()) + " |"
        for method in methods
    ]
    return "\n".join(["EPE in px, mean of the pairs:", "", header, "|---" * (len(results) + 1) + "|", *rows])


if __name__ == "__main__":
    main()
