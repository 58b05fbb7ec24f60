"""Convert weights of the original RAFT (princeton-vl), torchvision or this project to a model, and load models.

python -m modeling_raft.convert_raft_checkpoint raft-things.pth raft-things/
"""

import argparse
import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.utils import logging

from .checkpoint_files import check_weight_file, few, read_weight_file
from .configuration_raft import RaftConfig
from .image_processing_raft import RaftImageProcessor
from .modeling_raft import RaftForOpticalFlow
from .pipeline_raft import save_pretrained_with_pipeline
from .weight_layouts import (
    Fit,
    Layout,
    choose_fit,
    describe_misfit,
    find_state_dicts,
    fit_layouts,
    is_averaged,
    is_usual_path,
    known_layouts,
    make_layout,
)

logger = logging.get_logger(__name__)

# A name with such a suffix means a file, not a repository. The content of a file is never guessed from its suffix.
WEIGHT_SUFFIXES = {".pth", ".pt", ".ckpt", ".tar", ".bin", ".safetensors", ".th", ".pkl", ".pickle", ".zip", ".npz"}


def convert_state_dict(state_dict: Mapping[str, Any]) -> RaftForOpticalFlow:
    """Convert weights of princeton-vl, torchvision or this project to a model in float32, in eval mode.

    Args:
        state_dict: Names to tensors, or a checkpoint that holds such a dictionary (`{"model": {...}, "epoch": 3}`).
            Prefixes of modules that wrap the RAFT (`module.`, `model.raft.`) are removed.

    Raises:
        ValueError: There are no weights of a RAFT, or those of several, or they are not finite. The message, of at
            most five lines, describes them.
    """
    return _convert(state_dict, known_layouts(), "the state dict", {})


