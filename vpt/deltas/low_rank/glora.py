"""Generalized LoRA (Chavan et al., "One-for-All: Generalized LoRA", arXiv 2306.07967, 2023).

W x + b becomes (W + W ⊙ A + B) x + W C + b ⊙ D + E + b, whose support tensors A to E each have a form of their own.
The product W ⊙ A is that of the entries, as in the released code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from vpt.backbones.factory import Backbone
from vpt.deltas.base import Compute, MergedWeight
from vpt.deltas.low_rank.change import LinearChange
from vpt.deltas.registry import register_delta
from vpt.errors import ConfigError, UnknownNameError

FORMS = {
    "a": ("lora", "vector", "scalar", "none"),
    "b": ("lora", "vector", "scalar", "none"),
    "c": ("lora", "vector", "none"),
    "d": ("vector", "scalar", "none"),
    "e": ("vector", "scalar", "none"),
}
"""What each support tensor can be."""


@register_delta("glora")
class Glora(LinearChange):
    """Changes of weights and biases by five support tensors, in one choice of their forms for all maps.

    `supports` are the tensors of each of ``a`` to ``e`` by map: of ``lora`` the factors (outputs, rank) and
    (rank, inputs), where C is (inputs, 1); a ``vector`` (outputs,), of C (inputs,); a ``scalar``. All but the second
    factors are zero at first: training starts from the backbone. A layer without a bias has no D.
    """

    method = "GLoRA"

    def __init__(
        self,
        backbone: Backbone,
        rank: int = 4,
        a: Literal["lora", "vector", "scalar", "none"] = "lora",
        b: Literal["lora", "vector", "scalar", "none"] = "lora",
        c: Literal["lora", "vector", "none"] = "lora",
        d: Literal["vector", "scalar", "none"] = "vector",
        e: Literal["vector", "scalar", "none"] = "vector",
        targets: Sequence[str] = ("q", "v"),
        layers: Sequence[int] | None = None,
    ) -> None:
        """Draws the second factors by Xavier's rule and sets all else to zero.

        Args:
            backbone: The backbone that the change is for.
            rank: Of what is ``lora``, at least 1.
            a: Form of A, which scales weights.
            b: Form of B, which is added to weights.
            c: Form of C, which is added to what a layer reads, and so to its bias through W.
            d: Form of D, which scales biases.
            e: Form of E, which is added to biases.
            targets: See `LinearChange`.
            layers: See `LinearChange`.
        """
        self.forms: dict[str, str] = {"a": a, "b": b, "c": c, "d": d, "e": e}
        for letter, form in self.forms.items():
            if form not in FORMS[letter]:
                raise UnknownNameError(f"form of GLoRA's {letter}", form, FORMS[letter])
        if rank < 1:
            raise ConfigError(f"The rank of GLoRA must be at least 1, got {rank}.")
        if set(self.forms.values()) == {"none"}:
            raise ConfigError("GLoRA of a, b, c, d and e that are all none changes nothing: give one of them a form.")
        super().__init__(backbone, targets, layers)
        self.rank = rank
        self.supports = nn.ModuleDict({letter: nn.ModuleDict() for letter in FORMS})
        for letter, key, (outputs, inputs) in self._sizes():
            drawn = _drawn(self.forms[letter], rank, outputs, inputs, backbone.mean)
            cast("nn.ModuleDict", self.supports[letter])[key] = nn.ParameterList(drawn)

    def _sizes(self) -> Iterator[tuple[str, str, tuple[int, int]]]:
        """The support tensors of every map as matrices: letter, key, outputs and inputs."""
        modules = {**{key: target.module for key, target in self.targets.items()}, **self.convolutions}
        for key, (outputs, kernel) in self.shapes.items():
            inputs = math.prod(kernel)
            sizes = {"a": (outputs, inputs), "b": (outputs, inputs), "c": (inputs, 1), "e": (outputs, 1)}
            if modules[key]._parameters["bias"] is not None:
                sizes["d"] = (outputs, 1)
            for letter, size in sizes.items():
                yield letter, key, size

    def expected_parameters(self) -> int:
        """Σ over the support tensors of maps: rank · (outputs + inputs) of ``lora``, outputs of a ``vector``, or 1."""
        number = 0
        for letter, _, (outputs, inputs) in self._sizes():
            of_form = {"lora": self.rank * (outputs + inputs), "vector": outputs, "scalar": 1, "none": 0}
            number += of_form[self.forms[letter]]
        return number

    def _support(self, letter: str, key: str) -> Tensor | float:
        """One of them as a matrix, (outputs or 1, inputs or 1); 0 where there is none."""
        own = cast("nn.ModuleDict", self.supports[letter])
        factors = list(cast("nn.ParameterList", own[key])) if key in own else []
        if len(factors) == 2:
            return torch.mm(*factors)
        return factors[0].view(-1, 1) if factors else 0.0

    def _added(self, key: str, weight: Tensor) -> Tensor:
        """W ⊙ A + B of a map whose weight is given, (outputs, inputs)."""
        return weight * self._support("a", key) + self._support("b", key)

    def _shift(self, key: str, weight: Tensor, bias: Tensor | None) -> Tensor:
        """W C + b ⊙ D + E of a map, (outputs,)."""
        read, shift = self._support("c", key), self._support("e", key)
        found = shift + (weight @ read if isinstance(read, Tensor) else weight.new_zeros(len(weight), 1))
        return (found if bias is None else found + bias.unsqueeze(1) * self._support("d", key)).squeeze(1)

    def _weight_change(self, keys: Sequence[str], weight: Tensor) -> Tensor:
        """What is added to the weight of a module, (outputs, inputs), at its strength."""
        found = []
        for key in keys:
            target = self.targets[key]
            own = self._added(key, weight[target.start : target.stop])
            found.append(pad(own, (0, 0, target.start, len(weight) - target.stop)))
        return sum(found[1:], start=found[0]) * self.at(keys[0])

    def _bias_change(self, keys: Sequence[str], weight: Tensor, bias: Tensor | None) -> Tensor:
        """What is added to the bias of a module, (outputs,), at its strength."""
        found = []
        for key in keys:
            rows = slice((target := self.targets[key]).start, target.stop)
            own = self._shift(key, weight[rows], None if bias is None else bias[rows])
            found.append(pad(own, (target.start, len(weight) - target.stop)))
        return sum(found[1:], start=found[0]) * self.at(keys[0])

    @property
    def _changes_weights(self) -> bool:
        return not self.forms["a"] == self.forms["b"] == "none"

    def _beside(self, keys: Sequence[str], module: nn.Linear, x: Tensor, out: Tensor) -> Tensor:
        shift = self._bias_change(keys, module.weight, module.bias)
        return out + (linear(x, self._weight_change(keys, module.weight), shift) if self._changes_weights else shift)

    def _merged_weights(self) -> Iterator[MergedWeight]:
        """See `MergeablePart`."""
        yield from super()._merged_weights()
        for module, keys in self.by_module.items():
            yield MergedWeight(module, "bias", partial(self._changed_bias, keys, module))

    def _changed(self, keys: Sequence[str], weight: Tensor) -> Tensor:
        return weight + self._weight_change(keys, weight)

    def _changed_bias(self, keys: Sequence[str], module: nn.Linear, bias: Tensor | None) -> Tensor:
        # The parameter itself: the attribute is the merged weight.
        change = self._bias_change(keys, cast("Tensor", module._parameters["weight"]), bias)
        return change if bias is None else bias + change

    def _computed(self, key: str) -> dict[str, Compute]:
        """See `LinearChange`."""
        return super()._computed(key) | {"bias": partial(self._convolved_bias, key)}

    def _convolved(self, key: str, weight: Tensor) -> Tensor:
        if (strength := self.at(key)) == 0.0:
            return weight
        return weight + (strength * self._added(key, weight.flatten(1))).view_as(weight)

    def _convolved_bias(self, key: str, bias: Any) -> Any:
        if (strength := self.at(key)) == 0.0:
            return bias
        weight = cast("Tensor", self.convolutions[key]._parameters["weight"])
        change = strength * self._shift(key, weight.flatten(1), bias)
        return change if bias is None else bias + change


def _drawn(form: str, rank: int, outputs: int, inputs: int, like: Tensor) -> list[nn.Parameter]:
    """The tensors of a support tensor (outputs, inputs), none of which changes anything yet."""
    if form == "none":
        return []
    if form != "lora":
        return [nn.Parameter(like.new_zeros(() if form == "scalar" else outputs))]
    down = like.new_empty(rank, inputs)
    nn.init.xavier_uniform_(down)
    return [nn.Parameter(like.new_zeros(outputs, rank)), nn.Parameter(down)]
