"""Benchmarks: candidates compute the same, results arrive in the document, and nothing else in it changes."""

import copy
import json
from concurrent.futures.process import BrokenProcessPool

import cv2
import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator

from benchmarks import (
    bench_accuracy,
    bench_adapt,
    bench_collection,
    bench_confidence,
    bench_data,
    bench_gpu,
    bench_inference,
    bench_on_demand,
    bench_runtimes,
    bench_scaling,
    bench_tolerance,
    cost,
    gpu_tables,
    release_weights,
    report,
)
from benchmarks.agreement import check_flows, check_losses, estimate_flows
from benchmarks.candidates import Candidate, make_pairs
from benchmarks.cost import Job
from benchmarks.floor import count_work, floor_seconds, measure_ceilings
from benchmarks.machine import describe_as_sentence, describe_machine
from benchmarks.memory_needed import estimate_bytes, fits
from benchmarks.own_process import in_new_process, peak_bytes, resident_bytes
from benchmarks.rounds import spread, time_in_rounds, times_as_fast
from benchmarks.synthetic_data import write_pairs
from flow_data.datasets import DATASETS, load_source
from flow_data.sample import FlowSample
from flow_training.evaluation import evaluate
from modeling_raft import RaftConfig, RaftForOpticalFlow

CPU = torch.device("cpu")
PEER = Candidate("torchvision", "small")


