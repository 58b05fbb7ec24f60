"""What adaptation gains on footage with hidden ground truth, and what it costs elsewhere.

    python -m benchmarks.bench_adapt --data_root ~/datasets --model raft-small.pth --teacher raft-sintel.pth \
        --folder outputs/bench_adapt --footage kitti_2015 flying_chairs stylised_chairs --seeds 1 2 3

Each footage is the pairs of a data set, of which `flow_training.adapt` sees the images only. The stylised ones are
smoothed with preserved edges and posterized by OpenCV, which leaves the ground truth as it is. Then student, teacher
and adapted weights are evaluated on every data set below `--data_root` and on the stylised frames. All that is written
goes to `--folder`, and what is there is not computed again.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from benchmarks.bench_accuracy import open_datasets
from benchmarks.machine import describe_machine
from benchmarks.options import positive, write_json
from flow_data.datasets import DATASETS
from flow_data.features import to_sample
from flow_data.sample import FlowSample
from flow_inference.prediction import predict_pair
from flow_training.metrics import error_sums, summarize
from modeling_raft.convert_raft_checkpoint import load_raft

STYLISED = {"stylised_chairs": "flying_chairs", "stylised_sintel": "sintel_clean"}
LEVELS = 6  # of each color channel, of a posterized frame
NUM_FLOW_UPDATES = 12
METRICS = ("epe_per_image", "fl_all")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", type=Path, required=True, help="folder of the data sets' own folders")
    parser.add_argument("--model", required=True, help="student")
    parser.add_argument("--teacher", help="default: the student itself")
    parser.add_argument("--folder", type=Path, required=True, help="of frames, runs and results")
    parser.add_argument("--footage", nargs="+", required=True, help=f"data sets, and {', '.join(STYLISED)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--reduce", type=positive, default=1, help="factor by which frames are reduced (default: 1)")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="last: further flags of adapt")
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    args = parser.parse_args(argv)
    try:
        samples = read_samples(args.data_root, args.reduce)
        if unknown := sorted(set(args.footage) - set(samples)):
            raise ValueError(f"--footage must be among {', '.join(samples)}; got {', '.join(unknown)}")
        results: dict[str, Any] = {"student": evaluate(args.folder, args.model, samples)}
        if args.teacher:
            results["teacher"] = evaluate(args.folder, args.teacher, samples)
        for footage in args.footage:
            table = write_footage(args.folder / "footage" / f"{footage}-{args.reduce}", samples[footage])
            results[footage] = [adapt(args, table, footage, seed, samples) for seed in args.seeds]
    except (ValueError, OSError) as error:
        sys.exit(f"benchmarks.bench_adapt: error: {error}")
    print(as_table(results, samples))
    if args.output is not None:
        settings = {key: value for key, value in vars(args).items() if not isinstance(value, Path)}
        write_json(args.output, {"settings": settings, "machine": describe_machine("cpu"), "results": results})


def read_samples(data_root: Path, reduce: int) -> dict[str, list[tuple[FlowSample, str]]]:
    """Return the pairs, and the padding of the protocol, of every data set that is there, stylised ones last."""
    samples = {
        name: [(shrink(to_sample(row), reduce), DATASETS[name].protocol.padding) for row in dataset]
        for name, dataset in open_datasets(data_root).items()
    }
    for name, source in STYLISED.items():
        if source in samples:
            samples[name] = [(stylise(sample), padding) for sample, padding in samples[source]]
    return samples


def shrink(sample: FlowSample, factor: int) -> FlowSample:
    """Reduce frames by area averages, and take the flow of the pixel in the middle of each area."""
    if factor == 1:
        return sample
    height, width = (side // factor for side in sample.image1.shape[:2])
    images = [
        cv2.resize(image[: height * factor, : width * factor], (width, height), interpolation=cv2.INTER_AREA)
        for image in (sample.image1, sample.image2)
    ]
    middle = slice(factor // 2, None, factor)
    flow, valid = (array[middle, middle][:height, :width] for array in (sample.flow, sample.valid))
    return sample._replace(image1=images[0], image2=images[1], flow=flow / factor, valid=valid)


def stylise(sample: FlowSample) -> FlowSample:
    """Smooth with preserved edges, and round colors to `LEVELS` values."""

    def draw(image: np.ndarray) -> np.ndarray:
        smooth = cv2.edgePreservingFilter(image, flags=cv2.RECURS_FILTER, sigma_s=30, sigma_r=0.3)
        step = 255 / (LEVELS - 1)
        return (np.round(smooth / step) * step).astype(np.uint8)

    return sample._replace(image1=draw(sample.image1), image2=draw(sample.image2))


def write_footage(folder: Path, samples: list[tuple[FlowSample, str]]) -> Path:
    """Write the images of pairs, and the table of them that adaptation takes."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = ["image1,image2"]
    for index, (sample, _) in enumerate(samples):
        names = [f"{index:02}_{number}.png" for number in (1, 2)]
        for name, image in zip(names, (sample.image1, sample.image2), strict=True):
            cv2.imwrite(str(folder / name), cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
        rows.append(",".join(names))
    table = folder / "pairs.csv"
    table.write_text("\n".join(rows) + "\n")
    return table


def adapt(args: argparse.Namespace, table: Path, footage: str, seed: int, samples: dict) -> dict[str, Any]:
    """Adapt the student, and evaluate what comes of it, accepted or not."""
    name = f"{footage}-{args.reduce}-{Path(args.teacher).stem if args.teacher else 'self'}"
    output_dir = args.folder / "runs" / "-".join([name, *(flag.strip("-") for flag in args.flags), str(seed)])
    argv = [sys.executable, "-m", "flow_training.adapt", str(table), "--model", args.model]
    argv += ["--teacher", args.teacher] if args.teacher else []
    argv += ["--output_dir", str(output_dir), "--seed", str(seed), "--report_to", "none", *args.flags]
    start = time.perf_counter()
    code = subprocess.run(argv, stdout=subprocess.DEVNULL).returncode
    seconds = time.perf_counter() - start
    if code not in (0, 5):
        raise ValueError(f"adaptation must end with exit code 0 or 5; got {code} of {' '.join(argv)}")
    weights = output_dir if code == 0 else output_dir / "rejected"
    return {
        "code": code,
        "seconds": seconds,
        "adaptation": json.loads((output_dir / "adaptation.json").read_text()),
        "metrics": evaluate(output_dir, str(weights), samples) if (weights / "config.json").is_file() else None,
    }


def evaluate(folder: Path, source: str, samples: dict[str, list[tuple[FlowSample, str]]]) -> dict[str, Any]:
    """Data set -> metrics of a model, from ground truth."""
    sizes = {name: pairs[0][0].image1.shape[:2] for name, pairs in samples.items()}
    path = Path(source).resolve()
    cache = folder / f"evaluation-{path.parent.name}-{path.stem}-{max(sizes.values())[1]}.json"
    if cache.is_file():
        return json.loads(cache.read_text())
    model = load_raft(source).eval()
    results = {}
    for name, pairs in samples.items():
        rows = []
        for sample, padding in pairs:
            flow = predict_pair(model, sample.image1, sample.image2, NUM_FLOW_UPDATES, padding)[None].double()
            flow_gt = torch.from_numpy(sample.flow.copy()).permute(2, 0, 1)[None].double()
            rows.append(error_sums(flow, flow_gt, torch.from_numpy(sample.valid.copy())[None])[0])
        summary = summarize(torch.stack(rows))
        results[name] = {metric: summary[metric] for metric in METRICS}
    write_json(cache, results)
    return results


def as_table(results: dict[str, Any], samples: dict[str, list]) -> str:
    """Return Markdown: EPE in pixels (Fl-all in %) of every data set; of several seeds the median."""
    lines = ["| | " + " | ".join(f"{name} ({len(pairs)})" for name, pairs in samples.items()) + " | accepted | s |"]
    lines.append("|---" * (len(samples) + 3) + "|")
    for name, result in results.items():
        runs = result if isinstance(result, list) else [{"metrics": result}]
        metrics = [run["metrics"] for run in runs if run["metrics"]]
        cells = []
        for dataset in samples:
            epe, outliers = (
                statistics.median(run[dataset][metric] for run in metrics) if metrics else float("nan")
                for metric in METRICS
            )
            cells.append(f"{epe:.3f} ({outliers:.1f})")
        if isinstance(result, list):
            name = f"after, {name}"
            accepted = f"{sum(run['code'] == 0 for run in runs)} of {len(runs)}"
            cells += [accepted, f"{statistics.median(run['seconds'] for run in runs):.0f}"]
        else:
            cells += ["", ""]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
