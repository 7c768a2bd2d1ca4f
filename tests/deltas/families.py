"""Every supported timm family at a tiny size, in float64, with every parameter drawn anew."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn

from vpt.backbones.factory import Backbone

TINY: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
WINDOWS: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 2,
    "window_size": 4,
    "embed_dim": 12,
    "depths": (2, 2),
    "num_heads": (2, 2),
}
SEQUENCES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", TINY),
    "qk-norm": ("vit_tiny_patch16_224", TINY | {"qk_norm": True}),
    "scale-norm": ("vit_tiny_patch16_224", TINY | {"scale_attn_norm": True}),
    "avg-pool": ("vit_tiny_patch16_224", TINY | {"global_pool": "avg", "class_token": False}),
    "layer-scale": ("deit3_small_patch16_224", TINY | {"init_values": 1e-6}),
    "deit": ("deit_tiny_patch16_224", TINY),
    "distilled": ("deit_tiny_distilled_patch16_224", TINY),
    "dinov2": ("vit_small_patch14_dinov2", TINY),
    "dinov2-reg": ("vit_small_patch14_reg4_dinov2", TINY),
    "clip": ("vit_base_patch32_clip_224", TINY),
    "siglip": ("vit_base_patch16_siglip_224", TINY),
    "post-norm": ("vit_base_patch16_rpn_224", TINY),
    "post-norm-token": ("vit_base_patch16_rpn_224", TINY | {"class_token": True, "global_pool": "token"}),
    "eva": ("eva_giant_patch14_224", TINY),
    "eva02-fused": ("eva02_tiny_patch14_224", TINY),
    "eva02-split": ("eva02_base_patch14_224", TINY),
    "eva-post-norm": ("eva02_tiny_patch14_224", TINY | {"use_post_norm": True}),
    "eva-token": ("eva02_base_patch16_clip_224", TINY),
    "eva-post-norm-token": ("eva02_tiny_patch14_224", TINY | {"use_post_norm": True, "global_pool": "token"}),
    "dinov3": ("vit_small_patch16_dinov3", TINY),
    "rope-axial": ("vit_base_patch16_rope_224", TINY),
    "rope-mixed": ("vit_base_patch16_rope_mixed_224", TINY),
    "rope-grouped": ("vit_small_patch16_dinov3", TINY | {"attn_type": "rope", "qkv_fused": False, "num_kv_heads": 1}),
    "beit": ("beit_base_patch16_224", TINY),
    "beit-shared": (
        "beit_base_patch16_224",
        TINY | {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True, "global_pool": "token"},
    ),
}
SWINS: dict[str, tuple[str, dict[str, Any]]] = {
    "swin": ("swin_tiny_patch4_window7_224", WINDOWS),
    "swin-padded": ("swin_tiny_patch4_window7_224", WINDOWS | {"img_size": 28, "always_partition": True}),
    "swinv2": ("swinv2_tiny_window8_256", WINDOWS),
}
FAMILIES = SEQUENCES | SWINS


def make(family: str) -> tuple[Backbone, nn.Module]:
    """A float64 backbone and an untouched twin of its timm model with the same parameters."""
    name, options = FAMILIES[family]
    torch.manual_seed(0)
    model, twin = (timm.create_model(name, num_classes=0, **options).double() for _ in range(2))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            scale = 0.5 if key.endswith(("weight", "gamma", "gamma_1", "gamma_2")) and parameter.ndim == 1 else 0.0
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.2) + scale)
    twin.load_state_dict(model.state_dict())
    for module in twin.modules():
        if hasattr(module, "qkv_bias_separate"):
            module.qkv_bias_separate = True  # the order of rounding that opened attention has: equal bit for bit
    return Backbone(model, name, "random", "random", options["img_size"], "none").double(), twin.eval().requires_grad_(
        False
    )


def images(family: str = "vit") -> Tensor:
    size = FAMILIES[family][1]["img_size"]
    return torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(1)).double()


def relative(a: Tensor, b: Tensor) -> float:
    return float(((a - b).norm() / b.norm()).detach())
