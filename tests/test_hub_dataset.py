"""Data sets on the Hub: published, streamed, downloaded, trained on; real processes against a real HTTP server."""

import io
import json
import re
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from forked_process import free_port, run_code, run_script
from hub_server import Hub
from tiny_run import CPU, PROJECT, TINY_MODEL, environment

from flow_data import hub as module
from flow_data.datasets import is_sparse, load_source
from flow_data.features import to_sample
from flow_data.flow_io import decode_flow, write_flow
from flow_data.hub import ParquetRows, flow_is_sparse, load_hub_dataset
from flow_data.hub_upload import plan_shards, publish_to_folder
from flow_data.visualize import draw_flow, mask_invalid
from flow_training.run_log import read_log

SIZE = 72, 88  # h, w
NUM_PAIRS = 7


def make_pairs(root: Path, suffix: str = ".flo", num_pairs: int = NUM_PAIRS) -> Path:
    """A folder of the source `pairs`; the first has a mask."""
    root.mkdir()
    rng = np.random.default_rng(0)
    for number in range(num_pairs):
        for frame in (1, 2):
            pixels = rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(root / f"{number:02d}_img{frame}.png")
        write_flow(root / f"{number:02d}_flow{suffix}", rng.normal(0, 3, (*SIZE, 2)).astype(np.float32))
    mask = np.zeros(SIZE, np.uint8)
    mask[:, 10:] = 255
    PIL.Image.fromarray(mask).save(root / "00_valid.png")
    return root


def run(hub: Hub, cache: Path, *command: str | Path, timeout: int = 300) -> subprocess.CompletedProcess:
    """A process of its own that takes `hub` for the Hub."""
    environment = hub.environment(cache) | CPU
    environment["PYTHONPATH"] = str(PROJECT)
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, cwd=cache, timeout=timeout
    )


def publish(hub: Hub, cache: Path, source: str, root: Path, *flags: str) -> subprocess.CompletedProcess:
    command = ["-m", "flow_data.publish", source, "--data_dir", root, "--repo_id", "user/pairs", *flags]
    return run(hub, cache, *command)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return make_pairs(tmp_path_factory.mktemp("data") / "pairs")


@pytest.fixture
def hub():
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def published(tmp_path_factory, root):
    """A server that holds the pairs in several files."""
    with Hub() as hub:
        cache = tmp_path_factory.mktemp("cache")
        result = publish(hub, cache, "pairs", root, "--max_shard_bytes", "200000")
        assert result.returncode == 0, result.stderr
        yield hub


def files_of(hub: Hub) -> dict[str, bytes]:
    return hub.repos["dataset", "user/pairs"].commits[-1][1]


def assert_same_rows(rows, expected) -> None:
    """The same ids and, bit by bit, the same samples."""
    assert len(rows) == len(expected)
    for number in range(len(expected)):
        assert rows[number]["id"] == expected[number]["id"]
        for array, other in zip(to_sample(rows[number]), to_sample(expected[number]), strict=True):
            np.testing.assert_array_equal(array, other)


# ---- what is published ----


