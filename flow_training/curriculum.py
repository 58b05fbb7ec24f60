"""Stages of training one after another, each from the weights of the one before.

python -m flow_training.curriculum configs/curriculum/NAME.yaml [--dry_run] [--flag value ...]

The same command goes on where it was stopped: what is done is skipped, what is in progress is resumed.
"""

import argparse
import dataclasses
import os
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, get_type_hints

import psutil
import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers.utils import SAFE_WEIGHTS_NAME

from flow_training.checkpoints import list_checkpoints
from flow_training.config import FREE_ON_RESUME, TrainingConfig, nearest, parse_config, to_flag
from flow_training.hub import RUN_CONFIG
from flow_training.run_log import FILE_NAME as LOG_NAME
from modeling_raft import RaftConfig, RaftForOpticalFlow
from modeling_raft.convert_raft_checkpoint import load_raft

PROG = "flow_training.curriculum"
TRAINER = Path(__file__).resolve().parents[1] / "train_flow.py"  # in a checkout as in an installation
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SHARED_FOLDER_DELAY = 60  # seconds until other machines see what one has written; NFS looks at least so often

CURRICULUM_KEYS = ("stages", "flags", "launch", "output_root")
STAGE_KEYS = ("config", "name", "flags")
SET_BY_CURRICULUM = {
    "resume_from_checkpoint": "a stage in progress is always resumed",
    "model_name_or_path": "a stage starts from the weights of the one before",
    "output_dir": "give output_root, or output_dir in the flags of each stage",
}


@dataclasses.dataclass(frozen=True)
class Stage:
    """A run of train_flow.py."""

    name: str
    arguments: list[str]  # of train_flow.py
    config: TrainingConfig  # what it makes of them

    @property
    def output_dir(self) -> Path:
        return Path(self.config.output_dir)

    def is_done(self) -> bool:
        """Whether its last step was taken and its weights are whole.

        A run puts its settings, its model card and its weights in place after the last step (`hub.write_run`).
        """
        if not all((self.output_dir / name).is_file() for name in (SAFE_WEIGHTS_NAME, RUN_CONFIG, "README.md")):
            return False
        return self.finished_settings().get("max_train_steps") == self.config.max_train_steps

    def finished_settings(self) -> dict[str, Any]:
        """The settings that a finished run has left in `output_dir`; nothing where there is none."""
        try:
            settings = yaml.safe_load((self.output_dir / RUN_CONFIG).read_text())
        except (FileNotFoundError, yaml.YAMLError):
            return {}
        return settings if isinstance(settings, dict) else {}

    def state(self) -> str:
        """`done`, `in progress` with the step that it goes on from, or `not started`."""
        if self.is_done():
            return "done"
        checkpoints = list_checkpoints(self.output_dir)
        if checkpoints:
            return f"in progress, from step {checkpoints[-1].name.rpartition('-')[2]}"
        if (self.output_dir / LOG_NAME).exists():
            return "in progress, without a checkpoint: from the start"
        return "not started"


@dataclasses.dataclass(frozen=True)
class Curriculum:
    """Stages in their order, and what `accelerate launch` is told for each of them."""

    stages: list[Stage]
    launch: list[str]

    def first_to_train(self) -> int:
        """Index of the stage to begin with: the one after the last that is done. Earlier ones are not needed."""
        return max((i + 1 for i, stage in enumerate(self.stages) if stage.is_done()), default=0)

    def states(self) -> list[str]:
        """State of each stage, also `not needed`: a later one is done already."""
        first = self.first_to_train()
        states = [stage.state() for stage in self.stages]
        return ["not needed" if i < first and state != "done" else state for i, state in enumerate(states)]


