"""Where tokens attend in models that timm runs whole: what extra keys and values need to know, and nothing more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from timm.layers import LayerNorm2d
from timm.models import fastvit, mvitv2, nest, nextvit, pvt_v2, tnt, twins, visformer, vision_transformer_sam, volo
from timm.models._efficientnet_blocks import MobileAttention
from timm.models.byobnet import ByobNet
from timm.models.cait import Cait, LayerScaleBlock, LayerScaleBlockClassAttn
from timm.models.crossvit import CrossAttentionBlock, CrossVit
from timm.models.davit import DaVit, SpatialBlock
from timm.models.deepseek_vit import DeepseekVitBlock, DeepseekVitClassifier
from timm.models.eva import EvaBlock
from timm.models.gcvit import GlobalContextVit, GlobalContextVitBlock
from timm.models.gemma4_vit import Gemma4Block, Gemma4VitClassifier
from timm.models.hiera import Hiera, HieraBlock
from timm.models.hieradet_sam2 import HieraDet, MultiScaleBlock
from timm.models.maxxvit import (
    MaxxVit,
    ParallelPartitionAttention,
    PartitionAttention2d,
    PartitionAttentionCl,
    TransformerBlock2d,
)
from timm.models.metaformer import MetaFormer, MetaFormerBlock
from timm.models.mobilenetv3 import MobileNetV3
from timm.models.naflexvit import NaFlexVit
from timm.models.pit import PoolingVisionTransformer
from timm.models.qwen3_vit import Qwen3VitClassifier
from timm.models.swin_transformer_v2_cr import SwinTransformerV2Cr, SwinTransformerV2CrBlock
from timm.models.tiny_vit import TinyVit, TinyVitBlock
from timm.models.vision_transformer import Block, ParallelScalingBlock, ResPostBlock, VisionTransformer
from timm.models.vision_transformer_relpos import RelPosBlock, ResPostRelPosBlock, VisionTransformerRelPos
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vpt.backbones.attention.base import OpenAttention
from vpt.backbones.attention.families import OPEN, open_attention
from vpt.backbones.attention.layers_of_maps import as_map
from vpt.errors import UnsupportedBackboneError


@dataclass(frozen=True, kw_only=True)
class AttentionLayout:
    """Where a model attends, in the order in which it does.

    Attributes:
        blocks: The modules that hold the attention, in order.
        attentions: Their attention modules, opened; with each how many rows of a batch belong to one image.
        norms: What each block applies to tokens (B, n, dim) on their way into the attention; nothing in post-norm ones.
        dims: Width of the tokens in each block.
        patches: Keys of an image in each block, or of one of its windows.
        patch_size: (height, width) in pixels, of the first tokens.
        windowed: Whether tokens attend within windows of a known map (Swin); there is then no sequence that a token
            could be put into.
    """

    blocks: list[nn.Module]
    attentions: list[OpenAttention]
    norms: list[nn.Module]
    dims: list[int]
    patches: list[int]
    patch_size: tuple[int, int]
    windowed: bool = False


# Exact types: a subclass may do anything.
WHOLE = (
    ByobNet,
    Cait,
    CrossVit,
    DaVit,
    DeepseekVitClassifier,
    fastvit.FastVit,
    Gemma4VitClassifier,
    GlobalContextVit,
    Hiera,
    HieraDet,
    MaxxVit,
    MetaFormer,
    MobileNetV3,
    mvitv2.MultiScaleVit,
    NaFlexVit,
    nest.Nest,
    nextvit.NextViT,
    PoolingVisionTransformer,
    pvt_v2.PyramidVisionTransformerV2,
    Qwen3VitClassifier,
    SwinTransformerV2Cr,
    TinyVit,
    tnt.TNT,
    twins.Twins,
    vision_transformer_sam.VisionTransformerSAM,
    visformer.Visformer,
    volo.VOLO,
    VisionTransformer,
    VisionTransformerRelPos,
)
"""Models that timm runs whole: those of no known sequence of tokens, or with other blocks."""

NORMS: dict[type[nn.Module], str | dict[str, str]] = {
    Block: "norm1",
    CrossAttentionBlock: "norm1",
    DeepseekVitBlock: "norm1",
    EvaBlock: "norm1",
    fastvit.AttentionBlock: "norm",
    Gemma4Block: "norm1",
    GlobalContextVitBlock: "norm1",
    HieraBlock: "norm1",
    LayerScaleBlock: "norm1",
    LayerScaleBlockClassAttn: "norm1",
    MetaFormerBlock: "norm1",
    MobileAttention: "norm",
    MultiScaleBlock: "norm1",
    mvitv2.MultiScaleBlock: "norm1",
    nest.TransformerLayer: "norm1",
    nextvit.NextTransformerBlock: "norm1",
    nn.Sequential: "norm",  # of ParallelThingsBlock
    ParallelPartitionAttention: "norm1",
    PartitionAttention2d: "norm1",
    PartitionAttentionCl: "norm1",
    pvt_v2.Block: "norm1",
    RelPosBlock: "norm1",
    SpatialBlock: "norm1",
    tnt.Block: {"attn_in": "norm_in", "attn_out": "norm_out"},
    TransformerBlock2d: "norm1",
    twins.Block: "norm1",
    vision_transformer_sam.Block: "norm1",
    visformer.Block: "norm1",
    volo.ClassBlock: "norm1",
    volo.Transformer: "norm1",
    ResPostBlock: "",
    ResPostRelPosBlock: "",
    SwinTransformerV2CrBlock: "",
    TinyVitBlock: "",  # in its attention
}
"""By the kind of block, its norm before the attention, or before each; nothing where it is behind it, or within."""


RUN_WHOLE = (
    "timm runs this model whole, and what enters its blocks is not known. Deep prompts and prefixes take it, without "
    "what needs its tokens (init from images, adaptive); so do linear, mlp_head, sidetune, bias, norm, ssf, partial, "
    "prompt_pad, full, gps, and lora, dora, vera, pvera, mlae, glora and adapters on layers by name. Shallow prompts, "
    "these by the names of the papers, other deltas, figures of attention maps and segmentation do not."
)

KEYLESS = {"ChannelAttention", "ChannelAttentionV2", "ConvAttention", "OutlookAttention"}
"""What is called attention and has no keys of tokens: over channels, of fixed weights."""


def _attends(module: nn.Module) -> bool:
    """Whether a module is called attention and is none that is known, nor a block or a pool."""
    name = type(module).__name__
    called = "Attn" in name or "Attention" in name
    return called and type(module) not in OPEN and type(module) not in NORMS and "Pool" not in name


def read_attention(model: nn.Module, shape: tuple[int, int, int]) -> AttentionLayout:
    """Opens the attention of a timm model that is run whole, on images of a `shape` (C, H, W).

    An UnsupportedBackboneError where the model, a block or an attention module is of a type whose equivalence with the
    concatenated form has not been shown, or the model has no attention.
    """
    if type(model) not in WHOLE:
        raise UnsupportedBackboneError(
            f"Where {type(model).__name__} attends is not known: prompts and prefixes take timm's vision transformers, "
            "Swins and others that `vpt backbones --prompts` lists; linear, mlp_head, sidetune, bias, norm, ssf, "
            "partial, prompt_pad, full, and lora, dora, vera and adapters on layers by name take it."
        )
    found = [(name, module) for name, module in model.named_modules() if type(module) in OPEN]
    other = sorted({type(module).__name__ for module in model.modules() if _attends(module)} - KEYLESS)
    if other or not found:
        what = f"{' and '.join(other)}, which is not known" if other else "no attention over tokens"
        raise UnsupportedBackboneError(f"This {type(model).__name__} has {what}.")
    places = [_place(model, name, module) for name, module in found]
    attentions = [open_attention(attention) for _, _, attention in places]
    seen = _seen(model, attentions, shape)
    return AttentionLayout(
        blocks=[block for block, _, _ in places],
        attentions=attentions,
        norms=[norm for _, norm, _ in places],
        dims=[width for _, width in seen],
        patches=[keys for keys, _ in seen],
        patch_size=_patch_size(model),
    )


class OfMaps(nn.Module):
    """A norm of maps, for tokens (B, n, dim), which stand beside the map."""

    def __init__(self, norm: nn.Module) -> None:
        """Wraps it; a sequence's pool, behind the norm, leaves tokens of no position as they are."""
        super().__init__()
        self.norm = cast("nn.Module", norm.norm) if isinstance(norm, nn.Sequential) else norm

    def forward(self, tokens: Tensor) -> Tensor:
        """See the class."""
        return as_map(self.norm, tokens)


