"""What a run publishes: the folder of the model as its users get it, and its model card.

The card states only what the run did and measured.
"""

import importlib.metadata
import math
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from flow_data.datasets import DATASETS
from flow_data.shipped_files import find_model, shipped_path
from flow_inference.labels import read_teacher
from flow_training.config import split_validation_set
from flow_training.hub import CARD, RUN_CONFIG, loaded_from, quoted
from flow_training.metrics import format_metric
from flow_training.model import model_size
from modeling_raft import RaftForOpticalFlow, RaftImageProcessor
from modeling_raft.pipeline_raft import save_pretrained_with_pipeline

CARD_TEMPLATE = "model_card.md"
METRIC_NAMES = {
    "epe": "End-point error, pooled over pixels (px)",
    "epe_per_image": "End-point error, mean of images (px)",
    "fl_all": "Fl-all, pooled over pixels (%)",
    "fl_all_per_image": "Fl-all, mean of images (%)",
}
LINEAGE = "lineage"  # key in the card's metadata, see `read_lineage`


@dataclass(frozen=True)
class RunRecord:
    """What a run has done so far.

    Args:
        run_config: Every resolved setting.
        step: Optimizer steps done.
        seconds: How long this process has trained.
        device: Description of the hardware.
        reports: Validation set -> report of `flow_training.evaluation` on the weights of this step; may be empty.
        lineage: Of `read_lineage`.
    """

    run_config: dict[str, Any]
    step: int
    seconds: float
    device: str
    reports: dict[str, dict[str, Any]]
    lineage: list[str]


def fill_card(model: RaftForOpticalFlow, record: RunRecord) -> ModelCard:
    """The model card of a run; it says so where the run is not finished."""
    run_config = record.run_config
    source = loaded_from(run_config)
    name = Path(source).name if source == run_config["hub_model_id"] else Path(source).resolve().name
    data = ModelCardData(
        library_name="transformers",
        tags=["optical-flow", "raft"],
        base_model=_base_model(run_config),
        datasets=_hub_datasets(run_config),
        model_name=name,
        eval_results=_eval_results(record.reports) or None,
    )
    data[LINEAGE] = record.lineage
    return ModelCard.from_template(
        data,
        template_path=str(shipped_path(CARD_TEMPLATE)),
        name=name,
        source=quoted(source),
        size=model_size(model),
        num_parameters=f"{model.num_parameters():,}",
        num_flow_updates=run_config["num_flow_updates"],
        min_size=model.config.min_image_size,
        lineage=record.lineage,
        inherits=run_config["model_name_or_path"] is not None,
        training_data=_training_data(run_config),
        adapted=any(label_teacher(source, run_config) for source in run_config["train_mix"]),
        recipe={key: _cell(value) for key, value in run_config.items() if not key.startswith("hub_")},
        ema_decay=run_config["ema_decay"],
        reports=record.reports,
        cells={
            set_name: [format_metric(report["metrics"][metric]) for metric in METRIC_NAMES]
            for set_name, report in record.reports.items()
        },
        seen={set_name: _seen_in_training(set_name, run_config) for set_name in record.reports},
        metric_names=METRIC_NAMES,
        step=f"{record.step:,}",
        max_train_steps=f"{run_config['max_train_steps']:,}",
        finished=record.step >= run_config["max_train_steps"],
        hours=f"{record.seconds / 3600:.2f}",
        device=record.device,
        versions=f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {importlib.metadata.version('transformers')}",
    )


def write_model_folder(folder: Path, model: RaftForOpticalFlow, record: RunRecord) -> None:
    """Write everything that is published into a new folder: weights, code, image processor, model card, settings.

    Args:
        folder: Is replaced where it exists.
        model: What is published.
        record: The run that trained it.

    Raises:
        OSError: It cannot be written, for example to a full disk; the folder is removed.
    """
    if folder.exists():
        shutil.rmtree(folder)
    try:
        save_pretrained_with_pipeline(model, RaftImageProcessor(min_size=model.config.min_image_size), folder)
        (folder / RUN_CONFIG).write_text(yaml.safe_dump(record.run_config, sort_keys=False))
        fill_card(model, record).save(folder / CARD)
    except Exception as error:  # of the file system or safetensors, each in its own type
        shutil.rmtree(folder, ignore_errors=True)
        raise OSError(f"cannot write the weights to {folder.parent}: {error}") from error


