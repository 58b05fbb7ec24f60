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
from flow_data.optional_packages import MissingPackageError, require_packages
from flow_data.out_of_memory import explain_out_of_memory
from flow_data.shipped_files import PRETRAINED, find_model
from flow_training.adapt_flags import (
    HELD_OUT,
    LABEL_FLAGS,
    LABELS,
    PROG,
    TRAINED,
    guards,
    parse_args,
    trainer_arguments,
)
from flow_training.config import CHANGEABLE_ON_RESUME, parse_config, without_token
from flow_training.curriculum import TRAINER, Stage
from flow_training.hub import CARD, PUBLISHED_FILES
from flow_training.ops.launcher import SignalForwarder
from flow_training.run_log import FILE_NAME as LOG_NAME
from flow_training.run_log import read_log, to_json

# torch is imported once the arguments are known to be good, so that --help and mistakes take no time.
if TYPE_CHECKING:
    import torch

    from flow_inference.labels import LabelledPair, PseudoLabels
    from modeling_raft import RaftForOpticalFlow

NOT_ACCEPTED = 5  # exit code
RECORD, IMAGE, REJECTED = "adaptation.json", "before_after.png", "rejected"


def main(argv: Sequence[str] | None = None) -> int:
    """Label, check the teacher, train, judge; each phase is skipped where it is done."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args, flags = parse_args(argv, __doc__)
    require_packages(PROG)
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
