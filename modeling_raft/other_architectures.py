"""What a state dict is that is no RAFT, by modules that its architecture alone has: for messages, not for loading."""

import re
from collections.abc import Iterable

# Modules that must all be there, in the order in which they are looked for: some networks are a RAFT and more.
SIGNATURES: dict[str, tuple[str, ...]] = {
    "SEA-RAFT": ("upsample_weight.0", "init_conv", "cnet.final_conv"),
    "GMA (RAFT with global motion aggregation)": ("att.to_qk", "update_block.aggregator"),
    "RAFT-Stereo": ("context_zqr_convs", "update_block"),
    "GMFlow or UniMatch": ("feature_flow_attn", "transformer.layers"),
    "FlowFormer": ("memory_encoder", "memory_decoder"),
    "a RAFT of mmflow": ("decoder.gru", "decoder.flow_pred", "context"),
    "FlowNet2": ("flownetc", "flownets_1"),
    "PWC-Net": ("predict_flow6", "upfeat6", "dc_conv1"),
    "FlowNet": ("predict_flow6", "deconv5", "upsampled_flow6_to_5"),
    "SPyNet": ("basic.0.basic.0",),
    "LiteFlowNet": ("features", "matching", "subpixel", "regularization"),
    "a ResNet": ("layer1.0.conv1", "layer4.0.conv1"),
    "a VGG": ("features.0", "classifier.0"),
    "a Vision Transformer": ("blocks.0.attn.qkv",),
    "a Vision Transformer of torchvision": ("encoder.layers.encoder_layer_0",),
    "the UNet of a diffusion model": ("down_blocks.0", "mid_block"),
    "a language model": ("embed_tokens", "layers.0.self_attn"),
    "a BERT": ("embeddings.word_embeddings", "encoder.layer.0"),
}


def recognize_architecture(names: Iterable[str]) -> str | None:
    """The architecture whose tensors have these names, whatever stands before them; None: none that is listed."""
    # In the files of sniklaus (SPyNet, LiteFlowNet) each module is called moduleBasic, in his programs netBasic.
    text = "".join(f".{name}." for name in names)
    text = re.sub("[.](module|net)(?=[A-Z])", ".", text).lower()
    for architecture, modules in SIGNATURES.items():
        if all(f".{module}." in text for module in modules):
            return architecture
    return None