def read_curriculum(
    path: Path, flags: Sequence[str] = (), launch: str | None = None, output_root: str | None = None
) -> Curriculum:
    """The curriculum of a YAML file.

    Args:
        path: The file. Its keys: `stages`, a list of `{config, name, flags}` (the name is by default that of the
            config's file); `flags` of every stage, a mapping; `launch`, the options of `accelerate launch`; and
            `output_root`, under which every stage has a folder of its name, in place of its config's output_dir.
        flags: Of every stage, from the command line; they win over the file's.
        launch: Wins over the file's.
        output_root: Likewise.

    Raises:
        ValueError: Something in it is wrong; the message names file, key and value.
        SystemExit: train_flow.py would refuse the settings of a stage; its message has been printed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    content = _check_keys(content, CURRICULUM_KEYS, str(path))
    entries = content.get("stages")
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: stages must be a list of at least one {{config: FILE}}; got {entries!r}")
    launch = _check_text(content, "launch", str(path)) if launch is None else launch
    output_root = _check_text(content, "output_root", str(path)) if output_root is None else output_root
    given = {word.partition("=")[0].removeprefix("--") for word in flags}
    for name in ("resume_from_checkpoint", "output_dir"):  # but model_name_or_path is what the first stage starts from
        if name in given:
            raise ValueError(f"--{name} cannot be given for every stage: {SET_BY_CURRICULUM[name]}")
    common = _to_flags(content.get("flags"), {"resume_from_checkpoint", "output_dir"}, f"{path}: flags")

    stages: list[Stage] = []
    for number, entry in enumerate(entries, 1):
        where = f"{path}: stage {number}"
        entry = _check_keys(entry, STAGE_KEYS, where)
        config_path = _check_text(entry, "config", where)
        if config_path is None:
            raise ValueError(f"{where} needs a config")
        name = _check_text(entry, "name", where) or Path(config_path).stem
        fixed = {"resume_from_checkpoint"} | ({"model_name_or_path"} if stages else set())
        arguments = ["--config", config_path, *common, *_to_flags(entry.get("flags"), fixed, f"{where}: flags")]
        arguments += flags
        if output_root is not None:
            arguments += ["--output_dir", str(Path(output_root) / name)]
        if stages:
            arguments += ["--model_name_or_path", stages[-1].config.output_dir]
        arguments += ["--resume_from_checkpoint", "auto"]
        try:
            config = parse_config(arguments)
        except SystemExit:
            print(f"{PROG}: these are the settings of {where}, {name}", file=sys.stderr)
            raise
        for other in stages:
            if name == other.name:
                raise ValueError(f"{where}: there is a stage {name} already; give it another name")
            if Path(config.output_dir).resolve() == other.output_dir.resolve():
                raise ValueError(f"{where}: {config.output_dir} is the output_dir of {other.name} already")
        stages.append(Stage(name, arguments, config))
    try:
        return Curriculum(stages, shlex.split(launch or ""))
    except ValueError as error:
        raise ValueError(f"launch: {error}: {launch}") from error


def _check_keys(mapping: Any, known: Sequence[str], where: str) -> dict[str, Any]:
    if not isinstance(mapping, dict):
        raise ValueError(f"{where} must hold `key: value` lines; got {mapping!r}")
    for key in mapping:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key}{nearest(str(key), known)} (known: {', '.join(known)})")
    return mapping


def _check_text(mapping: dict[str, Any], key: str, where: str) -> str | None:
    value = mapping.get(key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where}: {key} must be text; got {value!r}")
    return value


def _to_flags(settings: Any, fixed: set[str], where: str) -> list[str]:
    """A mapping of settings as flags of train_flow.py; those of `fixed` are refused."""
    type_hints = get_type_hints(TrainingConfig)
    flags: list[str] = []
    for key, value in _check_keys(settings or {}, list(type_hints), where).items():
        if key in fixed:
            raise ValueError(f"{where}: {key} cannot be given here: {SET_BY_CURRICULUM[key]}")
        try:
            flags += [] if value is None else to_flag(key, value, type_hints[key])
        except ValueError as error:
            raise ValueError(f"{where}: {key}: {error}") from error
    return flags


# The plan


def kept_checkpoints(config: TrainingConfig) -> list[int]:
    """Steps of the checkpoints that are there when a run ends, if nothing interrupts it."""
    steps = list(range(config.checkpointing_steps, config.max_train_steps + 1, config.checkpointing_steps))
    return steps if config.checkpoints_total_limit is None else steps[-config.checkpoints_total_limit :]


def disk_needed(config: TrainingConfig, weights: int, parameters: int) -> int:
    """Bytes that a run needs at most at one time.

    A checkpoint is the weights and two moments of AdamW. The oldest is removed only when a new one is written.

    Args:
        config: The run.
        weights: Bytes of all parameters and buffers.
        parameters: Bytes of the parameters alone.
    """
    kept = len(kept_checkpoints(config))
    written = config.max_train_steps // config.checkpointing_steps
    return weights + (kept + (written > kept)) * (weights + 2 * parameters)


def model_bytes(config: TrainingConfig) -> tuple[int, int]:
    """(bytes of the weights, bytes of the parameters alone) of the model that a run starts with, in float32.

    Raises:
        ValueError: The model cannot be made.
        OSError: Its weights are not there.
    """
    if config.model_name_or_path is not None:
        model = load_raft(config.model_name_or_path)
    else:
        make_config = RaftConfig.small if config.model_size == "small" else RaftConfig
        try:
            with torch.device("meta"):  # shapes without numbers
                model = RaftForOpticalFlow(make_config(**config.config_overrides))
        except StrictDataclassError as error:
            raise ValueError(f"config_overrides: {error}") from error
    parameters = sum(tensor.nbytes for tensor in model.parameters())
    return sum(tensor.nbytes for tensor in model.state_dict().values()), parameters


def describe_plan(curriculum: Curriculum) -> str:
    """The table that `--dry_run` prints.

    Raises:
        ValueError, OSError: As `model_bytes`, of the first stage.
    """
    stages = curriculum.stages
    weights, parameters = model_bytes(stages[0].config)
    rows = [["stage", "steps", "batch", "pairs seen", "start weights", "checkpoints", "disk", "state"]]
    disks = [disk_needed(stage.config, weights, parameters) for stage in stages]
    for stage, disk, state in zip(stages, disks, curriculum.states(), strict=True):
        config = stage.config
        rows.append(
            [
                stage.name,
                f"{config.max_train_steps:,}",
                f"{config.total_batch_size}",
                f"{config.max_train_steps * config.total_batch_size:,}",
                config.model_name_or_path or f"random ({config.model_size})",
                _describe_checkpoints(config),
                _megabytes(disk),
                state,
            ]
        )
    steps = sum(stage.config.max_train_steps for stage in stages)
    pairs = sum(stage.config.max_train_steps * stage.config.total_batch_size for stage in stages)
    rows.append(["together", f"{steps:,}", "", f"{pairs:,}", "", "", _megabytes(sum(disks)), ""])
    free = _free_space(stages[0].output_dir)
    launch = shlex.join(["accelerate", "launch", *curriculum.launch, TRAINER.name, "..."])
    lines = [
        _align(rows, right={1, 2, 3, 6}),
        "",
        f"model: {parameters // 4:,} parameters; every checkpoint {_megabytes(weights + 2 * parameters)}",
        f"each stage: {launch}",
        f"free in {stages[0].output_dir}: {_megabytes(free)}",
    ]
    if free < sum(disks):
        lines.append("warning: this may not be enough; checkpoints_total_limit keeps fewer checkpoints")
    return "\n".join(lines)


def _describe_checkpoints(config: TrainingConfig) -> str:
    kept = kept_checkpoints(config)
    if not kept:
        return "none"
    written = config.max_train_steps // config.checkpointing_steps
    last = f", the last {len(kept)} kept" if len(kept) < written else ""
    return f"{written}: every {config.checkpointing_steps:,}{last}"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def _free_space(path: Path) -> int:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _align(rows: list[list[str]], right: set[int]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


# Training


class PassedOnSignals:
    """Runs commands; while it is entered, a signal to stop goes to the training processes of the one that runs.

    The command has a session of its own, else Ctrl-C would also end the launcher, and the workers that the trainer
    needs to finish its step.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._launcher: subprocess.Popen | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "PassedOnSignals":
        ignored = [number for number in STOP_SIGNALS if signal.getsignal(number) is signal.SIG_IGN]  # nohup
        self._previous = {
            number: signal.signal(number, self._receive) for number in STOP_SIGNALS if number not in ignored
        }
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def run(self, command: list[str]) -> int:
        """Run a command; returns its exit code (128 + N after signal N), once all its processes have ended."""
        # Whoever of them lives has the reading end for its standard input, so the writing end shows when none is left.
        reader, writer = os.pipe()
        try:
            self._launcher = subprocess.Popen(command, stdin=reader, start_new_session=True)
            os.close(reader)
            if self.signal is not None:  # it came while the launcher was being started
                self._pass_on()
            code = self._launcher.wait()
            readers = select.poll()
            readers.register(writer, 0)  # errors, that is the end of all readers, are always reported
            readers.poll()
        finally:
            self._launcher = None
            os.close(writer)
        return code if code >= 0 else 128 - code

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        print(f"\n{PROG}: {self.signal.name}: no further stage; the one that runs is told to stop", file=sys.stderr)
        self._pass_on()

    def _pass_on(self) -> None:
        """SIGTERM to the training processes, not to their launcher: it would die of it, or kill them too soon."""
        if self._launcher is None:
            return
        try:
            children = psutil.Process(self._launcher.pid).children()
            trainers = [child for child in children if str(TRAINER) in child.cmdline()]
            for process in trainers or [self._launcher]:
                process.terminate()
        except (psutil.NoSuchProcess, ProcessLookupError):
            pass  # it has just ended


