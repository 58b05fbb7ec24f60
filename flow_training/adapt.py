"""Adapt weights to your own footage, for which there is no ground truth.

python -m flow_training.adapt clip.mp4 --model raft-small.pth --teacher raft-sintel.pth --output_dir outputs/clip

A teacher, a stronger model or else the model itself, labels pairs of frames (`flow_inference.pseudo_labels`).
train_flow.py trains the model on these with the settings of configs/adapt.yaml. Then the weights are judged: what can
be seen without ground truth must have improved. docs/adapting.md explains when this helps and what it cannot see.

INPUT comes before all flags. All further flags are train_flow.py's, for example --learning_rate 5e-5. The same command
resumes after an interruption. Exit codes: 0, the weights are accepted; 5, they are not, or the labels are not worth
training on; 128 + N, stopped by signal N.
"""

import argparse
import json
import math
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flow_data.atomic_write import atomic_write
from flow_data.optional_packages import MissingPackageError
from flow_data.out_of_memory import explain_out_of_memory
from flow_data.shipped_files import PRETRAINED, find_model
from flow_inference.pseudo_labels import DEVICE_HELP, add_label_flags
from flow_training.config import CHANGEABLE_ON_RESUME, TrainingConfig, parse_config, without_token
from flow_training.curriculum import TRAINER, Stage
from flow_training.flags import FlagParser, nearest
from flow_training.hub import CARD, PUBLISHED_FILES
from flow_training.ops.launcher import SignalForwarder
from flow_training.run_log import FILE_NAME as LOG_NAME
from flow_training.run_log import read_log, to_json

# torch is imported once the arguments are known to be good, so that --help and mistakes take no time.
if TYPE_CHECKING:
    import torch

    from flow_inference.labels import LabelledPair, PseudoLabels
    from modeling_raft import RaftForOpticalFlow

PROG = "flow_training.adapt"
NOT_ACCEPTED = 5  # exit code
LABELS, TRAINED, HELD_OUT = "labels", "train.csv", "held_out.csv"  # folder, and tables in it
RECORD, IMAGE, REJECTED = "adaptation.json", "before_after.png", "rejected"
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


