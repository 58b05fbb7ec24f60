"""Weights of the original RAFT (princeton-vl) and of torchvision, as ours.

python -m modeling_raft.convert_raft_checkpoint raft-things.pth raft-things/
"""

import argparse
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedConfig

from .configuration_raft import RaftConfig
from .image_processing_raft import RaftImageProcessor
from .modeling_raft import RaftForOpticalFlow
from .pipeline_raft import save_pretrained_with_pipeline

WEIGHT_FILE_SUFFIXES = (".pth", ".pt")


def module_names(config: RaftConfig) -> Iterator[tuple[str, str, str]]:
    """Name of every module that has weights: (ours, princeton's, torchvision's)."""
    for ours, theirs in (("feature_encoder", "fnet"), ("context_encoder", "cnet")):
        for name, princeton, torchvision in encoder_module_names(config):
            yield f"{ours}.{name}", f"{theirs}.{princeton}", f"{ours}.{torchvision}"

    def update(ours: str, princeton: str, torchvision: str) -> tuple[str, str, str]:
        return f"update_block.{ours}", f"update_block.{princeton}", f"update_block.{torchvision}"

    for i in range(len(config.motion_corr_widths)):
        yield update(f"motion_encoder.corr_convs.{i}", f"encoder.convc{i + 1}", f"motion_encoder.convcorr{i + 1}.0")
    for i in range(len(config.motion_flow_widths)):
        yield update(f"motion_encoder.flow_convs.{i}", f"encoder.convf{i + 1}", f"motion_encoder.convflow{i + 1}.0")
    yield update("motion_encoder.fusion", "encoder.conv", "motion_encoder.conv.0")
    for i in range(len(config.gru_kernels)):
        number = i + 1 if len(config.gru_kernels) > 1 else ""  # princeton's single GRU has no number
        for gate, letter in (("update_gate", "z"), ("reset_gate", "r"), ("candidate", "q")):
            yield update(
                f"grus.{i}.{gate}", f"gru.conv{letter}{number}", f"recurrent_block.convgru{i + 1}.conv{letter}"
            )
    yield update("flow_head.0", "flow_head.conv1", "flow_head.conv1")
    yield update("flow_head.2", "flow_head.conv2", "flow_head.conv2")
    if config.convex_upsampling:
        yield "upsampler.mask_head.0", "update_block.mask.0", "mask_predictor.convrelu.0"
        yield "upsampler.mask_head.2", "update_block.mask.2", "mask_predictor.conv"


def encoder_module_names(config: RaftConfig) -> Iterator[tuple[str, str, str]]:
    """As `module_names`, within one encoder."""
    yield "stem.conv", "conv1", "convnormrelu.0"
    yield "stem.norm", "norm1", "convnormrelu.1"
    for stage in range(3):
        for block in range(2):
            ours, theirs = f"stages.{stage}.{block}", f"layer{stage + 1}.{block}"
            for layer in range(3 if config.encoder_block == "bottleneck" else 2):
                number = layer + 1
                yield f"{ours}.layers.{layer}.conv", f"{theirs}.conv{number}", f"{theirs}.convnormrelu{number}.0"
                yield f"{ours}.layers.{layer}.norm", f"{theirs}.norm{number}", f"{theirs}.convnormrelu{number}.1"
            yield f"{ours}.shortcut.conv", f"{theirs}.downsample.0", f"{theirs}.downsample.0"
            yield f"{ours}.shortcut.norm", f"{theirs}.downsample.1", f"{theirs}.downsample.1"
    yield "projection", "conv2", "conv"


