"""Runs that push to a Hub on the loopback address, on good days and bad ones: what comes there, what stays here."""

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import PIL.Image
import psutil
import pytest
import torch
from hub_server import Hub, Repo
from huggingface_hub import ModelCard
from safetensors.torch import load as load_bytes
from safetensors.torch import load_file
from test_hub import PUBLISHED
from tiny_run import CPU, PROJECT, command, log_lines

from flow_training import hub as pushing
from flow_training.ops.uploads import Uploads
from flow_training.run_log import read_log
from modeling_raft import RaftForOpticalFlow, RaftImageProcessor

pytestmark = pytest.mark.slow
SETTINGS = {
    "max_train_steps": "9",
    "checkpointing_steps": "3",
    "validation_sets": "synthetic",
    "validation_steps": "2",
    "ema_decay": "0.5",
}
TOKEN = "hf_a_secret"
SECONDS = 120.0


def start(hub: Hub, output_dir: Path, *switches: str, **settings: str | None) -> subprocess.Popen:
    """A tiny run that pushes to user/tiny."""
    argv = command(output_dir, "--push_to_hub", "--hub_model_id", "user/tiny", *switches, **SETTINGS | settings)
    environment = hub.environment(output_dir.parent / f"cache of {output_dir.name}") | CPU
    pipe = subprocess.PIPE
    return subprocess.Popen(
        argv, stdout=pipe, stderr=pipe, text=True, env=environment, cwd=PROJECT, start_new_session=True
    )


def push(hub: Hub, argv: list[str], cache: Path) -> subprocess.CompletedProcess:
    """Run `python -m flow_training.hub ...`."""
    assert argv[:3] == ["python", "-m", "flow_training.hub"]
    environment = hub.environment(cache)
    return subprocess.run(
        [sys.executable, *argv[1:]], capture_output=True, text=True, env=environment, cwd=PROJECT, timeout=SECONDS
    )


