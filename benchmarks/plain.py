"""What the benchmarks compare with: VPT-deep as published, the bare backbone, a formula, and what the machine can."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from vpt.backbones import Backbone, create_backbone
from vpt.experiments.profile import interleaved, wait

CLASSES = 100


class Concatenated(nn.Module):
    """VPT-deep as published: prompts join the sequence, or every window, before each block; their outputs are dropped.

    Softmax attention is computed as ours is, so that only the formulation differs.
    """

    def __init__(self, backbone: str | Backbone, tokens: int) -> None:
        """Builds prompts and a head on a frozen backbone, which is its own from now on, or is built by its name."""
        super().__init__()
        self.backbone = _built(backbone)
        layout = self.backbone.layout
        if hasattr(self.backbone.model, "rope"):  # positions are of the patches behind them
            for block in layout.blocks:
                cast("Any", block).attn.num_prefix_tokens += tokens
        prompts = [torch.empty(tokens, dim).uniform_(-0.1, 0.1) for dim in layout.dims]
        self.prompts = nn.ParameterList(nn.Parameter(own) for own in prompts)
        self.head = nn.Linear(self.backbone.num_features, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of uint8 images."""
        model: Any = self.backbone.model
        x = model.patch_embed(self.backbone.normalize(images))
        x = self._windows(model, x) if self.backbone.layout.windowed else self._sequence(model, x)
        return self.head(model.forward_head(model.norm(x), pre_logits=True))  # type: ignore[no-any-return]

    def _sequence(self, model: Any, x: Tensor) -> Tensor:
        given: dict[str, Any] = {}
        if hasattr(model, "rope"):
            x, given["rope"] = model._pos_embed(x)
        else:
            x = model._pos_embed(x)
        x = model.norm_pre(x)
        for prompts, block in zip(self.prompts, model.blocks, strict=True):
            x = torch.cat([x[:, :1], prompts.expand(len(x), -1, -1), x[:, 1:]], dim=1)
            x = block(x, **given)
            x = torch.cat([x[:, :1], x[:, 1 + len(prompts) :]], dim=1)
        return x

    def _windows(self, model: Any, x: Tensor) -> Tensor:
        layer = 0
        for stage in model.layers:
            x = stage.downsample(x)
            for block in stage.blocks:
                x = _window_block(block, x, self.prompts[layer].expand(len(x), -1, -1))
                layer += 1
        return x


def _window_block(block: Any, x: Tensor, prompts: Tensor) -> Tensor:
    """A Swin block on a map that its windows divide, with prompts in every window."""
    batch, height, width, dim = x.shape
    side, number = block.window_size[0], prompts.shape[1]
    shift = (-block.shift_size[0], -block.shift_size[1])
    moved = block.norm1(x).roll(shift, (1, 2)).unflatten(1, (-1, side)).unflatten(3, (-1, side))
    windows = moved.transpose(2, 3).reshape(-1, side * side, dim)
    count = len(windows) // batch
    tokens = torch.cat([block.norm1(prompts).repeat_interleave(count, dim=0), windows], dim=1)
    out = _attend(block.attn, tokens, block.attn_mask, number)
    moved = out[:, number:].reshape(batch, height // side, width // side, side, side, dim).transpose(2, 3)
    moved = moved.reshape(batch, height, width, dim).roll((-shift[0], -shift[1]), (1, 2))
    averaged = prompts + out[:, :number].reshape(batch, count, number, dim).mean(dim=1)
    x = torch.cat([averaged, (x + moved).flatten(1, 2)], dim=1)
    x = x + block.mlp(block.norm2(x))
    return x[:, number:].reshape(batch, height, width, dim)


def _attend(attn: Any, tokens: Tensor, mask: Tensor | None, number: int) -> Tensor:
    q, k, v = attn.qkv(tokens).unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    bias = attn._get_rel_pos_bias()
    if mask is not None:
        bias = (bias + mask.unsqueeze(1)).repeat(len(tokens) // len(mask), 1, 1, 1)
    out = attn.attend(q, k, v, pad(bias, (number, 0, number, 0)))
    return attn.proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Bare(nn.Module):
    """The frozen backbone with a gradient at its input: what no prompt tuning can undercut without trimming."""

    def __init__(self, backbone: str | Backbone) -> None:
        """Takes a backbone, or builds it by its name."""
        super().__init__()
        self.backbone = _built(backbone)

    def forward(self, images: Tensor) -> Tensor:
        """Features of uint8 images, whole last block."""
        model: Any = self.backbone.model
        x = self.backbone.normalize(images).requires_grad_()
        return model.forward_head(model.forward_features(x), pre_logits=True)  # type: ignore[no-any-return]


def _built(backbone: str | Backbone) -> Backbone:
    return create_backbone(backbone, "random") if isinstance(backbone, str) else backbone


def matmul_ceiling(dtype: torch.dtype, device: str, rounds: int = 5, side: int | None = None) -> float:
    """Operations a second of a large square matrix product: what a step could reach at best."""
    side = side or (8192 if device == "cuda" else 2048)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))

    def product() -> None:
        torch.mm(a, b)
        wait(a)

    return float(2 * side**3 / interleaved([product], rounds)[0])


def vit_flops(model: Any, batch: int, prompts: int, trim: bool) -> int:
    """The formula for VPT-deep as keys and values on a plain ViT with a class token, without the head.

    Per block: 2·3d² for each token and each prompt (once for all images), 4·d for each pair of query and key, 2·d² and
    2·2·d·h for each token behind the attention; with `trim` only one token passes the last block.
    """
    dim, depth, hidden = model.embed_dim, len(model.blocks), model.blocks[0].mlp.fc1.out_features
    patches = model.patch_embed.num_patches
    tokens = patches + 1
    total = batch * patches * 2 * dim * model.patch_embed.proj.weight[0].numel()
    for block in range(depth):
        asking = 1 if trim and block == depth - 1 else tokens
        total += 6 * dim * dim * (batch * tokens + prompts)
        total += batch * asking * (4 * dim * (tokens + prompts) + 2 * dim * dim + 4 * dim * hidden)
    return int(total)
