"""Using a model: flow of pairs and of video, what is occluded in it, and pictures of it."""

from flow_inference.consistency import consistency_error, is_occluded, warp
from flow_inference.prediction import predict_pair
from flow_inference.video import FlowVideo, VideoFlow
from flow_inference.warm_start import project_forward

__all__ = [
    "FlowVideo",
    "VideoFlow",
    "consistency_error",
    "is_occluded",
    "predict_pair",
    "project_forward",
    "warp",
]
