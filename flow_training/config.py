"""The settings of a run: one dataclass, filled from a YAML file and from the command line, which wins.

All that is known of a setting stands at its field: type, default, help, what its value must be (`must_be`), whether it
may change when a run is resumed (`changeable`), which field of `RaftConfig` it sets (`sets`).
"""

import dataclasses
import logging
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from flow_data.arguments import synthetic_options
from flow_data.datasets import check_source, check_split
from flow_data.sample import MAX_ZOOM
from flow_data.synthetic import SyntheticOptions
from flow_training.flags import FlagParser, YamlMapping, YamlValue, find_flag, flag_name

logger = logging.getLogger(__name__)
Rule = tuple[str, Callable[[Any], bool]]  # what a value must be, and whether it is
ANYTHING: Rule = ("", lambda value: True)
POSITIVE: Rule = ("positive and finite", lambda value: 0 < value < math.inf)
DECAY: Rule = ("between 0 and 1, 0.999 say", lambda value: 0 < value < 1)
CROP: Rule = (
    "a height and a width, multiples of 8",
    lambda value: len(value) == 2 and all(side >= 8 and side % 8 == 0 for side in value),
)


def count(low: int, high: int = 10**9) -> Rule:
    """The rule for what is counted: more than 10^9 of anything is a slip of the keyboard."""
    return f"from {low} to {high}", lambda value: low <= value <= high


def option(default: Any, help: str, must_be: Rule = ANYTHING, **metadata: Any) -> Any:
    """A field of the configuration.

    Args:
        default: Of the field; `dataclasses.MISSING` where it must be given.
        help: Of its flag.
        must_be: The rule for its value, unless that is None.
        metadata: `changeable`, `path` (a leading ~ is expanded) and `sets`.
    """
    metadata |= {"help": help, "must_be": must_be}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


_SYNTHETIC = SyntheticOptions()


