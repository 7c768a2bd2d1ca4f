"""The layers and parameters of a backbone, those of a vision transformer by the names that the literature gives them.

Where the blocks of the backbone must be known and are not, each of these raises an UnsupportedBackboneError.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

from timm.models import group_parameters
from torch import nn

from vpt.backbones.factory import Backbone
from vpt.backbones.frozen_weights import plain_convolution
from vpt.errors import ConfigError, UnknownNameError, UnsupportedBackboneError


@dataclass(frozen=True)
class LinearTarget:
    """The outputs `start` to `stop` of a layer: one linear map of a block, perhaps fused with others in one module."""

    module: nn.Linear
    start: int
    stop: int


def linear_targets(backbone: Backbone) -> list[dict[str, LinearTarget]]:
    """Finds the linear maps of every block, one dict per block.

    ``q``, ``k``, ``v``, ``proj`` of the attention, the first three perhaps thirds of one layer; ``fc1``, ``fc2`` of the
    MLP, the first of a gated one perhaps two, ``fc1_g`` and ``fc1_x``.
    """
    return [_linears(cast("Any", block.attn)) | _layers(cast("Any", block.mlp)) for block in backbone.layout.blocks]


def named_layers(backbone: Backbone, names: Sequence[str]) -> dict[str, nn.Linear | nn.Conv2d]:
    """Finds linear layers and convolutions of any backbone, by timm's names in the order of its modules.

    A name is that of a module or the end of it, such as ``conv1`` for ``layer1.0.conv1``, or one of `ALL`. An
    UnknownNameError where a name is that of none.
    """
    layers = {
        name: module
        for name, module in backbone.model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and backbone.reads(f"{name}.")
    }
    found = {
        name: {key for key, layer in layers.items() if _called(key, name) or isinstance(layer, ALL.get(name, ()))}
        for name in names
    }
    for name, keys in found.items():
        if not keys:
            kinds = [word for word, kind in ALL.items() if any(isinstance(layer, kind) for layer in layers.values())]
            raise UnknownNameError(f"layer of {backbone.name}", name, [*kinds, *sorted({_end(key) for key in layers})])
    chosen = set().union(*found.values())
    return {key: layer for key, layer in layers.items() if key in chosen}


ALL: dict[str, type[nn.Module]] = {"all-linear": nn.Linear, "all-conv": nn.Conv2d}
"""Names for every layer of a kind."""


def _called(key: str, name: str) -> bool:
    return key == name or key.endswith(f".{name}")


def _end(key: str) -> str:
    """The last part of a module's name, with the one before where it is a number."""
    before, _, last = key.rpartition(".")
    return f"{before.rpartition('.')[2]}.{last}" if last.isdigit() and before else last


def _linears(attention: Any) -> dict[str, LinearTarget]:
    if attention.qkv is None:
        parts = {"q": attention.q_proj, "k": attention.k_proj, "v": attention.v_proj}
        found = {name: LinearTarget(layer, 0, layer.out_features) for name, layer in parts.items()}
    else:
        dim = attention.qkv.out_features // 3
        found = {name: LinearTarget(attention.qkv, i * dim, (i + 1) * dim) for i, name in enumerate("qkv")}
    return found | {"proj": LinearTarget(attention.proj, 0, attention.proj.out_features)}


def bias_spans(backbone: Backbone, maps: Sequence[str]) -> dict[str, list[tuple[int, int]]]:
    """Finds the biases of linear maps of every block, named as in `linear_targets`.

    By timm's name of each parameter, which entries of it they are, [start, stop) in ascending order. An
    UnknownNameError where blocks have no map of a name, a ConfigError where it has no bias.
    """
    names = {id(parameter): name for name, parameter in backbone.model.named_parameters()}
    found: dict[str, list[tuple[int, int]]] = {}
    for block, known in zip(backbone.layout.blocks, linear_targets(backbone), strict=True):
        for name in sorted(set(maps), key=[*known, *maps].index):
            if name not in known:
                raise UnknownNameError(f"linear map of {backbone.name}", name, known)
            target = known[name]
            fused = target.module._parameters["bias"]
            beside = cast("Any", block).attn._parameters.get(f"{name}_bias")
            if fused is None and beside is None:
                raise ConfigError(f"{backbone.name} has no biases of {name}: leave it out.")
            if fused is None:
                found[names[id(beside)]] = [(0, len(beside))]
            else:
                found.setdefault(names[id(fused)], []).append((target.start, target.stop))
    return found


