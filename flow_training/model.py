"""The model that a run trains."""

from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from torch.nn import BatchNorm2d

from flow_data.shipped_files import find_model
from flow_training.config import MODEL_FIELDS, TrainingConfig
from modeling_raft import RaftConfig, RaftForOpticalFlow
from modeling_raft.convert_raft_checkpoint import load_raft


def make_model(config: TrainingConfig) -> RaftForOpticalFlow:
    """Make the model to train, from given or random weights. The run's settings win over those of the weights.

    Raises:
        ValueError: A setting does not fit the model; the message names it.
        OSError: The weights do not exist.
    """
    overrides = {field: getattr(config, flag) for field, flag in MODEL_FIELDS.items()}
    if config.model_name_or_path is not None:
        model = load_raft(find_model(config.model_name_or_path), **overrides)
        if config.model_size not in (None, model_size(model)):
            raise ValueError(
                f"model_size must be {model_size(model)}, as are the weights of {config.model_name_or_path}; got "
                f"{config.model_size}"
            )
    else:
        model = make_new_model(config, **overrides)
    smallest = model.config.min_image_size
    if min(config.crop_size) < smallest:
        raise ValueError(f"crop_size must be at least {smallest} with this model; got {config.crop_size}")
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable()
    return model


def compile_training(model: RaftForOpticalFlow) -> None:
    """Compile the forward pass of a model, loss and backward pass included, for training mode; eval mode is as before.

    It is compiled once, as all batches of a run have one shape. Validation has images of many sizes, and compiling for
    each would take longer than it saves. All pairs are correlated, as `correlation="dense"` does. Call it before the
    model is prepared by accelerate.

    Args:
        model: Is changed, so that a copy of it would share the compiled pass: copy it before.
    """
    # Several processes share gradients after the whole backward pass: torch's way to cut it in parts, so as to begin
    # earlier, does not take what is computed again in the backward pass.
    torch._dynamo.config.optimize_ddp = False
    eager, compiled = model.forward, torch.compile(model.forward, fullgraph=True, dynamic=False)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return compiled(*args, **kwargs) if model.training else eager(*args, **kwargs)

    model.forward = forward  # type: ignore[method-assign]


def model_size(model: RaftForOpticalFlow) -> Literal["large", "small"]:
    """`large` or `small`, which differ in the blocks of their encoders."""
    return "small" if model.config.encoder_block == "bottleneck" else "large"


def batch_norm_batch(model: RaftForOpticalFlow, per_device_train_batch_size: int | None) -> int | None:
    """Over how many pairs BatchNorm takes its statistics; None where no BatchNorm is trained."""
    trains = any(isinstance(module, BatchNorm2d) and module.training for module in model.train().modules())
    return per_device_train_batch_size if trains else None


def make_new_model(config: TrainingConfig, **overrides: Any) -> RaftForOpticalFlow:
    """Make a model with random weights, with the size and the config_overrides of a run.

    Args:
        config: The run's settings.
        overrides: Fields of RaftConfig that win over config_overrides.

    Raises:
        ValueError: A field of config_overrides is unknown or its value is wrong; the message names the field.
    """
    known = RaftConfig().to_dict()
    for name in config.config_overrides:
        if name not in known:
            raise ValueError(f"config_overrides: RaftConfig has no field {name}")
    make_config = RaftConfig.small if config.model_size == "small" else RaftConfig
    try:
        return RaftForOpticalFlow(make_config(**{**config.config_overrides, **overrides}))
    except StrictDataclassError as error:
        raise ValueError(f"config_overrides: {error}") from error


def model_bytes(config: TrainingConfig) -> tuple[int, int]:
    """Size of the model that a run starts with, in float32.

    Returns:
        Bytes of the weights, and bytes of the parameters alone.

    Raises:
        ValueError: The model cannot be made.
        OSError: Its weights do not exist.
    """
    if config.model_name_or_path is not None:
        model = load_raft(find_model(config.model_name_or_path))
    else:
        with torch.device("meta"):  # shapes without numbers
            model = make_new_model(config)
    parameters = sum(tensor.nbytes for tensor in model.parameters())
    return sum(tensor.nbytes for tensor in model.state_dict().values()), parameters
