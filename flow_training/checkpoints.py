"""Checkpoints, and how a run is resumed from one: bit by bit as if it had not been interrupted.

A checkpoint is written completely or not at all, and the oldest is removed last. All rules of resuming are here: which
checkpoint it is, which settings must not have changed since, what of the state is restored, which command resumes.
"""

import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR
from transformers.utils import SAFE_WEIGHTS_NAME

from flow_data.out_of_memory import is_out_of_memory
from flow_training.config import CHANGEABLE_ON_RESUME, FIELDS, TrainingConfig, without_token
from flow_training.flags import find_flag, read_yaml
from flow_training.metrics import ERROR_SUMS
from flow_training.ops.launcher import RESUME_VARIABLE
from flow_training.optimization import ExponentialMovingAverage, override_hyperparameters
from flow_training.run_log import FILE_NAME, read_log
from modeling_raft import RaftForOpticalFlow

logger = get_logger(__name__)  # only the main process logs
NAME = re.compile(r"checkpoint-(\d+)")
SETTINGS = "settings.yaml"
UNFINISHED, REMOVED = "unfinished-", "removed-"
STEP_TOTALS = ("steps", "loss", "grad_norm", "skipped_steps")  # what every objective has in a log line


class ResumeError(ValueError):
    """A checkpoint cannot be resumed from."""


class RunProgress:
    """The state of a run beside weights, optimizer, schedule and random states.

    Args:
        ema: Average of the weights, with `ema_decay`.
    """

    def __init__(self, ema: ExponentialMovingAverage | None = None):
        self.step = 0  # optimizer steps done
        self.totals: dict[str, float] = {}  # since the last log line: `STEP_TOTALS`, and the objective's
        self.ema = ema
        self.validation_due = False  # the run was stopped after the step and before its validation
        self.bad_samples: dict[str, int] = {}  # what was wrong with pairs that were replaced -> how often
        self.steps_without_pixels = 0  # how many of the last steps in a row had no pixel that counts for the loss

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "totals": self.totals,
            "validation_due": self.validation_due,
            "bad_samples": self.bad_samples,
            "steps_without_truth": self.steps_without_pixels,
            "ema": None if self.ema is None else self.ema.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        # Checkpoints of older versions have a list, in this order and with fl_all, which is not logged.
        listed = zip((*STEP_TOTALS, *ERROR_SUMS[:-1]), state.get("sums", []), strict=False)
        self.totals = state["totals"] if "totals" in state else dict(listed)
        self.validation_due = state["validation_due"]
        self.bad_samples = dict(state["bad_samples"])
        self.steps_without_pixels = state.get("steps_without_truth", 0)  # older versions have neither
        average = state.get("ema")
        if self.ema is not None and average is not None:
            self.ema.load_state_dict(average)
        elif self.ema is not None:
            logger.warning("ema_decay: the checkpoint has no EMA weights; the EMA starts from its weights")
        elif average is not None:
            logger.warning("ema_decay is not set: the EMA weights of the checkpoint are dropped")


def list_checkpoints(output_dir: Path) -> list[Path]:
    """List the complete checkpoints of a run, oldest first; other folders of that name are ignored."""
    numbered = [
        (int(match[1]), path)
        for path in output_dir.glob("checkpoint-*")
        if (match := NAME.fullmatch(path.name)) and (path / SETTINGS).is_file()
    ]
    return [path for _, path in sorted(numbered)]


def find_checkpoint(resume_from: str, output_dir: Path) -> Path | None:
    """Find the checkpoint that `--resume_from_checkpoint` names.

    Args:
        resume_from: A checkpoint's folder; or `latest`, the one of `output_dir` with the highest step; or `auto`, the
            latest or None.
        output_dir: The run's folder.

    Raises:
        FileNotFoundError: It does not exist; the message names the place.
    """
    if resume_from in ("latest", "auto"):
        checkpoints = list_checkpoints(output_dir)
        if not checkpoints and resume_from == "latest":
            raise FileNotFoundError(
                f"resume_from_checkpoint: latest, but there is no checkpoint-* in {output_dir}; "
                "with auto the run starts from the beginning then"
            )
        return checkpoints[-1] if checkpoints else None
    path = Path(resume_from)
    if not path.is_dir():
        raise FileNotFoundError(f"resume_from_checkpoint: no such folder: {path}")
    if not NAME.fullmatch(path.resolve().name):
        raise FileNotFoundError(
            f"resume_from_checkpoint: {path} is no checkpoint: give its checkpoint-STEP folder, 'latest' or 'auto'"
        )
    return path


