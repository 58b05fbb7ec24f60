"""Launching on several processes and machines, in real processes; and the files for accelerate that configure it."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from forked_process import free_port, run_ranks
from safetensors.torch import load_file
from test_modeling_raft import tiny_config
from tiny_run import PROJECT, environment, flags, log_lines, train

import evaluate_flow
import train_flow
from modeling_raft import RaftForOpticalFlow

ACCELERATE = PROJECT / "configs" / "accelerate"
FILES = sorted(ACCELERATE.glob("*.yaml"))
CPU = ["--mixed_precision", "no"]  # there is no fp16 on a CPU; environment() hides the GPU


def launch(config: str, options: list[str], argv: list[str]) -> subprocess.Popen:
    """Start train_flow.py through a file of configs/accelerate; options win over it."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ACCELERATE / config)]
    command += [*options, str(PROJECT / "train_flow.py"), *argv]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(), cwd=PROJECT
    )


def finish(*processes: subprocess.Popen) -> list[str]:
    """Wait for all; return what each has printed."""
    try:
        printed = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, text in zip(processes, printed, strict=True):
        assert process.returncode == 0, text
    return printed


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> Path:
    """The run that all others repeat."""
    output_dir = tmp_path_factory.mktemp("runs") / "one"
    result = train(output_dir, **SETTINGS)
    assert result.returncode == 0, result.stderr
    return output_dir


SETTINGS = {
    "validation_sets": "synthetic",
    "validation_steps": "2",
    "per_device_train_batch_size": "1",
    "checkpointing_steps": "2",
}


def assert_same_run(ours: Path, theirs: Path, rel: float = 1e-4) -> None:
    """The same metrics up to the order in which numbers are added."""
    assert len(log_lines(ours)) == len(log_lines(theirs)) > 4
    for line, expected in zip(log_lines(ours), log_lines(theirs), strict=True):
        assert line == pytest.approx(expected, rel=rel, abs=1e-7)


@pytest.mark.parametrize(
    ("variable", "name"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_FSDP", "FSDP"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "tensor, context or sequence parallelism"),
    ],
)
def test_settings_that_split_the_model_are_refused_before_anything_is_written(variable, name, tmp_path, monkeypatch):
    monkeypatch.setenv(variable, "true")
    evaluation = ["--model", "nowhere", "--dataset", "synthetic", "--output", str(tmp_path / "report.json")]
    for program, argv in ((train_flow, flags(tmp_path / "run")), (evaluate_flow, evaluation)):
        with pytest.raises(SystemExit) as end:
            program.main(argv)
        assert f"set up for {name} ({variable}=true), which is not supported" in str(end.value)
        assert "`accelerate config`" in str(end.value) and "\n" not in str(end.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_launcher_set_up_for_sharding_is_refused(tmp_path):
    """As `accelerate config` writes it."""
    config = {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2}, "use_cpu": True, "num_processes": 1}
    config |= {"num_machines": 1, "machine_rank": 0, "mixed_precision": "no", "debug": False}
    (tmp_path / "accelerate.yaml").write_text(yaml.safe_dump(config))
    process = launch(str(tmp_path / "accelerate.yaml"), [], flags(tmp_path / "run"))
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and "train_flow.py: error: accelerate is set up for FSDP" in printed, printed
    assert not (tmp_path / "run").exists()


LEAVING = """
import signal, sys, torch.distributed, {program}
from accelerate import PartialState

code = 0
{before}
try:
    {program}.main(sys.argv[1:])
except SystemExit as end:
    code = end.code
assert code == {code}, code
assert PartialState().num_processes == 2
print("left" if not torch.distributed.is_initialized() else "still there")
"""
STOP = "train_flow.terminate_with_launcher = lambda: signal.raise_signal(signal.SIGTERM)"  # the call before step 1


@pytest.mark.slow
@pytest.mark.parametrize(("program", "before", "code"), [("evaluate_flow", "", 0), ("train_flow", STOP, 143)])
def test_processes_leave_their_group_before_they_end(program, before, code, tmp_path):
    """Else torch's threads for gloo may abort them: one in fifty, where more processes run than there are cores."""
    (tmp_path / "leaving.py").write_text(LEAVING.format(program=program, before=before, code=code))
    argv = flags(tmp_path / "run", validation_sets=None, max_train_steps="2")
    if program == "evaluate_flow":
        RaftForOpticalFlow(tiny_config()).save_pretrained(tmp_path / "model")
        argv = ["--model", str(tmp_path / "model"), "--dataset", "synthetic", "--num_flow_updates", "1"]
        argv += ["--synthetic_image_size", "64", "72", "--synthetic_num_pairs", "2"]
    result = run_ranks(tmp_path / "leaving.py", argv, environment(), 2)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("left") == 2 and "still there" not in result.stdout, result.stdout


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_files_are_what_accelerate_reads(path):
    config = load_config_from_file(str(path))  # refuses keys that it does not know
    assert isinstance(config, ClusterConfig)
    written = yaml.safe_load(path.read_text())
    assert all(not isinstance(value, bool) or key in ("use_cpu", "same_network") for key, value in written.items())
    assert config.mixed_precision == ("no" if path.stem == "cpu" else path.stem.rpartition("_")[2])
    several = path.stem.startswith(("gpus", "machines"))
    assert config.distributed_type == (DistributedType.MULTI_GPU if several else DistributedType.NO)
    assert (config.num_processes > 1) == several and config.num_processes % config.num_machines == 0
    assert (config.num_machines > 1) == path.stem.startswith("machines")
    assert config.use_cpu == (path.stem == "cpu")
    assert path.name in written_commands(path)


