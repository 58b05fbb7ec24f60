"""Models from the Hub: real processes against a real HTTP server, most of them without this package."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from forked_process import free_port
from hub_server import Hub, Repo
from test_modeling_raft import tiny_config

from modeling_raft import RaftForOpticalFlow, RaftImageProcessor
from modeling_raft.pipeline_raft import save_pretrained_with_pipeline

SIZE = (70, 90)

# The checkout is installed in the environment that runs the tests: take it off.
WITHOUT_PACKAGE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_raft", "flow_data", "flow_training", "flow_inference"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
"""
COMMON = """
import io, json, os, sys, time
import numpy as np, torch, PIL.Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, pipeline
trust = {"trust_remote_code": True}
paths = ["frame1.png", "frame2.png"]
images = [PIL.Image.open(path) for path in paths]
report = {}
flows = {}

def estimate(model, processor):
    inputs = processor(images, return_tensors="pt")
    with torch.no_grad():
        outputs = model.eval()(**inputs)
    size = images[0].height, images[0].width
    return processor.post_process_optical_flow(outputs, target_sizes=[size])[0]["flow"].numpy()

def refusal(call):
    try:
        call()
    except (OSError, ValueError) as error:
        return str(error)
    return "no error"
"""
FINISH = """
np.savez("flows.npz", **flows)
print(json.dumps(report))
"""


