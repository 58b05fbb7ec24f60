"""The processes and devices of a run, as accelerate has set them up."""

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

from flow_training.config import TrainingConfig, accumulation_steps, nearest
from flow_training.evaluation import check_precision
from flow_training.run_dir import RunLock, sees_token
from modeling_raft import RaftForOpticalFlow

# What accelerate may have been told to split a model over several devices with -> the variable that says so, set by
# `accelerate launch` from its flags and from what `accelerate config` wrote.
SHARDING = {
    "DeepSpeed": "ACCELERATE_USE_DEEPSPEED",
    "FSDP": "ACCELERATE_USE_FSDP",
    "Megatron-LM": "ACCELERATE_USE_MEGATRON_LM",
    "tensor, context or sequence parallelism": "ACCELERATE_USE_PARALLELISM_CONFIG",
}


def refuse_sharding() -> None:
    """Refuse settings of accelerate that split the model; call it before an `Accelerator` is made, which starts them.

    Raises:
        ValueError: One is on; the message names it and its variable.
    """
    for name, variable in SHARDING.items():
        if parse_flag_from_env(variable):
            raise ValueError(
                f"accelerate is set up for {name} ({variable}={os.environ[variable]}), which is not supported: RAFT "
                "has 5 million parameters and needs no sharding. Run `accelerate config` again and choose multi-GPU "
                "with none of these, or launch with --config_file configs/accelerate/gpus_bf16.yaml"
            )


def make_accelerator(config: TrainingConfig) -> tuple[Accelerator, TrainingConfig]:
    """The accelerator, and the settings with everything resolved that depends on the machine.

    Raises:
        ValueError: A tracker or precision that there is not, a batch that the processes cannot share out, or settings
            of accelerate that split the model.
    """
    refuse_sharding()
    known, installed = ({str(name) for name in names} for names in (LOGGER_TYPE_TO_CLASS, get_available_trackers()))
    for name in config.report_to:
        if name not in known | {"none", "all"}:
            raise ValueError(f"report_to: there is no tracker {name}{nearest(name, sorted(known))}")
        if name not in installed | {"none", "all"}:
            raise ValueError(f"report_to: {name} is not installed; there are {', '.join(sorted(installed)) or 'none'}")
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=None if config.report_to == ["none"] else config.report_to,
        project_config=ProjectConfiguration(project_dir=config.output_dir, logging_dir=config.output_dir),
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
        # Passes of a step are counted; where batches end says nothing, as those of a step are taken together.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
        step_scheduler_with_optimizer=False,
    )
    check_precision(accelerator)
    if not accelerator.is_main_process:
        logging.getLogger("flow_data").setLevel(logging.ERROR)  # what is missing from the data is said once
    # Only now is the number of processes known.
    per_device, accelerator.gradient_accumulation_steps = accumulation_steps(
        config.total_batch_size, config.per_device_train_batch_size, accelerator.num_processes
    )
    return accelerator, dataclasses.replace(
        config, mixed_precision=accelerator.mixed_precision, per_device_train_batch_size=per_device
    )


def require_shared_folder(output_dir: Path, lock: RunLock | None, accelerator: Accelerator) -> None:
    """Refuse machines with an output_dir each: their parts of a checkpoint would never come together again."""
    if accelerator.num_processes == 1:
        return
    if lock is not None:
        lock.show_token()
    (token,) = broadcast_object_list([None if lock is None else lock.token])
    if not all(gather_object([sees_token(output_dir, str(token))])):
        raise ValueError(
            f"output_dir: {output_dir} is not the same folder for all processes; put it on a file system that all "
            "machines share"
        )


def describe_devices(accelerator: Accelerator) -> str:
    """The hardware, in words for the model card."""
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    return f"{accelerator.num_processes} x {name}"


def unwrap(accelerator: Accelerator, model: Any) -> RaftForOpticalFlow:
    """The model itself, out of what distributes or compiles it."""
    return accelerator.unwrap_model(model, keep_torch_compile=False)