def written_commands(path: Path) -> str:
    """The command in the comment at a file's head."""
    lines = [line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#")]
    (command,) = [line for line in lines if line.startswith("accelerate launch")]
    return command


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_files_leave_no_option_to_a_guess(path, caplog, monkeypatch):
    """Whatever is left open, `accelerate launch` would warn of, or guess from the machine."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # else it prints how many threads it takes
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "train_flow.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    assert not [record for record in caplog.records if "defaults used instead" in record.message]
    assert arguments.multi_gpu == path.stem.startswith(("gpus", "machines"))
    variables = (
        prepare_multi_gpu_env(arguments) if arguments.multi_gpu else prepare_simple_launcher_cmd_env(arguments)[1]
    )
    assert variables["ACCELERATE_MIXED_PRECISION"] == ("no" if path.stem == "cpu" else path.stem.rpartition("_")[2])
    if path.stem.startswith("machines"):
        for name in ("main_process_ip", "main_process_port", "machine_rank", "num_machines"):
            assert getattr(arguments, name) is not None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "options"),
    [("cpu.yaml", []), ("gpus_fp16.yaml", CPU)],
)
def test_one_machine(config, options, one_process, tmp_path):
    if config.startswith("gpus"):
        options = [*options, "--main_process_port", str(free_port())]
    (printed,) = finish(launch(config, options, flags(tmp_path / "run", **SETTINGS)))
    assert_same_run(tmp_path / "run", one_process)
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"{2 if config.startswith('gpus') else 1} x CPU" in card


@pytest.mark.slow
def test_bf16_on_several_processes(one_process, tmp_path):
    """The launcher passes the precision of its file on as an environment variable."""
    launched = environment() | {"ACCELERATE_MIXED_PRECISION": "bf16"}
    result = run_ranks(PROJECT / "train_flow.py", flags(tmp_path / "run", **SETTINGS), launched, 2)
    assert result.returncode == 0, result.stderr
    settings = yaml.safe_load((tmp_path / "run" / "run_config.yaml").read_text())
    assert settings["mixed_precision"] == "bf16"
    first, expected = log_lines(tmp_path / "run")[0], log_lines(one_process)[0]
    assert first["loss"] == pytest.approx(expected["loss"], rel=0.05) and first["loss"] != expected["loss"]


@pytest.mark.slow
def test_two_machines_do_what_one_process_does(one_process, tmp_path):
    """Half of the run, and the other half after a new start from the checkpoint in the folder that they share."""
    folder = tmp_path / "shared"
    place = ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
    place += ["--num_machines", "2", "--num_processes", "2", "--machine_rank"]
    machines = [launch("machines_fp16.yaml", [*CPU, *place, rank], flags(folder, **SETTINGS)) for rank in ("0", "1")]
    printed = finish(*machines)
    assert_same_run(folder, one_process)
    assert "2 x CPU" in (folder / "README.md").read_text()
    names = {path.name for path in (folder / "checkpoint-2").iterdir()}
    assert {"random_states_0.pkl", "random_states_1.pkl"} <= names
    assert "weights, model card and log are in" in printed[0] and "weights" not in printed[1]  # only once

    before = load_file(folder / "model.safetensors")
    for name in ("model.safetensors", "run_config.yaml", "README.md"):
        (folder / name).unlink()
    argv = flags(folder, "--resume_from_checkpoint", str(folder / "checkpoint-2"), **SETTINGS)
    resumed = run_ranks(PROJECT / "train_flow.py", argv, environment(), 2, machines=True)
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(folder, one_process)
    after = load_file(folder / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.equal(after[name]), name


@pytest.mark.slow
def test_machines_that_share_no_folder_are_refused(tmp_path):
    """They would save checkpoints from which no run can resume."""
    argv = [flags(tmp_path / machine) for machine in ("one", "two")]
    result = run_ranks(PROJECT / "train_flow.py", argv, environment(), 2, machines=True)
    assert result.returncode != 0 and "put it on a file system that all machines share" in result.stderr, result.stderr
    assert not list(tmp_path.rglob("train_log.jsonl"))
