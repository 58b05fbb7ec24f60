"""Compilation of the model's modules by torch.compile, one graph for each size of frames."""

from modeling_raft import RaftForOpticalFlow

MOST_SIZES = 64  # torch compiles a module for eight sizes only, and then leaves it as it was


def compile_model(model: RaftForOpticalFlow) -> None:
    """Have the encoders, the update block and the upsampling of a model compiled when they are called first.

    Sizes are fixed in each graph, which is faster than graphs for any size; the first pair of each size waits for the
    compiler. Correlation and warm start are not compiled. Results differ from those of other runs by rounding.

    Args:
        model: In eval mode, on its device.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(MOST_SIZES, torch._dynamo.config.recompile_limit)
    for module in (model.feature_encoder, model.context_encoder, model.update_block, model.upsampler):
        module.compile(dynamic=False)