def write_run(output_dir: Path, model: RaftForOpticalFlow, record: RunRecord) -> None:
    """Write everything that a finished run publishes into its folder, each file completely or not at all.

    Raises:
        OSError: It cannot be written, for example to a full disk.
    """
    unfinished = output_dir / "unfinished-model"
    write_model_folder(unfinished, model, record)
    try:
        # The weights come last: where they exist, the run is done and everything else exists too.
        mode = (unfinished / RUN_CONFIG).stat().st_mode  # safetensors ignores the umask, and gives no one else access
        for path in sorted(unfinished.iterdir(), key=lambda path: path.suffix == ".safetensors"):
            path.chmod(mode)
            os.replace(path, output_dir / path.name)
    except OSError as error:
        raise OSError(f"cannot write the final weights to {output_dir}: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def read_lineage(start: str | None) -> list[str]:
    """Describe what a run starts from, what that was started from, and so on, nearest first.

    In the folder of a model of this trainer, the settings say what it was trained on, and the card what came before.
    It must be called before the run starts: when the run ends, the folder may hold another model.

    Args:
        start: `model_name_or_path` of the run.
    """
    if start is None:
        return ["random weights"]
    folder = Path(find_model(start))
    if not folder.exists():
        return [f"`{start}` on the Hub; its page states what it was trained on"]
    try:
        older = ModelCard.load(folder / CARD, ignore_metadata_errors=True).data.to_dict()[LINEAGE]
    except (OSError, ValueError, KeyError):  # a card without, or none
        older = None
    try:
        run_config = yaml.safe_load((folder / RUN_CONFIG).read_text())
        data = "; ".join(description for description, _ in _training_data(run_config))
        earlier = run_config["model_name_or_path"]
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        if older is not None:  # released weights, whose card has all of it
            return [f"`{start}`", *older]
        return [f"`{start}`; nothing in it states what it was trained on"]
    return [f"`{start}`, trained on {data}", *(older or ["random weights" if earlier is None else f"`{earlier}`"])]


def _base_model(run_config: dict[str, Any]) -> str | None:
    """The model on the Hub that this one was trained from; None for a local folder or file."""
    start = run_config["model_name_or_path"]
    return None if start is None or Path(find_model(start)).exists() else start


def _hub_datasets(run_config: dict[str, Any]) -> list[str] | None:
    """The data sets on the Hub that the model was trained on; None for local ones."""
    name = run_config["dataset_name"]
    return None if name is None or Path(name).exists() else [name]


def _training_data(run_config: dict[str, Any]) -> list[tuple[str, int]]:
    """(description with its terms, repeats in an epoch) of each source of the training data."""
    mix = [(_describe_source(source, run_config), repeats) for source, repeats in run_config["train_mix"].items()]
    name = run_config["dataset_name"]
    if name is None:
        return mix
    place = f"`{name}`" if Path(name).exists() else f"`{name}` on the Hub"
    return [(f"{place} (its page states its terms)", 1), *mix]


def _describe_source(source: str, run_config: dict[str, Any]) -> str:
    """A source with its terms; of pairs that a model has labelled, this model and its terms."""
    license = DATASETS[source].license
    teacher = label_teacher(source, run_config)
    if teacher is None:
        return f"{license.title} ({license.terms})"
    (name, *earlier) = read_lineage(teacher)
    before = f"; before that: {'; '.join(earlier)}" if earlier else ""
    return (
        f"frames without ground truth, whose flow was estimated by a teacher, {name}{before} (the terms of the "
        "frames, of the teacher and of what it was trained on apply)"
    )


def label_teacher(source: str, run_config: dict[str, Any]) -> str | None:
    """The model that estimated the flow of a run's pairs (`flow_inference.pseudo_labels`); None for ground truth."""
    path = run_config.get("pairs_path")
    return read_teacher(Path(path)) if source == "pairs" and path is not None else None


def _eval_results(reports: dict[str, dict[str, Any]]) -> list[EvalResult]:
    """The metrics in the form of the Hub, `model-index`; those of no pixel, which are NaN, are left out."""
    return [
        EvalResult(
            task_type="optical-flow",
            task_name="Optical flow",
            dataset_type=set_name.partition(":")[0],
            dataset_name=set_name,
            dataset_split=_source_and_split(set_name)[1],
            dataset_args=dict(report["protocol"]),
            metric_type=metric,
            metric_name=metric_name,
            metric_value=round(report["metrics"][metric], 4),
        )
        for set_name, report in reports.items()
        for metric, metric_name in METRIC_NAMES.items()
        if math.isfinite(report["metrics"][metric])
    ]


def _source_and_split(set_name: str) -> tuple[str, str]:
    source, split = split_validation_set(set_name)
    return source, split or DATASETS[source].protocol.split


def _seen_in_training(set_name: str, run_config: dict[str, Any]) -> str:
    """Say whether the run trained on pairs of a validation set: "yes", "no" or "not known"."""
    if run_config["dataset_name"] is not None:
        return "not known"
    source, split = _source_and_split(set_name)
    own = run_config.get("validation_pairs_path")  # not in the settings of older versions
    if source == "pairs" and own not in (None, run_config["pairs_path"]):
        return "not known"  # two tables may list the same pairs
    trained = run_config["train_split"] or DATASETS[source].training_split
    seen = source in run_config["train_mix"] and (split == trained or "all" in (split, trained))
    return "yes" if seen else "no"


def _cell(value: Any) -> str:
    """A value inside a table of Markdown."""
    return str(value).replace("|", "\\|")
