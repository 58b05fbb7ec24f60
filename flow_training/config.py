"""The settings of a run: one dataclass, filled from a YAML file and the command line, which wins."""

import argparse
import dataclasses
import difflib
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, get_type_hints

import numpy as np
import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import HfArgumentParser

from flow_data.augmentation_recipe import MAX_ZOOM
from flow_data.sources import check_source, check_split
from flow_data.synthetic import SyntheticOptions

logger = logging.getLogger(__name__)


PATHS = ("output_dir", "data_root", "pairs_path", "synthetic_textures")
SET_BY_FLAGS = {  # fields of RaftConfig that a run sets from flags of its own
    "loss_gamma": "gamma",
    "loss_max_flow": "max_flow",
    "freeze_batch_norm": "freeze_batch_norm",
    "num_flow_updates": "num_flow_updates",
}
MAX_COUNT = 10**9  # of anything that is counted: more is a slip of the keyboard
# Settings that change nothing but where things lie, what is watched, and the rounding of sums; what replaces bad pairs
# changes nothing before the first of them, where the run would have stopped.
FREE_ON_RESUME = frozenset(
    "output_dir data_root pairs_path streaming skip_bad_samples dataloader_num_workers per_device_train_batch_size "
    "gradient_checkpointing logging_steps report_to validation_sets validation_steps synthetic_validation_pairs "
    "checkpointing_steps checkpoints_total_limit push_to_hub hub_strategy hub_model_id hub_private_repo".split()
)


class YamlMapping(dict):
    """A mapping; on the command line it is YAML text in quotes."""

    def __init__(self, value: Any = ()):
        loaded = _load_yaml(value) if isinstance(value, str) else dict(value)
        if not isinstance(loaded, dict):
            raise argparse.ArgumentTypeError(f"expected a mapping like '{{name: value}}'; got {value!r}")
        super().__init__(loaded)


class YamlValue:
    """Any YAML value, from its text."""

    def __new__(cls, text: str) -> Any:
        return _load_yaml(text)


def _load_yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no YAML: {error}") from error


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A field of the configuration, and its flag's help."""
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata={"help": help} | metadata)
    return dataclasses.field(default=default, metadata={"help": help} | metadata)


