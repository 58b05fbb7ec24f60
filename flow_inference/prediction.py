"""Flow of one pair of images, whatever their size."""

import numpy as np
import torch
from torch import Tensor

from modeling_raft import RaftForOpticalFlow, RaftImageProcessor


@torch.no_grad()
def predict_pair(
    model: RaftForOpticalFlow,
    image1: np.ndarray,
    image2: np.ndarray,
    num_flow_updates: int | None = None,
    padding: str = "split",
) -> Tensor:
    """Estimate flow from one image to the next.

    Args:
        model: In eval mode, on any device.
        image1: `(H, W, 3)` uint8, RGB.
        image2: The same size.
        num_flow_updates: Updates of the flow; None: as the model's configuration says.
        padding: To multiples of 8 by repeating edges: height `"split"` between both sides, or all at the `"bottom"`;
            `"none"`: the images must fit.

    Returns:
        `(2, H, W)` float32 on the CPU, pixels.

    Raises:
        ValueError: The images differ in size, or do not fit without padding.
    """
    processor = RaftImageProcessor(
        do_pad=padding != "none",
        height_padding="bottom" if padding == "bottom" else "split",
        min_size=model.config.min_image_size,
    )
    inputs = processor([image1, image2], return_tensors="pt", input_data_format="channels_last").to(model.device)
    outputs = model(**inputs, num_flow_updates=num_flow_updates)
    target_sizes = None if padding == "none" else [image1.shape[:2]]
    return processor.post_process_optical_flow(outputs, target_sizes)[0]["flow"].float().cpu()
