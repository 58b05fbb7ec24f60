"""Train in stages, each from the weights of the one before.

python -m flow_training.curriculum configs/curriculum/NAME.yaml [--dry_run] [--flag value ...]

The same command resumes after an interruption: stages that are done are skipped, one in progress is resumed.
"""

import argparse
import dataclasses
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from flow_data.optional_packages import require_packages
from flow_data.shipped_files import find_config
from flow_training.config import CHANGEABLE_ON_RESUME, TrainingConfig, parse_config, without_token
from flow_training.flags import check_keys, flag_name, read_yaml, to_flags
from flow_training.hub import FINISHED_FILES, RUN_CONFIG
from flow_training.ops.launcher import SignalForwarder
from flow_training.run_log import FILE_NAME as LOG_NAME

PROG = "flow_training.curriculum"
TRAINER = Path(__file__).resolve().parents[1] / "train_flow.py"  # in a checkout as in an installation
SHARED_FOLDER_DELAY = 60  # seconds until other machines see what one has written; NFS looks at least so often
SET_BY_CURRICULUM = {
    "resume_from_checkpoint": "a stage in progress is always resumed",
    "model_name_or_path": "a stage starts from the weights of the one before",
    "output_dir": "give output_root, or output_dir in the flags of each stage",
}


@dataclasses.dataclass(frozen=True)
class Stage:
    """A run of train_flow.py: its name, its arguments, and the settings that these are parsed to."""

    name: str
    arguments: list[str]
    config: TrainingConfig

    @property
    def output_dir(self) -> Path:
        return Path(self.config.output_dir)

    def finished_settings(self) -> dict[str, Any]:
        """The settings of the finished run in `output_dir`, which are written after the last step; {} without one."""
        try:
            settings = yaml.safe_load((self.output_dir / RUN_CONFIG).read_text())
        except (FileNotFoundError, yaml.YAMLError):
            return {}
        return settings if isinstance(settings, dict) else {}

    def is_done(self) -> bool:
        """Whether the last step was taken and everything is written that a finished run publishes."""
        complete = all((self.output_dir / name).is_file() for name in FINISHED_FILES)
        return complete and self.finished_settings().get("max_train_steps") == self.config.max_train_steps

    def changed_settings(self) -> list[str]:
        """The settings that have changed since the run was finished, a line for each."""
        finished = self.finished_settings()
        changes = [
            f"{name} was {finished[name]}, is {value} now"
            for name, value in self.config.to_dict().items()
            if name in finished and name not in CHANGEABLE_ON_RESUME and value is not None and finished[name] != value
        ]
        return [*changes, f"it is not trained again; for that, remove {self.output_dir}"] if changes else []

    def state(self) -> str:
        """`done`, `in progress` with the step to resume from, or `not started`."""
        from flow_training.checkpoints import list_checkpoints  # not above: --help must not wait for torch

        checkpoints = list_checkpoints(self.output_dir)
        if self.is_done():
            return "done"
        if checkpoints:
            return f"in progress, from step {checkpoints[-1].name.rpartition('-')[2]}"
        started = (self.output_dir / LOG_NAME).exists()
        return "in progress, without a checkpoint: from the start" if started else "not started"


@dataclasses.dataclass(frozen=True)
class Curriculum:
    """Stages in their order, and the options of `accelerate launch` for all of them."""

    stages: list[Stage]
    launch: list[str]

    def first_to_train(self) -> int:
        """Index of the first stage to train: the one after the last that is done. Earlier ones are not needed."""
        return max((i + 1 for i, stage in enumerate(self.stages) if stage.is_done()), default=0)

    def states(self) -> list[str]:
        """The state of each stage; `not needed` where a later one is done already."""
        first, states = self.first_to_train(), [stage.state() for stage in self.stages]
        return ["not needed" if i < first and state != "done" else state for i, state in enumerate(states)]