def run_curriculum(curriculum: Curriculum, again: str) -> int:
    """Train all stages that are not done.

    Args:
        curriculum: What to do.
        again: The command that goes on after a stop, for messages.

    Returns:
        The exit code: 0, or that of the stage that failed or was stopped, or was trained but not uploaded.
    """
    first = curriculum.first_to_train()
    for number, (stage, state) in enumerate(zip(curriculum.stages, curriculum.states(), strict=True), 1):
        if number <= first:
            hint = "" if state == "done" else f", as {curriculum.stages[first - 1].name} is done"
            _say(f"stage {number}, {stage.name}: {state}{hint}")
            for line in _changed_settings(stage) if state == "done" else []:
                _say(f"  {line}")
    exit_code = 0
    with PassedOnSignals() as signals:
        for number, stage in list(enumerate(curriculum.stages, 1))[first:]:
            if signals.signal is not None:
                return 128 + signals.signal
            _say(f"stage {number} of {len(curriculum.stages)}, {stage.name}: {stage.state()}")
            launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", *curriculum.launch]
            code = signals.run([*launcher, str(TRAINER), *stage.arguments])
            if signals.signal is not None and not (code == 0 and stage is curriculum.stages[-1] and stage.is_done()):
                _say(f"stopped by {signals.signal.name} in stage {stage.name}; go on with:  {again}")
                return code or 128 + signals.signal
            if code != 0 and stage.is_done():  # an upload that failed is no reason to lose days
                _say(f"stage {stage.name} is trained, but ended with exit code {code}: see what it says above")
                exit_code = code
            elif code != 0:
                _say(f"stage {stage.name} failed with exit code {code}; when that is mended, go on with:  {again}")
                return code
            elif not _wait_until_done(stage):
                _say(f"stage {stage.name} ended before its last step; go on with:  {again}")
                return 1
    _say(f"all stages are done; the weights are in {curriculum.stages[-1].output_dir}")
    return exit_code


