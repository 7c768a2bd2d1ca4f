"""timm in, one `Backbone` out. Nothing outside this folder touches timm's insides."""

from vpt.backbones.factory import Backbone, create_backbone, input_size

__all__ = ["Backbone", "create_backbone", "input_size"]