def _layers(mlp: Any) -> dict[str, LinearTarget]:
    """A gated MLP may have two first layers, `fc1_g` and `fc1_x`, and then none called `fc1`."""
    names = [name for name in ("fc1", "fc1_g", "fc1_x", "fc2") if isinstance(getattr(mlp, name, None), nn.Linear)]
    return {name: LinearTarget(getattr(mlp, name), 0, getattr(mlp, name).out_features) for name in names}


def sublayers(backbone: Backbone) -> list[dict[str, nn.Module]]:
    """The parts ``attn`` and ``mlp`` of every block, whose outputs are added to the residual stream.

    All tokens (B, N, dim) pass them, also those beside a Swin's map, which its attention as a module never sees.
    """
    blocks = (cast("Any", block) for block in backbone.layout.blocks)
    return [{"attn": block.attn.proj_drop, "mlp": block.mlp} for block in blocks]


def norms_before_mlp(backbone: Backbone) -> dict[int, nn.Module]:
    """What each block, by its position, applies to the residual stream before its MLP; nothing in post-norm blocks."""
    layout = backbone.layout
    return {
        index: cast("nn.Module", block.norm2)
        for index, (block, norm) in enumerate(zip(layout.blocks, layout.norms, strict=True))
        if not isinstance(norm, nn.Identity)
    }


def affine_layers(backbone: Backbone, names: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """Everything with a weight per output channel on the way of the tokens: patch embedding, norms, linear maps.

    By timm's name, in the order of its modules. What acts on heads or on positions, not on the tokens' channels, is
    left out, and so is the convolutional network before the patch embedding of a hybrid. Of a backbone whose blocks are
    not known it is every convolution, linear map and norm. With `names` only those that are called so, or end so; an
    UnknownNameError where a name is that of none.
    """
    off_path: list[Any] = []
    if backbone.has_layout:
        off_path.append(getattr(backbone.model.patch_embed, "backbone", None))
        for attention in backbone.layout.attentions:
            off_path += [getattr(attention, name, None) for name in ("q_norm", "k_norm", "cpb_mlp")]
    inner = {id(module) for each in off_path if each is not None for module in each.modules()}
    layers = {
        name: module
        for name, module in backbone.model.named_modules()
        if (isinstance(module, nn.Linear | nn.Conv2d) or _is_norm(module)) and id(module) not in inner
        if backbone.reads(f"{name}.")
    }
    for name in names or ():
        if not any(_called(key, name) for key in layers):
            raise UnknownNameError(f"layer of {backbone.name}", name, sorted({_end(key) for key in layers}))
    return {key: layer for key, layer in layers.items() if names is None or any(_called(key, name) for name in names)}


def channel_dim(layer: nn.Module) -> int:
    """The dimension of a layer's outputs that its weight has a value for: 1 of maps (B, channels, ...), or the last."""
    if hasattr(layer, "channel_dim"):  # GlobalResponseNorm
        return int(cast("Any", layer).channel_dim)
    first = (
        isinstance(layer, nn.Conv2d | nn.BatchNorm1d | nn.BatchNorm2d | nn.GroupNorm) or "2d" in type(layer).__name__
    )
    return 1 if first else -1


def absorbs_scale(layer: nn.Module) -> bool:
    """Whether a scale and a shift of a layer's outputs can be put into its weight and its bias.

    So it is of linear layers, plain convolutions, and norms that have a place for a bias and nothing behind it.
    """
    if isinstance(layer, nn.Linear) or plain_convolution(layer):
        return True
    activation = getattr(layer, "act", None)
    acts = isinstance(activation, nn.Module) and not isinstance(activation, nn.Identity)
    norm = isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d | nn.LayerNorm | nn.GroupNorm)
    return norm and not acts and "bias" in layer._parameters