def _wait_until_done(stage: Stage) -> bool:
    """Whether a run that has ended without error is done; on a machine that did not write it this may show late."""
    deadline = time.monotonic() + SHARED_FOLDER_DELAY
    while not stage.is_done():
        if time.monotonic() > deadline:
            return False
        time.sleep(1)
    return True


def _changed_settings(stage: Stage) -> list[str]:
    """Where a stage that is done was trained with other settings than are given now."""
    finished, now = stage.finished_settings(), stage.config.to_dict()
    changes = [
        f"{name} was {finished[name]}, is {value} now"
        for name, value in now.items()
        if name in finished and name not in FREE_ON_RESUME and value is not None and finished[name] != value
    ]
    return [*changes, f"it is not trained again; for that, remove {stage.output_dir}"] if changes else []


def _say(text: str) -> None:
    print(f"{PROG}: {text}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog=f"python -m {PROG}",
        usage="%(prog)s CURRICULUM.yaml [--dry_run] [--launch OPTIONS] [--output_root FOLDER] [--flag value ...]",
        description="Train stages one after another. All further flags are train_flow.py's, for every stage.",
        allow_abbrev=False,
    )
    parser.add_argument("curriculum", type=Path, help="YAML file that lists the stages")
    parser.add_argument("--dry_run", action="store_true", help="print the plan and the state of each stage; no more")
    parser.add_argument("--launch", help="options of accelerate launch, in quotes; they take the place of the file's")
    parser.add_argument("--output_root", help="folder for a folder of each stage, in place of their output_dir")
    arguments, flags = parser.parse_known_args(words)
    try:
        curriculum = read_curriculum(
            arguments.curriculum,
            [word for word in flags if word != "--"],
            arguments.launch,
            arguments.output_root,
        )
        if arguments.dry_run:
            print(describe_plan(curriculum))
            return 0
    except (ValueError, OSError) as error:
        sys.exit(f"{PROG}: error: {error}")
    return run_curriculum(curriculum, shlex.join(["python", "-m", PROG, *_without_token(words)]))


def _without_token(words: list[str]) -> list[str]:
    """A command line that can be shown."""
    hidden = ["TOKEN" if before == "--hub_token" else word for before, word in zip(["", *words], words, strict=False)]
    return ["--hub_token=TOKEN" if word.startswith("--hub_token=") else word for word in hidden]


if __name__ == "__main__":
    sys.exit(main())