# fmt: off
@dataclasses.dataclass
class TrainingConfig:
    """Every setting of a run. Keys of the YAML file and flags are the same words; recipes live in configs/."""

    output_dir: str = option(dataclasses.MISSING, "Folder for weights, logs and checkpoints.", changeable=True,
                             path=True)

    # data
    train_mix: YamlMapping = option(YamlMapping(), "Source -> how often its pairs occur in an epoch, e.g. "
                                    "'{sintel_clean: 100, kitti_2015: 200}'.")
    data_root: str = option("datasets", "Folder that holds the data sets' folders.", changeable=True, path=True)
    pairs_path: str | None = option(None, "Your own pairs, for the source 'pairs': a CSV or JSONL file, or a folder; "
                                    "default: data_root/pairs.", changeable=True, path=True)
    validation_pairs_path: str | None = option(None, "Your own pairs to validate on, where 'pairs' is one of "
                                               "validation_sets; default: pairs_path, those that are trained on.",
                                               changeable=True, path=True)
    dataset_name: str | None = option(None, "Data set of flow pairs on the Hub, user/name, to train on; it takes the "
                                      "place of train_mix.")
    streaming: bool = option(False, "Read each pair of dataset_name when it is needed; download nothing beforehand.",
                             changeable=True)
    train_split: str | None = option(None, "Split of every source; default: each one's training split, 'train' on the "
                                     "Hub. 'all': all pairs.")
    crop_size: list[int] = option([384, 512], "Height and width of training crops, multiples of 8.", CROP)
    zoom_range: list[YamlValue] = option([-0.2, 0.5], "Range of the random zoom, log2: two numbers, or "
                                         "'{default: [lo, hi], SOURCE: [lo, hi]}'.")
    flip: bool = option(True, "Flip pairs at random.")
    add_noise: bool = option(False, "Add Gaussian noise to both frames, sigma uniform in [0, 5] of 255 gray levels.")
    skip_bad_samples: bool = option(False, "Replace pairs that cannot be read by others, instead of stopping.",
                                    changeable=True)  # it changes nothing before the pair at which the run stopped
    dataloader_num_workers: int = option(4, "Processes that prepare pairs, for each training process.", count(0),
                                         changeable=True)
    synthetic_image_size: list[int] = option(list(_SYNTHETIC.image_size), "Height and width of synthetic pairs.")
    synthetic_displacement: list[float] = option(list(_SYNTHETIC.displacement), "Range of a synthetic pair's mean "
                                                 "flow, pixels.")
    synthetic_shapes: list[int] = option(list(_SYNTHETIC.shapes), "Range of the number of moving shapes.")
    synthetic_appearance: float = option(_SYNTHETIC.appearance, "Strength of changes of exposure, light, blur and "
                                         "noise between frames, 0 to 1.")
    synthetic_nonrigid: float = option(_SYNTHETIC.nonrigid, "Probability that a layer deforms smoothly.")
    synthetic_ego_motion: float = option(_SYNTHETIC.ego_motion, "Share of synthetic pairs with a camera that travels "
                                         "through a scene.")
    synthetic_textures: str | None = option(None, "Folder of images to cut textures from; default: drawn ones.",
                                            path=True)
    synthetic_num_pairs: int = option(20000, "Different synthetic pairs in the training split.", count(1))
    synthetic_validation_pairs: int = option(64, "Pairs in the synthetic validation split.", count(1),
                                             changeable=True)

    # model
    model_name_or_path: str | None = option(None, "Weights to start from: a folder, a repository id, or a file of "
                                            "weights.")
    model_size: Literal["large", "small"] | None = option(None, "Model to start from scratch; default: large.")
    config_overrides: YamlMapping = option(YamlMapping(), "Fields of RaftConfig, for a model from scratch.")
    freeze_batch_norm: bool = option(False, "Keep BatchNorm's running statistics fixed.", sets="freeze_batch_norm")
    gradient_checkpointing: bool = option(False, "Recompute updates in the backward pass to save memory.",
                                          changeable=True)

    # recipe
    objective: str = option("supervised", "What is minimized: a name in flow_training/objectives.py.")
    max_train_steps: int = option(100000, "Optimizer steps.", count(1))
    total_batch_size: int = option(6, "Pairs per optimizer step, over all processes.", count(1))
    per_device_train_batch_size: int | None = option(None, "Pairs per forward pass of a process; default: "
                                                     "total_batch_size / processes. The rest is accumulation.",
                                                     count(1), changeable=True)
    learning_rate: float = option(2e-5, "Highest learning rate of the one-cycle schedule.", POSITIVE)
    weight_decay: float = option(5e-5, "Weight decay of AdamW.", count(0))
    max_grad_norm: float = option(1.0, "Gradients are clipped to this global norm.", POSITIVE)
    num_flow_updates: int = option(12, "Flow updates of the model while training.", count(1), sets="num_flow_updates")
    gamma: float = option(0.8, "Decay of the sequence loss's weights towards earlier predictions.", POSITIVE,
                          sets="loss_gamma")
    max_flow: float = option(400.0, "Pixels that move farther than this are left out of the loss.", POSITIVE,
                             sets="loss_max_flow")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(None, "Precision of the forward pass; default: what"
                                                                   " accelerate launch was given, else no.")
    compile: bool = option(False, "Compile the training step with torch.compile, which takes minutes at the start and "
                           "changes results by rounding only.", changeable=True)
    cuda_graphs: bool = option(False, "Record the kernels of a training step once and launch them together, which "
                               "is faster where a GPU waits for the host: on one GPU, without accumulation.",
                               changeable=True)
    ema_decay: float | None = option(None, "Decay of an exponential moving average of the weights, which is then "
                                     "validated and saved as the final model; default: no average.", DECAY)
    seed: int = option(1234, "Of the weights, the order of the pairs and their augmentation.", count(0, 2**32 - 1))

    # logs and checkpoints
    logging_steps: int = option(100, "A line in train_log.jsonl every so many steps.", count(1), changeable=True)
    report_to: list[str] = option(["tensorboard"], "Where else metrics go: trackers of accelerate by name, or none.",
                                  changeable=True)
    tracker_project_name: str = option("raft", "Project of trackers that have projects: all but TensorBoard.",
                                       changeable=True)
    validation_sets: list[str] = option([], "SOURCE or SOURCE:SPLIT, each by its published protocol; nothing: none.",
                                        changeable=True)
    validation_steps: int = option(5000, "Validate every so many steps, and at the end.", count(1), changeable=True)
    checkpointing_steps: int = option(5000, "Save a checkpoint every so many steps.", count(1), changeable=True)
    checkpoints_total_limit: int | None = option(None, "Keep only so many newest checkpoints; default: all.",
                                                 count(1), changeable=True)
    resume_from_checkpoint: str | None = option(None, "A checkpoint's folder; 'latest' of output_dir; or 'auto': "
                                                "latest, or from the start if there is none.")
    allow_config_changes: bool = option(False, "Resume from a checkpoint although settings have changed that matter.")

    # Hub
    push_to_hub: bool = option(False, "Push the model to the Hub; the repository is made, and the token tried, before "
                               "training.", changeable=True)
    hub_strategy: Literal["end", "every_save"] = option("end", "Push the model at the end; or also as of each "
                                                        "checkpoint, in the background, with a card that says so.",
                                                        changeable=True)
    hub_model_id: str | None = option(None, "Repository user/name; default: output_dir's name, of the token's user.",
                                      changeable=True)
    hub_token: str | None = option(None, "Token to push with; default: HF_TOKEN, or the one you logged in with.")
    hub_private_repo: bool = option(False, "Make the repository private if it is new.", changeable=True)
    # fmt: on

    def __post_init__(self) -> None:
        for name, field in FIELDS.items():
            value, (description, holds) = getattr(self, name), field.metadata["must_be"]
            if value == "" or isinstance(value, list) and "" in value:
                raise ValueError(f"{name} is empty; leave it out for its default")
            if value is not None and field.metadata.get("path"):
                setattr(self, name, str(Path(value).expanduser()))
            if value is not None and not holds(value):
                raise ValueError(f"{name} must be {description}; got {value}")
        if self.dataset_name is not None and self.train_mix:
            logger.warning("training on %s; the train_mix %s is not used", self.dataset_name, dict(self.train_mix))
            self.train_mix = YamlMapping()
        self._check_sources()
        self.synthetic_options()  # checks them
        if self.streaming and self.dataset_name is None:
            raise ValueError("streaming needs dataset_name; the sources of train_mix are read from their files anyway")
        if "none" in self.report_to and len(self.report_to) > 1:
            raise ValueError(f"report_to must be none or trackers, not both; got {' '.join(self.report_to)}")
        for name in MODEL_FIELDS.keys() & self.config_overrides.keys():
            raise ValueError(f"config_overrides: {name} is set by the run's {MODEL_FIELDS[name]}; give that instead")
        if self.model_name_or_path is not None and self.config_overrides:
            raise ValueError("config_overrides shape a model from scratch, but model_name_or_path gives weights")
        if self.hub_model_id is not None:
            from huggingface_hub.errors import HFValidationError
            from huggingface_hub.utils import validate_repo_id

            try:
                validate_repo_id(self.hub_model_id)
            except HFValidationError as error:
                raise ValueError(f"hub_model_id must be user/name; got {self.hub_model_id}: {error}") from error

    def _check_sources(self) -> None:
        for source, repeats in self.train_mix.items():
            check_source(source)
            if not isinstance(repeats, int) or isinstance(repeats, bool) or repeats < 1:
                raise ValueError(f"train_mix: {source} must be a whole number of at least 1; got {repeats!r}")
            if self.train_split is not None:
                check_split(source, self.train_split)
        if not self.train_mix and self.dataset_name is None:
            raise ValueError("train_mix is required: it maps sources to repeats, e.g. {flying_chairs: 1}; "
                             "or give dataset_name, a data set of flow pairs on the Hub")  # fmt: skip
        if self.validation_pairs_path is not None and not any(
            split_validation_set(entry)[0] == "pairs" for entry in self.validation_sets
        ):
            raise ValueError("validation_pairs_path is not used: add pairs to validation_sets")
        for entry in self.validation_sets:
            source, split = split_validation_set(entry)
            check_source(source)
            if split is not None:
                check_split(source, split)
            if self.validation_sets.count(entry) > 1:
                raise ValueError(f"validation_sets names {entry} twice")
        parsed: Any = self.zoom_range
        if len(parsed) == 1 and isinstance(parsed, list) and isinstance(parsed[0], (dict, list)):  # one YAML text
            self.zoom_range = parsed[0]  # type: ignore[assignment]
        for source in self.zoom_ranges().keys() - {"default", self.dataset_name}:
            check_source(source)
        for source in [self.dataset_name] if self.dataset_name is not None else self.train_mix:
            self.zoom_range_of(source)

    def zoom_ranges(self) -> dict[str, tuple[float, float]]:
        """`zoom_range` as a mapping, whichever way it was written."""
        value: Any = self.zoom_range
        ranges = {}
        for source, limits in (value if isinstance(value, dict) else {"default": value}).items():
            try:
                low, high = (float(limit) for limit in limits)  # also of text: YAML 1.1 reads 1e-3 as such
            except (TypeError, ValueError):
                low, high = math.inf, -math.inf
            if not -MAX_ZOOM <= low <= high <= MAX_ZOOM:
                raise ValueError(f"zoom_range must be [lo, hi] in log2 with -{MAX_ZOOM} <= lo <= hi <= {MAX_ZOOM}, "
                                 f"for {source} too; got {limits}")  # fmt: skip
            ranges[source] = (low, high)
        return ranges

    def zoom_range_of(self, source: str) -> tuple[float, float]:
        """The zoom range of a source, log2."""
        ranges = self.zoom_ranges()
        if source not in ranges and "default" not in ranges:
            raise ValueError(f"zoom_range must have {source} or default; got {', '.join(ranges)}")
        return ranges[source] if source in ranges else ranges["default"]

    def synthetic_options(self) -> SyntheticOptions:
        """The settings of the synthetic source."""
        return synthetic_options(vars(self))

    def to_dict(self) -> dict[str, Any]:
        """Every value that makes the run, in types of YAML: without the token and what belongs to this start only."""
        values = dataclasses.asdict(self)
        values |= {name: dict(getattr(self, name)) for name in ("train_mix", "config_overrides")}
        for name in ("hub_token", "resume_from_checkpoint", "allow_config_changes"):
            values.pop(name)
        return values


