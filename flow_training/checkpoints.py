"""Checkpoints from which a run goes on exactly: written whole or not at all, the oldest removed last."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list

from flow_data.out_of_memory import is_out_of_memory
from flow_training.config import read_yaml
from flow_training.ema import ExponentialMovingAverage
from modeling_raft import RaftForOpticalFlow

logger = get_logger(__name__)  # the main process speaks for all
NAME = re.compile(r"checkpoint-(\d+)")
SETTINGS = "settings.yaml"
UNFINISHED, REMOVED = "unfinished-", "removed-"


class RunProgress:
    """What a run must remember beside weights, optimizer, schedule and random states.

    Args:
        num_sums: Length of the vector of sums behind the next log line.
        ema: Average of the weights, with `ema_decay`.
    """

    def __init__(self, num_sums: int, ema: ExponentialMovingAverage | None = None):
        self.step = 0  # optimizer steps done
        self.sums = torch.zeros(num_sums, dtype=torch.float64)
        self.ema = ema
        self.validation_due = False  # stopped after the step and before its validation
        self.bad_samples: dict[str, int] = {}  # what was wrong with pairs that were replaced -> how often
        self.steps_without_truth = 0  # how many of the last steps in a row had no pixel that counts for the loss

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "sums": self.sums.tolist(),
            "validation_due": self.validation_due,
            "bad_samples": self.bad_samples,
            "steps_without_truth": self.steps_without_truth,
            "ema": None if self.ema is None else self.ema.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.sums = torch.tensor(state["sums"], dtype=torch.float64)
        self.validation_due = state["validation_due"]
        self.bad_samples = dict(state["bad_samples"])
        self.steps_without_truth = state.get("steps_without_truth", 0)  # not in checkpoints of older versions
        average = state.get("ema")  # likewise
        if self.ema is not None and average is not None:
            self.ema.load_state_dict(average)
        elif self.ema is not None:
            logger.warning("ema_decay: the checkpoint has no EMA weights; the EMA starts from its weights")
        elif average is not None:
            logger.warning("ema_decay is not set: the EMA weights of the checkpoint are dropped")


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first; folders of the name that hold none are passed over."""
    numbered = [
        (int(match[1]), path)
        for path in output_dir.glob("checkpoint-*")
        if (match := NAME.fullmatch(path.name)) and (path / SETTINGS).is_file()
    ]
    return [path for _, path in sorted(numbered)]


def find_checkpoint(resume_from: str, output_dir: Path) -> Path | None:
    """The folder that `--resume_from_checkpoint` means.

    Args:
        resume_from: A checkpoint's folder, or `latest`: the one of `output_dir` with the highest step, or `auto`:
            likewise, if there is any.

    Raises:
        FileNotFoundError: There is none; the message says where it was looked for.
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

    It is written under another name, flushed to disk and renamed, so that a killed run leaves no half checkpoint. One
    that is there already stays: the state of a step is the same whenever it is reached.

    Args:
        accelerator: Whose registered objects are saved.
        output_dir: The run's folder, on a file system that all processes share.
        step: Optimizer steps done.
        total_limit: How many checkpoints are kept; None: all.
        settings: What the run must be gone on with, for `load_settings`.

    Raises:
        OSError: It cannot be written, for example to a full disk; what was written of it is removed, and older
            checkpoints are as they were.
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


def load_settings(checkpoint: Path) -> dict[str, Any]:
    """The settings that a checkpoint was saved with.

    Raises:
        ValueError: It is not one of this trainer's.
    """
    path = checkpoint / SETTINGS
    if not path.is_file():
        raise ValueError(
            f"resume_from_checkpoint: {checkpoint} holds no {SETTINGS}: it is no checkpoint of this trainer"
        )
    settings = read_yaml(path)
    if not isinstance(settings, dict):
        raise ValueError(f"resume_from_checkpoint: {checkpoint} is damaged: {SETTINGS} holds no settings")
    return settings


def load_checkpoint(accelerator: Accelerator, path: Path, progress: RunProgress, model: RaftForOpticalFlow) -> None:
    """Put every registered object of all processes back into the state saved in `path`.

    Args:
        accelerator: Whose registered objects are loaded.
        path: Of the checkpoint.
        progress: One of these objects.
        model: The prepared model, unwrapped; an EMA that is not in the checkpoint starts from its weights.

    Raises:
        ValueError: It is damaged.
    """
    try:
        accelerator.load_state(str(path))
    except Exception as error:  # of torch, pickle and safetensors, each in its own type
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"resume_from_checkpoint: {path} cannot be loaded: {error}. If it is damaged, remove it to go on from an "
            "older one"
        ) from error
    # accelerate counts passes over the whole run; with other passes a step it would be between two of them here.
    accelerator.step = 0
    if progress.ema is not None and progress.ema.num_updates == 0:
        progress.ema.restart(model)


def remove_unfinished(output_dir: Path) -> None:
    """Remove what earlier runs were killed over: half-written and half-removed checkpoints."""
    for path in [*output_dir.glob(f"{UNFINISHED}checkpoint-*"), *output_dir.glob(f"{REMOVED}checkpoint-*")]:
        shutil.rmtree(path, ignore_errors=True)


def set_aside_later_checkpoints(output_dir: Path, step: int) -> None:
    """Rename the checkpoints after `step`: a run that goes on from it writes these steps anew.

    Left as they are, they would count as the latest, and push new ones out of a total limit.
    """
    for path in list_checkpoints(output_dir):
        if int(path.name.rpartition("-")[2]) > step:
            target = path.with_name(f"abandoned-{path.name}")
            _remove(target)
            os.replace(path, target)


def _remove(path: Path) -> None:
    """Remove a folder, if it is there, so that a kill leaves nothing under its name that is not whole."""
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
