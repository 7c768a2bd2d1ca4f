"""Models that timm runs whole, with prompts concatenated in every attention: written out, independent of `vpt`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import gelu, layer_norm, linear, normalize, pad

Array = Any
"""A tensor: timm is untyped."""

SEEN = {
    "Attention",
    "Attention2d",
    "AttentionCl",
    "AttentionRope",
    "ClassAttention",
    "ClassAttn",
    "CrossAttention",
    "DiffAttention",
    "EfficientAttention",
    "EvaAttention",
    "Gemma4Attention",
    "GlobalSubSampleAttn",
    "LocallyGroupedAttn",
    "MaskUnitAttention",
    "MultiQueryAttention2d",
    "MultiScaleAttention",
    "ParallelScalingBlock",
    "RelPosAttention",
    "TalkingHeadAttn",
    "WindowAttention",
    "WindowAttentionGlobal",
    "WindowMultiHeadAttention",
}


def attentions(model: nn.Module) -> list[nn.Module]:
    """In the order of timm's modules."""
    return [module for module in model.modules() if type(module).__name__ in SEEN]


def concatenate(model: nn.Module, prompts: Sequence[Array], strength: float = 1.0) -> None:
    """Makes every attention of a model see its prompts, (n, dim) each, behind its own tokens, from now on.

    At a strength below 1 its logarithm is added to their logits.
    """
    names = dict(model.named_modules())
    for name, module in list(names.items()):
        if type(module).__name__ in SEEN:
            index = [id(each) for each in attentions(model)].index(id(module))
            block = names[name.rpartition(".")[0]]
            entering = prompts[index]
            if type(module).__name__ != "ParallelScalingBlock":
                entering = _normed(block, name.rpartition(".")[2], entering)
            run = partial(_attention(module), module, entering, torch.tensor(strength, dtype=entering.dtype).log())
            module.forward = run