def save_checkpoint(
    accelerator: Accelerator, output_dir: Path, step: int, total_limit: int | None, settings: dict[str, Any]
) -> None:
    """Save the state of all processes as `checkpoint-{step}`; then remove the oldest beyond `total_limit`.

    It is written under another name, flushed to disk and renamed, so that a killed run leaves nothing incomplete. An
    existing checkpoint is kept: the state of a step is the same whenever it is reached.

    Args:
        accelerator: Whose registered objects are saved.
        output_dir: The run's folder, on a file system that all processes share.
        step: Optimizer steps done.
        total_limit: How many checkpoints are kept; None: all.
        settings: The run's `resume_settings`.

    Raises:
        OSError: It cannot be written, for example to a full disk. The incomplete checkpoint is removed, and older ones
            are unchanged.
    """
    unfinished, finished = output_dir / f"{UNFINISHED}checkpoint-{step}", output_dir / f"checkpoint-{step}"
    if broadcast_object_list([finished in list_checkpoints(output_dir)])[0]:
        return
    if accelerator.is_main_process and unfinished.exists():
        shutil.rmtree(unfinished)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(unfinished))
        if accelerator.is_main_process:
            (unfinished / SETTINGS).write_text(yaml.safe_dump(settings, sort_keys=False))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            for path in [*unfinished.rglob("*"), unfinished]:
                _flush(path)
            _remove(finished)
            os.replace(unfinished, finished)
            _flush(output_dir)
    except Exception as error:  # of the file system, torch and safetensors, each in its own type
        shutil.rmtree(unfinished, ignore_errors=True)
        kept = list_checkpoints(output_dir)
        last = f"the last good one is {kept[-1]}" if kept else "there is none before it"
        free = f"{shutil.disk_usage(output_dir).free / 1e6:,.1f} MB are free there"
        raise OSError(f"cannot write {finished}: {error}; {free}; {last}") from error
    if accelerator.is_main_process and total_limit is not None:
        for old in list_checkpoints(output_dir)[:-total_limit]:
            _remove(old)
    accelerator.wait_for_everyone()


def resume_settings(config: TrainingConfig, num_pairs: dict[str, int], batch_norm_batch: int | None) -> dict[str, Any]:
    """Everything that determines the results of a run, and so must be the same when it is resumed.

    Args:
        config: The run's settings, resolved.
        num_pairs: Source -> number of its pairs.
        batch_norm_batch: Over how many pairs BatchNorm takes its statistics; None where they are fixed.
    """
    values = {name: value for name, value in config.to_dict().items() if name not in CHANGEABLE_ON_RESUME}
    return values | {"num_pairs": num_pairs, "batch_norm_batch": batch_norm_batch}


def choose_checkpoint(output_dir: Path, resume_from: str | None) -> Path | None:
    """Choose the checkpoint to resume from.

    Args:
        output_dir: The run's folder.
        resume_from: As in `find_checkpoint`; None for a new run.

    Returns:
        Its folder; None where the run starts from its first step.

    Raises:
        ValueError: `output_dir` holds another run, which is not resumed, or a model.
        FileNotFoundError: The checkpoint does not exist.
    """
    checkpoint = None if resume_from is None else find_checkpoint(resume_from, output_dir)
    resumes_here = resume_from == "auto" or (
        checkpoint is not None
        and (checkpoint.resolve().parent == output_dir.resolve() or _ended_before_saving(output_dir, checkpoint))
    )
    if not resumes_here and ((output_dir / FILE_NAME).exists() or list_checkpoints(output_dir)):
        raise ValueError(
            f"{output_dir} holds an earlier run: resume it (--resume_from_checkpoint latest), "
            "choose another output_dir, or remove it"
        )
    if checkpoint is None and (output_dir / SAFE_WEIGHTS_NAME).exists():
        raise ValueError(
            f"{output_dir} holds the weights of a model, and no checkpoint to resume from: choose another output_dir, "
            "or remove it"
        )
    return checkpoint


def _ended_before_saving(output_dir: Path, checkpoint: Path) -> bool:
    """Whether output_dir may hold a run from that checkpoint which saved nothing: only a log of later steps."""
    log = output_dir / FILE_NAME
    if list_checkpoints(output_dir) or not log.exists():
        return False
    step = int(checkpoint.resolve().name.rpartition("-")[2])
    return all(line["step"] > step for line in read_log(log))


