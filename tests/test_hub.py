"""What is published of a run and what its card says."""

import math
from pathlib import Path

import pytest
import yaml
from conftest import PROJECT
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import OfflineModeIsEnabled
from test_modeling_raft import tiny_config

from flow_training import hub
from flow_training.config import parse_config
from flow_training.model_card import RunRecord, read_lineage, write_run
from modeling_raft import RaftForOpticalFlow

REPORT = {
    "num_pairs": 3,
    "protocol": {"num_flow_updates": 24, "padding": "bottom", "dtype": "float32"},
    "metrics": {"epe": 1.5, "epe_per_image": 2.5, "1px": 0.5, "3px": 0.6, "5px": 0.7, "fl_all": 12.0,
                "fl_all_per_image": 13.0},
    "zero_flow_epe": 9.0,
    "per_pair": [],
}  # fmt: skip


MODEL_CODE = {path.name for path in (PROJECT / "modeling_raft").glob("*_raft.py")}
PUBLISHED = {
    "model.safetensors",
    "config.json",
    "preprocessor_config.json",
    "README.md",
    "run_config.yaml",
} | MODEL_CODE


def write(output_dir, *flags: str, reports=None, mix="{kitti_2015: 200, hd1k: 5}"):
    """Write a run of 20 steps that there never was, and return its card."""
    arguments = ["--output_dir", str(output_dir), "--train_mix", mix, "--max_train_steps", "20", *flags]
    config = parse_config(arguments)
    output_dir.mkdir(exist_ok=True)
    lineage = read_lineage(config.model_name_or_path)
    record = RunRecord(config.to_dict(), 20, 7200.0, "2 x H100", reports or {}, lineage)
    write_run(output_dir, RaftForOpticalFlow(tiny_config()), record)
    return (output_dir / "README.md").read_text()


def test_card_has_data_recipe_and_results(tmp_path):
    reports = {"kitti_2015": REPORT, "kitti_2012": REPORT, "sintel_clean:all": REPORT}
    card = write(
        tmp_path / "raft-kitti", "--model_name_or_path", "user/raft-sintel", "--gamma", "0.85", "--push_to_hub",
        "--hub_model_id", "user/raft-kitti-b", "--hub_token", "secret", reports=reports,
    )  # fmt: skip
    for part in (
        "# raft-kitti-b\n",
        'from_pretrained("user/raft-kitti-b"',
        'pipeline("optical-flow", model="user/raft-kitti-b"',
        "It started from `user/raft-sintel` on the Hub",
        "KITTI-2015 (CC BY-NC-SA 3.0), each pair 200 times",
        "HD1K (CC BY-NC-SA 4.0), each pair 5 times",
        "| gamma | 0.85 |",
        "| kitti_2015 | yes | 3 | 24 | bottom | float32 | 1.500 | 2.500 | 12.000 | 13.000 |",
        "| kitti_2012 | no | 3 |",
        "20 optimizer steps in 2.00 hours",
        "2 x H100",
    ):
        assert part in card, part
    assert "not finished" not in card
    assert "secret" not in card + (tmp_path / "raft-kitti" / "run_config.yaml").read_text()
    data = ModelCard(card).data
    assert "optical-flow" in data.tags and data.library_name == "transformers"
    assert data.base_model == "user/raft-sintel" and data.license is None  # which is not this program's to grant
    results = [result for result in data.eval_results if result.dataset_type == "kitti_2015"]
    assert {result.metric_type: result.metric_value for result in results} == {
        "epe": 1.5, "epe_per_image": 2.5, "fl_all": 12.0, "fl_all_per_image": 13.0
    }  # fmt: skip
    assert {result.dataset_split for result in results} == {"training"}
    assert all(result.dataset_args == REPORT["protocol"] for result in data.eval_results)
    again = ModelCard(f"---\n{data.to_yaml()}\n---\n").data
    assert again.to_dict() == data.to_dict() and len(again.eval_results) == 12


def test_card_of_a_run_that_measured_nothing_claims_nothing(tmp_path):
    card = write(tmp_path / "run")
    assert "None: the run has validated these weights on no set." in card and "from random weights" in card
    assert ModelCard(card).data.eval_results is None and ModelCard(card).data.base_model is None
    assert f'from_pretrained("{tmp_path / "run"}"' in card