@pytest.mark.slow
def test_anyone_can_read_what_is_published(published, root):
    """With Parquet alone: the files' own bytes, under plain columns, one row to a row group."""
    files = files_of(published)
    shards = sorted(path for path in files if path.endswith(".parquet"))
    assert len(shards) > 1 and shards[0] == f"data/train-00000-of-{len(shards):05d}.parquet"
    assert set(files) - set(shards) == {"README.md"}
    rows = []
    for shard in shards:
        reader = pq.ParquetFile(io.BytesIO(files[shard]))
        assert reader.num_row_groups == reader.metadata.num_rows
        rows += reader.read().to_pylist()
    assert [row["id"] for row in rows] == [f"{number:02d}" for number in range(NUM_PAIRS)]
    for row in rows:
        for column, name in (("image1", "img1.png"), ("image2", "img2.png"), ("flow", "flow.flo")):
            assert row[column] == {
                "path": f"{row['id']}_{name}",
                "bytes": (root / f"{row['id']}_{name}").read_bytes(),
            }
    assert [row["valid"] is not None for row in rows] == [True] + [False] * (NUM_PAIRS - 1)
    mask = np.array(PIL.Image.open(io.BytesIO(rows[0]["valid"]["bytes"])))
    np.testing.assert_array_equal(mask > 0, np.arange(SIZE[1])[None].repeat(SIZE[0], 0) >= 10)
    for row in rows:
        flow, valid = decode_flow(row["flow"]["bytes"], row["flow"]["path"])
        if row["valid"] is not None:
            valid &= mask > 0
        color = np.array(PIL.Image.open(io.BytesIO(row["flow_color"]["bytes"]))).astype(int)
        known = torch.from_numpy(np.where(valid[..., None], flow, 0)).permute(2, 0, 1)
        expected = mask_invalid(draw_flow(known), valid)
        assert color.shape == (*SIZE, 3) and np.abs(color - expected).mean() < 12  # a JPEG of noise
        assert np.abs(color - 255).mean() > 20 and row["flow_color"]["path"] == f"{row['id']}_flow.jpg"
    schema = pq.read_schema(io.BytesIO(files[shards[0]]))
    assert json.loads(schema.metadata[b"huggingface"])["info"]["features"]["flow_color"]["_type"] == "Image"
    assert b"OpticalFlow" not in schema.metadata[b"huggingface"]  # else only this package could open it


@pytest.mark.slow
def test_the_card_states_terms_and_count(published):
    card = files_of(published)["README.md"].decode()
    assert f"{NUM_PAIRS} pairs in split `train`" in card and "the user's to state" in card
    assert "license: other" in card and "path: data/train-*" in card and "n<1K" in card


@pytest.mark.slow
def test_publishing_again_replaces_old_files(hub, tmp_path, root):
    assert publish(hub, tmp_path, "pairs", root, "--max_shard_bytes", "200000").returncode == 0
    before = set(files_of(hub))
    result = publish(hub, tmp_path, "pairs", root)
    assert result.returncode == 0, result.stderr
    assert {path for path in files_of(hub) if path.endswith(".parquet")} == {"data/train-00000-of-00001.parquet"}
    assert len(before) > 2


@pytest.mark.slow
def test_an_upload_that_breaks_off_goes_on(hub, tmp_path, root):
    puts = []

    def fail_second_upload(request):
        if request.startswith("PUT"):
            puts.append(request)
            return 403 if len(puts) == 2 else None
        return None

    hub.error_status = fail_second_upload
    result = publish(hub, tmp_path, "pairs", root, "--max_shard_bytes", "200000")
    assert result.returncode == 1
    assert "run it again to resume" in result.stderr and "Traceback" not in result.stderr
    assert "README.md" not in files_of(hub)  # nothing half is shown
    hub.error_status = lambda request: None
    hub.requests.clear()
    result = publish(hub, tmp_path, "pairs", root, "--max_shard_bytes", "200000")
    assert result.returncode == 0, result.stderr
    assert puts[0] not in hub.requests and puts[1] in hub.requests  # what went through is not sent again
    assert "README.md" in files_of(hub)


@pytest.mark.slow
@pytest.mark.parametrize(("status", "message"), [(401, "user/pairs"), (403, "user/pairs")])
def test_a_refused_token_shows_before_any_work(hub, tmp_path, root, status, message):
    hub.error_status = lambda request: status if request == "POST /api/repos/create" else None
    result = publish(hub, tmp_path, "pairs", root)
    assert result.returncode == 1 and "cannot create the data set" in result.stderr and message in result.stderr
    assert "Traceback" not in result.stderr and not any("PUT" in request for request in hub.requests)


@pytest.mark.slow
def test_nothing_damaged_is_published(hub, tmp_path):
    root = make_pairs(tmp_path / "pairs", num_pairs=2)
    (root / "01_flow.flo").write_bytes((root / "01_flow.flo").read_bytes()[:-1])
    result = publish(hub, tmp_path, "pairs", root)
    assert result.returncode == 1 and "01_flow.flo: truncated" in result.stderr
    assert files_of(hub) == {}


