"""The page as a Space: pushed to a Hub, and complete without anything else of the project."""

import configparser
import re
import subprocess
import sys

import pytest
import yaml
from conftest import PROJECT
from hub_server import Hub
from tiny_run import CPU

from flow_training.hub import space_files

# All modules of the project must come from the Space: an editable installation would hide what is missing.
PREDICT = """
import sys, tempfile
from pathlib import Path
import app
from flow_data.shipped_files import pretrained_path
settings = app.Settings(1, 256, None, "", None)
first = app.examples_folder() / "slow_1.png"
model = app.choose_model(settings, None, True)
folder = Path(tempfile.mkdtemp())
app.predict_two_frames(str(first), str(first.with_name("slow_2.png")), settings, model, True, folder)
assert {"flow.flo", "flow_color.png", "arrows.jpg"} <= {path.name for path in folder.iterdir()}
here = Path.cwd().resolve()
assert pretrained_path().is_relative_to(here) and app.examples_folder().is_relative_to(here)
for name, module in sys.modules.items():
    if name.split(".")[0] in ("app", "flow_data", "flow_inference", "modeling_raft", "flow_training", "predict_flow"):
        assert module.__file__ is None or Path(module.__file__).is_relative_to(here), module
"""


@pytest.fixture(scope="module")
def pushed(tmp_path_factory) -> dict[str, bytes]:
    """Files of a Space that the command has pushed."""
    cache = tmp_path_factory.mktemp("cache")
    with Hub() as hub:
        environment = hub.environment(cache) | CPU | {"PYTHONPATH": str(PROJECT)}
        environment.pop("HF_HUB_OFFLINE", None)
        command = [sys.executable, "-m", "flow_training.hub", "push_space", "user/page"]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith("pushed: ")
        return hub.repos["space", "user/page"].commits[-1][1]


@pytest.mark.slow
def test_the_space_runs_alone(pushed, tmp_path):
    for name, data in pushed.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    environment = CPU | {"PYTHONPATH": str(tmp_path), "SPACE_ID": "user/page", "HF_HUB_OFFLINE": "1", "PATH": ""}
    result = subprocess.run(
        [sys.executable, "-c", PREDICT], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_the_space_has_what_it_needs_and_no_more(pushed):
    assert {"README.md", "requirements.txt", "app.py", "examples/clip.mp4", "examples/slow_1.png"} <= set(pushed)
    assert not any(name.startswith(("tests", "flow_training", "configs", "space", "docs")) for name in pushed)
    assert sum(map(len, pushed.values())) < 10 * 10**6
    assert pushed["app.py"] == (PROJECT / "app.py").read_bytes()


def test_requirements_and_version_are_those_of_setup_cfg():
    setup = configparser.ConfigParser()
    setup.read(PROJECT / "setup.cfg")
    wanted = setup["options"]["install_requires"] + setup["options.extras_require"]["video"]
    stated = (PROJECT / "space/requirements.txt").read_text().splitlines()
    expected = {line.strip() for line in wanted.splitlines() if line.strip() and not line.lstrip().startswith("#")}
    assert {line for line in stated if not line.startswith("#")} == expected - {"h5py>=3.15"}  # no .h5 in the page
    front_matter = yaml.safe_load((PROJECT / "space/README.md").read_text().split("---\n")[1])
    assert front_matter["sdk"] == "gradio" and front_matter["app_file"] == "app.py"
    lowest = re.search(r"gradio>=([\d.]+)", setup["options.extras_require"]["demo"])[1]
    assert front_matter["sdk_version"].startswith(lowest)
    assert len(front_matter["short_description"]) <= 60 and front_matter["license"] == "bsd-3-clause"


def test_an_installation_has_no_page(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no app.py; run push_space in a checkout"):
        space_files(tmp_path)
