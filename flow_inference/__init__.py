"""Prediction: flow of image pairs and of video, occlusion, and files and visualizations of flow."""

from flow_data.shipped_files import pretrained_path
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
