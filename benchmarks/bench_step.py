"""Where the time of a training step goes: waiting for data, forward with loss, backward, optimizer.

    python -m benchmarks.bench_step --config configs/finetune_small.yaml --data_root datasets [--flag value ...]

All flags are train_flow.py's. The steps are those that the run would begin with, data workers included; nothing is
saved. The first steps, in which workers start and memory is taken, are left out.
"""

import sys
import time
from collections import defaultdict

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from flow_training.batches import make_batches
from flow_training.config import parse_config
from flow_training.data import training_pairs
from flow_training.model import make_model
from flow_training.optimization import make_optimizer, make_schedule
from flow_training.processes import make_accelerator

WARM_UP = 3
STEPS = 30
PHASES = ("data", "forward", "backward", "optimizer")


def main() -> None:
    accelerator, config = make_accelerator(parse_config(sys.argv[1:]))
    if accelerator.num_processes > 1:
        sys.exit("bench_step: measures one process")
    set_seed(config.seed)
    model = make_model(config)
    fused = accelerator.scaler is None
    optimizer = make_optimizer(model.parameters(), config.learning_rate, config.weight_decay, fused)
    schedule = make_schedule(optimizer, config.learning_rate, config.max_train_steps)
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()
    batches = iter(make_batches(config, training_pairs(config), 0, accelerator))
    passes = accelerator.gradient_accumulation_steps

    table = []
    for _ in range(min(WARM_UP + STEPS, config.max_train_steps)):
        spent: dict[str, float] = defaultdict(float)
        for _ in range(passes):
            start = now(accelerator)
            batch = next(batches)
            if "error" in batch:
                sys.exit(f"bench_step: {batch['error']}")
            inputs = {name: batch[name] for name in ("pixel_values", "labels", "valid")}
            loaded = now(accelerator)
            with accelerator.accumulate(model):
                loss = model(**inputs, num_flow_updates=config.num_flow_updates).loss
                forwarded = now(accelerator)
                accelerator.backward(loss)
                done = now(accelerator)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
                if accelerator.sync_gradients:
                    schedule.step()
            times = (loaded - start, forwarded - loaded, done - forwarded, now(accelerator) - done)
            for phase, seconds in zip(PHASES, times, strict=True):
                spent[phase] += seconds
        table.append([spent[phase] for phase in PHASES])
    measured = np.array(table[WARM_UP:])
    total = measured.sum(1)
    quarter, median, three_quarters = np.percentile(total, (25, 50, 75))
    print("| phase | s, median | share |\n|---|---:|---:|")
    for phase, seconds in zip(PHASES, np.median(measured, axis=0), strict=True):
        print(f"| {phase} | {seconds:.3f} | {seconds / median:.1%} |")
    print(f"| step | {median:.3f} ({quarter:.3f} to {three_quarters:.3f}) | |")
    height, width = config.crop_size
    print(
        f"\n{len(measured)} steps of {config.total_batch_size} pairs of {height} x {width}, {config.num_flow_updates} "
        f"updates, precision {config.mixed_precision}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )


def now(accelerator: Accelerator) -> float:
    """Seconds, once the device has done all it was given."""
    if accelerator.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