def _normed(block: Any, own: str, prompts: Array) -> Array:
    """What the norm of the block makes of its prompts."""
    kind = type(block).__name__
    if kind in ("TinyVitBlock", "ResPostRelPosBlock", "SwinTransformerV2CrBlock", "ResPostBlock"):
        return prompts
    norm: Any = getattr(block, {"attn_in": "norm_in", "attn_out": "norm_out"}.get(own, "norm1"), None) or block.norm
    norm = norm.norm if type(norm) is nn.Sequential else norm
    if "BatchNorm" in type(norm).__name__:
        return (prompts - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
    if "RmsNorm" in type(norm).__name__:
        return norm(prompts)
    return layer_norm(prompts, prompts.shape[-1:], norm.weight, getattr(norm, "bias", None), norm.eps)


def _mix(q: Array, k: Array, v: Array, bias: Array | None, log: Array, number: int, scale: float) -> Array:
    """Softmax attention of (..., heads, tokens, dim), the last `number` keys being prompts: (..., tokens, channels)."""
    logits = q @ k.transpose(-2, -1) * scale
    before = logits.shape[-1] - number
    if bias is not None:
        logits = logits + pad(bias, (0, logits.shape[-1] - bias.shape[-1]))
    logits = torch.cat([logits[..., :before], logits[..., before:] + log], dim=-1)
    return (logits.softmax(-1) @ v).transpose(-3, -2).flatten(-2)


def _behind(x: Array, prompts: Array) -> Array:
    """[tokens, prompts] of x (..., N, dim)."""
    return torch.cat([x, prompts.expand(*x.shape[:-2], -1, -1)], dim=-2)


def _split(x: Array, heads: int) -> Array:
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def _three(qkv: Array, heads: int, per_head: bool = False) -> Array:
    if per_head:
        return _split(qkv, heads).chunk(3, dim=-1)
    return tuple(_split(part, heads) for part in qkv.chunk(3, dim=-1))


def _weights(layer: Any, x: Array) -> Array:
    return linear(x, layer.weight.flatten(1), layer.bias)


def _sequence(a: Any, p: Array, log: Array, x: Array, shared_rel_pos: Any = None, **_: Any) -> Array:
    """(..., N, dim), whatever is before the last two dimensions: also windows."""
    heads = a.heads if hasattr(a, "heads") else a.num_heads
    q, k, v = _three(_weights(a.qkv, _behind(x, p)), heads, getattr(a, "head_first", False))
    if hasattr(a, "q_norm"):
        q, k = a.q_norm(q), a.k_norm(k)
    bias = shared_rel_pos
    if getattr(a, "rel_pos", None) is not None:
        bias = a.rel_pos.get_bias()
    q = q[..., : x.shape[-2], :]
    return _weights(a.proj, _mix(q, k, v, bias, log, len(p), q.shape[-1] ** -0.5))


def _nest(a: Any, p: Array, log: Array, x: Array) -> Array:
    """(B, blocks, N, dim), whose heads timm interleaves behind the softmax."""
    q, k, v = _three(_weights(a.qkv, _behind(x, p)), a.num_heads)
    out = _mix(q[..., : x.shape[2], :], k, v, None, log, len(p), q.shape[-1] ** -0.5)
    return _weights(a.proj, out.unflatten(-1, (a.num_heads, -1)).transpose(-1, -2).flatten(-2))


def _pixels(a: Any, p: Array, log: Array, x: Array, **kwargs: Any) -> Array:
    """Maps (B, dim, H, W)."""
    out = _sequence(a, p, log, x.flatten(2).transpose(1, 2), **kwargs)
    return out.transpose(1, 2).unflatten(2, x.shape[2:])


def _map(a: Any, p: Array, log: Array, x: Array, **kwargs: Any) -> Array:
    """Maps (B, H, W, dim)."""
    return _sequence(a, p, log, x.flatten(1, 2), **kwargs).unflatten(1, x.shape[1:3])


def _sam(a: Any, p: Array, log: Array, x: Array) -> Array:
    _, h, w, _ = x.shape
    q, k, v = _three(_weights(a.qkv, _behind(x.flatten(1, 2), p)), a.num_heads)
    q = q[:, :, : h * w]
    rows = torch.arange(h)[:, None] - torch.arange(h)[None] + h - 1
    columns = torch.arange(w)[:, None] - torch.arange(w)[None] + w - 1
    grid = q.unflatten(2, (h, w))
    own_rows = torch.einsum("bnhwc,hkc->bnhwk", grid, a.rel_pos_h[rows])
    own_columns = torch.einsum("bnhwc,wkc->bnhwk", grid, a.rel_pos_w[columns])
    bias = (own_rows[..., :, None] + own_columns[..., None, :]).flatten(4).flatten(2, 3)
    return _weights(a.proj, _mix(q, k, v, bias, log, len(p), q.shape[-1] ** -0.5)).unflatten(1, (h, w))


def _twins_local(a: Any, p: Array, log: Array, x: Array, size: Any) -> Array:
    (h, w), s = size, a.ws
    maps: Any = pad(x.unflatten(1, size), (0, 0, 0, -w % s, 0, -h % s))
    windows = maps.unflatten(2, (-1, s)).unflatten(1, (-1, s)).transpose(2, 3)
    out = _sequence(a, p, log, windows.flatten(3, 4)).unflatten(3, (s, s))
    return out.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :h, :w].flatten(1, 2)