def test_a_metric_over_no_pixel_is_no_result(tmp_path):
    reports = {"kitti_2015": REPORT | {"metrics": REPORT["metrics"] | {"fl_all": math.nan}}}
    card = write(tmp_path / "run", reports=reports)
    assert "| 1.500 | 2.500 | - | 13.000 |" in card
    data = ModelCard(card).data
    assert {result.metric_type for result in data.eval_results} == {"epe", "epe_per_image", "fl_all_per_image"}


def test_lineage_goes_back_through_the_stages(tmp_path):
    """Each stage starts from the folder of the one before, which is trained again, or removed, later."""
    write(tmp_path / "chairs", mix="{flying_chairs: 1}")
    write(tmp_path / "things", "--model_name_or_path", str(tmp_path / "chairs"), mix="{flying_things_clean: 1}")
    write(tmp_path / "chairs", "--model_name_or_path", "user/other", mix="{synthetic: 1}")
    card = write(tmp_path / "sintel", "--model_name_or_path", str(tmp_path / "things"), mix="{sintel_clean: 1}")
    assert ModelCard(card).data.to_dict()["lineage"] == [
        f"`{tmp_path / 'things'}`, trained on FlyingThings3D, clean pass (research only)",
        f"`{tmp_path / 'chairs'}`, trained on FlyingChairs (research only)",
        "random weights",
    ]
    assert (
        f"Before that: `{tmp_path / 'chairs'}`, trained on FlyingChairs (research only); before that: random" in card
    )
    assert ModelCard(card).data.base_model is None  # a folder is no model of the Hub's
    (tmp_path / "raft.pth").write_bytes(b"")
    assert read_lineage(str(tmp_path / "raft.pth")) == [
        f"`{tmp_path / 'raft.pth'}`; nothing in it states what it was trained on"
    ]
    (tmp_path / "things" / "README.md").unlink()
    assert read_lineage(str(tmp_path / "things"))[1:] == [f"`{tmp_path / 'chairs'}`"]


def test_what_is_uploaded(tmp_path, monkeypatch):
    write(tmp_path)
    for name in ("checkpoint-10/model.safetensors", "logs/events.out", "unfinished-checkpoint-20/config.json"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("x")
    for name in ("train_log.jsonl", ".lock", "not_finite_step_3.pt"):
        (tmp_path / name).write_text("{}")
    calls = []

    def create_commit(self, repo_id, operations, commit_message):
        calls.append({operation.path_in_repo for operation in operations})
        return type("Commit", (), {"commit_url": "address"})

    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    assert hub.push_folder(tmp_path, "user/model", "token", "message") == "address"
    assert calls == [PUBLISHED]


def test_a_repository_that_cannot_be_made_is_one_clear_error():
    with pytest.raises(OSError, match="cannot create user/model on the Hub") as caught:
        hub.create_repository("user/model", "no token", private=False)  # the tests are offline
    assert isinstance(caught.value.__cause__, OfflineModeIsEnabled)


def test_an_error_that_quotes_the_token_is_shown_without_it(monkeypatch):
    def refuse(self, *args, **kwargs):
        raise ValueError(f"Illegal header value b'Bearer {self.token}'\nmore")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(OSError, match="Bearer TOKEN' more$"):
        hub.create_repository("user/model", "hf_secret", private=False)


def test_run_config_is_yaml(tmp_path):
    write(tmp_path)
    assert yaml.safe_load((tmp_path / "run_config.yaml").read_text())["train_mix"] == {"kitti_2015": 200, "hd1k": 5}


@pytest.mark.parametrize("name", ["flow", "optical-flow", "pt"])
def test_a_folder_named_like_a_word_of_the_code_keeps_the_card_valid(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    before = write(Path(name))
    cards = []

    def create_commit(self, repo_id, operations, commit_message):
        cards.extend(part.path_or_fileobj.decode() for part in operations if part.path_in_repo == "README.md")
        return type("Commit", (), {"commit_url": "address"})

    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    hub.push_folder(Path(name), "user/model", "token", "message")
    for call in ("model=", "from_pretrained("):
        before = before.replace(f'{call}"{name}"', f'{call}"user/model"')
    assert cards == [before] and before.count('"user/model"') == 3
