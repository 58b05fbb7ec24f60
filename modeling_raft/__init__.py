"""RAFT for optical flow as a Hugging Face model."""

from transformers import AutoConfig, AutoImageProcessor, AutoModel
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_raft import RaftConfig
from .image_processing_raft import RaftImageProcessor
from .loss_raft import sequence_loss
from .modeling_raft import RaftForOpticalFlow, RaftOutput
from .pipeline_raft import OpticalFlowPipeline

__all__ = [
    "OpticalFlowPipeline",
    "RaftConfig",
    "RaftForOpticalFlow",
    "RaftImageProcessor",
    "RaftOutput",
    "sequence_loss",
]

# save_pretrained writes this code beside the weights, for users who do not have the package ...
RaftConfig.register_for_auto_class()
RaftForOpticalFlow.register_for_auto_class("AutoModel")
RaftImageProcessor.register_for_auto_class("AutoImageProcessor")
# ... and those who have it need no trust_remote_code.
AutoConfig.register("raft", RaftConfig, exist_ok=True)
AutoModel.register(RaftConfig, RaftForOpticalFlow, exist_ok=True)
AutoImageProcessor.register(RaftConfig, image_processor_classes={"torchvision": RaftImageProcessor}, exist_ok=True)
PIPELINE_REGISTRY.register_pipeline("optical-flow", OpticalFlowPipeline, pt_model=AutoModel, type="image")
RaftConfig.pipeline_is_registered = True
