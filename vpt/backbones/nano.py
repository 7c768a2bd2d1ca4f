"""`vit_nano_patch8_64`: a small ViT whose weights ship with the package, for demos, tests and notebooks.

64-pixel images, patches of 8, six blocks of width 192 with three heads: 2.7 M parameters. The weights were distilled
from AugReg ViT-Ti/16; how, and how good they are, is told in `datasets/weights/README.md`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from timm.models import VisionTransformer, build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import checkpoint_filter_fn

WEIGHTS = Path(__file__).parent / "shipped" / "vit_nano_patch8_64.safetensors"

default_cfgs = generate_default_cfgs(
    {
        "vit_nano_patch8_64": {
            "file": str(WEIGHTS),
            "num_classes": 0,
            "input_size": (3, 64, 64),
            "pool_size": None,
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "fixed_input_size": True,
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "apache-2.0",
        }
    }
)


@register_model  # type: ignore[untyped-decorator]
def vit_nano_patch8_64(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Builds the 2.7 M parameter ViT with 64-pixel input and patches of 8.

    Args:
        pretrained: Load the weights that ship with this package.
        **kwargs: Passed on to timm's `VisionTransformer`.

    Returns:
        The model; its inputs are normalised with mean 0.5 and standard deviation 0.5.
    """
    architecture = {"img_size": 64, "patch_size": 8, "embed_dim": 192, "depth": 6, "num_heads": 3, **kwargs}
    # The filter resamples the position embedding when `img_size` is not 64.
    return build_model_with_cfg(
        VisionTransformer,
        "vit_nano_patch8_64",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        **architecture,
    )