def test_shards_hold_every_row_once(root):
    dataset = load_source("pairs", root)
    for size in (1, 200_000, 10**9):
        shards = plan_shards(dataset, "train", size)
        assert [number for shard in shards for number in shard.rows] == list(range(NUM_PAIRS))
        assert all(shard.path.endswith(f"-of-{len(shards):05d}.parquet") for shard in shards)
    assert len(plan_shards(dataset, "train", 1)) == NUM_PAIRS and len(plan_shards(dataset, "train", 10**9)) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sintel_claen", "--repo_id", "a/b"], "did you mean 'sintel_clean'"),
        (["sintel_clean", "--repo_id", "a/b"], "--data_dir is missing"),
        (["sintel_clean", "--repo_id", "a/b", "--data_dir", "x", "--split", "trainig"], "split must be one of"),
        (["sintel_clean", "--repo_id", "a/b", "--data_dir", "x", "--max_shard_bytes", "0"], "at least 1"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, capsys):
    from flow_data.publish import main

    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


# ---- reading ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory, root) -> Path:
    """What would be published, on the disk."""
    folder = tmp_path_factory.mktemp("published")
    publish_to_folder("pairs", {"train": load_source("pairs", root)}, folder, max_shard_bytes=200_000)
    return folder


@pytest.mark.parametrize("streaming", [True, False])
def test_rows_are_those_of_the_source(folder, root, streaming):
    rows = load_hub_dataset(str(folder), streaming=streaming)
    assert_same_rows(rows, load_source("pairs", root))
    assert not to_sample(rows[0]).valid.all()  # the mask came along
    assert not flow_is_sparse(rows)


@pytest.mark.parametrize("streaming", [True, False])
def test_splits_are_separate(tmp_path, root, streaming):
    pairs = load_source("pairs", root)
    splits = {"train": pairs.select(range(4)), "validation": pairs.select(range(4, NUM_PAIRS))}
    publish_to_folder("pairs", splits, tmp_path, 10**9)
    for split, expected in (*splits.items(), ("all", pairs)):
        assert_same_rows(load_hub_dataset(str(tmp_path), split, streaming=streaming), expected)


@pytest.mark.parametrize("streaming", [True, False])
def test_kitti_flow_is_taken_as_sparse(tmp_path, streaming):
    root = make_pairs(tmp_path / "pairs", ".png", num_pairs=2)
    publish_to_folder("pairs", {"train": load_source("pairs", root)}, tmp_path / "out", 10**9)
    rows = load_hub_dataset(str(tmp_path / "out"), streaming=streaming)
    assert flow_is_sparse(rows)
    assert_same_rows(rows, load_source("pairs", root))


def test_row_numbers_end_where_the_rows_do(folder):
    rows = load_hub_dataset(str(folder), streaming=True)
    assert isinstance(rows, ParquetRows) and len(rows) == NUM_PAIRS
    for number in (-1, NUM_PAIRS):
        with pytest.raises(IndexError, match=f"row {number} of {NUM_PAIRS}"):
            rows[number]


@pytest.mark.parametrize("streaming", [True, False])
def test_a_wrong_split_or_column_is_named(folder, tmp_path, streaming):
    with pytest.raises(ValueError, match="has no split trian; it has train"):
        load_hub_dataset(str(folder), "trian", streaming=streaming)
    table = pq.read_table(folder / "data")
    pq.write_table(table.drop_columns(["flow"]), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="it lacks flow; it has the columns id, image1, image2, valid"):
        load_hub_dataset(str(tmp_path), streaming=streaming)
    with pytest.raises(OSError, match="nowhere"):
        load_hub_dataset(str(tmp_path / "nowhere"), streaming=streaming)


@pytest.mark.parametrize("streaming", [True, False])
def test_any_kitti_flow_makes_it_sparse_as_in_files(tmp_path, streaming):
    root = make_pairs(tmp_path / "pairs", num_pairs=3)
    (root / "02_flow.flo").unlink()
    write_flow(root / "02_flow.png", np.zeros((*SIZE, 2), np.float32))
    pairs = load_source("pairs", root)
    publish_to_folder("pairs", {"train": pairs}, tmp_path / "out", 10**9)
    assert is_sparse("pairs", pairs) and flow_is_sparse(load_hub_dataset(str(tmp_path / "out"), streaming=streaming))


