"""The stages of a curriculum: read from its YAML file, and how far each of them is."""

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from flow_training.checkpoints import list_checkpoints
from flow_training.config import FREE_ON_RESUME, TrainingConfig, nearest, parse_config, read_yaml, to_flag
from flow_training.hub import FINISHED_FILES, RUN_CONFIG
from flow_training.run_log import FILE_NAME as LOG_NAME

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

        A run puts its settings, model card and weights in place after the last step (`model_folder.write_run`).
        """
        if not all((self.output_dir / name).is_file() for name in FINISHED_FILES):
            return False
        return self.finished_settings().get("max_train_steps") == self.config.max_train_steps

    def finished_settings(self) -> dict[str, Any]:
        """The settings that a finished run has left in `output_dir`; nothing where there is none."""
        try:
            settings = yaml.safe_load((self.output_dir / RUN_CONFIG).read_text())
        except (FileNotFoundError, yaml.YAMLError):
            return {}
        return settings if isinstance(settings, dict) else {}

    def changed_settings(self) -> list[str]:
        """Where the finished run was trained with other settings than are given now."""
        finished = self.finished_settings()
        changes = [
            f"{name} was {finished[name]}, is {value} now"
            for name, value in self.config.to_dict().items()
            if name in finished and name not in FREE_ON_RESUME and value is not None and finished[name] != value
        ]
        return [*changes, f"it is not trained again; for that, remove {self.output_dir}"] if changes else []

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
    content = _check_keys(read_yaml(path), CURRICULUM_KEYS, str(path))
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
            print(f"flow_training.curriculum: these are the settings of {where}, {name}", file=sys.stderr)
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
