"""VPT as the paper writes it, on timm models: concatenate, run the block, drop. Independent of `vpt`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize, pad


def concatenated_features(
    model: Any, images: Tensor, prompts: Sequence[Tensor] | Tensor, masks: Any = None, deep: bool = True
) -> Tensor:
    """Pooled features with prompts in the sequence.

    Args:
        model: A timm model.
        images: Normalised, (B, 3, H, W).
        prompts: (n, dim) for each block if deep, else for the first.
        masks: Multiplied onto the prompts, (B, n, dim) for each.
        deep: Replace the prompts before every block, or let the first ones travel.
    """
    if hasattr(model, "layers"):
        return _swin(model, images, prompts, masks, deep)
    x, rope, shared = _tokens(model, images)
    number = 0
    for layer, block in enumerate(model.blocks):
        if deep or layer == 0:
            inserted = prompts[layer].expand(len(x), -1, -1)
            if masks is not None:
                inserted = inserted * masks[layer]
            number = inserted.shape[1]
            x = torch.cat([inserted, x], dim=1)
        if rope is not None:
            block.attn.num_prefix_tokens += number
            x = block(x, rope=rope[layer] if model.rope_mixed else rope)
            block.attn.num_prefix_tokens -= number
        elif type(block).__name__ in ("ResPostBlock", "EvaBlock"):
            x = block(x)
        elif hasattr(block.attn, "relative_position_index"):
            x = _beit_block(block, x, shared, number)
        else:
            x = _plain_block(block, x)
        if deep:
            x = x[:, number:]
    if not deep:
        x = x[:, number:]
    pooled: Tensor = model.forward_head(model.norm(x), pre_logits=True)
    return pooled


def _tokens(model: Any, images: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Tokens before the first block, rotary embeddings and a bias shared by all blocks."""
    x = model.patch_embed(images)
    if hasattr(model, "rope"):
        x, rope = model._pos_embed(x)
        return model.norm_pre(x), rope, None
    if hasattr(model, "rel_pos_bias"):
        x = torch.cat([model.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = x if model.pos_embed is None else x + model.pos_embed
        return x, None, None if model.rel_pos_bias is None else model.rel_pos_bias()
    return model.norm_pre(model.patch_drop(model._pos_embed(x))), None, None


def _plain_block(block: Any, x: Tensor) -> Tensor:
    """A pre-norm block from its parts, with attention written out."""
    x = x + block.ls1(_plain_attention(block.attn, block.norm1(x)))
    out: Tensor = x + block.ls2(block.mlp(block.norm2(x)))
    return out


def _plain_attention(attn: Any, x: Tensor) -> Tensor:
    """Softmax attention over all tokens, one head at a time."""
    q, k, v = linear(x, attn.qkv.weight, attn.qkv.bias).chunk(3, dim=-1)
    heads = []
    for q_h, k_h, v_h in _by_head(attn, q, k, v):
        scores = attn.q_norm(q_h) @ attn.k_norm(k_h).transpose(1, 2) / q_h.shape[-1] ** 0.5
        heads.append(scores.softmax(dim=-1) @ v_h)
    out: Tensor = attn.proj(attn.norm(torch.cat(heads, dim=-1)))
    return out


def _by_head(attn: Any, *parts: Tensor) -> Any:
    return zip(*(part.chunk(attn.num_heads, dim=-1) for part in parts), strict=True)


def _separate_biases(attn: Any) -> Tensor | None:
    if attn.q_bias is None:
        return None
    return torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])


def _beit_block(block: Any, x: Tensor, shared: Tensor | None, number: int) -> Tensor:
    """Prompts come first; the bias of their rows and columns is 0."""
    attn, z = block.attn, block.norm1(x)
    q, k, v = linear(z, attn.qkv.weight, _separate_biases(attn)).chunk(3, dim=-1)
    bias: Any = 0 if shared is None else shared
    if attn.relative_position_bias_table is not None:
        bias = bias + attn._get_rel_pos_bias()
    bias = pad(bias.reshape(attn.num_heads, *bias.shape[-2:]), (number, 0, number, 0))
    heads = [
        (q_h @ k_h.transpose(1, 2) / q_h.shape[-1] ** 0.5 + bias[head]).softmax(dim=-1) @ v_h
        for head, (q_h, k_h, v_h) in enumerate(_by_head(attn, q, k, v))
    ]
    a, m = attn.proj(torch.cat(heads, dim=-1)), block.mlp
    x = x + (a if block.gamma_1 is None else block.gamma_1 * a)
    out: Tensor = x + (m(block.norm2(x)) if block.gamma_2 is None else block.gamma_2 * m(block.norm2(x)))
    return out