def stages(backbone: Backbone) -> list[list[str]]:
    """The parameters of each stage of a backbone that is no known transformer, as timm tells and registers them.

    The first has what lies before it, too, and the last what follows. An UnsupportedBackboneError where timm does not
    tell, or not in the order of its modules.
    """
    told: Any = getattr(backbone.model, "feature_info", None) or []
    ends = list(dict.fromkeys(str(each["module"]) for each in (told if isinstance(told, list) else told.info)))
    modules = [name for name, _ in backbone.model.named_modules()]
    last = [max((at for at, name in enumerate(modules) if _within(name, end)), default=-1) for end in ends]
    if not ends or -1 in last or sorted(set(last)) != last:
        raise UnsupportedBackboneError(f"timm does not tell the stages of {backbone.name} one after the other.")
    place = {name: at for at, name in enumerate(modules)}
    own = [(name, place[name.rpartition(".")[0]]) for name, _ in backbone.model.named_parameters()]
    first, last = [-1, *last[:-1]], [*last[:-1], len(modules)]
    found = [[name for name, at in own if low < at <= high] for low, high in zip(first, last, strict=True)]
    return [stage for stage in found if stage]


def _within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def parameter_names(backbone: Backbone, role: str, last: int = 0) -> list[str]:
    """Names the parameters of a timm model that play a role and are read, in the order of `model.named_parameters()`.

    Roles are ``all``; ``bias``, every additive vector named so; ``norm``, scale and shift of every normalisation, and
    ``scale``, its scales; ``last``, the `last` blocks, what lies between them and what follows them; where blocks are
    not known, the `last` stages.
    """
    own = {name: p for name, p in backbone.model.named_parameters() if backbone.reads(name)}
    names = list(own)
    if role == "bias":
        return [name for name in names if name.rpartition(".")[2] in ("bias", "q_bias", "v_bias")]
    if role in ("norm", "scale"):
        norms = {name for name, module in backbone.model.named_modules() if _is_norm(module)}
        own_names = [name for name in names if name.rpartition(".")[0] in norms]
        return [name for name in own_names if role == "norm" or name.endswith(".weight")]
    if role == "last" and not backbone.has_layout:
        chosen_stages = {name for stage in stages(backbone)[-last:] for name in stage}
        return [name for name in names if name in chosen_stages]
    if role == "last":
        chosen = backbone.layout.blocks[-last:]
        late = {id(p) for block in chosen for p in block.parameters()}
        first = len(backbone.layout.blocks) - last
        between = [merging for number, merging in backbone.layout.mergings.items() if number > first]
        late |= {id(p) for merging in between for p in merging.parameters()}
        after = ("norm.", "fc_norm.", "attn_pool.")  # timm's names of what a ViT applies after its blocks
        return [n for n, p in own.items() if id(p) in late or n.startswith(after)]
    return names


def _is_norm(module: nn.Module) -> bool:
    """PyTorch's and timm's: what is called a norm, has a weight for each channel, and holds no layers with weights."""
    weight = module._parameters.get("weight")
    named = "norm" in type(module).__name__.lower()
    nested = [p for child in module.children() for p in child.parameters()]
    return named and weight is not None and weight.ndim == 1 and not nested


def layer_numbers(backbone: Backbone) -> tuple[dict[str, int], int]:
    """Numbers the layers of a backbone as timm groups them, from 0 for the embeddings: by parameter, and of the head.

    Parameters are named as in `model.named_parameters()`; what the pool adds to them has the number of the head. On a
    vision transformer blocks have 1 to depth, and the head depth + 1. An UnsupportedBackboneError where timm has no
    groups for the model.
    """
    if (groups := getattr(backbone.model, "group_matcher", None)) is None:
        raise UnsupportedBackboneError(f"timm does not say what the layers of {backbone.name} are.")
    named = [*backbone.model.named_parameters(), ("of the head", None)]  # in no group, and so behind all
    whole = SimpleNamespace(named_parameters=lambda: named)
    numbers: dict[str, int] = group_parameters(whole, groups(coarse=False), reverse=True)
    return numbers, numbers["of the head"]
