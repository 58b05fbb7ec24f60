"""The Slurm scripts, run by a shell in which Slurm's commands are replaced."""

import os
import subprocess
from pathlib import Path

import pytest
from conftest import PROJECT

SCRIPTS = PROJECT / "configs" / "slurm"


def write_command(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)


def run(tmp_path: Path, script: str, *argv: str, **variables: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | variables
    command = ["bash", str(SCRIPTS / script), *argv]
    return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=30)


@pytest.mark.parametrize("code", [0, 4])
def test_prediction_passes_its_arguments_and_exit_code_on(tmp_path, code):
    write_command(tmp_path, "python", f'printf "%s\\n" "$OMP_NUM_THREADS" "$@"; exit {code}')
    write_command(tmp_path, "scontrol", "echo requeued")
    result = run(tmp_path, "predict.sbatch", "two words/", "--output", "flow", SLURM_CPUS_PER_TASK="7")
    assert result.returncode == code
    assert result.stdout.splitlines() == ["7", "predict_flow.py", "two words/", "--output", "flow"]


@pytest.mark.slow
def test_prediction_is_requeued_where_the_time_limit_stops_it(tmp_path):
    """Slurm signals the shell; the program gets SIGTERM, ends in its own time, and the job is put into the queue."""
    write_command(
        tmp_path, "python", "trap 'echo stopped; exit 1' TERM; sleep 1; kill -TERM $PPID; sleep 20 & wait $!"
    )
    write_command(tmp_path, "scontrol", 'echo "$@"')
    result = run(tmp_path, "predict.sbatch", "videos/", SLURM_JOB_ID="12")
    assert result.stdout.splitlines() == ["stopped", "requeue 12"] and result.returncode == 1


def test_training_launches_one_process_for_each_gpu_on_each_node(tmp_path):
    write_command(tmp_path, "scontrol", "printf 'node7\\nnode8\\n'")
    write_command(tmp_path, "srun", 'SLURM_NODEID=0 "$@"; SLURM_NODEID=1 "$@"')
    write_command(tmp_path, "accelerate", 'echo "$@"')
    variables = {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_ID": "31", "SLURM_JOB_NODELIST": "n[7-8]"}
    result = run(tmp_path, "train.sbatch", "--config", "configs/chairs.yaml", **variables)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "launch --multi_gpu --num_machines 2 --num_processes 8 "
        f"--machine_rank {rank} --main_process_ip node7 --main_process_port 20031 "
        "train_flow.py --config configs/chairs.yaml --resume_from_checkpoint auto"
        for rank in (0, 1)
    ]
