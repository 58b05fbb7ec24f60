"""Make the folder of weights that ships with the project, from the last of the runs that trained them.

    python -m benchmarks.release_weights RUN [RUN ...] --hardware "one H200" --data_root ~/datasets \
        --published raft-small.pth

Each RUN is the output folder of a finished stage of training, in order, each of which started from the one before; the
first one started from random weights, or from weights that were released like this. The card's metrics are measured
here, beside zero flow, classical methods and the published weights (`benchmarks.bench_accuracy`); its account of the
training comes from the runs' settings and logs. Runs that read anything but synthetic pairs are refused: the license
of the weights rests on that.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.bench_accuracy import as_table, dis, farneback, measure, open_datasets, open_model, zero_flow
from flow_data.shipped_files import PRETRAINED, find_model
from modeling_raft import RaftImageProcessor
from modeling_raft.convert_raft_checkpoint import load_raft

LARGEST = 4_500_000  # bytes of weights, so that they can travel in the wheel
NUM_FLOW_UPDATES = 12
STAGES = "training_stages.json"  # beside the weights: what the card says of each stage, for the stages that follow
SETTINGS = (  # of a stage, in the card
    "synthetic_image_size", "synthetic_displacement", "synthetic_shapes", "synthetic_appearance", "synthetic_nonrigid",
    "synthetic_ego_motion", "crop_size", "num_flow_updates", "total_batch_size", "learning_rate", "ema_decay",
    "mixed_precision",
)  # fmt: skip
CARD = """---
license: bsd-3-clause
library_name: transformers
pipeline_tag: image-to-image
tags: [optical-flow, raft]
lineage: ["random weights, trained on synthetic pairs of this project only"]
---

# {name}