@pytest.mark.parametrize("streaming", [True, False])
def test_columns_of_others_are_read_or_refused_alike(folder, tmp_path, streaming):
    """Images as bare bytes are taken; flow as numbers is not."""
    table = pq.read_table(folder / "data").drop_columns(["id", "valid"])
    bare = [image["bytes"] for image in table["image1"].to_pylist()]
    (tmp_path / "bare").mkdir()
    pq.write_table(table.set_column(0, "image1", pa.array(bare)), tmp_path / "bare" / "train.parquet")
    rows = load_hub_dataset(str(tmp_path / "bare"), streaming=streaming)
    expected = load_hub_dataset(str(folder))
    np.testing.assert_array_equal(to_sample(rows[3]).image1, to_sample(expected[3]).image1)
    (tmp_path / "numbers").mkdir()
    numbers = table.set_column(table.column_names.index("flow"), "flow", pa.array([1.0] * NUM_PAIRS))
    pq.write_table(numbers, tmp_path / "numbers" / "train.parquet")
    with pytest.raises(OSError, match="dataset_name: cannot read .*numbers: a column must be of paths or of 'bytes'"):
        load_hub_dataset(str(tmp_path / "numbers"), streaming=streaming)


def test_damage_is_reported_with_the_row(folder, tmp_path):
    table = pq.read_table(folder / "data")
    flows = table["flow"].to_pylist()
    flows[2]["bytes"] = flows[2]["bytes"][:-1]
    incomplete = table.set_column(table.column_names.index("flow"), "flow", pa.array(flows))
    pq.write_table(incomplete, tmp_path / "train.parquet", row_group_size=1)
    rows = load_hub_dataset(str(tmp_path), streaming=True)
    assert to_sample(rows[1]).valid.all()
    with pytest.raises(OSError, match="cannot read row 2 of .*02_flow.flo: truncated"):
        rows[2]
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(OSError, match=f"cannot read {tmp_path}"):
        load_hub_dataset(str(tmp_path), streaming=True)


def test_data_sets_without_ids_or_masks_will_do(folder, tmp_path):
    table = pq.read_table(folder / "data").drop_columns(["id", "valid"])
    pq.write_table(table, tmp_path / "train.parquet", row_group_size=3)
    for streaming in (True, False):
        rows = load_hub_dataset(str(tmp_path), streaming=streaming)
        assert [rows[number]["id"] for number in (0, 4)] == ["00000000", "00000004"]
        assert to_sample(rows[4]).flow.shape == (*SIZE, 2)


def test_nothing_is_read_but_the_columns_and_by_no_other_thread(folder, tmp_path, monkeypatch):
    """Columns of others, here large ones, are left out; Arrow's threads may abort a process that ends after them."""
    table = pq.read_table(folder / "data")
    for place in (0, 2, table.num_columns + 2):
        other = [np.random.default_rng(place).bytes(50_000) for _ in range(NUM_PAIRS)]
        table = table.add_column(place, f"other{place}", pa.array(other))
    pq.write_table(table, tmp_path / "train.parquet", row_group_size=2)
    rows = load_hub_dataset(str(tmp_path), streaming=True)
    taken, readers = [], set()

    class PartSpy(module._FilePart):
        def read(self, *size):
            readers.add(threading.get_ident())
            return super().read(*size)

    class FileSpy(io.FileIO):
        def read(self, *size):
            taken.append(super().read(*size))
            return taken[-1]

    monkeypatch.setattr(module, "_FilePart", PartSpy)
    monkeypatch.setattr(rows, "_open", FileSpy)
    assert_same_rows(rows, load_hub_dataset(str(folder)))
    assert readers == {threading.get_ident()}
    group = pq.read_metadata(tmp_path / "train.parquet").row_group(0)
    chunks = [group.column(index) for index in range(group.num_columns)]
    unread = re.compile(r"other|flow_color")  # the latter is for people
    needed = sum(chunk.total_compressed_size for chunk in chunks if not unread.match(chunk.path_in_schema))
    assert sum(map(len, taken[:2])) == needed  # two parts, around the middle one
    assert needed < sum(chunk.total_compressed_size for chunk in chunks) - 140_000