def _reduced(a: Any, p: Array, log: Array, x: Array, size: Any) -> Array:
    """PVT and Twins: keys of a smaller map; a prompt is a patch of it that is the prompt everywhere."""
    q = _split(_weights(a.q, x), a.num_heads)
    keys = _behind(x, p)
    if a.sr is not None:
        maps = x.transpose(1, 2).unflatten(2, tuple(size))
        pooled = maps if getattr(a, "pool", None) is None else a.pool(maps)
        small = a.sr(pooled).flatten(2).transpose(1, 2)
        own = linear(p, a.sr.weight.sum((2, 3)), a.sr.bias)
        keys = layer_norm(_behind(small, own), small.shape[-1:], a.norm.weight, a.norm.bias, a.norm.eps)
        keys = keys if getattr(a, "act", None) is None else gelu(keys)
    k, v = (_split(part, a.num_heads) for part in _weights(a.kv, keys).chunk(2, dim=-1))
    return _weights(a.proj, _mix(q, k, v, None, log, len(p), q.shape[-1] ** -0.5))


def _next(a: Any, p: Array, log: Array, x: Array) -> Array:
    q = _split(_weights(a.q, x), a.num_heads)
    keys = _behind(x, p)
    if a.sr is not None:
        small = x.unflatten(1, (-1, a.N_ratio)).mean(2)
        norm = a.norm
        keys = (_behind(small, p) - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
    k, v = (_split(_weights(layer, keys), a.num_heads) for layer in (a.k, a.v))
    return _weights(a.proj, _mix(q, k, v, None, log, len(p), q.shape[-1] ** -0.5))


def _tiny(a: Any, p: Array, log: Array, x: Array) -> Array:
    tokens = layer_norm(_behind(x, p), x.shape[-1:], a.norm.weight, a.norm.bias, a.norm.eps)
    q, k, v = _three(_weights(a.qkv, tokens), a.num_heads, per_head=True)
    bias = a.attention_biases[:, a.attention_bias_idxs]
    return _weights(a.proj, _mix(q[:, :, : x.shape[1]], k, v, bias, log, len(p), q.shape[-1] ** -0.5))


def _hiera(a: Any, p: Array, log: Array, x: Array) -> Array:
    """Tokens lie unrolled: (B, stride · kept · windows), the windows innermost."""
    windows = x.shape[1] // (a.q_stride * a.window_size) if a.use_mask_unit_attn else 1
    inside = x.unflatten(1, (-1, windows)).transpose(1, 2)
    q, k, v = _three(_weights(a.qkv, _behind(inside, p)), a.heads)
    q = q[..., : inside.shape[2], :].unflatten(-2, (a.q_stride, -1)).amax(-3)
    out = _mix(q, k, v, None, log, len(p), q.shape[-1] ** -0.5)
    return _weights(a.proj, out.transpose(1, 2).flatten(1, 2))


def _hieradet(a: Any, p: Array, log: Array, x: Array) -> Array:
    _, h, w, _ = x.shape
    q, k, v = _three(_weights(a.qkv, _behind(x.flatten(1, 2), p)), a.num_heads)
    q = q[:, :, : h * w]
    if a.q_pool is not None:
        q = q.unflatten(2, (h // 2, 2, w // 2, 2)).amax((3, 5)).flatten(2, 3)
        h, w = h // 2, w // 2
    return _weights(a.proj, _mix(q, k, v, None, log, len(p), q.shape[-1] ** -0.5)).unflatten(1, (h, w))


def _class(a: Any, p: Array, log: Array, x: Array) -> Array:
    """The class token alone asks: CaiT, CrossViT, VOLO."""
    tokens = _behind(x, p)
    if hasattr(a, "kv"):
        k, v = (_split(part, a.num_heads) for part in _weights(a.kv, tokens).chunk(2, dim=-1))
    else:
        k, v = (_split(_weights(getattr(a, f"w{n}", None) or getattr(a, n), tokens), a.num_heads) for n in "kv")
    q = _split(_weights(a.wq if hasattr(a, "wq") else a.q, x[:, :1]), a.num_heads)
    return _weights(a.proj, _mix(q, k, v, None, log, len(p), q.shape[-1] ** -0.5))


def _talking(a: Any, p: Array, log: Array, x: Array) -> Array:
    q, k, v = _three(_weights(a.qkv, _behind(x, p)), a.num_heads)
    logits = torch.einsum("bhqd,bhkd,gh->bgqk", q[:, :, : x.shape[1]] * a.scale, k, a.proj_l.weight)
    logits = logits + a.proj_l.bias[:, None, None]
    logits[..., x.shape[1] :] += log
    weights = torch.einsum("bhqk,gh->bgqk", logits.softmax(-1), a.proj_w.weight) + a.proj_w.bias[:, None, None]
    return _weights(a.proj, (weights @ v).transpose(1, 2).flatten(2))


def _gemma(a: Any, p: Array, log: Array, x: Array, rope_cos: Array, rope_sin: Array, **_: Any) -> Array:
    from timm.models.gemma4_vit import apply_multidimensional_rope as turn

    tokens = _behind(x, p)
    rms = {name: getattr(a, f"{name}_norm") for name in "qkv"}
    q, k, v = (rms[n](getattr(a, f"{n}_proj")(tokens).unflatten(-1, (-1, a.head_dim))) for n in "qkv")
    n = x.shape[1]
    q = turn(q[:, :n], rope_cos, rope_sin, ndim=2, unsqueeze_dim=2)
    k = torch.cat([turn(k[:, :n], rope_cos, rope_sin, ndim=2, unsqueeze_dim=2), k[:, n:]], dim=1)
    groups = a.num_heads // a.num_kv_heads
    k, v = (part.repeat_interleave(groups, dim=2) for part in (k, v))
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    return a.o_proj(_mix(q, k, v, None, log, len(p), 1.0))


def _rotary(a: Any, p: Array, log: Array, x: Array, rope: Array, **_: Any) -> Array:
    """Halves of a head turn together, or neighbours; prompts and what stands before the patches do not."""
    q, k, v = _three(_weights(a.qkv, _behind(x, p)), a.num_heads)
    sin, cos = rope.tensor_split(2, -1)
    n, still = x.shape[1], x.shape[1] - rope.shape[-2]

    def turn(part: Array) -> Array:
        before, part = part[:, :, :still], part[:, :, still:]
        if a.rotate_half:
            first, second = part.chunk(2, dim=-1)
            other = torch.cat([-second, first], dim=-1)
        else:
            other = torch.stack([-part[..., 1::2], part[..., ::2]], dim=-1).flatten(-2)
        return torch.cat([before, part * cos + other * sin], dim=2)

    q, k = turn(q[:, :, :n]), torch.cat([turn(k[:, :, :n]), k[:, :, n:]], dim=2)
    return _weights(a.proj, _mix(q, k, v, None, log, len(p), q.shape[-1] ** -0.5))


def _parallel(a: Any, p: Array, log: Array, x: Array, **_: Any) -> Array:
    tokens = a.in_norm(_behind(x, p))
    mlp, *parts = _weights(a.in_proj, tokens).split(a.in_split, dim=-1)
    q, k, v = (_split(part, a.num_heads) for part in parts)
    q, k, n = a.q_norm(q), a.k_norm(k), x.shape[1]
    own = _mix(q[:, :, :n], k, v, None, log, len(p), q.shape[-1] ** -0.5)
    hidden = a.mlp_act(mlp[:, :n] if a.mlp_bias is None else mlp[:, :n] + a.mlp_bias)
    if a.out_proj is not None:
        return x + a.ls(_weights(a.out_proj, torch.cat([own, hidden], dim=-1)))
    return x + a.ls(_weights(a.attn_out_proj, own) + _weights(a.mlp_out_proj, hidden))


def _differential(a: Any, p: Array, log: Array, x: Array, **_: Any) -> Array:
    q, k, v = _weights(a.qkv, _behind(x, p)).chunk(3, dim=-1)
    q, k = (norm(_split(part, 2 * a.num_heads)) for norm, part in ((a.q_norm, q), (a.k_norm, k)))
    v, q = _split(v, a.num_heads), q[:, :, : x.shape[1]]
    one, two = (_mix(q[:, first::2], k[:, first::2], v, None, log, len(p), q.shape[-1] ** -0.5) for first in (0, 1))
    factor = a._compute_lambda()
    heads = (one - factor * two).unflatten(-1, (a.num_heads, -1))
    return _weights(a.proj, a.norm((a.sub_norm(heads) * (1 - a.lambda_init)).flatten(-2)))


def _tnt(a: Any, p: Array, log: Array, x: Array) -> Array:
    q, k = (_split(part, a.num_heads) for part in _weights(a.qk, _behind(x, p)).chunk(2, dim=-1))
    v = _split(_weights(a.v, _behind(x, p)), a.num_heads)
    return _weights(a.proj, _mix(q[:, :, : x.shape[1]], k, v, None, log, len(p), q.shape[-1] ** -0.5))


def _gcvit(a: Any, p: Array, log: Array, x: Array, q_global: Array | None = None) -> Array:
    parts = [_split(each, a.num_heads) for each in _weights(a.qkv, _behind(x, p)).chunk(2 if a.use_global else 3, -1)]
    q = parts[0][:, :, : x.shape[1]]
    if a.use_global and q_global is not None:
        each = torch.stack([query for query in q_global for _ in range(len(x) // len(q_global))])
        q = _split(each.reshape(len(x), x.shape[1], -1), a.num_heads)
    out = _mix(q, parts[-2], parts[-1], a.rel_pos.get_bias(), log, len(p), q.shape[-1] ** -0.5)
    return _weights(a.proj, out)


def _swin_cr(a: Any, p: Array, log: Array, x: Array, mask: Array | None = None) -> Array:
    q, k, v = _three(_weights(a.qkv, _behind(x, p)), a.num_heads)
    q, k = normalize(q[:, :, : x.shape[1]], dim=-1), normalize(k, dim=-1)
    bias = a._relative_positional_encodings()
    if mask is not None:
        bias = torch.cat([bias + each for each in mask.repeat(len(x) // len(mask), 1, 1)[:, None, None]])
    scale = a.logit_scale.clamp(max=torch.tensor(100.0).double().log()).exp()[:, None, None]
    return _weights(a.proj, _mix(q * scale, k, v, bias, log, len(p), 1.0))


def _mvit(a: Any, p: Array, log: Array, x: Array, size: Any) -> Any:
    """A prompt is no part of a map: convolutions leave it out, the norms behind them do not."""
    parts, own, sizes = [], [], []
    for letter, whole, alone in zip(
        "qkv", *(_three(_weights(a.qkv, each), a.num_heads) for each in (x, p)), strict=True
    ):
        pool, norm = getattr(a, f"pool_{letter}"), getattr(a, f"norm_{letter}")
        first, small = whole[:, :, : int(a.has_cls_token)], tuple(size)
        if pool is not None:
            maps = whole[:, :, int(a.has_cls_token) :].transpose(2, 3).unflatten(3, tuple(size))
            maps = torch.stack([pool(maps[:, head]) for head in range(a.num_heads)], dim=1)
            small = tuple(maps.shape[-2:])
            whole = torch.cat([first, maps.flatten(3).transpose(2, 3)], dim=2)
        sizes.append(small)
        parts.append(whole if norm is None else norm(whole))
        own.append(alone if norm is None else norm(alone))
    (q, k, v), bias, start = parts, None, int(a.has_cls_token)
    if a.rel_pos_type == "spatial":
        places = []
        for table, asked, there in zip((a.rel_pos_h, a.rel_pos_w), *sizes[:2], strict=True):
            up, down = max(there / asked, 1.0), max(asked / there, 1.0)
            rows = [[int(i * up - j * down + (there - 1) * down) for j in range(there)] for i in range(asked)]
            places.append(table[torch.tensor(rows)])
        grid = q[:, :, start:].unflatten(2, sizes[0])
        high = torch.einsum("bnhwc,hkc->bnhwk", grid, places[0])[..., :, None]
        wide = torch.einsum("bnhwc,wkc->bnhwk", grid, places[1])[..., None, :]
        bias = pad((high + wide).flatten(4).flatten(2, 3), (start, 0, start, 0))
    k, v = (torch.cat([each, alone.expand(len(x), -1, -1, -1)], dim=2) for each, alone in ((k, own[1]), (v, own[2])))
    out = _mix(q, k, v, bias, log, len(p), a.head_dim**-0.5)
    out = out + q.transpose(1, 2).flatten(2) if a.residual_pooling else out
    return _weights(a.proj, out), list(sizes[0])


def _multi_query(a: Any, p: Array, log: Array, x: Array, **_: Any) -> Array:
    asking = a.query(x)
    q = _split(asking.flatten(2).transpose(1, 2), a.num_heads)
    own = {}
    for name in ("key", "value"):
        layers = getattr(a, name)
        prompts = p
        if hasattr(layers, "down_conv"):
            norm = layers.norm
            prompts = p * layers.down_conv.weight.sum((1, 2, 3))
            prompts = (prompts - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
        own[name] = _behind(layers(x).flatten(2).transpose(1, 2), _weights(layers.proj, prompts))[:, None]
    out = _mix(q, own["key"], own["value"], None, log, len(p), q.shape[-1] ** -0.5)
    height, width = (side // stride for side, stride in zip(x.shape[2:], a.query_strides, strict=True))
    return a.output(out.transpose(1, 2).unflatten(2, (height, width)))


_BY_MODULE: dict[tuple[str, str], Callable[..., Array]] = {
    ("vision_transformer_sam", "Attention"): _sam,
    ("twins", "LocallyGroupedAttn"): _twins_local,
    ("twins", "GlobalSubSampleAttn"): _reduced,
    ("pvt_v2", "Attention"): _reduced,
    ("nextvit", "EfficientAttention"): _next,
    ("tiny_vit", "Attention"): _tiny,
    ("hiera", "MaskUnitAttention"): _hiera,
    ("hieradet_sam2", "MultiScaleAttention"): _hieradet,
    ("mvitv2", "MultiScaleAttention"): _mvit,
    ("cait", "ClassAttn"): _class,
    ("cait", "TalkingHeadAttn"): _talking,
    ("crossvit", "CrossAttention"): _class,
    ("volo", "ClassAttention"): _class,
    ("volo", "Attention"): _map,
    ("gemma4_vit", "Gemma4Attention"): _gemma,
    ("eva", "EvaAttention"): _rotary,
    ("attention", "AttentionRope"): _rotary,
    ("vision_transformer", "ParallelScalingBlock"): _parallel,
    ("nest", "Attention"): _nest,
    ("tnt", "Attention"): _tnt,
    ("diff_attention", "DiffAttention"): _differential,
    ("gcvit", "WindowAttentionGlobal"): _gcvit,
    ("swin_transformer_v2_cr", "WindowMultiHeadAttention"): _swin_cr,
    ("attention2d", "MultiQueryAttention2d"): _multi_query,
    ("attention2d", "Attention2d"): _pixels,
    ("maxxvit", "Attention2d"): _pixels,
    ("fastvit", "Attention"): _pixels,
    ("visformer", "Attention"): _pixels,
}


def _attention(module: nn.Module) -> Callable[..., Array]:
    kind = type(module)
    if kind.__name__ == "AttentionCl":
        return _windows_of_maps
    return _BY_MODULE.get((kind.__module__.rpartition(".")[2], kind.__name__), _sequence)


def _windows_of_maps(a: Any, p: Array, log: Array, x: Array, **kwargs: Any) -> Array:
    """MaxViT: (B · windows, height, width, dim)."""
    return _map(a, p, log, x, **kwargs)