def parse_args(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Split the command line into the arguments of this program and flags of train_flow.py."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {PROG}",
        usage="%(prog)s INPUT [INPUT ...] --model STUDENT [--teacher MODEL] --output_dir DIR [--flag value ...]",
        description=__doc__,
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
        if is_flag(word):
            target = own if word.partition("=")[0] in known else flags
        target.append(word)
    args = parser.parse_args(own)
    names = [*known, *FlagParser(TrainingConfig, PROG)._option_string_actions]
    for flag in (word.partition("=")[0] for word in flags if is_flag(word)):
        if flag not in names:
            parser.error(f"unknown flag {flag}{nearest(flag, names)}")
    if not 0 <= args.mix_synthetic <= 0.9:
        parser.error(f"--mix_synthetic must be between 0 and 0.9; got {args.mix_synthetic:g}")
    if not args.max_guard_loss >= 0:
        parser.error(f"--max_guard_loss must be at least 0; got {args.max_guard_loss:g}")
    for name in flag_names(flags) & SET_BY_ADAPT.keys():
        parser.error(f"--{name} cannot be given: {SET_BY_ADAPT[name]}")
    return args, flags


def is_flag(word: str) -> bool:
    """Whether a word of the command line is a flag, and not a text in quotes that begins with one."""
    return word.startswith("--") and " " not in word.partition("=")[0]


def flag_names(flags: Sequence[str]) -> set[str]:
    """The names of flags, without their values."""
    return {word.partition("=")[0].removeprefix("--").replace("-", "_") for word in flags if is_flag(word)}


def main(argv: Sequence[str] | None = None) -> int:
    """Label, check the teacher, train, judge; each phase is skipped where it is done."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args, flags = parse_args(argv)
    config = parse_config(trainer_arguments(args, flags))  # mistakes in flags are found now, not after the labels
    if any(name.partition(":")[0] == "pairs" for name in args.guard) and config.validation_pairs_path is None:
        sys.exit(f"{PROG}: error: --guard pairs needs --validation_pairs_path, a table of pairs with ground truth")
    again = shlex.join(["python", "-m", PROG, *without_token(argv)])
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's notice ends it as Ctrl-C does
    try:
        return adapt(args, flags, again)
    except Exception as error:
        message = explain_out_of_memory(error, "the adaptation", "Reduce the frames, or give another --device.")
        if message is None and not isinstance(error, (ValueError, OSError, MissingPackageError)):
            raise
        sys.exit(f"{PROG}: error: {message or error}")
    except KeyboardInterrupt:
        print(f"{PROG}: stopped; resume with:  {again}", file=sys.stderr)
        return 128 + signal.SIGINT


def adapt(args: argparse.Namespace, flags: list[str], again: str) -> int:
    """Run the phases that are not done yet.

    Args:
        args: Of this program.
        flags: Of train_flow.py.
        again: How to resume, for messages.

    Returns:
        The exit code.

    Raises:
        ValueError, OSError: Something is wrong with settings or files.
    """
    from flow_inference.devices import choose_device
    from flow_training.judge import split_pairs
    from flow_training.ops.lock import RunLock

    device = choose_device(args.device)
    record = open_record(args, flags)
    lock = RunLock(args.output_dir / LABELS)  # not of output_dir, which train_flow.py locks
    try:
        labels = label(args, flags, device, record)
        if labels is None:
            return refuse(args.output_dir, record, "no labels", record["labels"]["reasons"])
        trained, held_out = split_pairs(labels.pairs)
        write_tables(labels.folder, trained, held_out)
        report(f"labels: {labels.description}; {len(held_out)} pairs are held out, {len(trained)} are trained on")
        check_labels(args, flags, device, record, labels)
        if reasons := record["teacher_check"]["reasons"]:
            if not args.force:
                return refuse(args.output_dir, record, "nothing was trained; --force trains all the same", reasons)
            for reason in reasons:
                report(f"warning: {reason}")
        if "accepted" not in record:
            code = train(args, flags, device, trained, again)
            if code != 0:
                return code
            judge(args, flags, device, record, trained, held_out)
        return finish(args.output_dir, record)
    finally:
        lock.close()


# ---- the record of what is done ----


def open_record(args: argparse.Namespace, flags: list[str]) -> dict[str, Any]:
    """Read the record of an adaptation in progress, or begin one.

    Raises:
        ValueError: The folder holds something else.
    """
    folder, path = args.output_dir, args.output_dir / RECORD
    names = ("inputs", "model", "teacher", *LABEL_FLAGS, "mix_synthetic", "guard", "max_guard_loss")
    settings = {name: vars(args)[name] for name in names} | {"model": args.model or PRETRAINED}
    config = parse_config(trainer_arguments(args, flags)).to_dict()
    settings |= {name: value for name, value in config.items() if name not in CHANGEABLE_ON_RESUME}
    settings = json.loads(json.dumps(settings))
    if not path.exists():
        found = [each.name for each in (folder / LOG_NAME, folder / "model.safetensors") if each.exists()]
        if found:
            raise ValueError(f"{folder} holds another run ({found[0]}): choose another output_dir, or remove it")
        return {"settings": settings}
    record: dict[str, Any] = json.loads(path.read_text())
    begun = record["settings"]
    changes = [f"{name} was {begun.get(name)}, is {settings[name]} now" for name in settings
               if begun.get(name) != settings[name]]  # fmt: skip
    only_labels = not (folder / LOG_NAME).exists() and "accepted" not in record
    if only_labels and all(begun.get(name) == settings[name] for name in ("inputs", "model", "teacher", *LABEL_FLAGS)):
        return {"settings": settings}  # nothing is trained yet, and the labels are the same
    if changes:
        raise ValueError(
            f"{folder} holds an adaptation with other settings: {'; '.join(changes)}. Choose another output_dir, or "
            "remove it"
        )
    return record


def save_record(output_dir: Path, record: dict[str, Any]) -> None:
    """Write the record, completely or not at all."""
    with atomic_write(output_dir / RECORD) as partial:
        partial.write_text(to_json(record, indent=2) + "\n")


# ---- phases ----


def label(
    args: argparse.Namespace, flags: list[str], device: "torch.device", record: dict[str, Any]
) -> "PseudoLabels | None":
    """Write the labels, or read them where they are complete; None where there are none to learn from.

    The record is begun when inputs and models have been found, so that a slip of the keyboard leaves none.
    """
    from flow_inference.footage import open_clips
    from flow_inference.labels import TABLE, NoLabelsError, make_labels, read_labels
    from flow_training.data import validation_sets

    folder = args.output_dir / LABELS
    try:
        clips = open_clips(args.inputs)
    except FileNotFoundError:
        if (folder / TABLE).exists():
            return read_labels(folder)  # they hold the frames that they need
        raise
    validation_sets(
        parse_config(trainer_arguments(args, flags))
    )  # a guard that is not there is found before the labels
    student = load(args.model, device)
    teacher = student if args.teacher is None else load(args.teacher, device)
    save_record(args.output_dir, record)
    try:
        return make_labels(
            teacher,
            args.teacher or args.model or PRETRAINED,
            clips,
            folder,
            **{LABEL_FLAGS[name]: vars(args)[name] for name in LABEL_FLAGS},
        )
    except NoLabelsError as error:
        record["labels"] = {"reasons": [str(error)]}
        return None


def write_tables(folder: Path, trained: "Sequence[LabelledPair]", held_out: "Sequence[LabelledPair]") -> None:
    """Write the tables of pairs to train on and of pairs that are held out."""
    from flow_inference.labels import format_table, table_rows

    for name, pairs in ((TRAINED, trained), (HELD_OUT, held_out)):
        with atomic_write(folder / name) as partial:
            partial.write_text(format_table([row for pair in pairs for row in table_rows(pair)]))


def check_labels(
    args: argparse.Namespace,
    flags: list[str],
    device: "torch.device",
    record: dict[str, Any],
    labels: "PseudoLabels",
) -> None:
    """Check the teacher, and evaluate the student on what guards it, before training; both are recorded."""
    from flow_training.data import validation_sets
    from flow_training.evaluation import evaluate_sets
    from flow_training.judge import check_teacher
    from flow_training.processes import make_accelerator

    if "teacher_check" in record:
        return
    config = parse_config(trainer_arguments(args, flags))
    student = load(args.model, device)
    check = check_teacher(student, labels.pairs, config.num_flow_updates, labels_are_own(args))
    accelerator, _ = make_accelerator(config)
    reports = evaluate_sets(student.to(accelerator.device), validation_sets(config), accelerator)  # type: ignore
    record["guard_before"] = {name: report["metrics"]["epe"] for name, report in reports.items()}
    record["teacher_check"] = check
    save_record(args.output_dir, record)
    if not labels_are_own(args):
        report(f"teacher: census error {check['teacher']:.4f}, student {check['student']:.4f}")


def train(
    args: argparse.Namespace, flags: list[str], device: "torch.device", trained: "Sequence[LabelledPair]", again: str
) -> int:
    """Run train_flow.py in a process of its own, or resume it; returns its exit code."""
    import torch

    wait_for_training(args.output_dir)
    arguments = trainer_arguments(args, flags, len(trained), smallest_frame(trained), on_gpu=device.type == "cuda")
    stage = Stage("adapt", arguments, parse_config(arguments))
    if stage.is_done():
        return 0
    launch = shlex.split(args.launch) if args.launch is not None else [
        *("--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
        *("--num_cpu_threads_per_process", str(torch.get_num_threads())),
        *(["--cpu"] if device.type == "cpu" else []),
    ]  # fmt: skip
    with SignalForwarder(TRAINER, PROG, again) as signals:
        code = signals.run(
            [sys.executable, "-m", "accelerate.commands.launch", "--quiet", *launch, str(TRAINER), *arguments]
        )
    if signals.signal is not None and not stage.is_done():
        return 128 + signals.signal
    if code == 0 and not stage.is_done():
        code = 1
    if code != 0:
        report(f"the training ended with exit code {code}; resume with:  {again}")
    return code


def wait_for_training(output_dir: Path) -> None:
    """Wait for the end of a training process that an earlier call has started, and that has outlived it.

    Such a process loses nothing: it ends as it would have, and its weights are those of an uninterrupted call.
    """
    from flow_training.ops.lock import RunLock

    reported = False
    while True:
        try:
            return RunLock(output_dir).close()
        except ValueError as error:
            if not reported:
                report(f"waiting: {error}")
            reported = True
            time.sleep(1)


def smallest_frame(pairs: "Sequence[LabelledPair]") -> tuple[int, int]:
    """The smallest height and the smallest width of frames, pixels."""
    from PIL import Image

    widths, heights = zip(*(Image.open(pair.frames[0]).size for pair in pairs), strict=True)
    return min(heights), min(widths)


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
    given = flag_names(flags)
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


def labels_are_own(args: argparse.Namespace) -> bool:
    """Whether the model that is adapted is its own teacher."""
    return args.teacher is None or find_model(args.teacher) == find_model(args.model)


def judge(
    args: argparse.Namespace,
    flags: list[str],
    device: "torch.device",
    record: dict[str, Any],
    trained: "Sequence[LabelledPair]",
    held_out: "Sequence[LabelledPair]",
) -> None:
    """Compare the weights before and after training, and record whether they are accepted."""
    from PIL import Image

    from flow_training.judge import MAX_SYNTHETIC_LOSS, check_guard, check_student, draw_before_after

    updates = parse_config(trainer_arguments(args, flags)).num_flow_updates
    before, after = load(args.model, device), load(str(args.output_dir), device)
    judged = held_out or trained
    check = check_student(before, after, judged, updates, labels_are_own(args))
    validated: dict[str, Any] = {}
    for line in read_log(args.output_dir / LOG_NAME):  # the trainer has validated the final weights
        validated |= line
    errors = {name: validated[f"validation/{name}/epe"] for name in guards(args)}
    record["guard_after"] = {name: math.nan if error is None else error for name, error in errors.items()}
    limits = {name: args.max_guard_loss if name in args.guard else MAX_SYNTHETIC_LOSS for name in guards(args)}
    check["reasons"] += check_guard(record["guard_before"], record["guard_after"], limits)
    with atomic_write(args.output_dir / IMAGE) as partial:
        Image.fromarray(draw_before_after(before, after, judged, updates)).save(partial)
    record |= {
        "judge": check | {"held_out": len(held_out), "trained": len(trained)},
        "accepted": not check["reasons"],
    }
    add_to_card(args.output_dir / CARD, describe_judge(record))
    save_record(args.output_dir, record)


def finish(output_dir: Path, record: dict[str, Any]) -> int:
    """Report the result; weights that are not accepted are moved into a folder of their own."""
    for line in describe_judge(record):
        report(line)
    if record["accepted"]:
        report(f"accepted: the weights are in {output_dir}, {IMAGE} shows flow before and after")
        return 0
    rejected = output_dir / REJECTED
    rejected.mkdir(exist_ok=True)
    names = [path.name for pattern in PUBLISHED_FILES for path in output_dir.glob(pattern)]
    for name in sorted(set(names), key=lambda name: not name.endswith(".safetensors")):  # no weights without a card
        os.replace(output_dir / name, rejected / name)
    card = rejected / CARD
    card.write_text(card.read_text().replace(f'"{output_dir}"', f'"{rejected}"'))
    return refuse(output_dir, record, f"the weights are in {rejected}", record["judge"]["reasons"])


def refuse(output_dir: Path, record: dict[str, Any], outcome: str, reasons: Sequence[str]) -> int:
    """Report why the adaptation is not accepted; returns the exit code."""
    save_record(output_dir, record)
    for reason in reasons:
        print(f"{PROG}: not accepted: {reason}", file=sys.stderr)
    print(f"{PROG}: not accepted: {outcome}", file=sys.stderr)
    return NOT_ACCEPTED


# ---- messages ----


def describe_judge(record: dict[str, Any]) -> list[str]:
    """What was measured, in sentences."""
    check = record["judge"]
    where = (
        f"on {check['held_out']} pairs of frames that were held out"
        if check["held_out"]
        else "on the pairs that were trained on: there are too few to hold any out, so what this shows is damage and "
        "not whether other frames of the footage gain"
    )
    lines = [
        f"distance to the labels: {change(check['distance'])} px, {where}",
        f"pixels whose forward and backward flow disagree: {change(check['failing'], 100)} %",
        f"census error: {change(check['census'])}, of the labels {number(record['teacher_check']['teacher'])}",
    ]
    if reasons := record["teacher_check"]["reasons"]:
        lines.append(f"the labels were refused before training, and --force trained on them: {'; '.join(reasons)}")
    for name, error in record["guard_before"].items():
        lines.append(f"end-point error on {name}: {change([error, record['guard_after'][name]])} px")
    return lines


def change(values: Sequence[float | None], factor: float = 1.0) -> str:
    """A value before and after training as text."""
    return " -> ".join(number(value, factor) for value in values)


def number(value: float | None, factor: float = 1.0) -> str:
    """A number of the record as text; "-" where it was not finite, which JSON cannot hold."""
    return "-" if value is None or not math.isfinite(value) else f"{factor * value:.3f}"


def add_to_card(path: Path, lines: Sequence[str]) -> None:
    """Add what was measured to a model card, in place of what an earlier call has added."""
    text = re.sub(r"## Adaptation\n.*?(?=^## Limits)", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    section = (
        "## Adaptation\n\nThese weights were adapted without ground truth. Of the footage no error is known, only:\n\n"
        + "".join(f"- {line}\n" for line in lines)
        + "\n"
    )
    with atomic_write(path) as partial:
        partial.write_text(text.replace("## Limits\n", f"{section}## Limits\n", 1))


def load(name: str | None, device: "torch.device") -> "RaftForOpticalFlow":
    """Load weights in eval mode."""
    from modeling_raft.convert_raft_checkpoint import load_raft

    return load_raft(find_model(name)).eval().to(device)  # type: ignore[arg-type]  # transformers hides torch's


def report(text: str) -> None:
    print(f"{PROG}: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
