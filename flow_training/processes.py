"""Processes and devices of a run, as accelerate sets them up."""

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import (
    DataLoaderConfiguration,
    GradientAccumulationPlugin,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
    parse_flag_from_env,
)

from flow_training.config import TrainingConfig
from flow_training.evaluation import check_precision
from flow_training.flags import nearest
from flow_training.ops.lock import RunLock, sees_token
from modeling_raft import RaftForOpticalFlow

# Ways to split a model over several devices -> the variable by which `accelerate launch` asks for it.
SHARDING = {
    "DeepSpeed": "ACCELERATE_USE_DEEPSPEED",
    "FSDP": "ACCELERATE_USE_FSDP",
    "Megatron-LM": "ACCELERATE_USE_MEGATRON_LM",
    "tensor, context or sequence parallelism": "ACCELERATE_USE_PARALLELISM_CONFIG",
}


def refuse_sharding() -> None:
    """Refuse settings of accelerate that split the model, before an `Accelerator` is created, which applies them.

    Raises:
        ValueError: One is set; the message names it and its variable.
    """
    for name, variable in SHARDING.items():
        if parse_flag_from_env(variable):
            raise ValueError(
                f"accelerate is set up for {name} ({variable}={os.environ[variable]}), which is not supported: RAFT "
                "has 5 million parameters and needs no sharding. Run `accelerate config` again and choose multi-GPU "
                "with none of these, or launch with --config_file configs/accelerate/gpus_bf16.yaml"
            )


def make_accelerator(config: TrainingConfig) -> tuple[Accelerator, TrainingConfig]:
    """Create the accelerator, and resolve the settings that depend on the machine.

    Returns:
        The accelerator, and the settings with `mixed_precision` and `per_device_train_batch_size` resolved.

    Raises:
        ValueError: A tracker or precision does not exist here, the batch cannot be split over the processes, or
            accelerate is set up to split the model.
    """
    refuse_sharding()
    known, installed = ({str(name) for name in names} for names in (LOGGER_TYPE_TO_CLASS, get_available_trackers()))
    for name in config.report_to:
        if name not in known | {"none", "all"}:
            raise ValueError(f"report_to must be trackers of accelerate; got {name}{nearest(name, sorted(known))}")
        if name not in installed | {"none", "all"}:
            raise ValueError(
                f"report_to must be installed trackers ({', '.join(sorted(installed)) or 'none'}); got {name}"
            )
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=None if config.report_to == ["none"] else config.report_to,
        project_config=ProjectConfiguration(project_dir=config.output_dir, logging_dir=config.output_dir),
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
        # Only passes are counted: the end of the batches never falls inside a step.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
        step_scheduler_with_optimizer=False,
    )
    check_precision(accelerator)
    if not accelerator.is_main_process:
        logging.getLogger("flow_data").setLevel(logging.ERROR)  # warnings about the data are logged once
    # Only now is the number of processes known.
    per_device, accelerator.gradient_accumulation_steps = split_batch(
        config.total_batch_size, config.per_device_train_batch_size, accelerator.num_processes
    )
    return accelerator, dataclasses.replace(
        config, mixed_precision=accelerator.mixed_precision, per_device_train_batch_size=per_device
    )


def check_cuda_graphs(accelerator: Accelerator, config: TrainingConfig) -> None:
    """Refuse what steps cannot be recorded with.

    Raises:
        ValueError: The device is no CUDA GPU, there are several processes, a step has several passes or is in fp16,
            the objective is another than the supervised one, or the step is to be compiled or recomputed as well.
    """
    if config.compile or config.gradient_checkpointing:
        other = "compile" if config.compile else "gradient_checkpointing"
        raise ValueError(f"cuda_graphs must be off with {other}; got both")
    if config.objective != "supervised":
        raise ValueError(f"objective must be supervised with cuda_graphs; got {config.objective}")
    if accelerator.mixed_precision == "fp16":  # a run with skipped steps has not been shown to be that without graphs
        raise ValueError("mixed_precision must be no or bf16 with cuda_graphs; got fp16")
    if accelerator.device.type != "cuda":
        raise ValueError(f"cuda_graphs needs a CUDA GPU; got the device {accelerator.device}")
    if accelerator.num_processes > 1:
        raise ValueError(f"cuda_graphs must be off with several processes; got {accelerator.num_processes}")
    if accelerator.gradient_accumulation_steps > 1:  # a replay overwrites the gradients of the one before
        raise ValueError(
            f"per_device_train_batch_size must be total_batch_size, {config.total_batch_size}, with cuda_graphs; got "
            f"{config.per_device_train_batch_size}"
        )


def split_batch(total_batch_size: int, per_device: int | None, num_processes: int) -> tuple[int, int]:
    """Split a global batch over processes and forward passes.

    Args:
        total_batch_size: Pairs per optimizer step, over all processes.
        per_device: Pairs per forward pass of a process; None for as many as possible.
        num_processes: Of the run.

    Returns:
        Pairs per forward pass of a process, and forward passes per optimizer step.

    Raises:
        ValueError: The parts would not be equal.
    """
    if per_device is None:
        per_device = max(total_batch_size // num_processes, 1)
    per_pass = per_device * num_processes
    if total_batch_size % per_pass:
        raise ValueError(
            f"total_batch_size {total_batch_size} cannot be cut into equal parts of "
            f"per_device_train_batch_size {per_device} on {num_processes} process(es); "
            f"the next that can is {-(-total_batch_size // per_pass) * per_pass}"
        )
    return per_device, total_batch_size // per_pass


def require_shared_folder(output_dir: Path, lock: RunLock | None, accelerator: Accelerator) -> None:
    """Refuse machines that do not share output_dir: the parts of a checkpoint would lie in different folders.

    Args:
        output_dir: The run's folder.
        lock: On the main process.
        accelerator: Of the run.

    Raises:
        ValueError: The folder is not the same one on all processes.
    """
    if accelerator.num_processes == 1:
        return
    if lock is not None:
        lock.show_token()
    (token,) = broadcast_object_list([None if lock is None else lock.token])
    if not all(gather_object([sees_token(output_dir, str(token))])):
        raise ValueError(
            f"output_dir must be the same folder for all processes; got {output_dir}, which is not: put it on a file "
            "system that all machines share"
        )


def describe_devices(accelerator: Accelerator) -> str:
    """Description of the hardware, such as `4 x NVIDIA A100`."""
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    return f"{accelerator.num_processes} x {name}"


def unwrap(accelerator: Accelerator, model: Any) -> RaftForOpticalFlow:
    """The model itself, without the wrappers that distribute or compile it."""
    return accelerator.unwrap_model(model, keep_torch_compile=False)