def read_curriculum(
    path: Path, flags: Sequence[str] = (), launch: str | None = None, output_root: str | None = None
) -> Curriculum:
    """Read the YAML file of a curriculum.

    Args:
        path: The file. Its keys: `stages`, a list of `{config, name, flags}` (the default of `name` is that of the
            config's file); `flags` of every stage, a mapping; `launch`, the options of `accelerate launch`; and
            `output_root`, in which every stage has a folder of its name, in place of its config's output_dir.
        flags: Of every stage, from the command line; they win over the file's.
        launch, output_root: Win over the file's.

    Raises:
        ValueError: Something in it is wrong; the message names file, key and value.
        SystemExit: train_flow.py would refuse the settings of a stage; its message has been printed.
    """
    content = check_keys(read_yaml(path), ("stages", "flags", "launch", "output_root"), str(path))
    entries = content.get("stages")
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: stages must be a list of at least one {{config: FILE}}; got {entries!r}")
    launch = _text(content, "launch", str(path)) if launch is None else launch
    output_root = _text(content, "output_root", str(path)) if output_root is None else output_root
    for name in {flag_name(word) for word in flags} & {"resume_from_checkpoint", "output_dir"}:
        raise ValueError(f"--{name} cannot be given for every stage: {SET_BY_CURRICULUM[name]}")
    common = _to_flags(content, ("resume_from_checkpoint", "output_dir"), str(path))

    stages: list[Stage] = []
    for index, entry in enumerate(entries, 1):
        where = f"{path}: stage {index}"
        config_path = _text(check_keys(entry, ("config", "name", "flags"), where), "config", where)
        if config_path is None:
            raise ValueError(f"{where} must have a config")
        name = _text(entry, "name", where) or Path(config_path).stem
        fixed = ("resume_from_checkpoint", *(["model_name_or_path"] if stages else []))
        arguments = ["--config", config_path, *common, *_to_flags(entry, fixed, where), *flags]
        arguments += [] if output_root is None else ["--output_dir", str(Path(output_root) / name)]
        arguments += ["--model_name_or_path", stages[-1].config.output_dir] if stages else []
        arguments += ["--resume_from_checkpoint", "auto"]
        try:
            stage = Stage(name, arguments, parse_config(arguments))
        except SystemExit:
            print(f"{PROG}: these are the settings of {where}, {name}", file=sys.stderr)
            raise
        for other in stages:
            if name == other.name:
                raise ValueError(f"{where}: there is a stage {name} already; give it another name")
            if stage.output_dir.resolve() == other.output_dir.resolve():
                raise ValueError(f"{where}: {stage.output_dir} is the output_dir of {other.name} already")
        stages.append(stage)
    try:
        return Curriculum(stages, shlex.split(launch or ""))
    except ValueError as error:
        raise ValueError(f"launch: {error}: {launch}") from error


def _text(mapping: dict[str, Any], key: str, where: str) -> str | None:
    value = mapping.get(key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where}: {key} must be text; got {value!r}")
    return value


def _to_flags(mapping: dict[str, Any], fixed: Sequence[str], where: str) -> list[str]:
    """The `flags` of a mapping as flags of train_flow.py; those that are `fixed` are refused."""
    settings = mapping.get("flags") or {}
    for key in (key for key in fixed if key in settings):
        raise ValueError(f"{where}: flags: {key} cannot be given here: {SET_BY_CURRICULUM[key]}")
    return to_flags(settings, TrainingConfig, f"{where}: flags")


def kept_checkpoints(config: TrainingConfig) -> list[int]:
    """Steps of the checkpoints that exist when a run ends, if nothing interrupts it."""
    steps = list(range(config.checkpointing_steps, config.max_train_steps + 1, config.checkpointing_steps))
    return steps if config.checkpoints_total_limit is None else steps[-config.checkpoints_total_limit :]


def checkpoint_bytes(config: TrainingConfig, weights: int, parameters: int) -> int:
    """Bytes of a checkpoint: the weights, their average with `ema_decay`, and two moments of AdamW."""
    return weights * (1 if config.ema_decay is None else 2) + 2 * parameters


def disk_needed(config: TrainingConfig, weights: int, parameters: int) -> int:
    """The most bytes that a run needs at any time; a new checkpoint is written before the oldest is removed.

    Args:
        config: The run's settings.
        weights: Bytes of all parameters and buffers.
        parameters: Bytes of the parameters alone.
    """
    kept = len(kept_checkpoints(config))
    written = config.max_train_steps // config.checkpointing_steps
    return weights + (kept + (written > kept)) * checkpoint_bytes(config, weights, parameters)


