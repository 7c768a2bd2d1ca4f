"""timm in, one `Backbone` out. Nothing outside this folder touches timm's insides."""

from vpt.backbones.attention.recording import (
    AttentionCall,
    ExtraShare,
    LayerAttention,
    class_attention,
    extra_shares,
    recording,
)
from vpt.backbones.checkpoints import pretrained_head
from vpt.backbones.factory import Backbone, create_backbone, input_size

__all__ = [
    "AttentionCall",
    "Backbone",
    "ExtraShare",
    "LayerAttention",
    "class_attention",
    "create_backbone",
    "extra_shares",
    "input_size",
    "pretrained_head",
    "recording",
]