@pytest.fixture(autouse=True)
def one_thread():
    """For tensors this small, threads wait for each other longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def three(value: float) -> dict[str, float]:
    return {"median": value, "lowest": value - 0.01, "highest": value + 0.01}


def row(name: str, **metrics) -> dict:
    return {"candidate": name, "difference_px": 4e-6} | metrics


@pytest.fixture
def results(tmp_path):
    """Synthetic results of every benchmark, as files; a function writes them again with changes."""
    machine = describe_machine()
    settings = {"runs": 3, "height": 384, "width": 512, "num_flow_updates": 12, "device": "cpu"}
    names = ["torchvision large fp32", "ours large fp32"]
    timed = [row(name, seconds=three(2.5), times_as_fast=three(1.25)) for name in names]
    point = {"seconds": three(0.5), "first_gb": 1.5, "peak_gb": 2.5, "difference_px": 2e-5}
    dense = {"candidate": "ours large fp32 dense"}
    reports = {
        "inference": {"settings": settings, "results": timed},
        "runtimes": {
            "settings": settings | {"model": None},
            "results": [{"candidate": "OpenVINO bf16", "seconds": three(0.75), "times_as_fast": three(2.0),
                         "mean_px": 0.153, "largest_px": 1.5}],
        },
        "training": {"settings": settings | {"batch_size": 2}, "results": timed},
        "memory": {
            "settings": settings | {"batch_size": 2},
            "results": [row(name, peak_gb=three(3.5), share=three(0.62)) for name in names],
        },
        "on_demand": {
            "settings": settings | {"largest": [2176, 3840]},
            "results": [row("ours large fp32 on_demand", seconds=three(7.5), times_as_fast=three(1.0),
                            first_gb=1.25, peak_gb=1.75)],
            "left_out": [{"candidate": names[0], "needed_gb": 15.2}],
            "largest": {"candidate": "ours large fp32 on_demand", "seconds": 70.25, "first_gb": 6.5,
                        "torchvision_needs_gb": 232},
        },
        "scaling": {
            "settings": settings,
            "pixels": [dense | point | {"height": 256, "width": 256}, dense | point | {"height": 512, "width": 512},
                       {"candidate": names[0], "height": 256, "width": 256, "needed_gb": 99.0, "difference_px": None}],
            "updates": [dense | {"num_flow_updates": 4, "seconds": three(1), "difference_px": 3e-5}],
            "training": [row(names[0], num_flow_updates=4, seconds=three(1), first_gb=1.0, peak_gb=2.0)],
        },
        "data": {
            "results": [{"dataset": "chairs", "content": "synthetic",
                         "whole": {"ours_per_s": 131.2, "baseline_per_s": 32.1, "ratio": 4.06}}]
        },
    }  # fmt: skip

    def write(change=lambda reports: None):
        changed = {name: {"machine": dict(machine)} | copy.deepcopy(content) for name, content in reports.items()}
        change(changed)
        for name, content in changed.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return tmp_path

    return write


@pytest.mark.slow
def test_the_report_replaces_what_is_between_the_markers_and_nothing_else(results, tmp_path):
    page = tmp_path / "speed.md"
    before, after = "# Title\n\n| a |\n|---|\n\n", "\n\n## Files é\n"
    page.write_text(f"{before}{report.BEGIN}\nold table\n{report.END}{after}", encoding="utf-8")
    arguments = ["--results", str(results()), "--page", str(page), "--plots", str(tmp_path / "docs")]
    report.main(arguments)
    text = page.read_text(encoding="utf-8")
    assert text.startswith(before + report.BEGIN) and text.endswith(report.END + after)
    assert "old table" not in text
    report.main(arguments)
    assert page.read_text(encoding="utf-8") == text
    images = {path.name for path in (tmp_path / "docs").iterdir()}
    assert images == {"scaling_pixels.png", "scaling_updates.png"}


def test_tables_have_the_results(results):
    lines = report.as_markdown(report.load_reports(results())).splitlines()
    assert "| this project, large, fp32 | 2.50 (2.49 to 2.51) | 1.25 (1.24 to 1.26) | 4e-06 |" in lines
    step = "| this project, large, fp32 | 2.50 (2.49 to 2.51) | 1.25 (1.24 to 1.26) | 3.50 (3.49 to 3.51) | 62% |"
    assert step in lines
    assert "| this project, large, fp32, on demand | 2176x3840 | 70.2 |  | 6.5 |  |" in lines
    assert any("would take about 15" in line for line in lines)
    assert "| OpenVINO bf16 | 0.75 (0.74 to 0.76) | 2.00 (1.99 to 2.01) | 0.2 |" in lines
    assert [line for line in lines if line.startswith("| times ")] == ["| times | 4.1 |"]
    assert any("3e-05 px" in line for line in lines)  # the largest difference is one of the scaling's
    for line, following in zip(lines, lines[1:], strict=False):
        if line.startswith("|") and following.startswith("|"):
            assert line.count("|") == following.count("|")


def test_a_report_refuses_what_it_cannot_compare(results, tmp_path):
    with pytest.raises(ValueError, match="memory.json was measured with torch 1.0"):
        report.load_reports(results(lambda reports: reports["memory"]["machine"].update(torch="1.0")))
    other_batch = results(lambda reports: reports["memory"]["settings"].update(batch_size=4))
    with pytest.raises(ValueError, match="other settings"):
        report.as_markdown(report.load_reports(other_batch))
    report.load_reports(results(lambda reports: reports["data"]["machine"].update(date="1999-12-31", gpu="a GPU")))
    (tmp_path / "scaling.json").unlink()
    with pytest.raises(ValueError, match="no results of scaling"):
        report.load_reports(tmp_path)


@pytest.mark.parametrize(
    "text", ["", report.BEGIN, f"{report.END}{report.BEGIN}", 2 * f"{report.BEGIN}\n{report.END}\n"]
)
def test_a_page_without_one_pair_of_markers_is_refused(text):
    with pytest.raises(ValueError, match="each once"):
        report.put_between(report.BEGIN, report.END, text, "block")


def test_candidates_compute_the_same():
    candidates = [PEER, Candidate("ours", "small"), Candidate("ours", "small", options=("on_demand",))]
    candidates.append(Candidate("ours", "small", options=("dense",)))
    pixel_values, labels = make_pairs(1, 128, 128)
    flows = estimate_flows(candidates, pixel_values, 2)
    assert max(check_flows(candidates, flows).values()) < 1e-3
    flows[candidates[1].name] = flows[candidates[1].name] + 0.01
    with pytest.raises(ValueError, match="do not compute the same"):
        check_flows(candidates, flows)
    flows[candidates[1].name] *= torch.nan
    with pytest.raises(ValueError, match="do not compute the same"):
        check_flows(candidates, flows)
    losses = {c.name: c.training_step(pixel_values, labels, 2)().item() for c in candidates[:2]}
    check_losses(losses, PEER.name)
    with pytest.raises(ValueError, match="has the loss"):
        check_losses(losses | {"ours": 1.1 * losses[PEER.name]}, PEER.name)


def test_a_benchmark_from_its_flags_to_its_file(tmp_path, monkeypatch):
    candidates = [PEER, Candidate("ours", "small"), Candidate("ours", "small", "bf16")]
    monkeypatch.setattr(bench_inference, "CANDIDATES", candidates)
    output = tmp_path / "new" / "inference.json"
    flags = {"runs": 1, "height": 128, "width": 128, "num_flow_updates": 1}
    bench_inference.main(
        [*(word for name, value in flags.items() for word in (f"--{name}", str(value))), "--device", "cpu"]
        + ["--output", str(output)]
    )
    written = json.loads(output.read_text())
    assert flags.items() <= written["settings"].items()
    assert written["machine"].keys() == describe_machine().keys()
    rows = {row["candidate"]: row for row in written["results"]}
    assert list(rows) == [candidate.name for candidate in candidates]
    assert rows["torchvision small fp32"]["times_as_fast"]["median"] == 1
    assert all(row["seconds"]["median"] > 0 for row in rows.values())
    report.inference_table(written)


@pytest.mark.parametrize(
    ("benchmark", "flags", "message"),
    [
        (bench_inference, "--height 132", "--height: must be a multiple of 8, at least 128; got 132"),
        (bench_inference, "--width 64", "--width: must be a multiple of 8, at least 128; got 64"),
        (bench_inference, "--runs many", "--runs: must be a whole number, at least 1; got 'many'"),
        (bench_inference, "--device abacus", "--device: 'abacus' cannot be used"),
        (bench_scaling, "--sizes 256", "--sizes: must be HEIGHTxWIDTH; got '256'"),
        (bench_scaling, "--sizes 256x", "--sizes: must be a whole number, at least 1; got ''"),
        (bench_on_demand, "--largest 8 8", "--largest: must be a multiple of 8, at least 128; got 8"),
        (bench_data, "--samples 0", "--samples: must be a whole number, at least 1; got '0'"),
        (bench_data, "--data_root nowhere", "--data_root: there is no folder nowhere"),
    ],
)
def test_flags_that_make_no_sense_are_refused_by_name(benchmark, flags, message, capsys):
    with pytest.raises(SystemExit) as error:
        benchmark.main(flags.split())
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_what_cannot_fit_is_left_out(monkeypatch):
    """torchvision took 8.4 GB for one pair of 1088x1920, and more for the next one."""
    on_demand, large = Candidate("ours", options=("on_demand",)), Candidate("torchvision")
    assert 8.4e9 < estimate_bytes(large, 1088, 1920) < 20e9
    assert fits(large, 1088, 1920, CPU, free=20 * 10**9) and not fits(large, 1088, 1920, CPU, free=8 * 10**9)
    assert not fits(large, 2176, 3840, CPU, free=85 * 10**9)
    assert 8.4e9 < estimate_bytes(large, 1088, 1920, one_pair=True) < estimate_bytes(large, 1088, 1920)
    assert fits(on_demand, 2176, 3840, CPU, free=24 * 10**9)

    done = []

    def run_here(function, job):
        done.append(job.candidate)
        return cost.run_job(job)

    monkeypatch.setattr(cost, "in_new_process", run_here)
    monkeypatch.setattr("benchmarks.memory_needed.device_memory", lambda device: (10**6, 10**6))
    parser = bench_scaling.make_parser("", runs=1, height=128, width=128, num_flow_updates=1)
    arguments = parser.parse_args(["--device", "cpu"])
    arguments.sizes = [(128, 128)]
    points = bench_scaling.measure_pixels(arguments)
    assert done == [bench_scaling.ON_DEMAND]
    assert ["needed_gb" in point for point in points] == [True, True, False]
    assert points[-1]["seconds"]["median"] > 0


def test_a_process_that_runs_out_of_memory_leaves_no_figure(monkeypatch):
    def break_down(function, job):
        raise BrokenProcessPool("ended")

    monkeypatch.setattr(cost, "in_new_process", break_down)
    assert cost.measure(Job(PEER, "inference", 1, 128, 128, 1)) is None


@pytest.mark.slow
def test_a_figure_comes_from_a_process_of_its_own():
    job = Job(Candidate("ours", "small", options=("checkpointing",)), "training", 1, 128, 128, 2, calls=3)
    block = torch.ones(2**30, dtype=torch.uint8)  # of this process: it must not count
    found = cost.measure(job)
    del block
    assert 0.01 < found.first_gb <= found.peak_gb < 0.9
    assert len(found.seconds) == 2 and found.flow.shape == (1, 2, 128, 128)
    assert found.loss == pytest.approx(cost.run_job(job).loss, rel=1e-4)


def test_peaks_of_memory_count_what_is_gone_again():
    before = resident_bytes()
    block = torch.ones(64 * 2**20, dtype=torch.uint8)
    del block
    assert peak_bytes() >= before + 60 * 2**20


def test_rounds_take_turns_after_one_that_does_not_count():
    order = []
    seconds = time_in_rounds({name: lambda name=name: order.append(name) for name in "ABC"}, 2, CPU)
    assert "".join(order) == "ABC" * 3
    assert [len(taken) for taken in seconds.values()] == [2, 2, 2]
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "lowest": 1.0, "highest": 3.0}
    assert times_as_fast([1.0, 2.0, 4.0], [2.0, 2.0, 2.0]) == {"median": 1.0, "lowest": 0.5, "highest": 2.0}


def test_the_machine_is_described_without_its_name():
    machine = describe_machine()
    sentence = describe_as_sentence(machine)
    assert f"torch {torch.__version__.split('+')[0]}" in sentence and f"{machine['cores']} cores" in sentence
    assert machine["gpu"] is None and machine["memory_gb"] > 0


def test_accuracy_of_models_and_classical_methods(tmp_path, capsys):
    """Each row is the end-point error of its method, a model's that of `evaluate_flow.py` on the same pairs."""
    write_pairs("flying_chairs", tmp_path, (128, 160), 2)
    model = RaftForOpticalFlow(RaftConfig.small())
    model.save_pretrained(tmp_path / "model")
    bench_accuracy.main(
        ["--data_root", str(tmp_path), "--models", f"{tmp_path / 'model'}@2", "--output", str(tmp_path / "out.json")]
    )
    results = json.loads((tmp_path / "out.json").read_text())["results"]["flying_chairs"]
    dataset = load_source("flying_chairs", tmp_path / "FlyingChairs_release", "all")
    report = evaluate(model.eval(), dataset, DATASETS["flying_chairs"].protocol, Accelerator(cpu=True), 2)
    for metric in ("epe", "epe_per_image", "fl_all"):
        assert results[f"{tmp_path / 'model'}@2"][metric] == pytest.approx(report["metrics"][metric])
    assert results["zero flow"]["epe"] == pytest.approx(report["zero_flow_epe"])
    table = capsys.readouterr().out
    for method, metrics in results.items():
        assert f"| {method} | {metrics['epe_per_image']:.2f} |" in table
    assert {"Farneback", "DIS, medium"} < set(results)


