"""Evaluate a model on a benchmark by its published protocol.

python evaluate_flow.py --model DIR_OR_REPO --dataset sintel_clean --data_dir datasets/Sintel --output report.json
"""

import argparse
import json
import logging
import sys
from pathlib import Path

from accelerate import Accelerator
from PIL import Image

from flow_data.features import to_sample
from flow_data.images import undecoded
from flow_data.pictures import stack_rows
from flow_data.sources import check_split, load_source
from flow_data.synthetic import SyntheticOptions, synthetic
from flow_inference.pictures import draw_comparison
from flow_inference.prediction import predict_pair
from flow_training.config import nearest
from flow_training.evaluation import PROTOCOLS, Protocol, check_precision, evaluate
from modeling_raft import RaftForOpticalFlow
from modeling_raft.convert_raft_checkpoint import load_raft

PICTURE_PAIRS = 4


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        accelerator = Accelerator(mixed_precision=args.mixed_precision)
        check_precision(accelerator)
        if not accelerator.is_main_process:
            logging.getLogger("flow_data").setLevel(logging.ERROR)  # what is missing from the data is said once
        split, dataset = open_dataset(args)
        model = load_raft(args.model).eval().to(accelerator.device)
        protocol = PROTOCOLS[args.dataset]
        report = evaluate(model, dataset, protocol, accelerator, args.num_flow_updates)
    except (ValueError, OSError) as error:
        sys.exit(f"evaluate_flow.py: error: {error}")
    if not accelerator.is_main_process:
        return

    report = {"dataset": args.dataset, "split": split, **report}
    used = report["protocol"]
    print(f"{args.dataset} {split}: {report['num_pairs']} pairs, {used['num_flow_updates']} updates, {used['dtype']}")
    for name, value in report["metrics"].items():
        print(f"  {name:16} {value:.4f}")
    print(f"  (zero flow: epe {report['zero_flow_epe']:.4f})")
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=2) + "\n")
    if args.picture is not None:
        args.picture.parent.mkdir(parents=True, exist_ok=True)
        draw_pairs(model, dataset, protocol, args.num_flow_updates).save(args.picture)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder, repository id, or .pth of princeton or torchvision")
    parser.add_argument("--dataset", required=True, help=", ".join(sorted(PROTOCOLS)))
    parser.add_argument("--data_dir", help="the data set's own folder; for synthetic: pictures to cut textures from")
    parser.add_argument("--split", help="default: what the published protocol evaluates; 'all' for every pair")
    parser.add_argument("--num_flow_updates", type=int, help="default: the protocol's")
    parser.add_argument(
        "--mixed_precision", choices=["no", "bf16", "fp16"], help="default: accelerate launch's, else no"
    )
    parser.add_argument("--output", type=Path, help="report to write, JSON")
    parser.add_argument("--picture", type=Path, help=f"picture to write of the first {PICTURE_PAIRS} pairs: frame 1, "
                        "true flow, predicted flow, error")  # fmt: skip
    options = SyntheticOptions()
    group = parser.add_argument_group("synthetic pairs, as the training flags of the same names")
    group.add_argument("--synthetic_image_size", type=int, nargs=2, default=options.image_size)
    group.add_argument("--synthetic_displacement", type=float, nargs=2, default=options.displacement)
    group.add_argument("--synthetic_shapes", type=int, nargs=2, default=options.shapes)
    group.add_argument("--synthetic_num_pairs", type=int, default=64)
    args = parser.parse_args(argv)
    if args.dataset not in PROTOCOLS:
        parser.error(f"unknown dataset {args.dataset}{nearest(args.dataset, list(PROTOCOLS))}")
    if args.dataset != "synthetic" and args.data_dir is None:
        parser.error(f"--data_dir is missing: the folder of {args.dataset}")
    if args.num_flow_updates is not None and args.num_flow_updates < 1:
        parser.error(f"--num_flow_updates must be at least 1; got {args.num_flow_updates}")
    return args


def open_dataset(args: argparse.Namespace):
    """(split, rows) of the data set that the arguments name."""
    split = args.split or PROTOCOLS[args.dataset].split
    check_split(args.dataset, split)
    if args.dataset != "synthetic":
        return split, undecoded(load_source(args.dataset, args.data_dir, split))
    options = SyntheticOptions(
        image_size=tuple(args.synthetic_image_size),
        displacement=tuple(args.synthetic_displacement),
        shapes=tuple(args.synthetic_shapes),
        textures=args.data_dir,
    )
    return split, synthetic(options, split=split, num_pairs=args.synthetic_num_pairs)


def draw_pairs(model: RaftForOpticalFlow, dataset, protocol: Protocol, num_flow_updates: int | None) -> Image.Image:
    """The first pairs of a data set, each a row: frame 1, true flow, predicted flow, error."""
    rows = []
    for index in range(min(PICTURE_PAIRS, len(dataset))):
        sample = to_sample(dataset[index])
        updates = num_flow_updates or protocol.num_flow_updates
        flow_pred = predict_pair(model, sample.image1, sample.image2, updates, protocol.padding)
        rows.append(draw_comparison(sample.image1, sample.flow, sample.valid, flow_pred))
    return Image.fromarray(stack_rows(rows))


if __name__ == "__main__":
    main()