def convert_state_dict(state_dict: Mapping[str, Tensor]) -> RaftForOpticalFlow:
    """The model, large or small, that princeton's or torchvision's weights belong to, with these weights.

    Args:
        state_dict: names to tensors; every name may carry the prefix `module.`.

    Raises:
        ValueError: Names or shapes do not fit; the message lists them.
    """
    weights = {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}
    is_princeton = any(name.startswith("fnet.") for name in weights)
    third_conv = "fnet.layer1.0.conv3.weight" if is_princeton else "feature_encoder.layer1.0.convnormrelu3.0.weight"
    config = RaftConfig.small() if third_conv in weights else RaftConfig()
    model = RaftForOpticalFlow(config)
    source_names = {
        ours: princeton if is_princeton else torchvision for ours, princeton, torchvision in module_names(config)
    }

    converted, problems = {}, []
    for name, tensor in model.state_dict().items():
        module, _, kind = name.rpartition(".")
        source = f"{source_names[module]}.{kind}"
        if source not in weights:
            problems.append(f"{source} is missing")
        elif weights[source].shape != tensor.shape:
            expected, received = tuple(tensor.shape), tuple(weights[source].shape)
            problems.append(f"{source} is {received}, not {expected}")
            weights.pop(source)
        else:
            converted[name] = weights.pop(source)
    # princeton registers the norm of a shortcut twice: norm3 is downsample.1, the same tensors.
    problems += [f"{name} is not known" for name in weights if not (is_princeton and ".norm3." in name)]
    if problems:
        size = "small" if third_conv in state_dict or f"module.{third_conv}" in state_dict else "large"
        raise ValueError(f"not the weights of a RAFT model ({size}); these do not fit:\n  " + "\n  ".join(problems))

    model.load_state_dict(converted)
    return model.eval()


def convert_file(path: str | os.PathLike) -> RaftForOpticalFlow:
    """Read a `.pth` of princeton or torchvision, never unpickling anything but tensors.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file holds no weights of RAFT; the message names it.
    """
    try:
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception as error:  # damaged files raise whatever the unpickler stumbles over
        raise ValueError(f"{path} cannot be read as a file of weights: {error}") from error
    # Training scripts, torchvision's too, keep the weights beside the optimizer's state.
    for key in ("model", "state_dict"):
        if isinstance(state_dict, Mapping) and isinstance(state_dict.get(key), Mapping):
            state_dict = state_dict[key]
    if not isinstance(state_dict, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state_dict.items()
    ):
        raise ValueError(f"{path} holds no state dict (names to tensors)")
    try:
        return convert_state_dict(state_dict)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def load_raft(source: str | os.PathLike, **overrides) -> RaftForOpticalFlow:
    """A model from a folder, a Hub repository or a `.pth` of princeton or torchvision, in float32, in eval mode.

    Args:
        source: Folder of `save_pretrained`, repository id, or a file that ends in .pth or .pt.
        overrides: Fields of `RaftConfig` that win over those of the source and change no weight.

    Raises:
        ValueError: What is there is no RAFT model, or not all of one; the message lists the weights that do not fit.
        OSError: Nothing is there.
    """
    if Path(source).suffix in WEIGHT_FILE_SUFFIXES:
        model = convert_file(source)
        for name, value in overrides.items():
            setattr(model.config, name, value)
        return model
    try:
        model_type = PreTrainedConfig.get_config_dict(source)[0].get("model_type")
        if model_type != RaftConfig.model_type:
            raise ValueError(f"{source} holds a model of type {model_type}, not {RaftConfig.model_type}")
        loaded: Any = RaftForOpticalFlow.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **overrides
        )
    except OSError as error:
        raise OSError(f"{source} is no folder with a model, and no repository that can be reached: {error}") from error
    except (SafetensorError, StrictDataclassError) as error:
        raise ValueError(f"{source}: {error}") from error
    model, report = loaded
    # from_pretrained would go on with random weights in their place.
    problems = {name: report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys") if report[name]}
    if problems:
        lines = [f"{name.replace('_', ' ')}: {', '.join(sorted(map(str, keys)))}" for name, keys in problems.items()]
        raise ValueError(f"{source}: not the weights of this RAFT model:\n  " + "\n  ".join(lines))
    return model


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Convert weights of princeton-vl/RAFT or torchvision.")
    parser.add_argument("source", type=Path, help="a .pth; its origin and size are found out from its keys")
    parser.add_argument("out_dir", type=Path, help="folder to write, for from_pretrained")
    args = parser.parse_args(argv)
    try:
        model = convert_file(args.source)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    save_pretrained_with_pipeline(model, RaftImageProcessor(), args.out_dir)
    size = "small" if model.config.encoder_block == "bottleneck" else "large"
    print(f"{args.out_dir}: RAFT ({size}), {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