def test_sparsification_of_known_errors():
    """Errors 1 to 1000 px: the ideal order leaves the mean of the smaller ones, and the worst one of the larger."""
    error = np.random.default_rng(0).permutation(np.arange(1.0, 1001))
    ideal = bench_confidence.summarize([bench_confidence.sparsify(error, error)])
    assert ideal["ause"] == 0 and ideal["epe"] == 500.5
    assert ideal["curves"]["ideal"][10] == pytest.approx(250.5 / 500.5)  # half of the pixels dropped
    worst = bench_confidence.summarize([bench_confidence.sparsify(error, -error)])
    assert worst["curves"]["by confidence"][10] == pytest.approx(750.5 / 500.5)
    assert worst["ause"] > worst["ause_random"] == pytest.approx(0.95**2 / 2, abs=1e-3)
    unsure = np.where(error > 900, np.inf, 0)  # infinite where flow leaves the frame: dropped first
    assert bench_confidence.sparsify(error, unsure)["by confidence"][2] == pytest.approx(450.5)


@pytest.mark.slow
def test_confidence_and_tolerance_of_real_pairs_are_tabled(tmp_path, capsys):
    write_pairs("flying_chairs", tmp_path, (128, 160), 2)
    RaftForOpticalFlow(RaftConfig.small()).save_pretrained(tmp_path / "model")
    common = ["--data_root", str(tmp_path), "--models", str(tmp_path / "model"), "--num_flow_updates", "3"]
    bench_confidence.main([*common, "--plot", str(tmp_path / "plot.png"), "--output", str(tmp_path / "out.json")])
    result = json.loads((tmp_path / "out.json").read_text())["results"][str(tmp_path / "model")]
    assert result["pairs"] == 2 and 0 <= result["ause"] and (tmp_path / "plot.png").stat().st_size > 5000
    bench_tolerance.main([*common, "--output", str(tmp_path / "tolerance.json")])
    tolerances = json.loads((tmp_path / "tolerance.json").read_text())["results"][str(tmp_path / "model")]
    assert tolerances["None"]["updates"] == 3 and tolerances["None"]["epe"] == pytest.approx(result["epe"], rel=1e-3)
    assert "| none | 3.0 |" in capsys.readouterr().out


