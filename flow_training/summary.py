"""What a run is about to do, in a few lines, so that a wrong setting is seen before days are spent on it."""

from flow_data.sampling import TrainingPairs
from flow_training.config import TrainingConfig
from flow_training.model import model_size
from modeling_raft import RaftForOpticalFlow


def describe_run(
    config: TrainingConfig,
    model: RaftForOpticalFlow,
    pairs: TrainingPairs,
    validation_counts: dict[str, int],
    accumulation: int,
    devices: str,
    step: int,
) -> str:
    """Model, data, batch arithmetic, precision and devices as lines of text.

    Args:
        config: with everything resolved.
        model: to be trained.
        pairs: its mix.
        validation_counts: validation set -> number of pairs.
        accumulation: forward passes of a process in each optimizer step.
        devices: in words, as `4 x NVIDIA A100`.
        step: optimizer steps that are done already.
    """
    samples = config.max_train_steps * config.total_batch_size
    start = config.model_name_or_path or "random weights"
    size = model_size(model)
    frozen = ", BatchNorm frozen" if config.freeze_batch_norm else ""
    mix = [f"{source.name}: {len(source.dataset):,} pairs x {source.repeats}" for source in pairs.sources]
    per_pass = config.per_device_train_batch_size or 0
    processes = config.total_batch_size // (per_pass * accumulation)
    done = f", of which {step:,} are done" if step else ""
    lines = [
        f"model       RAFT {size}, {model.num_parameters():,} parameters, from {start}{frozen}",
        f"data        {'; '.join(mix)}: an epoch is {len(pairs):,} samples",
        f"batch       {config.total_batch_size} pairs a step = {per_pass} a pass x {accumulation} passes x "
        f"{processes} process{'es' if processes > 1 else ''}",
        f"steps       {config.max_train_steps:,}{done}: {samples:,} samples, {samples / len(pairs):.1f} epochs "
        f"of {config.crop_size[0]} x {config.crop_size[1]} crops",
        f"precision   {config.mixed_precision}, on {devices}",
    ]
    if config.ema_decay is not None:
        lines.append(f"EMA         of the weights, decay {config.ema_decay}: validated and saved as the final model")
    if validation_counts:
        sets = "; ".join(f"{name}: {count:,} pairs" for name, count in validation_counts.items())
        lines.append(f"validation  {sets}: every {config.validation_steps:,} steps and at the end")
    if config.push_to_hub:
        when = "at each checkpoint and at the end" if config.hub_strategy == "every_save" else "at the end"
        private = ", private if it is new" if config.hub_private_repo else ""
        lines.append(f"hub         {config.hub_model_id}{private}: {when}")
    return "\n".join(lines)
