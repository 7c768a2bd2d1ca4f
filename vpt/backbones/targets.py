"""The linear maps and parameters of a vision transformer by the names that the literature gives them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import nn

from vpt.backbones.factory import Backbone

LINEARS = ("q", "k", "v", "proj", "fc1", "fc2")
"""Query, key, value and output projection of the attention; first and second layer of the MLP."""


@dataclass(frozen=True)
class LinearTarget:
    """One linear map of a block, perhaps fused with others in one module.

    Attributes:
        module: The layer that computes it.
        start: First of its outputs among those of the module.
        stop: One past the last.
    """

    module: nn.Linear
    start: int
    stop: int


def linear_targets(backbone: Backbone) -> list[dict[str, LinearTarget]]:
    """Finds the linear maps of every block.

    Args:
        backbone: A backbone whose blocks are known.

    Returns:
        One dict per block: each name of `LINEARS` to its map; query, key and value are thirds of timm's fused layer.

    Raises:
        UnsupportedBackboneError: The structure of the backbone is not known.
    """
    found = []
    for block in backbone.layout.blocks:
        attention, mlp = cast("nn.Module", block.attn), cast("nn.Module", block.mlp)
        qkv = cast("nn.Linear", attention.qkv)
        dim = qkv.out_features // 3
        targets = {name: LinearTarget(qkv, i * dim, (i + 1) * dim) for i, name in enumerate(("q", "k", "v"))}
        for name, layer in (("proj", attention.proj), ("fc1", mlp.fc1), ("fc2", mlp.fc2)):
            linear = cast("nn.Linear", layer)
            targets[name] = LinearTarget(linear, 0, linear.out_features)
        found.append(targets)
    return found


def sublayers(backbone: Backbone) -> list[dict[str, nn.Module]]:
    """The two parts of every block, whose outputs are added to the residual stream.

    Args:
        backbone: A backbone whose blocks are known.

    Returns:
        One dict per block with ``attn`` and ``mlp``; each maps tokens (B, N, dim) to tokens.

    Raises:
        UnsupportedBackboneError: The structure of the backbone is not known.
    """
    return [
        {"attn": cast("nn.Module", block.attn), "mlp": cast("nn.Module", block.mlp)} for block in backbone.layout.blocks
    ]


def affine_layers(backbone: Backbone) -> dict[str, nn.Module]:
    """Everything with a weight per output channel on the way of the tokens: patch embedding, norms, linear maps.

    Norms within the attention act on heads, not on the tokens' channels, and are left out.

    Args:
        backbone: A backbone whose blocks are known.

    Returns:
        Layers by timm's name, in the order of its modules.

    Raises:
        UnsupportedBackboneError: The structure of the backbone is not known.
    """
    inner = {id(norm) for a in backbone.layout.attentions for norm in (a.q_norm, a.k_norm)}
    return {
        name: module
        for name, module in backbone.model.named_modules()
        if (isinstance(module, nn.Linear | nn.Conv2d) or _is_norm(module)) and id(module) not in inner
    }


def parameter_names(backbone: Backbone, role: str, last: int = 0) -> list[str]:
    """Names the parameters of a timm model that play a role.

    Args:
        backbone: Any backbone; for ``last`` one whose blocks are known.
        role: ``all``; ``bias``: every additive vector named so; ``norm``: scale and shift of every normalisation;
            ``last``: the last blocks and what follows them.
        last: How many blocks for ``last``.

    Returns:
        Names as in `backbone.model.named_parameters()`, in that order.

    Raises:
        UnsupportedBackboneError: The blocks of the backbone are not known.
    """
    names = [name for name, _ in backbone.model.named_parameters()]
    if role == "bias":
        return [name for name in names if name.rpartition(".")[2] == "bias"]
    if role == "norm":
        norms = {name for name, module in backbone.model.named_modules() if _is_norm(module)}
        return [name for name in names if name.rpartition(".")[0] in norms]
    if role == "last":
        chosen = backbone.layout.blocks[-last:]
        late = {id(p) for block in chosen for p in block.parameters()}
        # timm's names of what a ViT applies after its blocks
        after = ("norm.", "fc_norm.", "attn_pool.")
        return [n for n, p in backbone.model.named_parameters() if id(p) in late or n.startswith(after)]
    return names


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm | nn.modules.batchnorm._NormBase)