def test_collections_are_compared_by_pairs_a_second():
    seconds = {"one process": [4.0], "two processes": [2.0], "one by one": [8.0], "torchvision": [10.0]}
    busy = {"one process": [0.9], "two processes": [0.8, 0.6], "one by one": [], "torchvision": []}
    table = bench_collection.as_table(seconds, busy, 20).splitlines()
    assert table[2:] == [
        "| one process | 5.00 | 2.00 | 2.50 | 90 % |",
        "| two processes | 10.00 | 4.00 | 5.00 | 70 % |",
        "| one by one | 2.50 | 1.00 | 1.25 |  |",
        "| torchvision | 2.00 | 0.80 | 1.00 |  |",
    ]


def test_accuracy_names_a_folder_without_data_sets(tmp_path):
    with pytest.raises(SystemExit, match="--data_root must hold one of .*; got"):
        bench_accuracy.main(["--data_root", str(tmp_path)])


@pytest.fixture
def stage(tmp_path):
    """The output folder of a run on synthetic pairs; a function writes it again with other settings."""

    def write(**settings):
        run = tmp_path / "run"
        RaftForOpticalFlow(RaftConfig.small()).save_pretrained(run)
        config = dict.fromkeys(release_weights.SETTINGS, 1) | {"total_batch_size": 4, "model_name_or_path": None}
        config |= {"train_mix": {"synthetic": 1}, "synthetic_textures": None} | settings
        (run / "run_config.yaml").write_text(yaml.safe_dump(config))
        lines = [{"step": step, "loss": 1.0, "pairs_per_second": 0.5} for step in (450, 900)]
        (run / "train_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return run

    return write


@pytest.mark.slow
def test_released_weights_have_a_card_and_no_code(stage, tmp_path):
    write_pairs("flying_chairs", tmp_path, (128, 160), 1)
    run, output = stage(), tmp_path / "released"
    published = run / "model.safetensors"
    release_weights.release([run], "a GPU", tmp_path, str(published), "Not finished.", output)
    assert {path.name for path in output.iterdir()} == {
        "README.md", "config.json", "model.safetensors", "preprocessor_config.json", "training_stages.json"
    }  # fmt: skip
    card = (output / "README.md").read_text()
    assert (
        "| steps | 900 |" in card
        and "| hours | 2.0 |" in card
        and "| hardware | a GPU |" in card
        and "Not finished." in card
    )
    assert "| **released** |" in card and "| published model@20 |" in card
    expected, released = RaftForOpticalFlow.from_pretrained(run), RaftForOpticalFlow.from_pretrained(output)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(released.state_dict()[name], tensor)

    # A further stage starts from what was released.
    run = stage(model_name_or_path=str(output))
    release_weights.release([run], "a CPU", tmp_path, str(published), "", tmp_path / "further")
    card = (tmp_path / "further/README.md").read_text()
    assert "| | stage 1 | stage 2 |" in card and "| hardware | a GPU | a CPU |" in card


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_mix": {"synthetic": 1, "sintel_clean": 1}}, "train_mix must be synthetic alone"),
        ({"synthetic_textures": "photos"}, "train_mix must be synthetic alone.*photos"),
        ({"model_name_or_path": "raft-things.pth"}, "random weights or from a folder with .*; got raft-things.pth"),
    ],
)
def test_weights_with_other_terms_are_not_released(stage, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        release_weights.release([stage(**settings)], "a CPU", tmp_path, "raft-small.pth", "", tmp_path / "released")
    assert not (tmp_path / "released").exists()


@pytest.mark.slow
def test_other_runtimes_compute_the_same_flow(tmp_path):
    """In a process of its own: OpenVINO leaves a freed stack for signals, and the next one would end this process."""
    distances = in_new_process(distances_of_runtimes, tmp_path / "raft.onnx")
    assert {"onnxruntime fp32", "OpenVINO fp32", "OpenVINO bf16"} < set(distances)
    for name, distance in distances.items():
        assert distance < (1e-3 if "fp32" in name else 0.5), name


def distances_of_runtimes(path):
    """Mean distance in pixels from the flow of PyTorch, of every other runtime."""
    model = Candidate("ours", "small").make_model().eval()
    calls = bench_runtimes.make_calls(model, make_pairs(1, 128, 136)[0], 1, path)
    flows = {name: call() for name, call in calls.items()}
    expected = flows.pop(bench_runtimes.EAGER)
    assert expected.shape == (1, 2, 128, 136)
    return {name: (flow - expected).abs().mean().item() for name, flow in flows.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_work_is_that_of_the_formula(dtype):
    """A convolution, forward and backward, and a product: 2 operations for each product of two numbers."""
    image, weight = (torch.randn(*shape, dtype=dtype).requires_grad_() for shape in ((2, 3, 10, 12), (5, 3, 3, 3)))
    left, right = torch.randn(4, 6, dtype=dtype), torch.randn(6, 7, dtype=dtype)
    forward = count_work(lambda: torch.nn.functional.conv2d(image, weight, padding=1))
    assert dict(forward.operations) == {dtype: 2 * (2 * 5 * 10 * 12) * (3 * 3 * 3)}
    assert forward.bytes == image.element_size() * (2 * 3 * 120 + 5 * 3 * 9 + 2 * 5 * 120)
    both = count_work(lambda: torch.nn.functional.conv2d(image, weight, padding=1).sum().backward())
    assert both.operations[dtype] == 3 * forward.operations[dtype]
    product = count_work(lambda: left @ right)
    assert product.operations[dtype] == 2 * 4 * 6 * 7
    ceilings = {"fp32": 10.0, "tf32": 20.0, "fp16": 40.0, "bf16": 80.0, "bandwidth": 1e9}
    rates = {"fp32": 10.0, "tf32": 20.0} if dtype == torch.float32 else {"fp32": 80.0, "tf32": 80.0}
    for precision, rate in rates.items():
        assert floor_seconds(product, precision, ceilings) == pytest.approx(2 * 4 * 6 * 7 / rate)
    assert floor_seconds(product, "fp32", ceilings | {"bandwidth": 1.0}) == product.bytes
    measured = measure_ceilings(CPU, side=16, copied_bytes=2**12)
    assert measured.keys() == ceilings.keys() and min(measured.values()) > 0


def test_tables_of_a_gpu(tmp_path):
    facts = {"part": "inference", "size": "large", "height": 440, "width": 1024, "num_flow_updates": 12, "batch": 8}
    timed = {"seconds": three(0.5), "times_as_fast": {"torchvision large fp32": three(3.25)}, "mean_px": 2e-3}
    rows = [
        {"part": "ceilings", "fp32": 5e13, "tf32": 4e14, "fp16": 7e14, "bf16": 8e14, "bandwidth": 3e12},
        facts | timed | {"candidate": "ours large bf16 compiled", "peak_gb": 1.234},
        facts | {"candidate": "torchvision large fp32", "failed": "out of memory"},
        facts | {"candidate": "floor bf16", "floor_seconds": 0.125},
        {"part": "video", "failed": "left out: the time was over"},
    ]
    text = gpu_tables.as_markdown({"machine": describe_machine(), "rows": rows})
    lines = text.splitlines()
    assert "| this project, large, bf16, compiled | 500.0 | 16.0 | 3.25 | 125.0 | 1.23 | 0.002 |" in lines
    assert "| torchvision, large, fp32 | out of memory |  |  |  |  |  |" in lines
    assert "**Inference**, large, 440x1024, 12 updates, batch of 8:" in lines
    assert "- video: left out: the time was over" in lines
    assert lines[-1].startswith("Matrix product") and "bf16 800; copy, 3,000 GB" in lines[-1]
    page = tmp_path / "speed.md"
    page.write_text(f"before\n{gpu_tables.BEGIN}\nold\n{gpu_tables.END}\nafter\n")
    gpu_tables.put_on_page(page, text)
    assert page.read_text() == f"before\n{gpu_tables.BEGIN}\n{text}\n{gpu_tables.END}\nafter\n"


@pytest.mark.slow
def test_a_part_whose_time_is_over_is_ended_and_its_rows_count(monkeypatch):
    ceilings = dict.fromkeys(("fp32", "tf32", "fp16", "bf16", "bandwidth"), 1.0)
    (row,) = bench_gpu.run_part("ceilings", "cpu", 300, ceilings)
    assert row["part"] == "ceilings" and row["bandwidth"] > 0
    monkeypatch.setattr(bench_gpu, "GRACE", 0.1)
    (row,) = bench_gpu.run_part("ceilings", "cpu", 0.1, ceilings)
    assert row == {"part": "ceilings", "failed": "not complete: its time was over"}
    (row,) = bench_gpu.run_part("video", "cpu", -1.0, ceilings)
    assert row["failed"].startswith("left out")


def test_footage_is_reduced_with_its_flow_and_stylised():
    """A frame moved by (4, -2) px is, at half size, one moved by (2, -1); a stylised one has few colors."""
    frame = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (72, 90, 3)).astype(np.uint8), (0, 0), 3)
    frame = cv2.normalize(frame, None, 0, 255, cv2.NORM_MINMAX)
    flow = np.broadcast_to(np.float32([4, -2]), (68, 80, 2))
    sample = FlowSample(frame[2:70, 5:85], frame[4:72, 1:81], flow, np.ones((68, 80), bool))
    half = bench_adapt.shrink(sample, 2)
    assert half.size == (34, 40) and half.valid.all() and (half.flow == (2, -1)).all()
    assert np.array_equal(half.image1[1:, :-2], half.image2[:-1, 2:])
    styled = bench_adapt.stylise(sample)
    assert styled.flow is sample.flow and set(np.unique(styled.image1)) <= {0, 51, 102, 153, 204, 255}
    assert len(np.unique(styled.image1)) > 2 and not np.array_equal(styled.image1, styled.image2)