@dataclasses.dataclass
class TrainingConfig:
    """Every setting of a run. Keys of the YAML file and flags are the same words; recipes live in configs/."""

    output_dir: str = dataclasses.field(metadata={"help": "Folder for weights, logs and checkpoints."})

    # data
    train_mix: YamlMapping = option(
        YamlMapping(),
        "Source -> how often its pairs occur in an epoch, e.g. '{sintel_clean: 100, kitti_2015: 200}'.",
    )
    data_root: str = option("datasets", "Folder that holds the data sets' folders.")
    pairs_path: str | None = option(
        None, "Your own pairs, for the source 'pairs': a CSV or JSONL file, or a folder; default: data_root/pairs."
    )
    dataset_name: str | None = option(
        None, "Data set of flow pairs on the Hub, user/name, to train on; it takes the place of train_mix."
    )
    streaming: bool = option(False, "Read each pair of dataset_name when it is needed; download nothing beforehand.")
    train_split: str | None = option(
        None, "Split of every source; default: each one's training split, 'train' on the Hub. 'all': all pairs."
    )
    crop_size: list[int] = option([384, 512], "Height and width of training crops, multiples of 8.")
    zoom_range: list[YamlValue] = option(
        [-0.2, 0.5],
        "Range of the random zoom, log2: two numbers, or '{default: [lo, hi], SOURCE: [lo, hi]}'.",
    )
    flip: bool = option(True, "Flip pairs at random.")
    add_noise: bool = option(False, "Add Gaussian noise to both frames, sigma uniform in [0, 5] of 255 grey levels.")
    skip_bad_samples: bool = option(False, "Replace pairs that cannot be read by others, instead of stopping.")
    dataloader_num_workers: int = option(4, "Processes that prepare pairs, for each training process.")
    synthetic_image_size: list[int] = option(
        list(SyntheticOptions().image_size), "Height and width of synthetic pairs."
    )
    synthetic_displacement: list[float] = option(
        list(SyntheticOptions().displacement), "Range of a synthetic pair's mean flow, pixels."
    )
    synthetic_shapes: list[int] = option(list(SyntheticOptions().shapes), "Range of the number of moving shapes.")
    synthetic_appearance: float = option(
        SyntheticOptions().appearance, "Strength of changes of exposure, light, blur and noise between frames, 0 to 1."
    )
    synthetic_nonrigid: float = option(SyntheticOptions().nonrigid, "Probability that a layer deforms smoothly.")
    synthetic_ego_motion: float = option(
        SyntheticOptions().ego_motion, "Share of synthetic pairs with a camera that travels through a scene."
    )
    synthetic_textures: str | None = option(None, "Folder of pictures to cut textures from; default: made up.")
    synthetic_num_pairs: int = option(20000, "Different synthetic pairs in the training split.")
    synthetic_validation_pairs: int = option(64, "Pairs in the synthetic validation split.")

    # model
    model_name_or_path: str | None = option(
        None, "Weights to start from: a folder, a repository id, or a file of weights."
    )
    model_size: Literal["large", "small"] | None = option(None, "Model to start from scratch; default: large.")
    config_overrides: YamlMapping = option(YamlMapping(), "Fields of RaftConfig, for a model from scratch.")
    freeze_batch_norm: bool = option(False, "Keep BatchNorm's running statistics fixed.")
    gradient_checkpointing: bool = option(False, "Recompute updates in the backward pass to save memory.")

    # recipe
    max_train_steps: int = option(100000, "Optimizer steps.")
    total_batch_size: int = option(6, "Pairs per optimizer step, over all processes.")
    per_device_train_batch_size: int | None = option(
        None, "Pairs per forward pass of a process; default: total_batch_size / processes. The rest is accumulation."
    )
    learning_rate: float = option(2e-5, "Highest learning rate of the one-cycle schedule.")
    weight_decay: float = option(5e-5, "Weight decay of AdamW.")
    max_grad_norm: float = option(1.0, "Gradients are clipped to this global norm.")
    num_flow_updates: int = option(12, "Flow updates of the model while training.")
    gamma: float = option(0.8, "Decay of the sequence loss's weights towards earlier predictions.")
    max_flow: float = option(400.0, "Pixels that move farther than this are left out of the loss.")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(
        None, "Precision of the forward pass; default: what accelerate launch was given, else no."
    )
    ema_decay: float | None = option(
        None,
        "Decay of an exponential moving average of the weights, which is then validated and saved as the final "
        "model; default: no average.",
    )
    seed: int = option(1234, "Of the weights, the order of the pairs and their augmentation.")

    # watching and keeping
    logging_steps: int = option(100, "A line in train_log.jsonl every so many steps.")
    report_to: list[str] = option(["tensorboard"], "Where else figures go: trackers of accelerate by name, or none.")
    validation_sets: list[str] = option([], "SOURCE or SOURCE:SPLIT, each by its published protocol; nothing: none.")
    validation_steps: int = option(5000, "Validate every so many steps, and at the end.")
    checkpointing_steps: int = option(5000, "Save a checkpoint every so many steps.")
    checkpoints_total_limit: int | None = option(None, "Keep only so many newest checkpoints; default: all.")
    resume_from_checkpoint: str | None = option(
        None, "A checkpoint's folder; 'latest' of output_dir; or 'auto': latest, or from the start if there is none."
    )
    allow_config_changes: bool = option(False, "Go on from a checkpoint although settings have changed that matter.")

    # Hub
    push_to_hub: bool = option(
        False, "Push the model to the Hub; the repository is made, and the token tried, before training."
    )
    hub_strategy: Literal["end", "every_save"] = option(
        "end", "Push the model at the end; or also as of each checkpoint, in the background, with a card that says so."
    )
    hub_model_id: str | None = option(None, "Repository user/name; default: output_dir's name, of the token's user.")
    hub_token: str | None = option(None, "Token to push with; default: HF_TOKEN, or the one you logged in with.")
    hub_private_repo: bool = option(False, "Make the repository private if it is new.")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value == "" or isinstance(value, list) and "" in value:
                raise ValueError(f"{field.name} is empty; leave it out for its default")
            if value is not None and field.name in PATHS:
                setattr(self, field.name, str(Path(value).expanduser()))
        if self.dataset_name is not None and self.train_mix:
            logger.warning("training on %s; the train_mix %s is not used", self.dataset_name, dict(self.train_mix))
            self.train_mix = YamlMapping()
        if self.streaming and self.dataset_name is None:
            raise ValueError("streaming needs dataset_name; the sources of train_mix are read from their files anyway")
        for source, repeats in self.train_mix.items():
            check_source(source)
            if not isinstance(repeats, int) or isinstance(repeats, bool) or repeats < 1:
                raise ValueError(f"train_mix: {source} needs a whole number of at least 1; got {repeats!r}")
            if self.train_split is not None:
                check_split(source, self.train_split)
        if "none" in self.report_to and len(self.report_to) > 1:
            raise ValueError(f"report_to: none excludes all others; got {' '.join(self.report_to)}")
        if not self.train_mix and self.dataset_name is None:
            raise ValueError(
                "train_mix is required: it maps sources to repeats, e.g. {flying_chairs: 1}; "
                "or give dataset_name, a data set of flow pairs on the Hub"
            )
        for entry in self.validation_sets:
            source, split = split_validation_set(entry)
            check_source(source)
            if split is not None:
                check_split(source, split)
            if self.validation_sets.count(entry) > 1:
                raise ValueError(f"validation_sets names {entry} twice")
        for name in SET_BY_FLAGS.keys() & self.config_overrides.keys():
            raise ValueError(f"config_overrides: {name} is set by the run's {SET_BY_FLAGS[name]}; give that instead")
        if self.model_name_or_path is not None and self.config_overrides:
            raise ValueError("config_overrides shape a model from scratch, but model_name_or_path gives weights")
        if self.hub_model_id is not None:
            try:
                validate_repo_id(self.hub_model_id)
            except HFValidationError as error:
                raise ValueError(f"hub_model_id: {self.hub_model_id} is no user/name: {error}") from error
        self._check_ranges()
        self._check_numbers()

    def _check_ranges(self) -> None:
        parsed: Any = self.zoom_range
        if len(parsed) == 1 and isinstance(parsed, list) and isinstance(parsed[0], (dict, list)):  # one YAML text
            self.zoom_range = parsed[0]  # type: ignore[assignment]
        for source in self.zoom_ranges():
            if source not in ("default", self.dataset_name):
                check_source(source)
        for source in [self.dataset_name] if self.dataset_name is not None else self.train_mix:
            self.zoom_range_of(source)
        for name in ("crop_size", "synthetic_image_size"):
            size = getattr(self, name)
            if len(size) != 2 or min(size) < 8 or (name == "crop_size" and any(side % 8 for side in size)):
                raise ValueError(f"{name} must be a height and a width, multiples of 8; got {size}")
        for name, lowest in (("synthetic_displacement", 0), ("synthetic_shapes", 0)):
            bounds = getattr(self, name)
            if len(bounds) != 2 or not lowest <= bounds[0] <= bounds[1] < math.inf:
                raise ValueError(f"{name} must be a range, lowest first, of at least {lowest}; got {bounds}")

    def _check_numbers(self) -> None:
        at_least = {
            "max_train_steps": 1,
            "total_batch_size": 1,
            "per_device_train_batch_size": 1,
            "num_flow_updates": 1,
            "logging_steps": 1,
            "validation_steps": 1,
            "checkpointing_steps": 1,
            "checkpoints_total_limit": 1,
            "synthetic_num_pairs": 1,
            "synthetic_validation_pairs": 1,
            "dataloader_num_workers": 0,
            "seed": 0,
            "weight_decay": 0,
        }
        for name, lowest in at_least.items():
            value = getattr(self, name)
            if value is not None and not value >= lowest:
                raise ValueError(f"{name} must be at least {lowest}; got {value}")
            highest = 2**32 - 1 if name == "seed" else MAX_COUNT
            if value is not None and value > highest:
                raise ValueError(f"{name} must be at most {highest}; got {value}")
        for name in ("synthetic_appearance", "synthetic_nonrigid", "synthetic_ego_motion"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1; got {getattr(self, name)}")
        for name in ("learning_rate", "max_grad_norm", "gamma", "max_flow"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite; got {getattr(self, name)}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay must be between 0 and 1, 0.999 say; got {self.ema_decay}")

    def zoom_ranges(self) -> dict[str, tuple[float, float]]:
        """`zoom_range` as a mapping, whichever way it was written."""
        value: Any = self.zoom_range
        ranges = {}
        for source, bounds in (value if isinstance(value, dict) else {"default": value}).items():
            try:
                low, high = (float(bound) for bound in bounds)  # also of text: YAML 1.1 reads 1e-3 as such
            except (TypeError, ValueError):
                low, high = math.inf, -math.inf
            if not -MAX_ZOOM <= low <= high <= MAX_ZOOM:
                raise ValueError(
                    f"zoom_range must be [lo, hi] in log2 with -{MAX_ZOOM} <= lo <= hi <= {MAX_ZOOM}, for {source} "
                    f"too; got {bounds}"
                )
            ranges[source] = (low, high)
        return ranges

    def zoom_range_of(self, source: str) -> tuple[float, float]:
        """Zoom range of a source, log2."""
        ranges = self.zoom_ranges()
        if source not in ranges and "default" not in ranges:
            raise ValueError(f"zoom_range has neither {source} nor default; it has {', '.join(ranges)}")
        return ranges[source] if source in ranges else ranges["default"]

    def synthetic_options(self) -> SyntheticOptions:
        """What the synthetic source is told."""
        return SyntheticOptions(
            image_size=(self.synthetic_image_size[0], self.synthetic_image_size[1]),
            displacement=(self.synthetic_displacement[0], self.synthetic_displacement[1]),
            shapes=(self.synthetic_shapes[0], self.synthetic_shapes[1]),
            appearance=self.synthetic_appearance,
            nonrigid=self.synthetic_nonrigid,
            ego_motion=self.synthetic_ego_motion,
            textures=self.synthetic_textures,
        )

    def to_dict(self) -> dict[str, Any]:
        """Every value that makes the run, so not the token, in types that YAML knows."""
        values = dataclasses.asdict(self) | {
            name: dict(getattr(self, name)) for name in ("train_mix", "config_overrides")
        }
        for name in ("hub_token", "resume_from_checkpoint", "allow_config_changes"):  # of this start, not of the run
            values.pop(name)
        return values

    def trajectory(self, num_pairs: dict[str, int], batch_norm_batch: int | None) -> dict[str, Any]:
        """What makes the run's figures what they are, and so must not change when it is gone on with.

        Args:
            num_pairs: Source -> how many pairs it has.
            batch_norm_batch: Over how many pairs BatchNorm takes its statistics; None where they are fixed.
        """
        values = {name: value for name, value in self.to_dict().items() if name not in FREE_ON_RESUME}
        return values | {"num_pairs": num_pairs, "batch_norm_batch": batch_norm_batch}


def split_validation_set(entry: str) -> tuple[str, str | None]:
    """`SOURCE:SPLIT` or `SOURCE` to both names; the split is None where it is not given."""
    source, colon, split = entry.partition(":")
    if colon and not split:
        raise ValueError(f"validation_sets: {entry} names no split after its colon")
    return source, split or None


def accumulation_steps(total_batch_size: int, per_device: int | None, num_processes: int) -> tuple[int, int]:
    """How a global batch is cut: (pairs per forward pass of a process, forward passes per optimizer step).

    Raises:
        ValueError: It cannot be cut into equal parts.
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


class FlagParser(HfArgumentParser):
    """Flags of a dataclass: no abbreviations, `--no_NAME` for every switch, errors in one line."""

    def __init__(self, dataclass_type: Any, **kwargs: Any):
        usage = "%(prog)s --config configs/NAME.yaml [--flag value ...]     (--help lists all flags)"
        super().__init__(dataclass_type, allow_abbrev=False, usage=usage, **kwargs)
        self.type_hints = get_type_hints(dataclass_type)
        self._option_string_actions["--validation_sets"].nargs = "*"  # none at all, where the file names some
        self.add_argument("--config", help="YAML file of settings; flags win over it")
        for field in dataclasses.fields(dataclass_type):
            if self.type_hints[field.name] is bool and field.default is False:
                self.add_argument(f"--no_{field.name}", dest=field.name, action="store_false", default=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def nearest(name: str, names: Sequence[str]) -> str:
    """A hint at the right name, to append to an error."""
    matches = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    return f"; did you mean {matches[0]}?" if matches else ""


def parse_config(argv: Sequence[str] | None = None) -> TrainingConfig:
    """Settings from `--config FILE` and flags. Mistakes end the program with one line that names key and value."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = FlagParser(TrainingConfig, prog="train_flow.py")
    # The file's settings become flags that stand before the real ones: one typed path, and the last one wins.
    config_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config_parser.error = parser.error  # type: ignore[method-assign]
    config_parser.add_argument("--config")
    path = config_parser.parse_known_args(arguments)[0].config
    try:
        if path is not None:
            arguments = yaml_to_flags(Path(path), parser.type_hints) + arguments
        # argparse stops at the first missing or malformed flag; a misspelt one explains more, so it goes first.
        unknown = [flag for flag in without_token(arguments) if flag.startswith("--") and not _is_flag(parser, flag)]
        if unknown:
            raise ValueError(f"unknown flag {unknown[0]}{nearest(unknown[0], list(parser._option_string_actions))}")
        config, _, rest = parser.parse_args_into_dataclasses(
            arguments, return_remaining_strings=True, look_for_args_file=False
        )
        if rest:
            raise ValueError(f"{rest[0]!r} belongs to no flag")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return config


def without_token(words: Sequence[str]) -> list[str]:
    """A command line that can be shown: hub_token's value is hidden."""
    hidden = ["TOKEN" if before == "--hub_token" else word for before, word in zip(["", *words], words, strict=False)]
    return ["--hub_token=TOKEN" if word.startswith("--hub_token=") else word for word in hidden]


def _is_flag(parser: argparse.ArgumentParser, text: str) -> bool:
    return text.partition("=")[0] in parser._option_string_actions


def yaml_to_flags(path: Path, type_hints: dict[str, Any]) -> list[str]:
    """The settings of a YAML file as command-line flags.

    Raises:
        ValueError: The file is no mapping of settings; the message names it, the key and the value.
    """
    settings = read_yaml(path)
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold `key: value` lines")
    flags: list[str] = []
    for key, value in settings.items():
        if key not in type_hints:
            raise ValueError(f"{path}: unknown key {key}{nearest(str(key), list(type_hints))}")
        if value is None:
            continue
        try:
            flags += to_flag(str(key), value, type_hints[key])
        except ValueError as error:
            raise ValueError(f"{path}: {key}: {error}") from error
    return flags


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML whose mappings name each key once; by itself the last one wins, and nobody hears of the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key} occurs twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """What a YAML file holds; errors name the file."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        return yaml.load(path.read_text(), Loader=_UniqueKeyLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from error


def to_flag(key: str, value: Any, type_hint: Any) -> list[str]:
    """A setting of a YAML file as the words of its flag; ValueError where the value is of another type."""
    if type_hint is bool:
        if not isinstance(value, bool):
            raise ValueError(f"expected true or false; got {value!r}")
        return [f"--{key}"] if value else [f"--no_{key}"]
    if value is False and "no" in str(type_hint):
        return [f"--{key}", "no"]  # a bare `no` is False in YAML 1.1
    if isinstance(value, bool):
        raise ValueError(f"expected no switch; got {value}")
    if isinstance(value, dict):
        return [f"--{key}", yaml.safe_dump(value, default_flow_style=True, width=float("inf")).strip()]
    if isinstance(value, list):
        if getattr(type_hint, "__origin__", None) is not list:
            raise ValueError(f"expected one value; got {value}")
        if not value and key != "validation_sets":  # the one list that may be empty
            raise ValueError("the list is empty; leave the key out for its default")
        return [f"--{key}", *map(_to_text, value)]
    return [f"--{key}", _to_text(value)]


def _to_text(value: Any) -> str:
    # argparse takes -0.2 for a value but -1e-05 for a flag
    return np.format_float_positional(value, trim="0") if isinstance(value, float) else str(value)
