"""A training run so small that tests can start many: real processes, real checkpoints, seconds each."""

import os
import subprocess
import sys
from pathlib import Path

from forked_process import ForkedProcess, free_port, run_ranks, run_script

from flow_training.run_log import read_log

PROJECT = Path(__file__).resolve().parents[1]
TINY_MODEL = (
    "{feature_dim: 16, hidden_dim: 16, context_dim: 16, encoder_widths: [8, 8, 12, 16], corr_radius: 2, "
    "motion_corr_widths: [16], motion_flow_widths: [16, 16], motion_dim: 18, flow_head_dim: 16}"
)
CPU = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}  # in the environment of a run's processes
TINY_RUN = {
    "train_mix": "{synthetic: 1}",
    "synthetic_image_size": "72 88",
    "synthetic_displacement": "1 4",
    "synthetic_shapes": "1 3",
    "synthetic_num_pairs": "7",
    "synthetic_validation_pairs": "3",
    "crop_size": "64 72",
    "model_size": "small",
    "config_overrides": TINY_MODEL,
    "num_flow_updates": "2",
    "total_batch_size": "4",
    "max_train_steps": "4",
    "learning_rate": "3e-4",  # low: rounding grows fast where gradients are large
    "logging_steps": "1",
    "dataloader_num_workers": "0",
    "report_to": "none",
}


def flags(output_dir: Path, *switches: str, **settings: str | None) -> list[str]:
    """The flags of the tiny run, with some settings changed; a setting that is None is left out."""
    argv = ["--output_dir", str(output_dir), *switches]
    for key, value in (TINY_RUN | settings).items():
        if value is not None:
            argv += [f"--{key}", *([value] if value.startswith("{") else value.split())]
    return argv


def command(output_dir: Path, *switches: str, processes: int = 1, **settings: str | None) -> list[str]:
    """The command line of a run in processes of its own."""
    argv = [sys.executable, str(PROJECT / "train_flow.py")]
    if processes > 1:  # with --cpu instead, accelerate would silently run one process
        launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
        argv[1:1] = [*launch, "--main_process_port", str(free_port())]
    return argv + flags(output_dir, *switches, **settings)


def environment() -> dict[str, str]:
    return os.environ | CPU


def train(
    output_dir: Path, *switches: str, processes: int = 1, max_file_bytes: int | None = None, **settings: str | None
) -> subprocess.CompletedProcess:
    """Run train_flow.py to its end, without a launcher; one process may have a limit on the size of files."""
    argv = flags(output_dir, *switches, **settings)
    if processes > 1:
        return run_ranks(PROJECT / "train_flow.py", argv, environment(), processes)
    return run_script(PROJECT / "train_flow.py", argv, environment(), max_file_bytes)


def start(
    output_dir: Path, *switches: str, processes: int = 1, **settings: str | None
) -> subprocess.Popen | ForkedProcess:
    """Start train_flow.py, in a process group of its own; several processes by accelerate launch."""
    if processes == 1:
        return ForkedProcess(PROJECT / "train_flow.py", flags(output_dir, *switches, **settings), environment())
    argv = command(output_dir, *switches, processes=processes, **settings)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(argv, env=environment(), cwd=PROJECT, start_new_session=True, **pipes)


def log_lines(output_dir: Path) -> list[dict[str, float]]:
    """Lines of the log, without what depends on speed."""
    lines = read_log(output_dir / "train_log.jsonl")
    return [{key: value for key, value in line.items() if key != "pairs_per_second"} for line in lines]
