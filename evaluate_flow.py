"""Evaluate a model on a benchmark by its published protocol, or write what the benchmark's server takes.

python evaluate_flow.py --model DIR_OR_REPO --dataset sintel_clean --data_dir datasets/Sintel --output report.json
python evaluate_flow.py --model DIR_OR_REPO --dataset kitti_2015 --data_dir datasets/KITTI --submission kitti_results

Under `accelerate launch`, processes share the pairs. docs/evaluation.md explains the metrics.
"""

import argparse
import logging
import math
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from tqdm.auto import tqdm

from flow_data.arguments import add_synthetic_flags, given_options, synthetic_options
from flow_data.atomic_write import atomic_write
from flow_data.datasets import DATASETS, SUBMISSIONS, Protocol, check_split, load_source
from flow_data.flow_io import describe_loss
from flow_data.optional_packages import MissingPackageError, require_packages
from flow_data.out_of_memory import explain_out_of_memory
from flow_data.shipped_files import PRETRAINED, find_model
from flow_inference.cpu_threads import limit_spinning
from flow_training.flags import nearest
from flow_training.run_log import to_json

# torch is imported once the arguments are known to be good, so that --help and mistakes take no time.
if TYPE_CHECKING:
    from accelerate import Accelerator

    from modeling_raft import RaftForOpticalFlow

DRAWN_PAIRS = 4
NAMED_PAIRS = 8  # at most, in a message


def main(argv: list[str] | None = None) -> None:
    """Evaluate as the command line says; mistakes and interruptions end the program with one line."""
    args = parse_args(argv)
    limit_spinning()
    require_packages("evaluate_flow.py")
    try:
        from accelerate import Accelerator

        from flow_training.evaluation import check_precision
        from flow_training.processes import refuse_sharding

        refuse_sharding()
        with use_device(args.device):
            accelerator = Accelerator(mixed_precision=args.mixed_precision)
        check_precision(accelerator)
        if not accelerator.is_main_process:
            logging.getLogger("flow_data").setLevel(logging.ERROR)  # warnings about the data are logged once
        if args.submission is None:
            report(args, accelerator)
        else:
            submit(args, accelerator)
        accelerator.end_training()  # leaves the process group: its threads may abort this process as it ends
    except Exception as error:
        message = explain_out_of_memory(error, "the evaluation", advise_on_memory(args))
        if message is None and not isinstance(error, (ValueError, OSError, MissingPackageError)):
            raise
        sys.exit(f"evaluate_flow.py: error: {message or error}")
    except KeyboardInterrupt:
        kept = "" if args.submission is None else f"; the files that were written are in {args.submission}"
        sys.exit(f"evaluate_flow.py: stopped{kept}")


def use_device(name: str | None) -> AbstractContextManager:
    """A context in which an `Accelerator` uses this device; None: the one that accelerate chooses.

    Raises:
        ValueError: The device does not exist, or several processes would share it.
    """
    if name is None:
        return nullcontext()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(f"--device {name} is for one process; accelerate launch gives each of several its own device")
    from accelerate.utils import patch_environment

    from flow_inference.devices import choose_device

    return patch_environment(ACCELERATE_TORCH_DEVICE=choose_device(name))


def report(args: argparse.Namespace, accelerator: "Accelerator") -> None:
    """Evaluate, print the metrics, and write the report and the image that are asked for."""
    from flow_inference.submission import prepare_folders
    from flow_training.evaluation import evaluate
    from flow_training.metrics import format_metric
    from modeling_raft.convert_raft_checkpoint import load_raft

    split = args.split or DATASETS[args.dataset].protocol.split
    dataset = open_dataset(args, split)
    for flag, path in (("--output", args.output), ("--picture", args.picture)):
        if path is not None and accelerator.is_main_process:
            prepare_folders([path], flag)
    model = load_raft(find_model(args.model)).eval().to(accelerator.device)
    protocol = DATASETS[args.dataset].protocol
    results = evaluate(
        model,
        dataset,
        protocol,
        accelerator,
        args.num_flow_updates,
        batch_size=args.batch_size,
        warm_start=args.warm_start,
    )
    if not accelerator.is_main_process:
        return

    used = results["protocol"]
    print(f"{args.dataset} {split}: {results['num_pairs']} pairs, {describe(args, used)}")
    for name, value in results["metrics"].items():
        print(f"  {name:16} {format_metric(value, 4)}")
    print(f"  (zero flow: epe {format_metric(results['zero_flow_epe'], 4)})")
    for line in describe_missing_metrics(results):
        print(f"  {line}")
    if args.output is not None:
        contents = {"dataset": args.dataset, "split": split, **results}
        with atomic_write(args.output) as partial:
            partial.write_text(to_json(contents, indent=2) + "\n")
    if args.picture is not None:
        with accelerator.autocast():
            image = draw_pairs(model, dataset, protocol, used["num_flow_updates"], args.warm_start)
        with atomic_write(args.picture) as partial:
            image.save(partial)