def _place(model: nn.Module, name: str, attention: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The block of an attention module, and the norm before it."""
    if type(attention) is ParallelScalingBlock:
        return attention, nn.Identity(), attention
    inside, _, own = name.rpartition(".")
    block = model.get_submodule(inside)
    if type(block) not in NORMS:
        raise UnsupportedBackboneError(
            f"{name} is in a {type(block).__name__}, in which prompts are not known to be exact."
        )
    entry = NORMS[type(block)]
    entry = entry if isinstance(entry, str) else entry[own]
    norm = getattr(block, entry) if entry else nn.Identity()
    of_maps = isinstance(norm, nn.Sequential | nn.BatchNorm2d | LayerNorm2d)
    return block, OfMaps(norm) if of_maps else norm, attention


class _Watch:
    """An edit that changes nothing and notes what passes it."""

    active, on_all = True, False

    def __init__(self) -> None:
        self.calls: list[tuple[OpenAttention, int, int]] = []

    def __call__(self, attention: OpenAttention, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, None]:
        self.calls.append((attention, keys.shape[0], keys.shape[2]))
        return keys, values, None

    def complete(self, attention: OpenAttention, keys: Tensor, values: Tensor, bias: Tensor | None) -> None:
        """Nothing."""


def _seen(model: nn.Module, attentions: list[OpenAttention], shape: tuple[int, int, int]) -> list[tuple[int, int]]:
    """Keys and width of each attention module, from one image that has no values; says how many windows each has."""
    watch = _Watch()
    handles = [attention.register_edit(watch) for attention in attentions]
    try:
        _run(model, shape)
    except Exception as error:  # whatever a model's own code raises where tensors have no values
        raise UnsupportedBackboneError(
            f"{type(model).__name__} cannot be followed on images of shape {shape}: {type(error).__name__}."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    if [call[0] for call in watch.calls] != attentions:
        raise UnsupportedBackboneError(f"{type(model).__name__} does not run its attention once and in order.")
    for attention, rows, _ in watch.calls:
        attention.windows = rows
    return [(keys, attention.width()) for attention, _, keys in watch.calls]


@torch.no_grad()
def _run(model: nn.Module, shape: tuple[int, int, int]) -> None:
    """Runs a model on an image without values, in eval mode as it is in a frozen backbone."""
    first, training = next(model.parameters()), model.training
    model.eval()
    try:
        if first.is_meta:
            cast("Any", model).forward_features(torch.empty(1, *shape, dtype=first.dtype, device="meta"))
            return
        with FakeTensorMode(allow_non_fake_inputs=True):
            image = torch.empty(1, *shape, dtype=first.dtype, device=first.device)
            cast("Any", model).forward_features(image)
    finally:
        model.train(training)


def _patch_size(model: Any) -> tuple[int, int]:
    own = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if own is not None:
        height, width = (own, own) if isinstance(own, int) else own
        return int(height), int(width)
    reduction = int(model.feature_info[0]["reduction"]) if getattr(model, "feature_info", None) else 16
    return reduction, reduction
