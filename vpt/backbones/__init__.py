"""timm in, one `Backbone` out. Nothing outside this folder touches timm's insides."""

from vpt.backbones.factory import Backbone, create_backbone, input_size
from vpt.backbones.heads import pretrained_head
from vpt.backbones.maps import LayerAttention, class_attention
from vpt.backbones.recording import AttentionCall, recording

__all__ = [
    "AttentionCall",
    "Backbone",
    "LayerAttention",
    "class_attention",
    "create_backbone",
    "input_size",
    "pretrained_head",
    "recording",
]
