"""Fine-tune RAFT with transformers.Trainer, on this project's sources and augmentation.

    python examples/finetune_with_trainer.py --model_name_or_path raft-small.pth --output_dir outputs/mine \
        --train_mix '{pairs: 1}' --data_root datasets --crop_size 256 384 --max_train_steps 200

For those who live with Trainer: its callbacks, DeepSpeed, sweeps. Flags and defaults are train_flow.py's, and so are
samples, their order, augmentation, optimizer and schedule. train_flow.py has more settings, and does more about bad
data, interruptions, validation and the model card. Evaluate with evaluate_flow.py.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
import yaml
from accelerate.utils import patch_environment
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from flow_data.augmentation import augment_dense, augment_sparse
from flow_data.datasets import DATASETS, check_source, is_sparse, load_source
from flow_data.images import disable_image_decoding
from flow_data.sampling import MixSource, RunSampler, TrainingPairs
from flow_inference.devices import choose_device
from flow_training.optimization import make_optimizer, make_schedule
from modeling_raft import RaftImageProcessor
from modeling_raft.convert_raft_checkpoint import load_raft
from modeling_raft.pipeline_raft import save_pretrained_with_pipeline


def load_mix(args: argparse.Namespace) -> TrainingPairs:
    """The sources of `--train_mix`, each with the augmentation that its ground truth allows."""
    mix = []
    for name, repeats in args.train_mix.items():
        check_source(name)
        folder = DATASETS[name].folder
        rows = disable_image_decoding(load_source(name, None if folder is None else Path(args.data_root) / folder))
        augment = augment_sparse if is_sparse(name, rows) else augment_dense
        augment = partial(augment, crop_size=args.crop_size, zoom_range=args.zoom_range)
        mix.append(MixSource(name, rows, repeats, augment))
    return TrainingPairs(mix, args.seed)


class Samples(Dataset):
    """Every sample of the run, in order: which pair it is, and its augmentation, follow from the seed and its number.

    So the Trainer must not shuffle; and what it skips when it resumes is what it has trained on.
    """

    def __init__(self, pairs: TrainingPairs, num_samples: int):
        self.pairs = pairs
        self.keys = list(RunSampler(len(pairs), pairs.seed, 0, num_samples))

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        """What the model's `forward` takes: `pixel_values` `(2, 3, H, W)`, `labels` `(2, H, W)`, `valid` `(H, W)`."""
        sample = self.pairs[self.keys[number]]
        return {name: sample[name] for name in ("pixel_values", "labels", "valid")}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="folder, repository id, or file of weights")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--train_mix", type=yaml.safe_load, required=True, help="'{SOURCE: REPEATS}'")
    parser.add_argument("--data_root", default="datasets", help="folder that holds the data sets' folders")
    parser.add_argument("--crop_size", type=int, nargs=2, default=[384, 512], metavar=("H", "W"))
    parser.add_argument("--zoom_range", type=float, nargs=2, default=[-0.2, 0.5], metavar=("LO", "HI"), help="log2")
    numbers = {"max_train_steps": 100_000, "total_batch_size": 6, "learning_rate": 2e-5, "weight_decay": 5e-5,
               "num_flow_updates": 12, "dataloader_num_workers": 4, "logging_steps": 100, "seed": 1234}  # fmt: skip
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--per_device_train_batch_size", type=int, help="default: total_batch_size / processes")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps, xpu; default: all GPUs if there are any")
    parser.add_argument("--report_to", nargs="+", default=["tensorboard"], help="trackers of transformers, or none")
    parser.add_argument("--resume_from_checkpoint", help="folder of a checkpoint")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        device = {} if args.device is None else {"ACCELERATE_TORCH_DEVICE": choose_device(args.device)}
    except ValueError as error:
        sys.exit(f"finetune_with_trainer.py: error: {error}")
    with patch_environment(**device):
        training_args = TrainingArguments(
            args.output_dir,
            max_steps=args.max_train_steps,
            train_sampling_strategy="sequential",
            max_grad_norm=1.0,
            logging_steps=args.logging_steps,
            dataloader_num_workers=args.dataloader_num_workers,
            report_to=args.report_to,
            seed=args.seed,
        )
    per_device = args.per_device_train_batch_size or max(args.total_batch_size // training_args.world_size, 1)
    accumulation_steps, rest = divmod(args.total_batch_size, per_device * training_args.world_size)
    if rest:
        sys.exit(f"--total_batch_size {args.total_batch_size} is no multiple of processes x {per_device}")
    training_args.per_device_train_batch_size = per_device
    training_args.gradient_accumulation_steps = accumulation_steps

    try:
        model = load_raft(args.model_name_or_path, num_flow_updates=args.num_flow_updates)
        samples = Samples(load_mix(args), args.max_train_steps * args.total_batch_size)
    except (ValueError, OSError) as error:
        sys.exit(f"finetune_with_trainer.py: error: {error}")
    processor = RaftImageProcessor(min_size=model.config.min_image_size)
    optimizer = make_optimizer(model.parameters(), args.learning_rate, args.weight_decay)
    schedule = make_schedule(optimizer, args.learning_rate, args.max_train_steps)
    trainer = Trainer(
        model, training_args, train_dataset=samples, processing_class=processor, optimizers=(optimizer, schedule)
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if trainer.is_world_process_zero():
        save_pretrained_with_pipeline(model, processor, args.output_dir)
        trainer.save_state()  # trainer_state.json has the log


if __name__ == "__main__":
    main()
