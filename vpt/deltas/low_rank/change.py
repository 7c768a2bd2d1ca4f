"""Changes of chosen linear maps, and those of low rank: W + α · factor · U D, where each method says what U and D are.

The weight of a convolution, (outputs, inputs, rows, columns), is such a map of inputs · rows · columns values.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from vpt.backbones.factory import Backbone
from vpt.backbones.strength import Place
from vpt.backbones.target_modules import LinearTarget, linear_targets, named_layers
from vpt.deltas.base import Compute, Handle, MergeablePart, MergedWeight, Parametrization, chosen_blocks
from vpt.errors import ConfigError, UnknownNameError


class LinearChange(MergeablePart):
    """A change of linear maps of every block, or of layers by name.

    The change of a linear map is computed beside the frozen one, so that a fused query-key-value layer can be changed
    in part; that of a convolution in its weight, whatever the layer does with that. Its strength scales the change: at
    0 the frozen map runs alone. By ``block_name``, or the layer's name with ``/`` for ``.``, `targets` are linear maps
    and `convolutions` the others; `by_module` says which maps are of one module, and `shapes` the outputs of
    each and what one output weighs, (inputs,) or the shape of its kernel.
    """

    method: ClassVar[str]

    def __init__(self, backbone: Backbone, targets: Sequence[str], layers: Sequence[int] | None) -> None:
        """Finds what is changed.

        Args:
            backbone: The backbone that the change is for.
            targets: Any of ``q``, ``k``, ``v``, ``proj``, ``fc1``, ``fc2`` of a vision transformer's blocks; and linear
                layers and convolutions of any backbone by name (`vpt.backbones.target_modules.named_layers`).
            layers: Of a vision transformer's maps, only in blocks ``[first, last + 1]``, counted from 0; None for all.
        """
        super().__init__(backbone)
        blocks = linear_targets(backbone) if backbone.has_layout else []
        known = list(blocks[0]) if blocks else []
        if not targets:
            raise ConfigError(f"{self.method} needs at least one target{' of ' if known else ''}{', '.join(known)}.")
        if len(set(targets)) < len(targets):
            raise ConfigError(f"{self.method} needs different targets, got {[*targets]}.")
        if not known and list(targets) == ["q", "v"]:
            raise ConfigError(
                f"The blocks of {backbone.name} are not known, and so no q and v: name layers in {self.method}'s "
                "targets, such as all-linear or all-conv."
            )
        by_name = self._by_name(known, targets)
        if by_name and layers is not None:
            raise ConfigError(f"layers are of a block's {', '.join(known) or 'maps'}, not of layers by name.")
        chosen = [] if len(by_name) == len(targets) else chosen_blocks(len(blocks), layers)
        self.first_block = 0 if by_name else chosen[0]
        self.targets: dict[str, LinearTarget] = {
            f"{index}_{name}": blocks[index][name] for index in chosen for name in targets if name in known
        }
        self.convolutions: dict[str, nn.Conv2d] = {}
        for name, layer in (named_layers(backbone, by_name) if by_name else {}).items():
            if isinstance(layer, nn.Conv2d):
                self.convolutions[name.replace(".", "/")] = layer
            elif any(layer is target.module for target in self.targets.values()):
                raise ConfigError(f"{name} would be changed twice: by its name, and as one of {', '.join(known)}.")
            else:
                self.targets[name.replace(".", "/")] = LinearTarget(layer, 0, layer.out_features)
        self.by_module: dict[nn.Linear, list[str]] = {}
        for key, target in self.targets.items():
            self.by_module.setdefault(target.module, []).append(key)
        self.shapes: dict[str, tuple[int, tuple[int, ...]]] = {
            **{key: (t.stop - t.start, (t.module.in_features,)) for key, t in self.targets.items()},
            **{key: (c.out_channels, tuple(c.weight.shape[1:])) for key, c in self.convolutions.items()},
        }

    def _by_name(self, known: Sequence[str], targets: Sequence[str]) -> list[str]:
        """The targets that are layers by name; an UnknownNameError, which names maps too, where one is none."""
        found = [name for name in targets if name not in known]
        for name in found:
            try:
                named_layers(self.backbone, [name])
            except UnknownNameError as error:
                kind = f"{self.method} target of {self.backbone.name}"
                raise UnknownNameError(kind, name, dict.fromkeys([*known, *error.known])) from error
        return found

    def hooks(self) -> Iterator[Handle]:
        """The change beside every module that computes one of the maps or several."""
        for module, keys in self.by_module.items():
            yield module.register_forward_hook(partial(self._add, keys))
        for key, layer in self.convolutions.items():
            for name, compute in self._computed(key).items():
                try:
                    yield Parametrization(layer, name, compute)
                except ConfigError as error:
                    raise ConfigError(f"Two deltas train {key.replace('/', '.')}.{name}: keep one of them.") from error

    def _computed(self, key: str) -> dict[str, Compute]:
        """The parameters of a convolution that are computed, by their names."""
        return {"weight": partial(self._convolved, key)}

    def places(self) -> Mapping[Any, Place]:
        """See `DeltaPart`."""
        return {**{key: target.module for key, target in self.targets.items()}, **self.convolutions}

    def adds_to(self) -> list[nn.Module]:
        """See `DeltaPart`; the change of a convolution lies in its weight."""
        return [] if self.convolutions else [*self.by_module]

    def _merged_weights(self) -> Iterator[MergedWeight]:
        """See `MergeablePart`."""
        for module, keys in self.by_module.items():
            yield MergedWeight(module, "weight", partial(self._changed, keys))

    @torch.no_grad()
    def merge_for_good(self) -> None:
        """See `MergeablePart`."""
        self.merge()  # which may be refused, before anything is changed
        convolved = [handle for handle in self._handles if isinstance(handle, Parametrization)]
        values = [handle.value.detach().clone() for handle in convolved]
        for handle in convolved:
            handle.remove()
            self._handles.remove(handle)
        super().merge_for_good()
        for handle, value in zip(convolved, values, strict=True):
            handle.module._parameters[handle.name] = nn.Parameter(value, requires_grad=False)

    def _add(self, keys: Sequence[str], module: nn.Linear, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        if self.at(keys[0]) == 0.0 or self.merged:
            return out
        return self._beside(keys, module, args[0], out)

    @abstractmethod
    def _beside(self, keys: Sequence[str], module: nn.Linear, x: Tensor, out: Tensor) -> Tensor:
        """The output of a module, of its input, with the changes of its maps."""

    @abstractmethod
    def _changed(self, keys: Sequence[str], weight: Tensor) -> Tensor:
        """The weight of a module with the changes of its maps."""

    @abstractmethod
    def _convolved(self, key: str, weight: Tensor) -> Tensor:
        """The weight of a convolution with its change."""


class LowRankChange(LinearChange):
    """A change of low rank of linear maps; `factor` multiplies every change."""

    factor: float = 1.0

    @abstractmethod
    def factors(self, key: str) -> tuple[Tensor, Tensor]:
        """D, (ranks, inputs) or (ranks, inputs, rows, columns), and U, (outputs, ranks), of one of the changes."""

    def acting(self, key: str) -> tuple[Tensor, Tensor]:
        """Those that act in this forward pass: the same, unless training leaves out some of the ranks."""
        return self.factors(key)

    def _convolved(self, key: str, weight: Tensor) -> Tensor:
        if (strength := self.at(key)) == 0.0:
            return weight
        down, up = self.acting(key)
        return torch.add(weight, ((up * (self.factor * strength)) @ down.flatten(1)).view_as(weight))

    def _changed(self, keys: Sequence[str], weight: Tensor) -> Tensor:
        down, up = self._stacked(keys)
        return torch.addmm(weight, up, down)

    def _stacked(self, keys: Sequence[str]) -> tuple[Tensor, Tensor]:
        """D and U of all maps of a module as one: (ranks, inputs), and scaled (outputs of the module, ranks)."""
        downs, columns = [], []
        for key in keys:
            (down, up), target = self.acting(key), self.targets[key]
            downs.append(down)
            columns.append(pad(up, (0, 0, target.start, target.module.out_features - target.stop)))
        assembled = columns[0] if len(keys) == 1 else torch.cat(columns, dim=1)
        return torch.cat(downs), assembled * (self.factor * self.at(keys[0]))

    def _beside(self, keys: Sequence[str], module: nn.Linear, x: Tensor, out: Tensor) -> Tensor:
        down, up = self._stacked(keys)
        # One product that adds: a sum into a third of a fused layer's output would copy all of it.
        added = torch.addmm(out.flatten(0, -2), x.flatten(0, -2) @ down.T, up.T)
        return added.view_as(out)