def wait_until(condition, what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def has_step(output_dir: Path, step: int) -> bool:
    log = output_dir / "train_log.jsonl"
    return log.exists() and any(line["step"] >= step for line in read_log(log))


def assert_whole(output_dir: Path) -> None:
    """All that is published is there, and nothing half."""
    assert {path.name for path in output_dir.iterdir()} >= PUBLISHED
    assert not list(output_dir.glob("unfinished*"))
    assert all(torch.isfinite(value).all() for value in load_file(output_dir / "model.safetensors").values())


def uploads_of(pid: int) -> list[psutil.Process]:
    return [process for process in psutil.Process(pid).children() if "flow_training.hub" in process.cmdline()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Four runs at one time: all is well, but slow; no Hub at the end; uploads fail in every way; a bad token."""
    folder = tmp_path_factory.mktemp("runs")
    well, gone, failing, refusing = Hub(), Hub(), Hub(), Hub()
    output_dirs = {name: folder / name for name in ("well", "gone to lunch", "failing", "refused")}

    def slow(request: str) -> float:
        """The upload of step 3 waits for step 7: were it the training that waited, neither would come."""
        if "preupload" in request and not has_step(output_dirs["well"], 7):
            wait_until(lambda: has_step(output_dirs["well"], 7), "training waits for an upload")
        return 0.0

    def fail(request: str) -> int | None:
        """500 in the middle of the upload of step 3, again and again; from then on the token is refused."""
        failing.puts = getattr(failing, "puts", 0) + request.startswith("PUT /lfs")
        if failing.puts > 30:
            return 401
        return 500 if failing.puts > 2 and request.startswith("PUT /lfs") else None

    well.delay, failing.error_status, refusing.error_status = slow, fail, lambda request: 401
    with well, failing, refusing:
        gone.__enter__()
        every_save = ["--hub_strategy", "every_save", "--hub_token", TOKEN]
        processes = {
            "well": start(well, output_dirs["well"], *every_save),
            "gone to lunch": start(gone, output_dirs["gone to lunch"]),
            "failing": start(failing, output_dirs["failing"], *every_save),
            "refused": start(refusing, output_dirs["refused"], "--hub_token", TOKEN),
        }
        wait_until(lambda: any("auth-check" in request for request in gone.requests), "no repository was made")
        gone.__exit__()
        outputs = {name: process.communicate(timeout=SECONDS) for name, process in processes.items()}
        codes = {name: process.returncode for name, process in processes.items()}
        yield {"hub": well, "failing": failing, "folders": output_dirs, "outputs": outputs, "codes": codes}


def test_checkpoints_and_final_model_are_pushed_without_delaying_the_training(runs):
    output_dir, (output, errors) = runs["folders"]["well"], runs["outputs"]["well"]
    assert runs["codes"]["well"] == 0, errors
    _, (_, first), (_, last) = runs["hub"].repos["model", "user/tiny"].commits
    assert set(first) == set(last) == PUBLISHED
    for name, content in last.items():
        assert content == (output_dir / name).read_bytes(), name
    weights = load_bytes(first["model.safetensors"])
    saved = torch.load(output_dir / "checkpoint-3/custom_checkpoint_1.pkl")["ema"]["model"]
    assert weights.keys() == saved.keys() and all(torch.equal(weights[name], saved[name]) for name in saved)
    early, final = first["README.md"].decode(), last["README.md"].decode()
    assert "step 3 of 9: its training is not finished" in early and "3 of 9 optimizer steps" in early
    assert "validated these weights on no set" in early and ModelCard(early).data.eval_results is None
    assert "not finished" not in final and "9 optimizer steps" in final
    assert {result.metric_type for result in ModelCard(final).data.eval_results} >= {"epe", "epe_per_image"}
    assert "hub         user/tiny: at each checkpoint and at the end" in output
    assert "step 6 is not uploaded: the upload of step 3 to user/tiny is still running" in output
    assert "step 3 is uploaded to user/tiny" in output and "pushed: http" in output
    assert_whole(output_dir)
    assert log_lines(output_dir) == log_lines(runs["folders"]["gone to lunch"])  # which uploaded nothing meanwhile


def test_the_token_is_written_nowhere(runs):
    for output in (*runs["outputs"]["well"], *runs["outputs"]["failing"]):
        assert TOKEN not in output
    files = [path for name in ("well", "failing") for path in runs["folders"][name].rglob("*") if path.is_file()]
    assert len(files) > 20 and not [path for path in files if TOKEN.encode() in path.read_bytes()]
    for commit in runs["hub"].repos["model", "user/tiny"].commits:
        assert not [name for name, content in commit[1].items() if TOKEN.encode() in content]


def test_the_code_of_a_pushed_card_runs_as_pasted(runs, tmp_path):
    """Where nothing of this project is installed."""
    card = runs["hub"].repos["model", "user/tiny"].commits[-1][1]["README.md"].decode()
    with_pipeline, by_hand = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert "pipeline(" in with_pipeline and "AutoModel" in by_hand
    frames = [np.random.default_rng(number).integers(0, 256, (70, 90, 3), np.uint8) for number in (1, 2)]
    for number, frame in enumerate(frames, 1):
        PIL.Image.fromarray(frame).save(tmp_path / f"frame{number}.png")
    (tmp_path / "first.py").write_text(with_pipeline)
    (tmp_path / "second.py").write_text(by_hand)
    code = (
        "import sys\n"
        "for name in ('modeling_raft', 'flow_data', 'flow_training', 'flow_inference'): sys.modules[name] = None\n"
        "results = []\n"
        "for name in ('first.py', 'second.py'):\n"
        "    names = {'__name__': '__main__'}; exec(open(name).read(), names); results.append(names['flow'])\n"
        "import torch; torch.save(results, 'flow.pt')"
    )
    environment = runs["hub"].environment(tmp_path / "cache") | CPU | {"HF_TOKEN": ""}
    result = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr
    model = RaftForOpticalFlow.from_pretrained(runs["folders"]["well"]).eval()
    processor = RaftImageProcessor.from_pretrained(runs["folders"]["well"])
    with torch.no_grad():
        outputs = model(**processor([PIL.Image.fromarray(frame) for frame in frames], return_tensors="pt"))
    expected = processor.post_process_optical_flow(outputs, target_sizes=[(70, 90)])[0]["flow"]
    for flow in torch.load(tmp_path / "flow.pt"):
        torch.testing.assert_close(flow, expected)


def test_a_run_is_pushed_later_when_the_hub_is_down_at_its_end(runs, tmp_path):
    """With the printed command; the folder's name needs quotes."""
    output_dir, (output, errors) = runs["folders"]["gone to lunch"], runs["outputs"]["gone to lunch"]
    assert "hub         user/tiny: at the end" in output and "not uploaded" not in output  # nor was it tried before
    assert runs["codes"]["gone to lunch"] == pushing.UPLOAD_FAILED and "Traceback" not in errors
    assert f"training is done and {output_dir} is complete, but the upload to user/tiny failed" in errors
    assert re.search("cannot create user/tiny on the Hub, http://127.*, or write to it: .*refused", errors)
    assert_whole(output_dir)
    (line,) = [line for line in errors.splitlines() if line.startswith("Push it later with:")]
    argv = shlex.split(line.partition(":")[2])
    assert argv == ["python", "-m", "flow_training.hub", "push", str(output_dir), "user/tiny"]
    with Hub() as hub:
        result = push(hub, [*argv[:-1], "user/elsewhere", "--private"], tmp_path)
        assert result.returncode == 0, result.stderr
        _, (_, files) = hub.repos["model", "user/elsewhere"].commits
    assert set(files) == PUBLISHED and "pushed: http" in result.stdout
    assert files["model.safetensors"] == (output_dir / "model.safetensors").read_bytes()
    assert 'from_pretrained("user/elsewhere"' in files["README.md"].decode()  # not where it was meant to be
    assert 'from_pretrained("user/tiny"' in (output_dir / "README.md").read_text()


def test_failed_uploads_are_reported_and_a_failed_last_one_sets_the_exit_code(runs, tmp_path):
    output_dir, (output, errors) = runs["folders"]["failing"], runs["outputs"]["failing"]
    assert runs["codes"]["failing"] == pushing.UPLOAD_FAILED and "Traceback" not in errors, errors
    (line,) = [line for line in output.splitlines() if "training continues" in line]
    assert line.startswith("step 3 is not uploaded to user/tiny, training continues: cannot push"), line
    assert "Error while uploading" in line and "500" in line
    assert "401" in errors and "hf auth login" in errors and "HF_TOKEN" in errors
    assert f"{output_dir} is complete, but the upload to user/tiny failed" in errors
    assert len(runs["failing"].repos["model", "user/tiny"].commits) == 1  # the empty one: nothing half has come
    assert_whole(output_dir)
    (line,) = [line for line in errors.splitlines() if line.startswith("Push it later with:")]
    argv = shlex.split(line.partition(":")[2])
    refused = push(runs["failing"], [*argv, "--token", TOKEN], tmp_path)
    assert refused.returncode == pushing.UPLOAD_FAILED and "Traceback" not in refused.stderr
    assert "401" in refused.stderr and "hf auth login" in refused.stderr and TOKEN not in refused.stderr
    errors_left = [500]
    runs["failing"].error_status = lambda request: errors_left.pop() if "PUT" in request and errors_left else None

    later = push(runs["failing"], argv, tmp_path)  # a hiccup on the way is overcome
    assert later.returncode == 0 and "500" in later.stderr and "[Retry 1/5]" in later.stderr, later.stderr
    assert set(runs["failing"].repos["model", "user/tiny"].commits[-1][1]) == PUBLISHED


def test_a_refused_token_is_one_line_and_leaves_no_folder(runs):
    output, errors = runs["outputs"]["refused"]
    assert runs["codes"]["refused"] == 1 and not output and TOKEN not in errors
    (line,) = [line for line in errors.splitlines() if "error" in line.lower()]
    assert line.startswith("train_flow.py: error: cannot create user/tiny on the Hub") and "401" in line
    assert "hf auth login" in line and not runs["folders"]["refused"].exists()


def test_kills_and_signals_cancel_an_upload_and_remove_its_copy(tmp_path):
    """The Hub does not answer while an upload runs in the background."""
    output_dir = tmp_path / "run"
    settings = {"max_train_steps": "1000", "validation_sets": None}
    switches = ["--hub_strategy", "every_save", "--resume_from_checkpoint", "auto"]
    with Hub() as hub:
        hub.delay = lambda request: 600.0 if "preupload" in request else 0.0
        process = start(hub, output_dir, *switches, **settings)
        wait_until(lambda: any("preupload" in request for request in hub.requests), "no upload")
        (upload,) = uploads_of(process.pid)
        process.kill()
        process.communicate()
        assert list(output_dir.glob("unfinished-*-upload"))  # it could not be removed
        assert upload.wait(timeout=10) is not None or not upload.is_running()

        hub.requests.clear()
        process = start(hub, output_dir, *switches, **settings)
        wait_until(lambda: any("preupload" in request for request in hub.requests), "no upload")
        assert len(list(output_dir.glob("unfinished-*-upload"))) == 1
        (upload,) = uploads_of(process.pid)
        process.terminate()
        output, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM and "is saved" in errors, errors
    assert "to user/tiny was canceled" in output
    assert not upload.is_running() and not list(output_dir.glob("unfinished*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_last_upload_and_not_the_process(tmp_path, monkeypatch, default_signals, number):
    begun = []

    def sleep(self, folder, *options, **streams):
        begun.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]))
        threading.Timer(0.2, lambda: os.kill(os.getpid(), number)).start()
        threading.Timer(0.7, lambda: os.kill(os.getpid(), number)).start()
        return begun[0]

    monkeypatch.setattr(Uploads, "_push", sleep)
    assert Uploads(tmp_path, "user/tiny", None, print).push_final() == "was interrupted"
    time.sleep(0.5)  # in which the second signal comes: a launcher's, or a second Ctrl-C
    assert begun[0].returncode == -signal.SIGKILL


def test_the_push_command_says_what_is_wrong(tmp_path):
    """Exit code 1: the folder; 2: the command; 3: the Hub, here one that never answers."""
    with Hub() as hub:
        hub.delay = lambda request: 600.0
        program = ["python", "-m", "flow_training.hub", "push"]
        (tmp_path / "run").mkdir()
        for argv, code, part in (
            ([str(tmp_path / "no_run"), "user/tiny"], 1, f"no such folder: {tmp_path / 'no_run'}"),
            ([str(tmp_path / "run"), "user/tiny"], 1, "holds no finished run: model.safetensors, config.json"),
            ([str(tmp_path / "run"), "user/a b"], 2, "'user/a b' is no user/name"),
            ([str(tmp_path / "run")], 2, "user/name"),
        ):
            result = push(hub, [*program, *argv], tmp_path)
            assert result.returncode == code and part in result.stderr, result.stderr
            assert len(result.stderr.splitlines()) == 1 and not hub.requests
        for name in pushing.FINISHED_FILES:
            (tmp_path / "run" / name).write_text("")
        hub.delay, hub.error_status = (
            lambda request: 0.0,
            lambda request: 403 if re.search("create|auth", request) else None,
        )
        hub.repos["model", "user/theirs"] = Repo()  # a token that may read finds it, so there is nothing to create
        result = push(hub, [*program, str(tmp_path / "run"), "user/theirs"], tmp_path)
        assert result.returncode == pushing.UPLOAD_FAILED and "hf auth login" in result.stderr, result.stderr
        assert not any("preupload" in request for request in hub.requests)
        hub.delay = lambda request: 600.0
        argv = ["push", str(tmp_path / "run"), "user/tiny"]
        code = f"import flow_training.hub as hub; hub.TIMEOUT = 0.5; raise SystemExit(hub.main({argv}))"
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=hub.environment(tmp_path), timeout=30
        )
    assert result.returncode == pushing.UPLOAD_FAILED and "timed out" in result.stderr, result.stderr
    assert len(result.stderr.splitlines()) == 1