FIELDS = {field.name: field for field in dataclasses.fields(TrainingConfig)}
MODEL_FIELDS = {field.metadata["sets"]: name for name, field in FIELDS.items() if "sets" in field.metadata}
CHANGEABLE_ON_RESUME = frozenset(name for name, field in FIELDS.items() if field.metadata.get("changeable"))


def parse_config(argv: Sequence[str] | None = None) -> TrainingConfig:
    """Read the settings from `--config FILE` and flags.

    Raises:
        SystemExit: Something is wrong; one line that names key and value has been printed.
    """
    parser = FlagParser(TrainingConfig, prog="train_flow.py")
    return parser.parse(list(sys.argv[1:] if argv is None else argv), secret="hub_token")


def split_validation_set(entry: str) -> tuple[str, str | None]:
    """Split `SOURCE:SPLIT` or `SOURCE` into both names; the split is None where it is not given."""
    source, colon, split = entry.partition(":")
    if colon and not split:
        raise ValueError(f"validation_sets: {entry} names no split after its colon")
    return source, split or None


def without_token(argv: Sequence[str]) -> list[str]:
    """A command line that can be shown: the value of hub_token is hidden."""
    shown, hidden = list(argv), find_flag(argv, "hub_token")
    for index in hidden & set(range(len(shown))):
        flag, equals, _ = shown[index].partition("=")
        if flag_name(flag) != "hub_token":
            shown[index] = "TOKEN"
        elif equals:
            shown[index] = f"{flag}=TOKEN"
    return shown
