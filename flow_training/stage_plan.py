"""What a curriculum would do, as a table: steps, pairs, checkpoints, disk."""

import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from flow_training.config import TrainingConfig
from flow_training.model import make_new_model
from flow_training.stages import Curriculum, Stage
from modeling_raft.convert_raft_checkpoint import load_raft


def kept_checkpoints(config: TrainingConfig) -> list[int]:
    """Steps of the checkpoints that are there when a run ends, if nothing interrupts it."""
    steps = list(range(config.checkpointing_steps, config.max_train_steps + 1, config.checkpointing_steps))
    return steps if config.checkpoints_total_limit is None else steps[-config.checkpoints_total_limit :]


def disk_needed(config: TrainingConfig, weights: int, parameters: int) -> int:
    """Bytes that a run needs at most at one time.

    The oldest checkpoint is removed only when a new one is written.

    Args:
        config: The run.
        weights: Bytes of all parameters and buffers.
        parameters: Bytes of the parameters alone.
    """
    kept = len(kept_checkpoints(config))
    written = config.max_train_steps // config.checkpointing_steps
    return weights + (kept + (written > kept)) * checkpoint_bytes(config, weights, parameters)


def checkpoint_bytes(config: TrainingConfig, weights: int, parameters: int) -> int:
    """Bytes of a checkpoint: the weights, their average if the run keeps one, and two moments of AdamW."""
    return weights * (1 if config.ema_decay is None else 2) + 2 * parameters


def model_bytes(config: TrainingConfig) -> tuple[int, int]:
    """(bytes of the weights, bytes of the parameters alone) of the model that a run starts with, in float32.

    Raises:
        ValueError: The model cannot be made.
        OSError: Its weights are not there.
    """
    if config.model_name_or_path is not None:
        model = load_raft(config.model_name_or_path)
    else:
        with torch.device("meta"):  # shapes without numbers
            model = make_new_model(config)
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
                config.model_name_or_path or f"random ({config.model_size or 'large'})",
                _describe_checkpoints(config),
                _megabytes(disk),
                state,
            ]
        )
    steps = sum(stage.config.max_train_steps for stage in stages)
    pairs = sum(stage.config.max_train_steps * stage.config.total_batch_size for stage in stages)
    rows.append(["together", f"{steps:,}", "", f"{pairs:,}", "", "", _megabytes(sum(disks)), ""])
    free = _free_space(stages[0].output_dir)
    launch = shlex.join(["accelerate", "launch", *curriculum.launch, "train_flow.py", "..."])
    lines = [
        _align(rows, right={1, 2, 3, 6}),
        "",
        f"model: {parameters // 4:,} parameters; {_describe_sizes(stages, weights, parameters)}",
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


def _describe_sizes(stages: Sequence[Stage], weights: int, parameters: int) -> str:
    sizes = sorted({checkpoint_bytes(stage.config, weights, parameters) for stage in stages})
    return f"every checkpoint {' or '.join(map(_megabytes, sizes))}"  # two where some stages keep an average


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