def submit(args: argparse.Namespace, accelerator: "Accelerator") -> None:
    """Write the flow of every pair for the benchmark's server, and report what is missing."""
    import torch

    from flow_inference.prediction import chunk_rows, predict_rows, split_work
    from flow_inference.submission import check_submission, find_missing, prepare_folders, read_frames, write_result
    from flow_training.evaluation import DTYPES
    from modeling_raft.convert_raft_checkpoint import load_raft

    check_submission(args.dataset)
    submission, protocol = SUBMISSIONS[args.dataset], DATASETS[args.dataset].protocol
    split = args.split or submission.split
    dataset = open_dataset(args, split).select_columns(["id", "image1", "image2"])
    paths = [args.submission / submission.path(id_) for id_ in dataset["id"]]
    prepare_folders(paths)
    model = load_raft(find_model(args.model)).eval().to(accelerator.device)

    shares = split_work(chunk_rows(dataset, args.batch_size, args.warm_start), accelerator.num_processes)
    share = shares[accelerator.process_index]
    updates = args.num_flow_updates or protocol.num_flow_updates
    used = {"num_flow_updates": updates, "dtype": DTYPES[accelerator.mixed_precision]}
    clipped = []  # share of the pixels of each pair
    with (
        accelerator.autocast(),
        tqdm(total=sum(map(len, share)), desc="predicting", disable=not accelerator.is_main_process) as bar,
    ):
        predictions = predict_rows(model, dataset, share, read_frames, updates, protocol.padding, args.warm_start)
        for prediction in predictions:
            clipped.append(write_result(paths[prediction.position], prediction.flow, submission))
            bar.update()
    accelerator.wait_for_everyone()
    clipped_sum = accelerator.reduce(torch.tensor(float(sum(clipped)), device=accelerator.device)).item()
    if accelerator.is_main_process:
        print(f"{args.dataset} {split}: {len(paths)} files in {args.submission}, {describe(args, used)}")
        if clipped_sum:
            print(f"  warning: {describe_loss(clipped_sum / len(paths), paths[0].suffix)} and were clipped to it")
        problems = find_missing(args.dataset, split, args.submission, list(dataset["id"]))
        for problem in problems:
            print(f"  incomplete: {problem}")
        if not problems:
            print("  complete; docs/evaluation.md explains how to submit it")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder, repository id, or file of weights of RAFT; default: the shipped "
        f"{PRETRAINED}")  # fmt: skip
    parser.add_argument("--dataset", required=True, help=", ".join(sorted(DATASETS)))
    parser.add_argument("--data_dir", help="the data set's own folder; for synthetic: images to cut textures from")
    parser.add_argument(
        "--split",
        help="default: what the published protocol evaluates, or with --submission the test split; 'all' for every "
        "pair with ground truth",
    )
    parser.add_argument("--num_flow_updates", type=int, help="default: the protocol's")
    parser.add_argument("--batch_size", type=int, default=1, help="pairs that a process predicts at once, default 1; "
                        "where the size of images changes, a new batch begins")  # fmt: skip
    parser.add_argument("--warm_start", action="store_true", help="video: start each pair from the flow of the one "
                        "before, moved along, as published for Sintel submissions")  # fmt: skip
    parser.add_argument(
        "--mixed_precision", choices=["no", "bf16", "fp16"], help="default: accelerate launch's, else no"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps, xpu; default: the GPU if there is one")
    parser.add_argument("--output", type=Path, help="report to write, JSON")
    parser.add_argument("--picture", type=Path, help=f"image to write of the first {DRAWN_PAIRS} pairs: frame 1, "
                        "ground truth, predicted flow, error")  # fmt: skip
    parser.add_argument("--submission", type=Path, metavar="DIR", help="instead of a report, write the flow of the "
                        f"test split in the server's format; for {', '.join(SUBMISSIONS)}")  # fmt: skip
    parser.add_argument("--synthetic_num_pairs", type=int, help="pairs of the synthetic split, default 64")
    add_synthetic_flags(parser)
    args = parser.parse_args(argv)
    if args.dataset not in DATASETS:
        parser.error(f"unknown dataset {args.dataset}{nearest(args.dataset, list(DATASETS))}")
    if args.dataset != "synthetic" and args.data_dir is None:
        parser.error(f"--data_dir is missing: the folder of {args.dataset}")
    given = [*given_options(vars(args)), *(["num_pairs"] if args.synthetic_num_pairs is not None else [])]
    if given and args.dataset != "synthetic":
        parser.error(f"--synthetic_{given[0]} is for --dataset synthetic; {args.dataset} is read from files")
    if args.synthetic_num_pairs is None:
        args.synthetic_num_pairs = 64
    for name in ("num_flow_updates", "batch_size", "synthetic_num_pairs"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1; got {value}")
    if args.picture is not None and Image.registered_extensions().get(args.picture.suffix.lower()) not in Image.SAVE:
        parser.error(f"--picture must end in the suffix of an image, .png for example; got {args.picture}")
    if args.warm_start and args.batch_size > 1:
        parser.error(f"--warm_start predicts one pair after the other: leave out --batch_size {args.batch_size}")
    if args.submission is not None and (args.output or args.picture):
        parser.error("--submission writes flow and compares it with nothing: leave out --output and --picture")
    return args


def open_dataset(args: argparse.Namespace, split: str):
    """Open the rows that the arguments name."""
    from flow_data.images import disable_image_decoding  # and with it the package datasets

    check_split(args.dataset, split)
    if args.dataset == "synthetic":
        from flow_data.synthetic import synthetic

        options = synthetic_options(vars(args), args.data_dir)
        dataset = synthetic(options, split=split, num_pairs=args.synthetic_num_pairs)
    else:
        dataset = disable_image_decoding(load_source(args.dataset, args.data_dir, split))
    if not args.warm_start:
        return dataset
    from flow_inference.prediction import find_sequences

    if len(find_sequences(dataset)) == len(dataset):
        raise ValueError(f"--warm_start: no pair of {args.dataset} {split} begins with the frame with which another "
                         "ends, so there is no flow to start from; leave it out")  # fmt: skip
    return dataset


def advise_on_memory(args: argparse.Namespace) -> str:
    """Say what needs less memory than these arguments."""
    batch = "" if args.batch_size == 1 else f"Predict fewer pairs at once than --batch_size {args.batch_size}. "
    return (
        f"{batch}Correlation is computed on demand where memory looks too short for all pairs of pixels; "
        '"correlation": "on_demand" in config.json of the model\'s folder does so always, and --mixed_precision bf16 '
        "halves the rest."
    )


def describe(args: argparse.Namespace, used: dict[str, Any]) -> str:
    """Describe how flow was predicted, from the `protocol` of the report."""
    warm_start = ", warm start" if args.warm_start else ""
    return f"{used['num_flow_updates']} updates, {used['dtype']}{warm_start}"


def describe_missing_metrics(report: dict[str, Any]) -> list[str]:
    """Explain which metrics of a report do not exist, and why; a line for each reason."""
    unknown = [pair["id"] for pair in report["per_pair"] if not math.isfinite(pair["fl_all"])]
    lines = []
    if len(unknown) == report["num_pairs"]:
        lines.append("no pixel of these pairs has valid ground truth: there is nothing to compare the flow with")
    elif unknown:
        more = f" and {len(unknown) - NAMED_PAIRS} more" if len(unknown) > NAMED_PAIRS else ""
        names = f"{', '.join(unknown[:NAMED_PAIRS])}{more}"
        lines.append(f"no pixel of {len(unknown)} pair(s) has valid ground truth, they do not count: {names}")
    if math.isfinite(report["zero_flow_epe"]) and not math.isfinite(report["metrics"]["epe"]):
        lines.append("the model's flow is not finite: its weights may be those of a training that diverged")
    return lines


def draw_pairs(
    model: "RaftForOpticalFlow", dataset, protocol: Protocol, num_flow_updates: int, warm_start: bool
) -> Image.Image:
    """Draw the first pairs of a data set: frame 1, ground truth, predicted flow, error."""
    from flow_data.features import to_sample
    from flow_data.visualize import stack_rows
    from flow_inference.prediction import chunk_rows, predict_rows
    from flow_inference.visualization import compare

    chunks = chunk_rows(dataset, warm_start=warm_start)
    predictions = predict_rows(model, dataset, chunks, to_sample, num_flow_updates, protocol.padding, warm_start)
    rows = [
        compare(sample.image1, sample.flow, sample.valid, flow)
        for _, _, sample, flow in islice(predictions, DRAWN_PAIRS)
    ]
    return Image.fromarray(stack_rows(rows))


if __name__ == "__main__":
    main()
