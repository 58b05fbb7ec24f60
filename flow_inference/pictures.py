"""Pictures of a prediction beside the truth."""

import numpy as np
import torch
from torch import Tensor

from flow_data.pictures import draw_flow, hide_unknown, join_row

WHITE_ERROR = 3.0  # pixels; Fl counts errors from there on


def draw_comparison(image1: np.ndarray, flow_gt: np.ndarray, valid: np.ndarray, flow_pred: Tensor) -> np.ndarray:
    """Frame 1, true flow, predicted flow on the same scale, and where they differ, side by side.

    Args:
        image1: `(H, W, 3)` uint8.
        flow_gt: `(H, W, 2)` float32, pixels; unknown flow is white.
        valid: `(H, W)` bool.
        flow_pred: `(2, H, W)`, pixels.

    Returns:
        `(H, 4 * W + 3 * GAP, 3)` uint8. The error is black where it is zero and white from 3 px on.
    """
    truth = torch.from_numpy(flow_gt).permute(2, 0, 1)
    truth_picture, pred_picture = draw_flow(torch.stack([truth, flow_pred]))
    error = torch.linalg.vector_norm(flow_pred - truth, dim=0).numpy() * valid
    error_picture = np.repeat((np.clip(error / WHITE_ERROR, 0, 1) * 255).astype(np.uint8)[..., None], 3, axis=2)
    return join_row([image1, hide_unknown(truth_picture, valid), pred_picture, error_picture])