def convert_file(path: str | os.PathLike[str], **overrides: Any) -> RaftForOpticalFlow:
    """Convert a file of weights as `convert_state_dict` does. Its suffix does not matter, and no code in it is run.

    Args:
        path: A file of `torch.save` or of safetensors.
        overrides: Fields of `RaftConfig` that replace those of the weights, and that change the shape of no weight.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError: The file cannot be opened.
        ValueError: The file holds no weights of a RAFT; the message names the file.
    """
    content = read_weight_file(path)
    layouts = (*_layout_of_folder(Path(path).parent), *known_layouts())
    try:
        return _convert(content, layouts, str(path), overrides)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def load_raft(source: str | os.PathLike[str], **overrides: Any) -> RaftForOpticalFlow:
    """Load a model in float32, in eval mode, from a folder, a Hub repository or a file of weights.

    Args:
        source: A file that `convert_file` reads, a folder of `save_pretrained`, or a repository id.
        overrides: Fields of `RaftConfig` that replace those of the source, and that change the shape of no weight.

    Raises:
        ValueError: The source is not a complete RAFT model, or its weights are not finite.
        OSError: The source does not exist.
    """
    if os.path.isfile(source):
        return convert_file(source, **overrides)
    if os.path.isdir(source):
        _check_folder(Path(source))
    else:
        _check_repository_id(os.fspath(source))
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
    # from_pretrained would use random weights in their place.
    problems = {name: report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys") if report[name]}
    if problems:
        lines = [f"{name.replace('_', ' ')}: {few(sorted(map(str, keys)))}" for name, keys in problems.items()]
        raise ValueError(f"{source}: not the weights of this RAFT model:\n  " + "\n  ".join(lines))
    try:
        _check_finite(model.state_dict())
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    return model


def _convert(content: Any, layouts: tuple[Layout, ...], name: str, overrides: Mapping[str, Any]) -> RaftForOpticalFlow:
    """Convert the content of a checkpoint to a model; `name` is for log messages."""
    state_dicts = list(find_state_dicts(content))
    if not state_dicts:
        keys = f" of {few([str(key) for key in content])}" if isinstance(content, Mapping) and content else ""
        raise ValueError(f"holds no state dict (names to tensors): it is a {type(content).__name__}{keys}")
    fits = [fit for path, tensors in state_dicts for fit in fit_layouts(path, tensors, layouts)]
    if not any(fit.is_complete for fit in fits):
        raise ValueError(describe_misfit(state_dicts, fits))
    fit = choose_fit(fits)
    _log_choice(fit, fits, name)

    config = copy.deepcopy(fit.layout.config)
    for field, value in overrides.items():
        setattr(config, field, value)
    model = RaftForOpticalFlow(config)
    initial = model.state_dict()
    model.load_state_dict({ours: fit.weights.get(theirs, initial[ours]) for ours, theirs in fit.layout.names.items()})
    _check_finite({fit.layout.names[ours]: tensor for ours, tensor in model.state_dict().items()})
    return model.eval()


def _log_choice(fit: Fit, fits: list[Fit], name: str) -> None:
    """Log which weights are taken, where there is a choice."""
    others = [other.path or "the top level" for other in fits if other is not fit]
    parts = [f"its weights under {fit.path!r}" if fit.path else "the weights at its top level"]
    if others:
        parts.append(f"not those under {few(others)}")
    if fit.beside:
        parts.append(f"leaving out {few(fit.beside)}")
    if len(parts) > 1 or is_averaged(fit.path) or not is_usual_path(fit.path):
        logger.warning("%s: taking %s", name, ", ".join(parts))


def _layout_of_folder(folder: Path) -> list[Layout]:
    """Return the layout of the model that a folder's config.json describes, or no layout if it describes no RAFT."""
    path = folder / "config.json"
    if not path.is_file():
        return []
    try:
        content = PreTrainedConfig.get_config_dict(folder)[0]
        if content.get("model_type") != RaftConfig.model_type:
            return []
        return [make_layout(f"the RAFT of {path}", RaftConfig.from_dict(content))]
    except (
        OSError,
        StrictDataclassError,
    ) as error:  # weights of another program do not need it
        logger.warning("%s is not used: %s", path, error)
        return []


def _check_folder(folder: Path) -> None:
    """Raise an error where from_pretrained would misread the files of a folder."""
    for path in sorted(folder.glob("*.safetensors")):
        check_weight_file(path)
    files = [path.name for path in sorted(folder.iterdir()) if path.suffix.lower() in WEIGHT_SUFFIXES]
    if files and not (folder / "config.json").is_file():
        # Where there are both, as in a training's checkpoint, the others hold its state.
        files = [name for name in files if name.endswith(".safetensors")] or files
        raise OSError(f"{folder} has no config.json: give a file of weights in it itself ({few(files)})")


def _check_repository_id(source: str) -> None:
    """Raise an error where a name means a file or folder, without asking the Hub for it."""
    if "://" in source:
        raise ValueError(f"{source} is a URL: download the file of weights and give its path, or give a repository id")
    if os.path.exists(source):
        raise OSError(f"{source} is neither a file nor a folder")
    if Path(source).suffix.lower() in WEIGHT_SUFFIXES:
        raise FileNotFoundError(f"no such file: {source}")
    if os.path.isabs(source) or source.startswith((".", "~")) or "\\" in source or source.count("/") > 1:
        raise FileNotFoundError(f"no such file or folder: {source}")


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError where weights are NaN or infinite."""
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(
            f"{len(broken)} of {len(tensors)} tensors hold NaN or infinity ({few(broken)}): the training that wrote "
            "them has diverged, or the file is damaged; take an earlier checkpoint"
        )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: list[str] | None = None) -> None:
    parser = _Parser(
        prog="convert_raft_checkpoint",
        description="Convert weights of princeton-vl/RAFT, torchvision or this project, large or small, saved by any "
        "training program.",
    )
    parser.add_argument("source", type=Path, help="a file of torch.save or safetensors, of any suffix")
    parser.add_argument("out_dir", type=Path, help="folder to write, for from_pretrained")
    args = parser.parse_args(argv)
    try:
        model = convert_file(args.source)
        if args.out_dir.exists() and not args.out_dir.is_dir():  # which transformers would only log
            raise NotADirectoryError(f"{args.out_dir} is not a folder: name one to write to")
        save_pretrained_with_pipeline(model, RaftImageProcessor(), args.out_dir)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    size = "small" if model.config.encoder_block == "bottleneck" else "large"
    print(f"{args.out_dir}: RAFT ({size}), {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
