"""Prediction: flow of image pairs and of video, occlusion, and files and visualizations of flow."""

import importlib
from typing import TYPE_CHECKING, Any

from flow_data.shipped_files import pretrained_path

if TYPE_CHECKING:
    from flow_inference.consistency import consistency_error, is_occluded
    from flow_inference.prediction import predict_pair
    from flow_inference.video import FlowVideo, VideoFlow
    from flow_inference.warm_start import forward_interpolate
    from modeling_raft.correlation_raft import warp

__all__ = [
    "FlowVideo",
    "VideoFlow",
    "consistency_error",
    "is_occluded",
    "predict_pair",
    "pretrained_path",
    "forward_interpolate",
    "warp",
]

# Imported at first use, since torch takes seconds: the commands of this package parse their arguments before it.
_MODULES = {
    "FlowVideo": "flow_inference.video",
    "VideoFlow": "flow_inference.video",
    "consistency_error": "flow_inference.consistency",
    "is_occluded": "flow_inference.consistency",
    "predict_pair": "flow_inference.prediction",
    "forward_interpolate": "flow_inference.warm_start",
    "warp": "modeling_raft.correlation_raft",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
