"""train_flow.py as the GPU tests start it: deterministic, and where there are several processes, all on one GPU."""

import os

import torch

torch.use_deterministic_algorithms(True, warn_only=True)  # whether all that is used is deterministic is tested
if "RANK" in os.environ:
    # NCCL refuses two processes on one GPU, gloo does not; to accelerate, each is the only one of its machine.
    os.environ["LOCAL_RANK"] = "0"
    torch.distributed.init_process_group("gloo")

import train_flow  # noqa: E402  # its accelerator must find what is set up above

train_flow.main()
