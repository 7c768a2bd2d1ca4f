"""Learned queries that attend to all patches instead of the backbone's pool."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from vpt.backbones.factory import Backbone
from vpt.deltas.base import DeltaPart, Handle
from vpt.deltas.registry import register_delta
from vpt.errors import ConfigError


@register_delta("attention_pool")
class AttentionPool(DeltaPart):
    """Efficient Probing (Psomas et al., "Attention, Please!", ICLR 2026): multi-query cross-attention.

    Query j of M attends to the final tokens x_i of the patches as they are, a_ij = softmax_i(q_j · x_i / √dim), and the
    features are the concatenation of y_j = Σ_i a_ij W_j x_i, where W_1 … W_M are the rows of one map of values in
    order; or of the j-th part of Σ_i a_ij x_i. Strength α moves from the backbone's pooled features to these.
    """

    changes_pool = True

    def __init__(self, backbone: Backbone, queries: int = 32, values: bool = True) -> None:
        """Draws the queries from N(0, 0.02²), and the map of values as `nn.Linear` does.

        A ConfigError unless the number of `queries` is positive and divides the width of the features; an
        UnsupportedBackboneError where the tokens of the backbone are not known. Without `values` there is no such map.
        """
        super().__init__(backbone)
        self.first_block = len(backbone.layout.blocks)
        dim, width, like = backbone.layout.dims[-1], backbone.num_features, backbone.mean
        if queries < 1 or width % queries:
            raise ConfigError(f"The {width} features have no {queries} equal parts, one of each query: change queries.")
        if dim != width and not values:
            raise ConfigError(f"The tokens of {backbone.name} are {dim} wide, its features {width}: leave values on.")
        self.queries = nn.Parameter(torch.randn(queries, dim, dtype=like.dtype, device=like.device) * 0.02)
        place = {"dtype": like.dtype, "device": like.device}
        self.values = nn.Linear(dim, width, bias=False, **place) if values else None

    def hooks(self) -> Iterable[Handle]:
        """None: the backbone asks. A ConfigError where another one is attached already."""
        if any(isinstance(part, AttentionPool) for part in self.backbone.attached):
            raise ConfigError("Two deltas attention_pool would each be the pool: keep one of them.")
        return ()

    def expected_parameters(self) -> int:
        """M · dim, and dim · width for the values."""
        return self.queries.numel() + (0 if self.values is None else self.values.weight.numel())

    @property
    def reads_tokens(self) -> bool:
        """Unless its strength is 0."""
        return self.at() != 0.0

    def attention(self, tokens: Tensor) -> Tensor:
        """Where each query looks, (B, M, patches), rows of sum 1, of final tokens (B, patches, dim)."""
        scores = tokens @ self.queries.T * math.sqrt(1 / tokens.shape[-1])
        return scores.softmax(dim=1).transpose(1, 2)

    def pool(self, tokens: Tensor, pooled: Tensor) -> Tensor:
        """See `vpt.backbones.block_forward.Attached`."""
        means = self.attention(tokens) @ tokens  # before the map of values, which is linear: once for each query
        number, dim = self.queries.shape
        if self.values is None:
            parts = means.view(-1, number, number, dim // number).diagonal(dim1=1, dim2=2).transpose(1, 2)
        else:
            parts = torch.einsum("bmd,mkd->bmk", means, self.values.weight.view(number, -1, dim))
        own = parts.flatten(1).to(pooled.dtype)  # autocast
        return own if self.at() == 1.0 else pooled.lerp(own, self.at())
