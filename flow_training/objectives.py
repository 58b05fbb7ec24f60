"""What a run minimizes, by the name that the setting `objective` gives.

To add an objective, write a function like `supervised` and enter it in `OBJECTIVES`. A loss of each prediction that
needs no ground truth is given to the model as `prediction_loss`, and takes as little memory as the supervised one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from flow_training.config import TrainingConfig
from flow_training.metrics import ERROR_SUMS, error_sums, flow_length


class ObjectiveOutput(NamedTuple):
    """What an objective makes of a batch.

    Args:
        loss: Scalar, with its graph.
        totals: Name -> scalar without a graph, summed over the pixels of the batch; `count` is the number of pixels.
            Logged is each total divided by `count`, over all batches and processes since the last line.
    """

    loss: Tensor
    totals: dict[str, Tensor]


class Objective(NamedTuple):
    """An objective and what it needs.

    Args:
        compute: (model, batch, config) -> `ObjectiveOutput`. The model is the prepared one, which takes part in what
            distributes the run. The batch has `pixel_values`, and `labels` and `valid` where all its samples
            have ground truth; all are on the device.
        needs_flow: Whether all training data must have ground truth.
        needs_images_without_photo_aug: Whether the batch has `pixel_values_without_photo_aug` as well: the frames
            without color jitter, erased rectangles and noise, which photometric losses compare.
    """

    compute: Callable[[Any, dict[str, Tensor], TrainingConfig], ObjectiveOutput]
    needs_flow: bool = True
    needs_images_without_photo_aug: bool = False


def supervised(model: Any, batch: dict[str, Tensor], config: TrainingConfig) -> ObjectiveOutput:
    """RAFT's sequence loss against ground truth (paper section 3.4), with the errors of the last prediction.

    The loss is computed in the model's forward pass, where most activations of upsampling need not be kept. The errors
    are over the pixels that the loss counts: valid, and moving less than `max_flow` pixels.
    """
    labels, valid = batch["labels"], batch["valid"]
    output = model(batch["pixel_values"], labels=labels, valid=valid, num_flow_updates=config.num_flow_updates)
    counted = valid & (flow_length(labels) < config.max_flow)
    totals = error_sums(output.flow.detach(), labels, counted).sum(0)
    errors = dict(zip(ERROR_SUMS, totals.unbind(), strict=True))
    del errors["fl_all"]  # of interest on whole images only
    return ObjectiveOutput(output.loss, errors)


OBJECTIVES = {
    "supervised": Objective(supervised),
}


def find_objective(name: str) -> Objective:
    """Find an objective by its name.

    Raises:
        ValueError: There is none of that name.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}; got {name}")
    return OBJECTIVES[name]