def _swin(model: Any, images: Tensor, prompts: Sequence[Tensor] | Tensor, masks: Any, deep: bool) -> Tensor:
    x, layer, travelling = model.patch_embed(images), 0, prompts[0]
    for stage in model.layers:
        x = stage.downsample(x)
        if layer and not deep:
            travelling = merged(stage.downsample, travelling)
        for block in stage.blocks:
            inserted = travelling
            if deep or layer == 0:
                inserted = prompts[layer].expand(len(x), -1, -1)
                inserted = inserted if masks is None else inserted * masks[layer]
            x, travelling = swin_block(block, x, inserted)
            layer += 1
    pooled: Tensor = model.head(model.norm(x), pre_logits=True)
    return pooled


def merged(merging: Any, prompts: Tensor) -> Tensor:
    """A prompt as a map of 2 × 2 equal patches, merged by timm's own code."""
    maps = prompts[:, :, None, None].expand(-1, -1, 2, 2, -1).flatten(0, 1)
    merged: Tensor = merging(maps).reshape(*prompts.shape[:2], -1)
    return merged


def swin_block(
    block: Any, x: Tensor, prompts: Tensor, bypass: Callable[[str, Tensor, int], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """One image and one window at a time: the prompts of an image join each of its windows and are averaged over them.

    Args:
        block: A block of Swin (pre-norm) or Swin V2 (post-norm).
        x: (B, H, W, C).
        prompts: (B, n, C).
        bypass: What is added to the output of a sublayer, by its name, for its input (B, N, C), of how many columns; of
            prompts none.

    Returns:
        What becomes of both.
    """
    post = hasattr(block.attn, "logit_scale")
    height, width = x.shape[1:3]
    wh, ww = block.window_size
    sh, sw = block.shift_size
    entering, prompts_in = (x, prompts) if post else (block.norm1(x), block.norm1(prompts))
    moved = pad(entering.roll((-sh, -sw), (1, 2)), (0, 0, 0, -width % ww, 0, -height % wh))
    out, averages = torch.zeros_like(moved), torch.zeros_like(prompts)
    for image in range(len(x)):
        seen = []
        corners = [(t, u) for t in range(0, moved.shape[1], wh) for u in range(0, moved.shape[2], ww)]
        for number, (top, left) in enumerate(corners):
            area = (image, slice(top, top + wh), slice(left, left + ww))
            mask = None if block.attn_mask is None else block.attn_mask[number]
            tokens = torch.cat([prompts_in[image], moved[area].reshape(wh * ww, -1)])
            answer = _window(block.attn, tokens, mask, prompts.shape[1])
            seen.append(answer[: prompts.shape[1]])
            out = out.index_put(
                (
                    torch.tensor(image),
                    torch.arange(top, top + wh)[:, None],
                    torch.arange(left, left + ww)[None],
                ),
                answer[prompts.shape[1] :].reshape(wh, ww, -1),
            )
        averages = averages.index_put((torch.tensor(image),), torch.stack(seen).mean(dim=0))
    out = out[:, :height, :width].roll((sh, sw), (1, 2))

    def beside(name: str, tokens: Tensor, columns: int) -> Tensor:
        return (
            torch.zeros_like(tokens) if bypass is None else bypass(name, tokens.flatten(1, -2), columns).view_as(tokens)
        )

    def mlp(tokens: Tensor, columns: int) -> Tensor:
        return cast("Tensor", block.mlp(tokens) + beside("mlp", tokens, columns))

    out, averages = out + beside("attn", entering, width), averages + beside("attn", prompts_in, 0)
    after = nn.Identity() if not post else block.norm1
    x, prompts = x + after(out), prompts + after(averages)
    if post:
        return x + block.norm2(mlp(x, width)), prompts + block.norm2(mlp(prompts, 0))
    return x + mlp(block.norm2(x), width), prompts + mlp(block.norm2(prompts), 0)


def _window(attn: Any, tokens: Tensor, mask: Tensor | None, number: int) -> Tensor:
    """Attention of one window, (n + area, C); neither bias nor mask for the first n."""
    cosine = hasattr(attn, "logit_scale")
    bias_of_layer = _separate_biases(attn) if cosine else attn.qkv.bias
    q, k, v = linear(tokens, attn.qkv.weight, bias_of_layer).chunk(3, dim=-1)
    if cosine:
        table = attn.cpb_mlp(attn.relative_coords_table).reshape(-1, attn.num_heads)
        bias = 16 * table[attn.relative_position_index].sigmoid()
    else:
        bias = attn.relative_position_bias_table[attn.relative_position_index]
    heads = []
    for head, (q_h, k_h, v_h) in enumerate(_by_head(attn, q, k, v)):
        if cosine:
            scale = attn.logit_scale[head, 0, 0].clamp(max=torch.tensor(100.0, dtype=q.dtype).log()).exp()
            scores = normalize(q_h, dim=-1) @ normalize(k_h, dim=-1).T * scale
        else:
            scores = q_h @ k_h.T / q_h.shape[-1] ** 0.5
        shift = bias[..., head] if mask is None else bias[..., head] + mask
        heads.append((scores + pad(shift, (number, 0, number, 0))).softmax(dim=-1) @ v_h)
    out: Tensor = attn.proj(torch.cat(heads, dim=-1))
    return out
