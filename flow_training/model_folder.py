"""A trained model's folder as its users get it: weights, code, processor, model card, settings."""

import os
import shutil
from pathlib import Path

import yaml

from flow_training.hub import CARD, RUN_CONFIG
from flow_training.model_card import RunRecord, fill_card
from modeling_raft import RaftForOpticalFlow, RaftImageProcessor
from modeling_raft.pipeline_raft import save_pretrained_with_pipeline


def write_model_folder(folder: Path, model: RaftForOpticalFlow, record: RunRecord) -> None:
    """Write everything that is published into a new folder.

    Args:
        folder: What an earlier run has left there is removed.
        model: Its weights.
        record: What made them.

    Raises:
        OSError: It cannot be written, for example to a full disk; nothing is left then.
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
    """Write everything that a finished run publishes into its folder, each file whole or not at all.

    Raises:
        OSError: It cannot be written, for example to a full disk.
    """
    unfinished = output_dir / "unfinished-model"
    write_model_folder(unfinished, model, record)
    try:
        # The weights come last: where they are, the run is done and everything else is there too.
        mode = (unfinished / RUN_CONFIG).stat().st_mode  # safetensors keeps others out, against the umask
        for path in sorted(unfinished.iterdir(), key=lambda path: path.suffix == ".safetensors"):
            path.chmod(mode)
            os.replace(path, output_dir / path.name)
    except OSError as error:
        raise OSError(f"cannot write the final weights to {output_dir}: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
