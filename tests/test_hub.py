"""What is published, and the card's template where there is no checkout."""

import os
import shutil
import subprocess
import sys

import pytest
import yaml
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import filter_repo_objects
from test_modeling_raft import tiny_config

from flow_training import hub
from flow_training.config import parse_config
from modeling_raft import RaftForOpticalFlow

REPORT = {
    "num_pairs": 3,
    "protocol": {"num_flow_updates": 24, "padding": "bottom", "dtype": "float32"},
    "metrics": {"epe": 1.5, "epe_per_image": 2.5, "1px": 0.5, "3px": 0.6, "5px": 0.7, "fl_all": 12.0,
                "fl_all_per_image": 13.0},
    "zero_flow_epe": 9.0,
    "per_pair": [],
}  # fmt: skip


def write(output_dir, *flags: str, reports=None):
    arguments = ["--output_dir", str(output_dir), "--train_mix", "{kitti_2015: 200, hd1k: 5}", *flags]
    run_config = parse_config(arguments).to_dict()
    output_dir.mkdir(exist_ok=True)
    hub.write_run(output_dir, RaftForOpticalFlow(tiny_config()), run_config, reports or {}, 7200.0, "2 x H100")
    return (output_dir / "README.md").read_text()


def test_card_has_data_recipe_results_and_lineage(tmp_path):
    card = write(
        tmp_path / "raft-kitti", "--model_name_or_path", "user/raft-sintel", "--gamma", "0.85",
        "--hub_model_id", "user/raft-kitti", "--hub_token", "secret", reports={"kitti_2015": REPORT},
    )  # fmt: skip
    for part in (
        'from_pretrained("user/raft-kitti"',
        "from `user/raft-sintel`",
        "KITTI-2015 (CC BY-NC-SA 3.0), each pair 200 times",
        "HD1K (CC BY-NC-SA 4.0), each pair 5 times",
        "| gamma | 0.85 |",
        "| kitti_2015 | 3 | 24 | bottom | float32 | 1.500 | 2.500 | 12.000 | 13.000 |",
        "in 2.00 hours",
        "2 x H100",
    ):
        assert part in card, part
    assert "secret" not in card + (tmp_path / "raft-kitti" / "run_config.yaml").read_text()
    data = ModelCard(card).data
    assert "optical-flow" in data.tags and data.library_name == "transformers"
    results = {result.metric_type: result.metric_value for result in data.eval_results}
    assert results == {"epe": 1.5, "epe_per_image": 2.5, "fl_all": 12.0, "fl_all_per_image": 13.0}


def test_card_of_a_run_that_measured_nothing_claims_nothing(tmp_path):
    card = write(tmp_path / "run")
    assert "None: the run validated on no set." in card and "random weights" in card
    assert ModelCard(card).data.eval_results is None


def test_what_is_uploaded(tmp_path, monkeypatch):
    write(tmp_path)
    for name in ("checkpoint-10/model.safetensors", "logs/events.out", "unfinished-checkpoint-20/config.json"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("x")
    (tmp_path / "train_log.jsonl").write_text("{}")
    calls = []
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **kwargs: calls.append(kwargs) or "address")
    assert hub.push_run(tmp_path, "user/model", "token") == "address"
    files = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]
    (call,) = calls
    uploaded = filter_repo_objects(
        files, allow_patterns=call["allow_patterns"], ignore_patterns=call["ignore_patterns"]
    )
    assert set(uploaded) == {
        "model.safetensors", "config.json", "preprocessor_config.json", "README.md", "run_config.yaml",
        "modeling_raft.py", "configuration_raft.py", "correlation_raft.py", "loss_raft.py", "image_processing_raft.py",
    }  # fmt: skip


def test_a_repository_that_cannot_be_made_is_one_clear_error(monkeypatch):
    with pytest.raises(ValueError, match="push_to_hub: cannot create user/model"):
        hub.create_repository("user/model", "no token", private=False)  # the tests are offline


@pytest.mark.slow
def test_template_travels_with_an_installation(tmp_path):
    """Installed without -e, into a folder of its own, used from elsewhere."""
    checkout = hub.find_card_template().parent
    project = tmp_path / "project"  # a copy: building leaves files behind
    shutil.copytree(checkout, project, ignore=shutil.ignore_patterns(".*", "outputs", "tests", "build", "*.egg-info"))
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    install += ["--ignore-installed"]  # else pip takes the project out of the environment that runs the tests
    subprocess.run([*install, "--prefix", tmp_path / "prefix", project], check=True, capture_output=True)
    (packages,) = (tmp_path / "prefix").rglob("site-packages")
    code = (
        f"import sys; sys.path = [{str(packages)!r}] + [p for p in sys.path if p]\n"
        "import flow_training.hub as hub; print(hub.__file__); print(hub.find_card_template())"
    )
    result = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": ""},
    )
    assert result.returncode == 0, result.stderr
    module, template = result.stdout.split()
    assert module.startswith(str(tmp_path / "prefix")) and template.startswith(str(tmp_path / "prefix"))
    assert "{{ card_data }}" in open(template).read()


def test_run_config_is_yaml(tmp_path):
    write(tmp_path)
    assert yaml.safe_load((tmp_path / "run_config.yaml").read_text())["train_mix"] == {"kitti_2015": 200, "hd1k": 5}