def test_a_file_truncated_meanwhile_is_reported(folder, tmp_path):
    pq.write_table(pq.read_table(folder / "data"), tmp_path / "train.parquet", row_group_size=1)
    rows = load_hub_dataset(str(tmp_path), streaming=True)
    whole = (tmp_path / "train.parquet").read_bytes()
    (tmp_path / "train.parquet").write_bytes(whole[: len(whole) // 2])
    assert rows[0]["id"] == "00"
    with pytest.raises(OSError, match="cannot read row 6 of .*the file ends before byte"):
        rows[6]


def test_large_row_groups_are_not_streamed(folder, tmp_path, monkeypatch):
    pq.write_table(pq.read_table(folder / "data"), tmp_path / "train.parquet")
    monkeypatch.setattr("flow_data.hub.MAX_ROW_GROUP_BYTES", 100_000)
    with pytest.raises(ValueError, match="each pair would cost a row group"):
        load_hub_dataset(str(tmp_path), streaming=True)
    assert len(load_hub_dataset(str(tmp_path))) == NUM_PAIRS


def test_only_parquet_is_streamed(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"image1": "a"}\n')
    with pytest.raises(ValueError, match=r"not in Parquet .*train\.jsonl.*without --streaming"):
        load_hub_dataset(str(tmp_path), streaming=True)


READ_ALL = """
import json, sys
from flow_data.hub import load_hub_dataset
dataset = load_hub_dataset("user/pairs", streaming=sys.argv[1] == "streaming")
rows = [dataset[i] for i in range(len(dataset))]
print(json.dumps([[row["id"], float(row["flow"]["flow"].sum())] for row in rows]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["streaming", "downloaded"])
def test_round_trip_over_the_server(published, root, tmp_path, how):
    published.requests.clear()
    result = run(published, tmp_path, "-c", READ_ALL, how)
    assert result.returncode == 0, result.stderr
    expected = [[row["id"], float(row["flow"]["flow"].sum())] for row in load_source("pairs", root)]
    assert json.loads(result.stdout) == expected
    downloads = [request for request in published.requests if request.startswith("GET") and ".parquet" in request]
    if how == "streaming":
        footers = len([path for path in files_of(published) if path.endswith(".parquet")])
        assert len(downloads) == footers + NUM_PAIRS  # one request a row
        assert all(path.stat().st_size < 10_000 for path in tmp_path.rglob("*"))  # no pair was left on the disk


@pytest.mark.slow
def test_a_downloaded_data_set_is_read_offline(published, tmp_path):
    assert run(published, tmp_path, "-c", READ_ALL, "downloaded").returncode == 0
    published.error_status = lambda request: 401
    again = run(published, tmp_path, "-c", READ_ALL, "downloaded")
    streamed = run(published, tmp_path, "-c", READ_ALL, "streaming")
    published.error_status = lambda request: None
    assert again.returncode == 0 and len(json.loads(again.stdout)) == NUM_PAIRS, again.stderr
    assert streamed.returncode == 1 and "OSError: dataset_name: cannot read user/pairs" in streamed.stderr
    assert "without --streaming" in streamed.stderr


@pytest.mark.slow
def test_streaming_rides_out_a_hiccup_and_names_what_lasts(published, tmp_path):
    failed = []

    def hiccup(request):
        if request.startswith("GET") and ".parquet" in request and len(failed) < 1:
            failed.append(request)
            return 503
        return None

    published.error_status = hiccup
    result = run(published, tmp_path, "-c", READ_ALL, "streaming")
    assert result.returncode == 0 and failed, result.stderr
    published.error_status = lambda request: 403 if request.startswith("GET") and ".parquet" in request else None
    result = run(published, tmp_path, "-c", READ_ALL, "streaming")
    published.error_status = lambda request: None
    assert result.returncode == 1 and "OSError: dataset_name: cannot read user/pairs" in result.stderr


# ---- training ----

DRAW_IDS = """
import json, sys
import numpy as np
from accelerate import Accelerator
from flow_training.config import parse_config
from flow_training.data import make_batches, training_pairs
from flow_training.processes import make_accelerator
accelerator, config = make_accelerator(parse_config(sys.argv[2:]))
batches = make_batches(config, training_pairs(config), 0, accelerator)
ids = [[id_, float(flow.double().sum())] for batch in batches for id_, flow in zip(batch["id"], batch["labels"])]
with open(f"{sys.argv[1]}/{accelerator.process_index}.json", "w") as file:
    json.dump(ids, file)
"""
RUN = [
    *"--output_dir out --crop_size 64 72 --model_size small --num_flow_updates 2 --total_batch_size 2".split(),
    *"--learning_rate 1e-3 --logging_steps 1 --report_to none --config_overrides".split(),
    TINY_MODEL,
]


def draw(hub: Hub, folder: Path, processes: int, workers: int, *flags: str) -> list[list]:
    """(id, sum of the augmented flow) of every sample of a run, over all processes."""
    folder.mkdir()
    (folder / "draw_ids.py").write_text(DRAW_IDS)
    launch = [] if processes == 1 else ["-m", "accelerate.commands.launch", "--multi_gpu"]
    if processes > 1:
        launch += ["--num_processes", str(processes), "--main_process_port", str(free_port())]
    command = [*launch, "draw_ids.py", str(folder), *RUN, "--dataloader_num_workers", str(workers), *flags]
    result = run(hub, folder, *command)
    assert result.returncode == 0, result.stderr
    return [pair for file in sorted(folder.glob("*.json")) for pair in json.loads(file.read_text())]


@pytest.mark.slow
def test_streaming_sees_every_sample_once_per_epoch(published, root, tmp_path):
    """Two epochs: each pair twice, whatever the processes and workers, drawn as from the files themselves."""
    hub_flags = ["--dataset_name", "user/pairs", "--streaming", "--max_train_steps", str(NUM_PAIRS)]
    draws = {
        (processes, workers): draw(published, tmp_path / f"{processes}{workers}", processes, workers, *hub_flags)
        for processes, workers in ((1, 0), (2, 2))
    }
    for drawn in draws.values():
        assert Counter(id_ for id_, _ in drawn) == {f"user/pairs/{n:02d}": 2 for n in range(NUM_PAIRS)}
        assert len({flow for _, flow in drawn}) == 2 * NUM_PAIRS  # augmented anew in the second epoch
    local_flags = ["--train_mix", "{pairs: 1}", "--pairs_path", str(root), "--max_train_steps", str(NUM_PAIRS)]
    result = run_code(DRAW_IDS, [tmp_path, *RUN, "--dataloader_num_workers", "0", *local_flags], environment())
    assert result.returncode == 0, result.stderr
    local = json.loads((tmp_path / "0.json").read_text())
    local = sorted([id_.replace("pairs/", "user/pairs/", 1), flow] for id_, flow in local)
    assert sorted(draws[1, 0]) == sorted(draws[2, 2]) == local


@pytest.mark.slow
def test_training_is_the_same_streamed_downloaded_and_from_files(published, root, tmp_path):
    ways = {
        "files": ["--train_mix", "{pairs: 1}", "--pairs_path", str(root)],
        "streamed": ["--dataset_name", "user/pairs", "--streaming"],
        "downloaded": ["--dataset_name", "user/pairs"],
    }
    logs = {}
    for name, flags in ways.items():
        argv = [*RUN, "--max_train_steps", "3", "--dataloader_num_workers", "1", *flags]
        argv += ["--output_dir", str(tmp_path / name / "out")]
        (tmp_path / name).mkdir()
        if name == "files":
            result = run_script(PROJECT / "train_flow.py", argv, environment())
        else:
            result = run(published, tmp_path / name, PROJECT / "train_flow.py", *argv)
        assert result.returncode == 0, result.stderr
        lines = read_log(tmp_path / name / "out" / "train_log.jsonl")
        logs[name] = [{key: value for key, value in line.items() if key != "pairs_per_second"} for line in lines]
    assert logs["files"] == logs["streamed"] == logs["downloaded"] and len(logs["files"]) == 3
    card = (tmp_path / "streamed" / "out" / "README.md").read_text()
    assert "`user/pairs` on the Hub" in card and "datasets:\n- user/pairs" in card


@pytest.mark.slow
def test_training_without_its_data_set_is_reported(published, tmp_path):
    command = [PROJECT / "train_flow.py", *RUN, "--max_train_steps", "1", "--dataset_name", "user/nothing"]
    result = run(published, tmp_path, *command)
    assert result.returncode == 1 and "dataset_name: cannot read user/nothing" in result.stderr
    assert "Traceback" not in result.stderr
