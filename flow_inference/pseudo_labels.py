"""Estimate labels for frames without ground truth: pairs whose flow is that of a model, to train another one on.

python -m flow_inference.pseudo_labels clip.mp4 --model raft-sintel.pth --output labels

Clips are a video, a folder of frames, a folder of videos or of such folders, a list of frames (.txt, one path a line),
and each pair of a table (.csv, .jsonl with image1 and image2); image files that are given are one clip together. Each
pair of frames is estimated in both directions, from zero flow and at full size, and is two pairs to train on. A pixel
is valid where forward and backward flow agree. Duplicate frames, scene cuts and frames of one color are skipped.

The output is a source `pairs`: `python -m flow_data.preview pairs --data_dir labels` shows it, and
`train_flow.py --train_mix '{pairs: 1}' --pairs_path labels` trains on it. The same command resumes after an
interruption.
"""

import argparse
import sys
from pathlib import Path

from flow_data.optional_packages import MissingPackageError
from flow_data.out_of_memory import explain_out_of_memory
from flow_data.shipped_files import PRETRAINED, find_model

DEVICE_HELP = "cpu, cuda, cuda:1, mps, xpu; default: the GPU if there is one"


def add_label_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which pairs of frames are labelled."""
    parser.add_argument(
        "--every", type=int, metavar="N", help="begin a pair at every Nth frame; default: evenly over all of the "
        "footage, as many as --max_pairs")  # fmt: skip
    parser.add_argument(
        "--gap", type=int, nargs="+", default=[1, 2], metavar="N", help="distances in time between the frames of a "
        "pair; duplicate frames do not count; default: 1 2")  # fmt: skip
    parser.add_argument(
        "--max_pairs", type=int, metavar="N", help="at most so many pairs of frames, evenly over the footage; "
        "default: as many as hold 6 megapixels on a CPU (13 pairs of 436 x 1024), 400 on a GPU, but at least "
        "4")  # fmt: skip
    parser.add_argument(
        "--intensity_range", type=float, nargs=2, metavar=("LO", "HI"), help="what becomes black and white of frames "
        "with 16 bits; default: the smallest and largest value of the first two frames of a clip")  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m flow_inference.pseudo_labels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="videos, folders of frames, lists, images")
    parser.add_argument("--model", help="folder, repository id, or file of weights that estimate the labels; default: "
                        f"the shipped {PRETRAINED}")  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    add_label_flags(parser)
    parser.add_argument("--num_flow_updates", type=int, default=32, help="updates of the flow; default: 32")
    parser.add_argument("--device", help=DEVICE_HELP)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Label the inputs as the command line says; mistakes end the program with one line."""
    args = parse_args(argv)
    try:
        from flow_inference.devices import choose_device  # torch takes seconds, which --help must not
        from flow_inference.footage import open_clips
        from flow_inference.labels import make_labels
        from modeling_raft.convert_raft_checkpoint import load_raft

        if args.output.exists() and not args.output.is_dir():
            raise NotADirectoryError(f"{args.output} is a file; --output must be a folder")
        device = choose_device(args.device)
        clips = open_clips(args.inputs)
        model = load_raft(find_model(args.model)).eval().to(device)
        labels = make_labels(
            model,
            args.model or PRETRAINED,
            clips,
            args.output,
            every=args.every,
            gaps=args.gap,
            max_pairs=args.max_pairs,
            num_flow_updates=args.num_flow_updates,
            intensity_range=args.intensity_range,
        )
    except Exception as error:
        message = explain_out_of_memory(error, "the labels", "Reduce the frames, or estimate on another device.")
        if message is None and not isinstance(error, (ValueError, OSError, MissingPackageError)):
            raise
        sys.exit(f"flow_inference.pseudo_labels: error: {message or error}")
    except KeyboardInterrupt:
        sys.exit(f"flow_inference.pseudo_labels: stopped; the same command resumes in {args.output}")
    print(f"{args.output}: {labels.description}")


if __name__ == "__main__":
    main()
