"""Two small backbones whose weights ship with the package, for demos, tests and notebooks: a ViT and a Swin.

Both end in 8 × 8 tokens. How they were distilled, and how good they are: `datasets/weights/README.md`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from timm.models import SwinTransformer, VisionTransformer, build_model_with_cfg, generate_default_cfgs, register_model
from timm.models import swin_transformer as swin
from timm.models import vision_transformer as vit


def weights_file(name: str) -> Path:
    """Tells where the weights of a shipped backbone lie, a key of `default_cfgs`: a safetensors file of the package."""
    return Path(__file__).parent / "shipped" / f"{name}.safetensors"


def _cfg(name: str, classifier: str) -> dict[str, Any]:
    return {
        "file": str(weights_file(name)),
        "num_classes": 0,
        "input_size": (3, 64, 64),
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "first_conv": "patch_embed.proj",
        "classifier": classifier,
        "license": "apache-2.0",
    }


_CLASSIFIERS = {"vit_nano_patch8_64": "head", "swin_nano_patch4_window8_64": "head.fc"}
default_cfgs = generate_default_cfgs({name: _cfg(name, classifier) for name, classifier in _CLASSIFIERS.items()})


@register_model  # type: ignore[untyped-decorator]
def vit_nano_patch8_64(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Builds the 2.7 M parameter ViT with 64-pixel input and patches of 8: six blocks of width 192 with three heads.

    As the Swin's, its inputs are normalised with mean and standard deviation 0.5. Other arguments are timm's.
    """
    architecture = {"img_size": 64, "patch_size": 8, "embed_dim": 192, "depth": 6, "num_heads": 3, **kwargs}
    # The filter resamples the position embedding when `img_size` is not 64.
    return build_model_with_cfg(
        VisionTransformer,
        "vit_nano_patch8_64",
        pretrained,
        pretrained_filter_fn=vit.checkpoint_filter_fn,
        **architecture,
    )


@register_model  # type: ignore[untyped-decorator]
def swin_nano_patch4_window8_64(pretrained: bool = False, **kwargs: Any) -> SwinTransformer:
    """Builds the 3.0 M parameter Swin with 64-pixel input, patches of 4 and windows of 8.

    Two blocks of width 96 on 16 × 16 tokens, the second with shifted windows, are merged into six of width 192 on 8 × 8
    tokens, which are one window; the features are their mean.
    """
    stages = {"embed_dim": 96, "depths": (2, 6), "num_heads": (3, 3), "drop_path_rate": 0.0}
    architecture = {"img_size": 64, "patch_size": 4, "window_size": 8, **stages, **kwargs}
    return build_model_with_cfg(
        SwinTransformer,
        "swin_nano_patch4_window8_64",
        pretrained,
        pretrained_filter_fn=swin.checkpoint_filter_fn,
        **architecture,
    )