def sha_of(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()


OLD, NEW = sha_of("old"), sha_of("new")


class RunsCode:
    """A pickle that makes a folder when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A server with two models in two versions, one of which has pickled weights only, and a folder for each."""
    root = tmp_path_factory.mktemp("published")
    with Hub() as hub:
        for number, name in enumerate(("old", "new")):
            torch.manual_seed(number)
            model = RaftForOpticalFlow(tiny_config(num_flow_updates=2 + number))
            save_pretrained_with_pipeline(model, RaftImageProcessor(), root / name)
        files = {name: {path.name: path.read_bytes() for path in (root / name).iterdir()} for name in ("old", "new")}
        hub.repos["model", "user/raft"] = Repo([(OLD, files["old"]), (NEW, files["new"])])
        pickled = {name: data for name, data in files["new"].items() if name != "model.safetensors"}
        pickled["pytorch_model.bin"] = pickle.dumps({"weight": RunsCode(root / "executed")})
        hub.repos["model", "user/pickled"] = Repo([(sha_of("pickled"), pickled)])
        hub.repos["model", "user/slow"] = Repo([(sha_of("slow"), files["new"])])
        hub.repos["model", "user/failing"] = Repo([(sha_of("failing"), files["new"])])
        hub.delay = lambda request: 2.0 if request.startswith("GET /user/slow") and "safetensors" in request else 0.0
        hub.error_status = lambda request: 403 if "user/failing" in request else None
        yield SimpleNamespace(hub=hub, folder=root / "new", executed=root / "executed", files=files)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """An empty folder with two frames: what the processes start in; it also has their cache."""
    place = tmp_path_factory.mktemp("place")
    frames = np.random.default_rng(0).integers(0, 256, (2, *SIZE, 3), dtype=np.uint8)
    for number, frame in enumerate(frames, start=1):
        PIL.Image.fromarray(frame).save(place / f"frame{number}.png")
    return place


def run(hub: Hub, place: Path, code: str, **environment: str) -> tuple[dict, dict[str, np.ndarray]]:
    """What a process of its own reports, and the flows that it computed."""
    result = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=place,
        env=hub.environment(place / "cache") | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    with np.load(place / "flows.npz") as flows:
        return json.loads(result.stdout.splitlines()[-1]), dict(flows)


STRANGER = """
try:
    import modeling_raft
except ImportError:
    pass
else:
    sys.exit("the package can be imported: this process proves nothing")
config = AutoConfig.from_pretrained("user/raft", **trust)
model = AutoModel.from_pretrained("user/raft", **trust)
processor = AutoImageProcessor.from_pretrained("user/raft", **trust)
report["config"] = [type(config).__name__, config.num_flow_updates]
report["module"] = type(model).__module__
flows["auto"] = estimate(model, processor)
old = os.environ["OLD"]
flows["auto_old"] = estimate(AutoModel.from_pretrained("user/raft", revision=old, **trust), processor)

pipe = pipeline("optical-flow", model="user/raft", **trust)
flows["images"] = pipe(tuple(images))["flow"].numpy()
flows["paths"] = pipe(tuple(paths))["flow"].numpy()
flows["arrays"] = pipe(tuple(np.array(image) for image in images))["flow"].numpy()
first, second = pipe([tuple(images), tuple(paths)])
flows["first"], flows["second"] = first["flow"].numpy(), second["flow"].numpy()
more = pipe(tuple(images), num_flow_updates=7, return_image=True)
flows["more"] = more["flow"].numpy()
report["image"] = [type(more["image"]).__module__, *more["image"].size]
flows["pipe_old"] = pipeline("optical-flow", model="user/raft", revision=old, **trust)(tuple(images))["flow"].numpy()
report["untrusted"] = refusal(lambda: pipeline("optical-flow", model="user/raft", trust_remote_code=False))

for dtype in ("float16", "bfloat16"):
    half = AutoModel.from_pretrained("user/raft", dtype=getattr(torch, dtype), **trust)
    report[dtype] = [str(half.dtype), str(pipeline("optical-flow", model="user/raft", dtype=dtype, **trust).dtype)]
    flows[dtype] = estimate(half, processor)
for name, device_map in {"cpu": "cpu", "all": {"": "cpu"}, "auto": "auto"}.items():
    flows["map_" + name] = estimate(AutoModel.from_pretrained("user/raft", device_map=device_map, **trust), processor)
mapped = pipeline("optical-flow", model="user/raft", device_map="auto", **trust)
flows["pipe_map"] = mapped(tuple(images))["flow"].numpy()

model.save_pretrained("again")
processor.save_pretrained("again")
pipe.save_pretrained("again_pipe")

for repo in ("user/pickled", "user/nobody", "user/failing"):
    report[repo] = refusal(lambda: AutoModel.from_pretrained(repo, **trust))
    report[repo + " pipeline"] = refusal(lambda: pipeline("optical-flow", model=repo, **trust))
report["unsafe"] = refusal(lambda: AutoModel.from_pretrained("user/raft", use_safetensors=False, **trust))
started = time.monotonic()
flows["slow"] = pipeline("optical-flow", model="user/slow", **trust)(tuple(images))["flow"].numpy()
report["slow"] = time.monotonic() - started
"""

OFFLINE = """
flows["pipe"] = pipeline("optical-flow", model="user/raft", **trust)(tuple(images))["flow"].numpy()
old = os.environ["OLD"]
flows["pipe_old"] = pipeline("optical-flow", model="user/raft", revision=old, **trust)(tuple(images))["flow"].numpy()
flows["again"] = pipeline("optical-flow", model="again", **trust)(tuple(images))["flow"].numpy()
report["never"] = refusal(lambda: AutoModel.from_pretrained("user/never", **trust))

sys.meta_path.pop(0)  # the package is there now
from modeling_raft import RaftForOpticalFlow, RaftImageProcessor
processor = RaftImageProcessor.from_pretrained("user/raft")
flows["class"] = estimate(RaftForOpticalFlow.from_pretrained("user/raft"), processor)
flows["class_old"] = estimate(RaftForOpticalFlow.from_pretrained("user/raft", revision=old), processor)
"""

OWNER = """
from modeling_raft import RaftForOpticalFlow, RaftImageProcessor
from modeling_raft.convert_raft_checkpoint import load_raft
for name in ("old", "new"):
    folder = os.path.join(os.environ["PUBLISHED"], name)
    processor = RaftImageProcessor.from_pretrained(folder)
    flows["local_" + name] = estimate(RaftForOpticalFlow.from_pretrained(folder), processor)
flows["local_more"] = pipeline("optical-flow", model=folder)(tuple(images), num_flow_updates=7)["flow"].numpy()

processor = RaftImageProcessor.from_pretrained("user/raft")
flows["class"] = estimate(RaftForOpticalFlow.from_pretrained("user/raft"), processor)
flows["class_old"] = estimate(RaftForOpticalFlow.from_pretrained("user/raft", revision=os.environ["OLD"]), processor)
flows["load_raft"] = estimate(load_raft("user/raft"), processor)
for name, arguments in {"pipe": {}, "trusting": trust}.items():
    pipe = pipeline("optical-flow", model="user/raft", **arguments)
    report[name] = [type(pipe).__module__, type(pipe.model).__module__]
    flows[name] = pipe(tuple(images))["flow"].numpy()
RaftForOpticalFlow.from_pretrained("user/raft").push_to_hub("user/pushed")
processor.push_to_hub("user/pushed")
for repo in ("user/pickled", "user/nobody", "user/failing"):
    report[repo] = refusal(lambda: RaftForOpticalFlow.from_pretrained(repo))
    report[repo + " load_raft"] = refusal(lambda: load_raft(repo))
"""

DOWN = """
time.sleep = lambda seconds: None  # the client of the Hub would wait 23 seconds in all before it gives up
from modeling_raft import RaftImageProcessor
from modeling_raft.convert_raft_checkpoint import load_raft
flows["cached"] = estimate(load_raft("user/raft"), RaftImageProcessor.from_pretrained("user/raft"))
report["never"] = refusal(lambda: load_raft("user/never"))
"""


@pytest.fixture(scope="module")
def owner(published, place):
    """With the package installed, too: first from the folders that were published, `local_*`, then over the server."""
    return run(published.hub, place, COMMON + OWNER + FINISH, OLD=OLD, PUBLISHED=str(published.folder.parent))


@pytest.fixture(scope="module")
def expected(owner) -> dict[str, np.ndarray]:
    """`old`, `new` and `more`: local models' flow."""
    flows = {name.removeprefix("local_"): flow for name, flow in owner[1].items() if name.startswith("local_")}
    assert flows["new"].shape == (2, *SIZE) and not np.array_equal(flows["new"], flows["old"])
    return flows


@pytest.fixture(scope="module")
def stranger(published, place):
    """What a process without the package reports, and computes, that pulls everything."""
    return run(published.hub, place, WITHOUT_PACKAGE + COMMON + STRANGER + FINISH, OLD=OLD)


def assert_equal(flows: dict[str, np.ndarray], names: str, expected: np.ndarray) -> None:
    for name in names.split():
        np.testing.assert_array_equal(flows[name], expected, err_msg=name)


@pytest.mark.slow
def test_without_the_package_everything_gives_the_local_flow(stranger, expected):
    report, flows = stranger
    assert report["config"] == ["RaftConfig", 3] and report["module"].startswith("transformers_modules.")
    assert_equal(flows, "auto images paths arrays first second slow", expected["new"])
    assert_equal(flows, "auto_old pipe_old", expected["old"])
    assert_equal(flows, "more", expected["more"])
    assert report["image"] == ["PIL.Image", SIZE[1], SIZE[0]]
    assert "trust_remote_code=True" in report["untrusted"]
    assert report["slow"] > 2


@pytest.mark.slow
def test_precisions_and_device_maps(stranger, expected):
    report, flows = stranger
    assert_equal(flows, "map_cpu map_all map_auto pipe_map", expected["new"])
    for dtype in ("float16", "bfloat16"):
        assert report[dtype] == [f"torch.{dtype}"] * 2
        assert flows[dtype].dtype == np.float32
        assert 0 < np.abs(flows[dtype] - expected["new"]).max() < 0.1 * np.abs(expected["new"]).max()


@pytest.mark.slow
def test_a_downloaded_model_is_saved_again_completely(stranger, published, place):
    for name in ("again", "again_pipe"):
        saved = {path.name: path.read_bytes() for path in (place / name).iterdir()}
        assert saved == published.files["new"]


@pytest.mark.slow
def test_with_the_package_there_is_nothing_to_trust(owner, expected):
    report, flows = owner
    assert_equal(flows, "class load_raft pipe trusting", expected["new"])
    assert_equal(flows, "class_old", expected["old"])
    for name in ("pipe", "trusting"):  # the code beside the weights is not even looked at
        assert report[name] == ["modeling_raft.pipeline_raft", "modeling_raft.modeling_raft"]


@pytest.mark.slow
def test_push_to_hub_of_model_and_processor_pushes_the_pipeline_too(owner, published):
    _, pushed = published.hub.repos["model", "user/pushed"].commits[-1]
    assert {name: data for name, data in pushed.items() if name != "README.md"} == published.files["new"]


@pytest.mark.slow
def test_pickles_are_refused_and_not_read(stranger, owner, published):
    for report, names in ((stranger[0], ("", " pipeline")), (owner[0], ("", " load_raft"))):
        for name in names:
            printed = report["user/pickled" + name]
            assert "user/pickled has no weights in safetensors" in printed and "save_pretrained" in printed
    assert "use_safetensors must not be False" in stranger[0]["unsafe"]
    assert not published.executed.exists()
    requested = " ".join(published.hub.requests)
    assert "user/pickled/resolve" in requested and "pytorch_model.bin" not in requested


@pytest.mark.slow
def test_a_failed_download_says_what_to_do(stranger, owner):
    for report, names in ((stranger[0], ("", " pipeline")), (owner[0], ("", " load_raft"))):
        for name in names:
            printed = report["user/nobody" + name]
            assert (
                "user/nobody" in printed
                and "is not a valid model identifier" in printed
                and "hf auth login" in printed
            )
            assert "couldn't connect" in report["user/failing" + name]
    assert "user/failing" in owner[0]["user/failing load_raft"]


@pytest.mark.slow
def test_offline_from_the_cache(stranger, published, place, expected):
    before = len(published.hub.requests)
    report, flows = run(published.hub, place, WITHOUT_PACKAGE + COMMON + OFFLINE + FINISH, OLD=OLD, HF_HUB_OFFLINE="1")
    assert_equal(flows, "pipe again class", expected["new"])
    assert_equal(flows, "pipe_old class_old", expected["old"])
    assert "couldn't find them in the cached files" in report["never"]
    assert len(published.hub.requests) == before


@pytest.mark.slow
def test_a_server_that_is_down_is_reported_and_the_cache_is_used(owner, published, place, expected):
    nobody = f"http://127.0.0.1:{free_port()}"
    report, flows = run(published.hub, place, COMMON + DOWN + FINISH, HF_ENDPOINT=nobody)
    assert_equal(flows, "cached", expected["new"])
    assert "user/never is no folder with a model, and no repository that can be reached" in report["never"]
    assert nobody in report["never"] and "Check your internet connection" in report["never"]