def check_resume_settings(checkpoint: Path, settings: dict[str, Any]) -> None:
    """Refuse to resume with settings that would make another run of it.

    Args:
        checkpoint: Its folder.
        settings: The `resume_settings` of this start.

    Raises:
        ValueError: They differ from those of the checkpoint, which the message lists; or it is not a checkpoint.
    """
    path = checkpoint / SETTINGS
    if not path.is_file():
        raise ValueError(
            f"resume_from_checkpoint: {checkpoint} holds no {SETTINGS}: it is no checkpoint of this trainer"
        )
    saved = read_yaml(path)
    if not isinstance(saved, dict):
        raise ValueError(f"resume_from_checkpoint: {checkpoint} is damaged: {SETTINGS} holds no settings")
    for name in settings.keys() & FIELDS.keys() - saved.keys():
        saved[name] = FIELDS[name].default  # of an older version, which did what the default does
    changes = [
        f"{name}: {_to_yaml(saved.get(name))} -> {_to_yaml(settings.get(name))}"
        for name in dict.fromkeys([*saved, *settings])
        if saved.get(name) != settings.get(name)
    ]
    if changes:
        raise ValueError(
            f"{checkpoint} was trained with other settings: {'; '.join(changes)}. Give the old ones, "
            "or resume with the new ones all the same: --allow_config_changes"
        )


def _to_yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=float("inf")).removesuffix("...\n").strip()


def load_checkpoint(
    accelerator: Accelerator,
    path: Path,
    config: TrainingConfig,
    progress: RunProgress,
    model: RaftForOpticalFlow,
    optimizer: Optimizer,
    schedule: OneCycleLR,
) -> None:
    """Restore every registered object of all processes to the state saved in a checkpoint.

    Args:
        accelerator: Whose registered objects are loaded: the following, and the random states.
        path: The checkpoint's folder.
        config: With `allow_config_changes`, its hyperparameters take effect instead of those that were saved.
        progress: Is loaded.
        model: The prepared model, unwrapped; an average that is not in the checkpoint starts from its weights.
        optimizer, schedule: Are loaded.

    Raises:
        ResumeError: The checkpoint is damaged, or beyond `max_train_steps`.
    """
    try:
        accelerator.load_state(str(path))
    except Exception as error:  # of torch, pickle and safetensors, each in its own type
        if is_out_of_memory(error):
            raise
        raise ResumeError(
            f"resume_from_checkpoint: {path} cannot be loaded: {error}. If it is damaged, remove it to resume from an "
            "older one"
        ) from error
    # accelerate counts passes over the whole run; with other passes a step it would be between two of them here.
    accelerator.step = 0
    if progress.ema is not None and progress.ema.num_updates == 0:
        progress.ema.restart(model)
    if progress.step > config.max_train_steps:
        raise ResumeError(
            f"max_train_steps must be at least the {progress.step} steps of {path}; got {config.max_train_steps}"
        )
    if config.allow_config_changes:
        override_hyperparameters(
            optimizer, schedule, config.learning_rate, config.weight_decay, config.max_train_steps
        )


def resume_command(argv: Sequence[str], output_dir: Path) -> str:
    """The command that resumes a run, without secrets, as a line for the user.

    Where nothing has been saved yet, it is the command as it was given: the weights or the checkpoint that it started
    from must not be lost. Below a program that starts runs, it is that program's.
    """
    if RESUME_VARIABLE in os.environ:
        return f"Resume with:  {os.environ[RESUME_VARIABLE]}"
    given = without_token(argv)
    start = find_flag(given, "resume_from_checkpoint")
    if list_checkpoints(output_dir) or not start:
        given = [word for index, word in enumerate(given) if index not in start]
        given += ["--resume_from_checkpoint", "auto"]
    return f"Resume with:  {shlex.join(['accelerate', 'launch', *_program(), *given])}"


def _program() -> list[str]:
    """The trainer as `accelerate launch` takes it: the script as it was named, or the module of an installation."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None and spec.name == "train_flow":
        return ["-m", "train_flow"]
    return [sys.argv[0] if Path(sys.argv[0]).name == "train_flow.py" else "train_flow.py"]


def remove_unfinished(output_dir: Path) -> None:
    """Remove what killed runs have left: incompletely written and incompletely removed checkpoints."""
    for path in [*output_dir.glob(f"{UNFINISHED}checkpoint-*"), *output_dir.glob(f"{REMOVED}checkpoint-*")]:
        shutil.rmtree(path, ignore_errors=True)


def archive_later_checkpoints(output_dir: Path, step: int) -> None:
    """Rename the checkpoints after `step` to `abandoned-*`: a run that resumes from `step` repeats these steps.

    Otherwise they would count as the latest, and push new ones out of a total limit.
    """
    for path in list_checkpoints(output_dir):
        if int(path.name.rpartition("-")[2]) > step:
            target = path.with_name(f"abandoned-{path.name}")
            _remove(target)
            os.replace(path, target)


def _remove(path: Path) -> None:
    """Remove a folder, if it exists, so that a kill leaves nothing incomplete under its name."""
    if path.exists():
        removed = path.with_name(f"{REMOVED}{path.name}")
        shutil.rmtree(removed, ignore_errors=True)
        os.replace(path, removed)
        shutil.rmtree(removed, ignore_errors=True)


def _flush(path: Path) -> None:
    if os.name == "nt":  # Windows opens no folders, and flushes no file that is opened for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
