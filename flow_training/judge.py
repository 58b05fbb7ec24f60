"""Judge labels of a teacher, and weights that were trained on them, where there is no ground truth.

Nothing here measures the error of flow. What is measured are signs of it: how well flow explains the frames, how far a
student is from its teacher's labels on pairs that it was not trained on, and whether its flow still agrees with itself
in both directions. docs/adapting.md has what these signs have missed.

Shapes: `H W` frame. Flow is (x right, y down), pixels; of both directions it is `(2, 2, H, W)`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flow_data.visualize import draw_flow, draw_text, join_row, longest_vector, mask_invalid, stack_rows
from flow_inference.consistency import is_occluded
from flow_inference.labels import ABSOLUTE_TOLERANCE, LabelledPair
from flow_inference.prediction import predict_pair
from modeling_raft import RaftForOpticalFlow
from modeling_raft.correlation_raft import warp

HELD_OUT_SHARE = 0.1  # of the pairs of frames
FEWEST_TO_HOLD_OUT = 10  # pairs of frames, of which one is held out; of fewer, all are trained on
MOST_JUDGED = 16  # pairs of frames, evenly over the footage
MOST_DRAWN = 4
CENSUS_RADIUS = 3  # 7 x 7 pixels
DISPLACEMENT = (5.0, 5.0)  # pixels (x, y) by which flow is made wrong, to see whether the frames can tell
FEWEST_MATCHED = 0.01  # of the pixels of the frames, on which labels can be judged
DISTINGUISHED = 0.9  # a census error of at most this share of that of the wrong flow
MAX_COLLAPSE = 1.25  # factor by which the share of pixels whose flow does not agree with itself may rise
MAX_FAILING = 0.9  # of the pixels, whatever it was before
NEGLIGIBLE_COLLAPSE = 0.02  # of the pixels, which may always be added to that share
# On synthetic pairs, which every adaptation is guarded by. It tells damage from the usual forgetting: in trials the
# error there rose by up to 45 % with the default learning rate, and by 380 % with one of 1e-3, where the error on
# FlyingChairs more than doubled.
MAX_SYNTHETIC_LOSS = 0.5
# Of own labels, the share by which the census error may rise: in trials it rose by 1.9 % or less where the end-point
# error fell, and by 8.8 % where that rose by 28 %.
MAX_CENSUS_LOSS, NEGLIGIBLE_CENSUS_LOSS = 0.05, 0.01  # the latter is not a share: drawn frames are explained exactly


# ---- which pairs ----


def split_pairs(pairs: Sequence[LabelledPair]) -> tuple[list[LabelledPair], list[LabelledPair]]:
    """Split pairs into those to train on and those that are held out, a tenth, evenly over the footage.

    The two have no frame in common: pairs that share one with a pair that is held out are in neither.

    Args:
        pairs: In the order of the footage. Of fewer than ten, none is held out: in a trial, one of six judged wrongly.
    """
    if len(pairs) < FEWEST_TO_HOLD_OUT:
        return list(pairs), []
    count = max(1, round(HELD_OUT_SHARE * len(pairs)))
    held_out = [pairs[(i + 1) * len(pairs) // count - 1] for i in range(count)]
    frames = {frame for pair in held_out for frame in pair.frames}
    trained = [pair for pair in pairs if not frames & set(pair.frames)]
    return (trained, held_out) if trained else (list(pairs), [])


def spread(pairs: Sequence[LabelledPair], most: int) -> list[LabelledPair]:
    """At most so many pairs, evenly over the footage."""
    count = min(most, len(pairs))
    return [pairs[i * len(pairs) // count] for i in range(count)]


# ---- what is measured ----


def predict_both(model: RaftForOpticalFlow, frames: Sequence[np.ndarray], num_flow_updates: int) -> Tensor:
    """Flow from frame 1 to 2 and from 2 to 1, `(2, 2, H, W)` on the CPU."""
    first, second = frames
    ways = [(first, second), (second, first)]
    return torch.stack([predict_pair(model, *way, num_flow_updates=num_flow_updates) for way in ways])


def census_error(frames1: Tensor, frames2: Tensor, flow: Tensor, mask: Tensor) -> tuple[float, int]:
    """Difference of the neighborhoods of pixels in frame 1 and of the places to which flow brings them in frame 2.

    The soft census transform of 7 x 7 pixels, in which changes of brightness cancel out (Meister, Hur & Roth, UnFlow,
    AAAI 2018, section 3.2; Stein 2004).

    Args:
        frames1: `(B, 3, H, W)` in 0..255.
        frames2: The same shape.
        flow: `(B, 2, H, W)`, from frame 1 to frame 2.
        mask: `(B, H, W)` bool, the pixels to compare. Those near the border of either frame are left out.

    Returns:
        The sum over pixels of a difference between 0 and 1, and the number of pixels.
    """
    gray = frames1.new_tensor([0.299, 0.587, 0.114]).reshape(1, 3, 1, 1)
    first, second = (frames1 * gray).sum(1, keepdim=True), (frames2 * gray).sum(1, keepdim=True)
    warped, inside = warp(second, flow)
    border = CENSUS_RADIUS
    kept = (mask & inside)[:, border:-border, border:-border]
    height, width = first.shape[-2:]
    difference = torch.zeros_like(first[:, 0, border:-border, border:-border])
    offsets = range(-border, border + 1)
    for y, x in ((y, x) for y in offsets for x in offsets if (y, x) != (0, 0)):
        window = (..., slice(border + y, height - border + y), slice(border + x, width - border + x))
        center = (..., slice(border, height - border), slice(border, width - border))
        changes = [(image[window] - image[center])[:, 0] for image in (first, warped)]
        signs = [change / (0.81 + change.square()).sqrt() for change in changes]  # constants: UnFlow's
        squared = (signs[0] - signs[1]).square()
        difference += squared / (0.1 + squared)
    difference /= len(offsets) ** 2 - 1
    return float(difference[kept].double().sum()), int(kept.sum())


def check_teacher(
    student: RaftForOpticalFlow, pairs: Sequence[LabelledPair], num_flow_updates: int, own_labels: bool
) -> dict[str, Any]:
    """Find out whether labels explain the frames, and whether they do so better than the student.

    Args:
        student: In eval mode, before training.
        pairs: With their labels.
        num_flow_updates: Of the student.
        own_labels: The student itself is the teacher; then it is not compared with it.

    Returns:
        The mean census errors of the labels (`teacher`), of the `student` and of labels that were made wrong
        (`displaced`), over pixels that both models see in both frames; and `reasons`, why these labels are refused.
    """
    sums, count, total_pixels = np.zeros(3), 0, 0
    for pair in spread(pairs, MOST_JUDGED):
        frames = pair.read_frames()
        labels, mask = pair.read_labels()
        flow = labels if own_labels else predict_both(student, frames, num_flow_updates)
        if not own_labels:
            mask = mask & ~is_occluded(flow, flow.flip(0), ABSOLUTE_TOLERANCE)
        images = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float()
        wrong = labels + torch.tensor(DISPLACEMENT).reshape(1, 2, 1, 1)
        mask = mask & warp(images, wrong)[1] & warp(images, flow)[1]
        for index, candidate in enumerate((labels, flow, wrong)):
            total, pixels = census_error(images, images.flip(0), candidate, mask)
            sums[index] += total
        count += pixels
        total_pixels += mask.numel()
    teacher, own, displaced = (sums / max(count, 1)).tolist()
    reasons = []
    if count < FEWEST_MATCHED * total_pixels:
        reasons.append(
            f"there are too few pixels to judge by, that both models follow to the other frame and back: {count} of "
            f"{total_pixels}"
        )
    elif teacher > DISTINGUISHED * displaced:
        reasons.append(
            f"the frames do not support the labels: their census error is {teacher:.4f}, and {displaced:.4f} where "
            f"they are wrong by {DISPLACEMENT[0]:g} px (noise, or nothing to see)"
        )
    elif not own_labels and teacher >= own:
        reasons.append(
            f"the teacher explains the footage no better than the student: census error {teacher:.4f} against "
            f"{own:.4f}"
        )
    return {"teacher": teacher, "student": own, "displaced": displaced, "pixels": count, "reasons": reasons}


def check_student(
    before: RaftForOpticalFlow,
    after: RaftForOpticalFlow,
    pairs: Sequence[LabelledPair],
    num_flow_updates: int,
    own_labels: bool,
) -> dict[str, Any]:
    """Compare a student before and after training with its labels, with the frames, and with itself.

    The distance to a teacher's labels must have fallen. To its own labels, which are its flow after more updates, a
    student is so near before that the distance rises even where the flow becomes better: with these, nothing shows a
    gain, and the census error shows whether the flow has become worse.

    Args:
        before: In eval mode.
        after: In eval mode.
        pairs: With labels; those that were held out, where there are any.
        num_flow_updates: Of both.
        own_labels: The labels are the student's own.

    Returns:
        Lists of two, before and after: `distance`, the mean distance to the labels in pixels where these are valid;
        `census`, the mean census error of the pixels that the flow before training follows to the other frame and
        back; and `failing`, the share of pixels whose flow forward and backward do not agree with each other, among
        those that the flow before training keeps inside the frame. And `reasons`, why the weights are refused.
    """
    totals = {name: np.zeros((2, 2)) for name in ("distance", "census", "failing")}  # before and after; sum and pixels
    for pair in spread(pairs, MOST_JUDGED):
        frames = pair.read_frames()
        labels, valid = pair.read_labels()
        images = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float()
        flows = [predict_both(model, frames, num_flow_updates) for model in (before, after)]
        inside = warp(flows[0], flows[0])[1]
        matched = inside & ~is_occluded(flows[0], flows[0].flip(0), ABSOLUTE_TOLERANCE) & warp(images, flows[1])[1]
        for index, flow in enumerate(flows):
            error = torch.linalg.vector_norm(flow - labels, dim=1)
            failing = is_occluded(flow, flow.flip(0)) & inside
            totals["distance"][index] += float(error[valid].double().sum()), int(valid.sum())
            totals["census"][index] += census_error(images, images.flip(0), flow, matched)
            totals["failing"][index] += int(failing.sum()), int(inside.sum())
    means = {name: (total[:, 0] / np.maximum(total[:, 1], 1)).tolist() for name, total in totals.items()}
    distance, census, failing = means.values()
    reasons = []
    if not own_labels and not distance[1] < distance[0]:
        reasons.append(
            f"the distance to the teacher's labels has not fallen: {distance[0]:.3f} -> {distance[1]:.3f} px"
        )
    if own_labels and not census[1] <= census[0] + max(MAX_CENSUS_LOSS * census[0], NEGLIGIBLE_CENSUS_LOSS):
        reasons.append(
            f"the flow explains the frames less than before: census error {census[0]:.4f} -> {census[1]:.4f}"
        )
    limit = min(max(MAX_COLLAPSE * failing[0], failing[0] + NEGLIGIBLE_COLLAPSE), MAX_FAILING)
    if not failing[1] <= limit:
        reasons.append(
            f"forward and backward flow disagree on too many pixels: {100 * failing[0]:.1f} -> "
            f"{100 * failing[1]:.1f} %, at most {100 * limit:.1f} %"
        )
    return means | {"reasons": reasons}


def check_guard(before: dict[str, float], after: dict[str, float], limits: dict[str, float]) -> list[str]:
    """Why weights are refused on labelled data.

    Args:
        before: Set -> end-point error before training, pixels.
        after: The same after training.
        limits: Set -> share by which it may rise.
    """
    return [
        f"the end-point error on {name} has risen by more than {100 * limits[name]:g} %: {error:.3f} -> "
        f"{after[name]:.3f} px"
        for name, error in before.items()
        if not after[name] <= (1 + limits[name]) * error
    ]


# ---- visualization ----


def draw_before_after(
    before: RaftForOpticalFlow,
    after: RaftForOpticalFlow,
    pairs: Sequence[LabelledPair],
    num_flow_updates: int,
) -> np.ndarray:
    """Draw some pairs: frame 1, the labels (white where they are not valid), flow before and after training.

    Returns:
        `(h, w, 3)` uint8, a row for each pair; the flow of a row is on one scale.
    """
    rows = []
    for pair in spread(pairs, MOST_DRAWN):
        frames = pair.read_frames()
        labels, valid = pair.read_labels()
        flows = torch.stack(
            [labels[0], *(predict_pair(model, *frames, num_flow_updates) for model in (before, after))]
        )
        known = torch.where(valid[0], labels[0], 0)
        colors = draw_flow(flows, longest_vector(torch.stack([known, flows[1]])))
        parts = [frames[0], mask_invalid(colors[0], valid[0].numpy()), colors[1], colors[2]]
        titles = (pair.id, "labels", "before", "after")
        columns = [stack_rows([draw_text(title), part]) for title, part in zip(titles, parts, strict=True)]
        rows.append(join_row([column[:, : frames[0].shape[1]] for column in columns]))
    return stack_rows(rows)