def describe_plan(curriculum: Curriculum) -> str:
    """The table that `--dry_run` prints: steps, pairs, checkpoints, disk and state of each stage.

    Raises:
        ValueError, OSError: The model of the first stage cannot be made, or its weights do not exist.
    """
    from flow_training.model import model_bytes  # not above: --help must not wait for torch

    stages = curriculum.stages
    weights, parameters = model_bytes(stages[0].config)
    disks = [disk_needed(stage.config, weights, parameters) for stage in stages]
    rows = [["stage", "steps", "batch", "pairs seen", "start weights", "checkpoints", "disk", "state"]]
    for stage, disk, state in zip(stages, disks, curriculum.states(), strict=True):
        config, kept = stage.config, len(kept_checkpoints(stage.config))
        steps, batch, every = config.max_train_steps, config.total_batch_size, config.checkpointing_steps
        limited = f", the last {kept} kept" if kept < steps // every else ""
        start = config.model_name_or_path or f"random ({config.model_size or 'large'})"
        checkpoints = f"{steps // every}: every {every:,}{limited}" if kept else "none"
        rows.append([stage.name, f"{steps:,}", f"{batch}", f"{steps * batch:,}", start, checkpoints, _mb(disk), state])
    steps = sum(stage.config.max_train_steps for stage in stages)
    pairs = sum(stage.config.max_train_steps * stage.config.total_batch_size for stage in stages)
    rows.append(["together", f"{steps:,}", "", f"{pairs:,}", "", "", _mb(sum(disks)), ""])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    alignments = "<>>><<><"
    lines = [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, alignments, widths, strict=True)).rstrip()
        for row in rows
    ]
    sizes = sorted({checkpoint_bytes(stage.config, weights, parameters) for stage in stages})  # two if some average
    folder = next(path for path in (stages[0].output_dir, *stages[0].output_dir.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    lines += [
        "",
        f"model: {parameters // 4:,} parameters; every checkpoint {' or '.join(map(_mb, sizes))}",
        f"each stage: {shlex.join(['accelerate', 'launch', *curriculum.launch, 'train_flow.py', '...'])}",
        f"free in {stages[0].output_dir}: {_mb(free)}",
    ]
    if free < sum(disks):
        lines.append("warning: this may not be enough; checkpoints_total_limit keeps fewer checkpoints")
    return "\n".join(lines)


def _mb(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def run_curriculum(curriculum: Curriculum, again: str) -> int:
    """Train all stages that are not done.

    Args:
        curriculum: The stages.
        again: The command that resumes after an interruption, for messages.

    Returns:
        The exit code: 0, or that of the stage that failed, was stopped, or was trained but not uploaded.
    """
    first, exit_code = curriculum.first_to_train(), 0
    for index, (stage, state) in enumerate(zip(curriculum.stages, curriculum.states(), strict=True), 1):
        if index <= first:
            hint = "" if state == "done" else f", as {curriculum.stages[first - 1].name} is done"
            _report(f"stage {index}, {stage.name}: {state}{hint}")
            for line in stage.changed_settings() if state == "done" else []:
                _report(f"  {line}")
    with SignalForwarder(TRAINER, PROG, again) as signals:
        for index, stage in list(enumerate(curriculum.stages, 1))[first:]:
            if signals.signal is not None:
                return 128 + signals.signal
            _report(f"stage {index} of {len(curriculum.stages)}, {stage.name}: {stage.state()}")
            launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", *curriculum.launch]
            code = signals.run([*launcher, str(TRAINER), *stage.arguments])
            if signals.signal is not None and not (code == 0 and stage is curriculum.stages[-1] and stage.is_done()):
                _report(f"stopped by {signals.signal.name} in stage {stage.name}; resume with:  {again}")
                return code or 128 + signals.signal
            if code != 0 and stage.is_done():  # an upload that failed is no reason to lose days
                _report(f"stage {stage.name} is trained, but ended with exit code {code}: see the messages above")
                exit_code = code
            elif code != 0:
                _report(f"stage {stage.name} failed with exit code {code}; when that is fixed, resume with:  {again}")
                return code
            elif not _wait_until_done(stage):
                _report(f"stage {stage.name} ended before its last step; resume with:  {again}")
                return 1
    _report(f"all stages are done; the weights are in {curriculum.stages[-1].output_dir}")
    return exit_code


def _wait_until_done(stage: Stage) -> bool:
    """Whether a run that ended without an error is done; another machine than the one that wrote it sees it later."""
    deadline = time.monotonic() + SHARED_FOLDER_DELAY
    while not stage.is_done():
        if time.monotonic() > deadline:
            return False
        time.sleep(1)
    return True


def _report(text: str) -> None:
    print(f"{PROG}: {text}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog=f"python -m {PROG}",
        usage="%(prog)s CURRICULUM.yaml [--dry_run] [--launch OPTIONS] [--output_root FOLDER] [--flag value ...]",
        description="Train stages one after another. All further flags are train_flow.py's, for every stage.",
        allow_abbrev=False,
    )
    parser.add_argument("curriculum", help="YAML file that lists the stages, or the name of a shipped one")
    parser.add_argument("--dry_run", action="store_true", help="print the plan and the state of each stage; no more")
    parser.add_argument("--launch", help="options of accelerate launch, in quotes; they take the place of the file's")
    parser.add_argument("--output_root", help="folder for a folder of each stage, in place of their output_dir")
    args, flags = parser.parse_known_args(argv)
    try:
        flags = [word for word in flags if word != "--"]
        curriculum = read_curriculum(
            find_config(args.curriculum, "configs/curriculum"), flags, args.launch, args.output_root
        )
        if args.dry_run:
            print(describe_plan(curriculum))
            return 0
    except (ValueError, OSError) as error:
        sys.exit(f"{PROG}: error: {error}")
    require_packages(PROG)
    return run_curriculum(curriculum, shlex.join(["python", "-m", PROG, *without_token(argv)]))


if __name__ == "__main__":
    sys.exit(main())
