"""The command line of `flow_training.adapt`, and the one of train_flow.py that follows from it."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from flow_data.shipped_files import PRETRAINED
from flow_inference.pseudo_labels import DEVICE_HELP, add_label_flags
from flow_training.config import TrainingConfig, parse_config
from flow_training.flags import FlagParser, flag_name, nearest

PROG = "flow_training.adapt"
LABELS, TRAINED, HELD_OUT = "labels", "train.csv", "held_out.csv"  # folder, and tables in it
STEPS_PER_PAIR, MOST_STEPS = 4, 400  # of pairs to train on, each direction one, in batches of 1
GPU_BATCH = 4
CROP_MULTIPLE, SMALLEST_CROP = 8, 64  # pixels: what the model takes
SET_BY_ADAPT = {
    "model_name_or_path": "give --model",
    "pairs_path": "it is trained on the labels",
    "train_mix": "give --mix_synthetic",
    "dataset_name": "it is trained on the labels",
    "resume_from_checkpoint": "an adaptation in progress is always resumed",
    "validation_sets": "give --guard",
}
LABEL_FLAGS = {"every": "every", "gap": "gaps", "max_pairs": "max_pairs", "intensity_range": "intensity_range"}
ALWAYS_GUARD = "synthetic"  # labelled pairs that need no data


def parse_args(argv: Sequence[str], description: str | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Split the command line into the arguments of this program and flags of train_flow.py."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {PROG}",
        usage="%(prog)s INPUT [INPUT ...] --model STUDENT [--teacher MODEL] --output_dir DIR [--flag value ...]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="videos; folders of frames, or of such folders; lists of frames "
        "(.txt); tables of pairs (.csv, .jsonl); images, which are one clip together; before all flags")  # fmt: skip
    add("--model", help="weights to adapt: a folder, a repository id or a file of weights; default: the shipped "
        f"{PRETRAINED}")  # fmt: skip
    add("--teacher", help="weights that estimate the labels; default: those of --model")
    add("--output_dir", required=True, type=Path, help="folder for labels, weights, card, log and images")
    add("--config", default="adapt", help="settings of the training; default: adapt, which ships with the project")
    add("--force", action="store_true", help="train although the teacher does not explain the footage better")
    add("--guard", nargs="+", default=[], metavar="SOURCE", help="labelled data on which the end-point error must not "
        "rise by more than --max_guard_loss: SOURCE or SOURCE:SPLIT, as validation_sets of train_flow.py; on "
        "synthetic pairs it must not rise by more than 50 %% in any case")  # fmt: skip
    add("--max_guard_loss", type=float, default=0.05, metavar="SHARE", help="by which the error may rise on the data "
        "of --guard; default: 0.05, that is 5 %%")  # fmt: skip
    add("--mix_synthetic", type=float, default=0.2, metavar="SHARE", help="share of synthetic pairs among those that "
        "are trained on, 0 to 0.9, against forgetting; default: 0.2")  # fmt: skip
    add_label_flags(parser)
    add("--device", help=f"for labels and judge: {DEVICE_HELP}")
    add("--launch", help="options of accelerate launch, in quotes; default: one process")
    known = {name for action in parser._actions for name in action.option_strings}
    own: list[str] = []
    flags: list[str] = []
    target = own  # what stands before the first flag is an input
    for word in argv:
        if flag_name(word):
            target = own if word.partition("=")[0] in known else flags
        target.append(word)
    args = parser.parse_args(own)
    names = [*known, *FlagParser(TrainingConfig, PROG)._option_string_actions]
    for flag in (word.partition("=")[0] for word in flags if flag_name(word)):
        if flag not in names:
            parser.error(f"unknown flag {flag}{nearest(flag, names)}")
    if not 0 <= args.mix_synthetic <= 0.9:
        parser.error(f"--mix_synthetic must be between 0 and 0.9; got {args.mix_synthetic:g}")
    if not args.max_guard_loss >= 0:
        parser.error(f"--max_guard_loss must be at least 0; got {args.max_guard_loss:g}")
    for name in {flag_name(word) for word in flags} & SET_BY_ADAPT.keys():
        parser.error(f"--{name} cannot be given: {SET_BY_ADAPT[name]}")
    return args, flags


def trainer_arguments(
    args: argparse.Namespace,
    flags: list[str],
    num_pairs: int = 1,
    frame_size: tuple[int, int] | None = None,
    on_gpu: bool = False,
) -> list[str]:
    """The command line of train_flow.py.

    Args:
        args: Of this program.
        flags: Of train_flow.py, as given.
        num_pairs: Pairs of frames to train on.
        frame_size: Height and width into which the crop must fit; else frames would be enlarged for it, and the model
            would be adapted to another scale than theirs.
        on_gpu: The training has a GPU.
    """
    given = {flag_name(word) for word in flags}
    arguments = ["--config", args.config, *flags]
    fixed = [
        *("--model_name_or_path", args.model or PRETRAINED, "--output_dir", str(args.output_dir)),
        *("--pairs_path", str(args.output_dir / LABELS / TRAINED), "--resume_from_checkpoint", "auto"),
        *("--validation_sets", *guards(args)),
    ]
    if on_gpu and "total_batch_size" not in given:
        arguments += ["--total_batch_size", str(GPU_BATCH)]
    config: TrainingConfig = parse_config([*arguments, *fixed])
    if frame_size is not None and "crop_size" not in given:
        crop_size = [fit_crop(*sides) for sides in zip(config.crop_size, frame_size, strict=True)]
        arguments += ["--crop_size", *map(str, crop_size)]
    steps, batch = config.max_train_steps, config.total_batch_size
    if "max_train_steps" not in given:
        steps = max(steps, min(STEPS_PER_PAIR * 2 * num_pairs // batch, MOST_STEPS))
        steps = round(steps / (1 - args.mix_synthetic))  # as many labelled pairs as without synthetic ones
        arguments += ["--max_train_steps", str(steps)]
    if args.mix_synthetic > 0:  # an epoch is about the run, so that all synthetic pairs are different
        synthetic = max(1, round(args.mix_synthetic * steps * batch))
        repeats = max(1, round((1 - args.mix_synthetic) * steps * batch / (2 * num_pairs)))
        arguments += ["--train_mix", f"{{pairs: {repeats}, synthetic: 1}}", "--synthetic_num_pairs", str(synthetic)]
    return [*arguments, *fixed]


def fit_crop(side: int, frame_side: int) -> int:
    """The side of a crop, reduced so that a frame need not be enlarged for it, pixels."""
    from flow_data.augmentation import DENSE_CROP_SLACK

    fitting = (frame_side - DENSE_CROP_SLACK) // CROP_MULTIPLE * CROP_MULTIPLE
    return min(side, max(fitting, SMALLEST_CROP))


def guards(args: argparse.Namespace) -> list[str]:
    """The labelled sets on which little may be lost."""
    return list(dict.fromkeys([*args.guard, ALWAYS_GUARD]))