RAFT ([Teed & Deng 2020](https://arxiv.org/abs/2003.12039)), small model, {parameters:,} parameters, trained on nothing
but synthetic pairs that this project draws itself (`flow_data/synthetic/`): no image, video, ground truth or weights
of anyone else were used. Code and weights are BSD-3-Clause.

{remark}## Use

```python
from flow_inference import pretrained_path
from modeling_raft import RaftForOpticalFlow, RaftImageProcessor

model = RaftForOpticalFlow.from_pretrained(pretrained_path()).eval()
processor = RaftImageProcessor.from_pretrained(pretrained_path())
```

`predict_flow.py` and `evaluate_flow.py` use these weights where no `--model` is given. They need no network.

## Training

From random weights in {num_stages}. The weights are the exponential moving average of those after each step.

{stages}

Motion is in pixels, sizes are height and width; docs/data.md explains the settings of synthetic pairs. Hours are those
of the optimizer steps, beside other work.

## Results

{table}

Measured by `benchmarks/release_weights.py` on pairs of the training splits of these data sets (how many, in brackets).
None of them was trained on. So few pairs show where the weights stand; they are no benchmark results. Models take
{updates} updates unless `@` gives another number. Farneback and DIS are OpenCV's.

## Limits

These weights are less exact than the published ones, which were trained longer and on other data, and in some columns
of the table less exact than DIS, which needs no weights. Flow is estimated on a grid of 1/8 of the image: small fast
objects may be lost. Where a pixel is hidden in frame 2, the flow is a guess.
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folders of the stages, in order")
    parser.add_argument("--data_root", type=Path, required=True, help="folder of the data sets' own folders")
    parser.add_argument(
        "--published", required=True, help="published weights to compare with, evaluated at 20 updates"
    )
    parser.add_argument(
        "--hardware", required=True, help="description of the machine that ran the training, for the card"
    )
    parser.add_argument("--remark", default="", help="a paragraph for the card, such as how far the training has come")
    parser.add_argument("--output", type=Path, default=Path(PRETRAINED))
    arguments = parser.parse_args(argv)
    try:
        release(
            arguments.runs,
            arguments.hardware,
            arguments.data_root,
            arguments.published,
            arguments.remark,
            arguments.output,
        )
    except (ValueError, OSError) as error:
        sys.exit(f"benchmarks.release_weights: error: {error}")


def release(runs: Sequence[Path], hardware: str, data_root: Path, published: str, remark: str, output: Path) -> None:
    """Write weights, configuration, image processor, card and stages of training into a folder."""
    stages = [*earlier_stages(runs[0]), *(read_stage(run, hardware) for run in runs)]
    model = load_raft(str(runs[-1]))
    model.config.num_flow_updates = NUM_FLOW_UPDATES
    output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(output)
    RaftImageProcessor().save_pretrained(output)
    drop_code(output)
    (output / STAGES).write_text(json.dumps(stages, indent=1) + "\n", encoding="utf-8")
    size = (output / "model.safetensors").stat().st_size
    if size > LARGEST:
        raise ValueError(f"weights must be at most {LARGEST:,} bytes to ship in the wheel; got {size:,}")

    datasets = open_datasets(data_root)
    methods = {
        "zero flow": zero_flow,
        "Farneback": farneback,
        "DIS, medium": dis,
        f"published {Path(published).stem}@20": open_model(f"{published}@20", NUM_FLOW_UPDATES),
        f"**{output.name}**": open_model(str(output), NUM_FLOW_UPDATES),
    }
    results = {name: measure(name, dataset, methods) for name, dataset in datasets.items()}
    card = CARD.format(
        name=output.name,
        parameters=model.num_parameters(),
        remark=f"{remark}\n\n" if remark else "",
        num_stages=f"{len(stages)} stages, one after the other" if len(stages) > 1 else "one stage",
        stages=describe_stages(stages),
        table=as_table(results, {name: len(dataset) for name, dataset in datasets.items()}),
        updates=NUM_FLOW_UPDATES,
    )
    (output / "README.md").write_text(card, encoding="utf-8")
    print(card)


def earlier_stages(run: Path) -> list[dict[str, Any]]:
    """The stages of the weights that a run started from; none where it started from random ones.

    Raises:
        ValueError: Nothing is known of these weights.
        OSError: It is no finished run.
    """
    start = yaml.safe_load((run / "run_config.yaml").read_text(encoding="utf-8"))["model_name_or_path"]
    if start is None:
        return []
    path = Path(find_model(start)) / STAGES
    if not path.is_file():
        raise ValueError(
            f"{run}: the first run must start from random weights or from a folder with {STAGES}; got {start}"
        )
    stages: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return stages


def read_stage(run: Path, hardware: str) -> dict[str, Any]:
    """Settings of a finished run, with its `steps`, `hours` and `hardware`; the steps are those of the last log line.

    Raises:
        ValueError: It was trained on something other than drawn pairs.
        OSError: It is no finished run.
    """
    config = yaml.safe_load((run / "run_config.yaml").read_text(encoding="utf-8"))
    if set(config["train_mix"]) != {"synthetic"} or config["synthetic_textures"] is not None:
        raise ValueError(
            f"{run}: train_mix must be synthetic alone, with drawn textures; got {config['train_mix']} with "
            f"synthetic_textures {config['synthetic_textures']}"
        )
    lines = [json.loads(line) for line in (run / "train_log.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "loss" in line]
    intervals = zip(steps, [{"step": 0}, *steps], strict=False)
    pairs = [(now["step"] - before["step"]) * config["total_batch_size"] for now, before in intervals]
    seconds = sum(count / line["pairs_per_second"] for count, line in zip(pairs, steps, strict=True))
    facts = {"steps": steps[-1]["step"], "hours": round(seconds / 3600, 1), "hardware": hardware}
    return facts | {name: config[name] for name in SETTINGS}


def describe_stages(stages: Sequence[dict[str, Any]]) -> str:
    """A Markdown table, a column for each stage."""
    header = "| | " + " | ".join(f"stage {number}" for number in range(1, len(stages) + 1)) + " |"
    rows = [
        f"| {name} | " + " | ".join(str(stage[name]) for stage in stages) + " |"
        for name in ("steps", "hours", "hardware", *SETTINGS)
    ]
    return "\n".join([header, "|---" * (len(stages) + 1) + "|", *rows])


def drop_code(folder: Path) -> None:
    """Remove the model's code and the references to it: where this folder is installed, the code is, too."""
    for path in folder.glob("*.py"):
        path.unlink()
    for name in ("config.json", "preprocessor_config.json"):
        path = folder / name
        config = json.loads(path.read_text(encoding="utf-8"))
        for key in ("auto_map", "custom_pipelines"):
            config.pop(key, None)
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
