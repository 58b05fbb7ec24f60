"""What a program does not need is not imported, and what is not installed is named with how to install it."""

import os
import re
import subprocess
import sys

import pytest

HEAVY = {"torch", "torchvision", "transformers", "accelerate", "datasets", "av", "h5py", "pandas", "cv2", "matplotlib"}
HEAVY |= {"gradio"}
TRAIN_EXTRA = {"datasets", "pyarrow", "cv2", "kornia_rs", "h5py", "tensorboard", "psutil", "jinja2"}
HELP = """
import runpy, sys
sys.argv[1:] = ["--help"]
try:
    runpy.run_module({!r}, run_name="__main__")
except SystemExit:
    pass
"""
COMMANDS = ["train_flow", "evaluate_flow", "predict_flow", "flow_training.curriculum", "flow_training.hub"]
COMMANDS += ["flow_training.plot_log", "flow_data.preview", "flow_data.publish", "app"]
COMMANDS += ["flow_training.adapt", "flow_inference.pseudo_labels"]


def run_python(code: str, blocked: set[str] = frozenset()) -> subprocess.CompletedProcess:
    """Run a program in a process of its own, in which importing some packages fails as if they were not installed."""
    block = f"import sys; sys.modules |= dict.fromkeys({sorted(blocked)!r})\n"
    return subprocess.run([sys.executable, "-c", block + code], capture_output=True, text=True)


def imported_packages(code: str) -> set[str]:
    """Top-level names of the packages that a program has imported when it ends."""
    result = run_python(f"{code}\nimport sys; print('imported', *(name for name in sys.modules if '.' not in name))")
    assert result.returncode == 0, result.stderr
    first, *names = result.stdout.splitlines()[-1].split()
    assert first == "imported"
    return set(names)


@pytest.mark.parametrize("given", [{}, {"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "ACTIVE"}])
@pytest.mark.parametrize(
    "call",
    [
        "predict_flow.main(['a.png', 'b.png', '--output', 'flow.flo'])",
        "evaluate_flow.main(['--dataset', 'synthetic'])",
        "app.build_page = lambda args: __import__('torch'); app.main([])",
        "runpy.sys.argv[1:] = ['--output_dir=run', '--train_mix={synthetic: 1}']; "
        "runpy.run_path('train_flow.py', run_name='__main__')",
    ],
)
def test_waiting_threads_are_set_up_before_torch_is_imported(call, given):
    """OpenMP reads the variables when it is loaded; what the environment says stays."""
    code = f"""
import importlib.abc, os, sys
import {call.partition(".")[0]}

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"))
            os._exit(0)

os.environ |= {given!r}
assert "torch" not in sys.modules
sys.meta_path.insert(0, Finder())
{call}
"""
    expected = given.get("GOMP_SPINCOUNT", "None" if "OMP_WAIT_POLICY" in given else "10000")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP_", "OMP_"))}
    result = subprocess.run([sys.executable, "-uc", code], capture_output=True, text=True, env=environment)
    assert result.stdout.split()[-1:] == [expected], result.stderr


@pytest.mark.slow
def test_packages_import_little():
    """Video, data sets and flow files of other projects are for those who use them."""
    names = imported_packages("from flow_inference import FlowVideo, is_occluded, warp")
    assert {"torch", "transformers", "modeling_raft"} <= names
    assert not names & {"datasets", "av", "h5py", "pandas", "cv2", "kornia_rs", "matplotlib"}


def test_flow_inference_imports_what_is_used():
    assert not imported_packages("from flow_inference import pretrained_path") & HEAVY
    import flow_inference

    assert all(hasattr(flow_inference, name) for name in flow_inference.__all__)
    with pytest.raises(AttributeError, match="no attribute 'flow'"):
        flow_inference.flow  # noqa: B018


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_heavy(command):
    """Every name of a data set and of a setting is in it, but it takes no second."""
    assert not imported_packages(HELP.format(command)) & HEAVY


def test_mistakes_are_found_before_heavy_imports():
    code = "import sys; sys.argv = ['predict_flow', '--model', 'x', '--output', 'y']\nimport predict_flow\n"
    names = imported_packages(f"{code}try: predict_flow.main()\nexcept SystemExit as error: assert error.code == 2")
    assert not names & HEAVY


@pytest.mark.slow
def test_a_missing_extra_is_named_with_how_to_install_it(tmp_path):
    (tmp_path / "in.mp4").write_bytes(b"")
    (tmp_path / "1.png").write_bytes(b"")
    (tmp_path / "train_log.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    predict = ["--model", "x", "--output"]
    calls = [
        ("predict_flow", [*predict, str(tmp_path / "flow"), "--video", str(tmp_path / "in.mp4")]),
        ("predict_flow", [*predict, str(tmp_path / "a.mp4"), str(tmp_path)]),
        ("flow_training.plot_log", [str(tmp_path)]),
    ]
    code = f"""
import importlib
for name, argv in {calls!r}:
    try:
        importlib.import_module(name).main(argv)
    except SystemExit as end:
        print(end.code)
"""
    result = run_python(code, blocked={"av", "matplotlib"})
    assert result.returncode == 0 and not result.stderr, result.stderr
    assert result.stdout.splitlines() == [
        f"{name}: error: {package} is not installed; install it with: pip install 'raft-flow-trainer[{extra}]'"
        for name, package, extra in (
            ("predict_flow.py", "av", "video"),
            ("predict_flow.py", "av", "video"),
            ("flow_training.plot_log", "matplotlib", "plot"),
        )
    ]


COMMAND_LINES = [
    "train_flow --config quickstart",
    "evaluate_flow --dataset synthetic",
    "flow_data.preview synthetic",
    "flow_data.publish synthetic --repo_id user/name",
    "flow_training.curriculum pretrain_synthetic_small",
    "flow_training.adapt frames --output_dir run",
]


@pytest.mark.slow
@pytest.mark.parametrize("line", COMMAND_LINES)
def test_a_core_installation_names_the_extra_of_training(line):
    module, *argv = line.split()
    code = f"import runpy, sys; sys.argv[1:] = {argv!r}; runpy.run_module({module!r}, run_name='__main__')"
    result = run_python(code, blocked=TRAIN_EXTRA)
    message = r"error: \w+ is not installed; install it with: pip install 'raft-flow-trainer\[train\]'\n"
    assert result.returncode == 1 and re.fullmatch(rf"{module}(\.py)?: {message}", result.stderr), result.stderr
    assert not imported_packages(HELP.format(module)) & HEAVY


@pytest.mark.slow
def test_frames_in_memory_and_flow_files_need_no_extra():
    """A core installation predicts flow of a pair, and writes it."""
    code = """
import tempfile, numpy as np, torch
from pathlib import Path
from PIL import Image
import predict_flow
from modeling_raft import RaftConfig, RaftForOpticalFlow
folder = Path(tempfile.mkdtemp())
RaftForOpticalFlow(RaftConfig.small()).save_pretrained(folder / "model")
for name in ("a.png", "b.png"):
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(folder / name)
pair = [str(folder / name) for name in ("a.png", "b.png")]
for name in ("flow.flo", "flow.npy", "flow.pfm", "flow.npz", "flow.png"):
    flags = ["--model", str(folder / "model"), "--num_flow_updates", "1", "--output", str(folder / name)]
    predict_flow.main([*flags, *pair])
    assert (folder / name).is_file()
"""
    extras = {"av", "matplotlib", "onnx", "onnxscript", "onnxruntime"}
    result = run_python(code, blocked=TRAIN_EXTRA | extras)
    assert result.returncode == 0, result.stderr
