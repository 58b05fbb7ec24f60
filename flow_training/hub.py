"""What a run gives away: weights, processor, model card, settings; in its folder and, if asked, on the Hub."""

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData

from flow_data.licences import PROVENANCE
from flow_training.model import model_size
from modeling_raft import RaftForOpticalFlow, RaftImageProcessor

CARD_TEMPLATE = "model_card.md"
RUN_CONFIG = "run_config.yaml"
PUBLISHED_FILES = ["*.safetensors", "config.json", "preprocessor_config.json", "*.py", "README.md", RUN_CONFIG]

METRIC_NAMES = {
    "epe": "End-point error, pooled over pixels (px)",
    "epe_per_image": "End-point error, mean of images (px)",
    "fl_all": "Fl-all, pooled over pixels (%)",
    "fl_all_per_image": "Fl-all, mean of images (%)",
}


def find_card_template() -> Path:
    """The card's template: in a checkout beside the packages, else where the installation put it."""
    path = Path(__file__).resolve().parents[1] / CARD_TEMPLATE
    if path.is_file():
        return path
    for file in importlib.metadata.files("raft-flow-trainer") or []:
        if file.name == CARD_TEMPLATE:
            return Path(str(file.locate())).resolve()
    raise FileNotFoundError(f"{CARD_TEMPLATE} is neither beside the packages nor in the installation; install again")


def write_run(
    output_dir: Path,
    model: RaftForOpticalFlow,
    run_config: dict[str, Any],
    reports: dict[str, dict[str, Any]],
    seconds: float,
    device: str,
) -> None:
    """Write everything that a finished run publishes, each file whole or not at all.

    Args:
        output_dir: The run's folder.
        model: The final weights.
        run_config: Every resolved setting.
        reports: Validation set -> last report of `flow_training.evaluation`; may be empty.
        seconds: That this process trained.
        device: It trained on, in words.

    Raises:
        OSError: It cannot be written, for example to a full disk.
    """
    unfinished = output_dir / "unfinished-model"
    if unfinished.exists():
        shutil.rmtree(unfinished)
    card = fill_card(output_dir.resolve().name, model, run_config, reports, seconds, device)
    try:
        model.save_pretrained(unfinished)
        RaftImageProcessor(min_size=model.config.min_image_size).save_pretrained(unfinished)
        (unfinished / RUN_CONFIG).write_text(yaml.safe_dump(run_config, sort_keys=False))
        card.save(unfinished / "README.md")
        # The weights come last: where they are, the run is done and everything else is there too.
        mode = (unfinished / RUN_CONFIG).stat().st_mode  # safetensors keeps others out, against the umask
        for path in sorted(unfinished.iterdir(), key=lambda path: path.suffix == ".safetensors"):
            path.chmod(mode)
            os.replace(path, output_dir / path.name)
    except Exception as error:  # of the file system or safetensors, each in its own type
        raise OSError(f"cannot write the final weights to {output_dir}: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def fill_card(
    name: str,
    model: RaftForOpticalFlow,
    run_config: dict[str, Any],
    reports: dict[str, dict[str, Any]],
    seconds: float,
    device: str,
) -> ModelCard:
    """The model card: only what the run did and measured."""
    results = [
        EvalResult(
            task_type="optical-flow",
            task_name="Optical flow",
            dataset_type=set_name.partition(":")[0],
            dataset_name=set_name,
            dataset_args={"num_flow_updates": report["protocol"]["num_flow_updates"]},
            metric_type=metric,
            metric_name=metric_name,
            metric_value=round(report["metrics"][metric], 4),
        )
        for set_name, report in reports.items()
        for metric, metric_name in METRIC_NAMES.items()
    ]
    data = ModelCardData(
        library_name="transformers",
        tags=["optical-flow", "raft"],
        datasets=_hub_datasets(run_config),
        model_name=name,
        eval_results=results or None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(find_card_template()),
        name=name,
        source=run_config["hub_model_id"] or run_config["output_dir"],
        size=model_size(model),
        num_parameters=f"{model.num_parameters():,}",
        num_flow_updates=run_config["num_flow_updates"],
        min_size=model.config.min_image_size,
        start=run_config["model_name_or_path"],
        training_data=_training_data(run_config),
        recipe={key: _cell(value) for key, value in run_config.items() if not key.startswith("hub_")},
        reports=reports,
        metric_names=METRIC_NAMES,
        steps=run_config["max_train_steps"],
        hours=f"{seconds / 3600:.2f}",
        device=device,
        versions=f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {importlib.metadata.version('transformers')}",
    )


def _training_data(run_config: dict[str, Any]) -> list[tuple[str, int]]:
    """(what the model was trained on, how often an epoch) of each source."""
    mix = [
        (f"{PROVENANCE[source].title} ({PROVENANCE[source].terms})", repeats)
        for source, repeats in run_config["train_mix"].items()
    ]
    name = run_config["dataset_name"]
    return mix if name is None else [(f"`{name}` on the Hub (its page states its terms)", 1), *mix]


def _hub_datasets(run_config: dict[str, Any]) -> list[str] | None:
    """What the Hub links the model to; a local folder is none of its data sets."""
    name = run_config["dataset_name"]
    return None if name is None or Path(name).exists() else [name]


def _cell(value: Any) -> str:
    """A value inside a table of Markdown."""
    return str(value).replace("|", "\\|")


def create_repository(model_id: str, token: str | None, private: bool) -> str:
    """Create the repository, or find it, before a run starts: a token that will not do is then known at once.

    Returns:
        Its full id, user/name.

    Raises:
        ValueError: It cannot be created, for whatever reason of token, name or network.
    """
    try:
        return HfApi(token=token).create_repo(model_id, private=private, exist_ok=True).repo_id
    except Exception as error:
        raise ValueError(f"push_to_hub: cannot create {model_id}: {error}") from error


def push_run(output_dir: Path, repo_id: str, token: str | None) -> str:
    """Upload what a run publishes, without checkpoints and logs; returns the commit's address."""
    return HfApi(token=token).upload_folder(
        folder_path=output_dir,
        repo_id=repo_id,
        allow_patterns=PUBLISHED_FILES,
        ignore_patterns=["*checkpoint-*/*", "logs/*"],
        commit_message="Upload RAFT",
    )
