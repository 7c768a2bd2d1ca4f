"""What every delta is made of: a module of trained tensors that can be put on a backbone and taken off again."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from vpt.backbones.factory import Backbone
from vpt.backbones.strength import Place, Strength, by_place, checked_strength
from vpt.errors import ConfigError

READOUT = sys.maxsize
"""The place behind all blocks, as a `DeltaPart.first_block`."""


class Handle(Protocol):
    """Something that was put on the backbone; `remove` takes it off."""

    def remove(self) -> None:
        """Takes it off."""


@dataclass(frozen=True)
class TrainingImages:
    """What a delta may start from: training images that are not augmented.

    Attributes:
        number: How many there are.
        images: Those at some positions, as the backbone takes them.
        labels: The class of each, int64 (number,); None where an image has other than one class.
        logits: What the model answers to images, (B, C), with the head that it has by then.
        shown: Shows how far a loop over a sequence is, with a word.
    """

    number: int
    images: Callable[[Sequence[int]], Tensor]
    labels: Tensor | None = None
    logits: Callable[[Tensor], Tensor] | None = None
    shown: Callable[[Sequence[Any], str], Iterable[Any]] = lambda steps, word: steps


class DeltaPart(nn.Module, ABC):
    """One kind of change to a frozen backbone.

    Its parameters belong to it, never to the backbone; the constructor takes the backbone only to read sizes from it.
    Arguments that it cannot take raise what `DeltaSpec.build` says.

    Attributes:
        first_block: How many blocks lie before everything that it changes; `READOUT` for all of them.
        changes_pool: Whether it changes the pooled features in another way than through the tokens that are pooled: a
            model that reads the map of tokens never sees that.
        pools: Whether the pool reads the tokens that it puts beside the map of a Swin.
        replaced: How many parameters of the backbone its own stand in for.
        started: Whether it needs no initial values from images, having taken or loaded its own.
        starts_from_classes: Whether the images that it starts from have to have one class each.
    """

    first_block: int = 0
    changes_pool: bool = False
    pools: bool = False
    replaced: int = 0
    started: bool = False
    starts_from_classes: bool = False

    def __init__(self, backbone: Backbone) -> None:
        """Starts at full strength, attached to nothing."""
        super().__init__()
        self._on = [backbone]  # in a list, so that it does not become a part of this module
        self._strength: Strength = 1.0
        self._by_place: dict[Hashable, float] = {}
        self._handles: list[Handle] = []

    @property
    def backbone(self) -> Backbone:
        """The backbone that the change is for."""
        return self._on[0]

    @property
    def attached(self) -> bool:
        """Whether the change is on the backbone."""
        return any(part is self for part in self.backbone.attached)

    def attach(self) -> None:
        """Puts all of it on; a ConfigError where it is on, or the backbone is merged with another delta."""
        if self.attached:
            raise ConfigError(f"This {type(self).__name__} is attached already.")
        if any(isinstance(part, DeltaPart) and part.merged for part in self.backbone.attached):
            raise ConfigError("A delta is merged into the backbone's weights: unmerge it before another is attached.")
        try:
            for handle in self.hooks():
                self._handles.append(handle)
        except BaseException:
            self._detach()
            raise
        self.backbone.attached.append(self)

    def detach(self) -> None:
        """Takes the change off, if it is on; the backbone is bit for bit what it was."""
        if self.attached:
            self._detach()
            self.backbone.attached.remove(self)

    def hooks(self) -> Iterable[Handle]:
        """Hooks the change on the backbone; what it returns takes the change off again."""
        return ()

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @property
    def merged(self) -> bool:
        """Whether the change lies in the backbone's own weights for now."""
        return False

    def joining(self, block: int, images: int) -> Tensor | None:
        """See `vpt.backbones.block_forward.Attached`: none, unless a delta says otherwise."""
        return None

    @property
    def reads_tokens(self) -> bool:
        """See `vpt.backbones.block_forward.Attached`: it does not, unless a delta says otherwise."""
        return False

    def pool(self, tokens: Tensor, pooled: Tensor) -> Tensor:
        """See `vpt.backbones.block_forward.Attached`."""
        return pooled

    def adds_to(self) -> list[nn.Module]:
        """The layers that it adds to the outputs of, by hooks, where it changes nothing else; otherwise none."""
        return []

    def rate_scales(self) -> dict[nn.Parameter, float]:
        """Multiples of the learning rate, by parameter; 1 for those that it lacks."""
        return {}

    @property
    def starts_from_images(self) -> bool:
        """Whether it has yet to take initial values from training images."""
        return False

    def start_from_images(self, training: TrainingImages, rng: np.random.Generator) -> None:
        """Takes initial values where it `starts_from_images`; the backbone is without a delta meanwhile.

        All that is random follows from `rng`.
        """

    def penalty(self) -> Tensor | None:
        """What training adds to its loss, a scalar that depends on the parameters alone; None for nothing."""
        return None

    def curves(self) -> dict[str, Tensor]:
        """Scalars that are worth a curve while it trains, by name."""
        return {}

    @abstractmethod
    def expected_parameters(self) -> int:
        """The number of trained parameters by the method's formula."""

    def folded(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a delta file keeps: the arguments that differ without what only training needs, and its tensors."""
        return {}, self.state_dict(keep_vars=True)

    def unfolded(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `folded`, as an equal part's state; a ConfigError where nothing gives these tensors."""
        return dict(tensors)

    def misfit(self, tensors: Mapping[str, Tensor]) -> str:
        """Says why tensors of the names and shapes of its state cannot be that; nothing where they can."""
        return ""

    @property
    def strength(self) -> Strength:
        """α in [0, 1]: 1 is the tuned model exactly, 0 the frozen backbone exactly; or that of each layer."""
        return self._strength

    @strength.setter
    def strength(self, alpha: float | Sequence[float]) -> None:
        strength = checked_strength(alpha, self.backbone)
        self._by_place = by_place(strength, self.places(), self.backbone)
        self._strength = strength

    def places(self) -> Mapping[Any, Place]:
        """Where each change lies, by the key that `at` is asked with; what is not told lies in the last layer."""
        return {}

    def at(self, key: Hashable = None) -> float:
        """α of one of its changes."""
        strength = self._strength
        return strength if isinstance(strength, float) else self._by_place.get(key, strength[-1])

    @property
    def beside_strength(self) -> float:
        """See `vpt.backbones.block_forward.Attached`."""
        return self.at()


Compute = Callable[[Any], Tensor]
"""From the original parameter, or None where there is none, to what is used in its place."""


class Parametrization:
    """One parameter of a module that is computed, whenever it is read, from its own value and from what is trained.

    A handle, as of a hook. Unlike `torch.nn.utils.parametrize`, the original keeps name and place: state dicts, `.to()`
    and `torch.func.functional_call` see the backbone as it is, and taking the computation off leaves no trace.
    """

    def __init__(self, module: nn.Module, name: str, compute: Compute) -> None:
        """Puts it on: the module's attribute is what `compute` makes of the parameter `name`, which may be None.

        A ConfigError where the parameter is computed already.
        """
        computed: dict[str, Compute] = module.__dict__.setdefault("_computed", {})
        if name in computed:
            raise ConfigError(f"Two deltas train the {name} of one {type(module).__name__}: keep one of them.")
        base = _base(module)
        computed[name] = compute
        module.__class__ = _computing(base, frozenset(computed))
        self.module, self.name = module, name

    @property
    def value(self) -> Tensor:
        """What is used in its place."""
        used: Tensor = getattr(self.module, self.name)
        return used

    def remove(self) -> None:
        """Takes it off."""
        base, computed = _base(self.module), self.module.__dict__["_computed"]
        del computed[self.name]
        self.module.__class__ = _computing(base, frozenset(computed)) if computed else base
        if not computed:
            del self.module.__dict__["_computed"]


def _base(module: nn.Module) -> type[nn.Module]:
    """The class of a module without computed parameters."""
    return cast("type[nn.Module]", vars(type(module)).get("_uncomputed", type(module)))


_CLASSES: dict[tuple[type[nn.Module], frozenset[str]], type[nn.Module]] = {}


def _computing(base: type[nn.Module], names: frozenset[str]) -> type[nn.Module]:
    """The subclass of a class of modules in which parameters of these names are computed."""
    if (base, names) in _CLASSES:
        return _CLASSES[base, names]
    members: dict[str, Any] = {name: property(partial(_read, name=name)) for name in names}
    members |= {"__reduce_ex__": _reduce, "__module__": base.__module__, "_uncomputed": base}
    _CLASSES[base, names] = type(base.__name__, (base,), members)
    return _CLASSES[base, names]


def _read(module: nn.Module, name: str) -> Tensor:
    original = module._parameters[name]
    try:
        return cast("Tensor", module.__dict__["_computed"][name](original))
    except AttributeError as error:  # Python would ask `nn.Module.__getattr__` instead, which has the original
        raise RuntimeError(f"{name} of {type(module).__name__} cannot be computed: {error}") from error


def _reduce(module: nn.Module, protocol: int) -> tuple[Any, ...]:
    """A copy, or what is unpickled, computes the same parameters; its class is made where it is not there yet."""
    return _made_again, (_base(module), tuple(module.__dict__["_computed"])), module.__dict__


def _made_again(base: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    computing = _computing(base, frozenset(names))
    return computing.__new__(computing)


@dataclass(frozen=True)
class MergedWeight:
    """A weight of a module of the backbone, and what makes it, None for a missing bias, the changed one."""

    module: nn.Module
    name: str
    changed: Callable[[Any], Tensor]


class MergeablePart(DeltaPart):
    """A change that can be put into the weights that the backbone computes with: the same function."""

    def __init__(self, backbone: Backbone) -> None:
        """Starts unmerged."""
        super().__init__(backbone)
        self._merged: list[Parametrization] = []
        self._written = False

    @property
    def merges_wholly(self) -> bool:
        """Whether nothing of it is computed beside the weights once it is merged."""
        return True

    @abstractmethod
    def _merged_weights(self) -> Iterator[MergedWeight]:
        """Each weight of the backbone that has the change in it when merged."""

    def merge(self) -> None:
        """Puts the change into the weights that the backbone computes with. Its parameters themselves stay.

        A change that is trained, loaded or weakened later counts at once: each weight is computed when it is read.
        `vpt.export.onnx_torch.fold` writes it into a copy, where it costs nothing. A ConfigError where something else
        is attached to the backbone.
        """
        if self.backbone.narrow:
            raise ConfigError("A change is not merged into weights that are kept in bfloat16, which would round it.")
        if [*self.backbone.attached] != [self] or self._written:
            raise ConfigError(f"Only a {type(self).__name__} that is attached alone can be merged, and once for good.")
        self.unmerge()
        for weight in self._merged_weights():
            self._merged.append(Parametrization(weight.module, weight.name, weight.changed))

    @property
    def merged(self) -> bool:
        """Whether the change lies in the weights that the backbone computes with."""
        return self._written or bool(self._merged)

    @torch.no_grad()
    def merge_for_good(self) -> None:
        """Merges, and writes what the backbone then computes with over its parameters; only a copy should lose them."""
        self.merge()
        values = [(handle, handle.value.detach().clone()) for handle in self._merged]
        self.unmerge()
        for handle, value in values:
            handle.module._parameters[handle.name] = nn.Parameter(value, requires_grad=False)
        self._written = True

    def unmerge(self) -> None:
        """Lets the backbone compute with its own weights again."""
        for handle in self._merged:
            handle.remove()
        self._merged = []

    def _detach(self) -> None:
        self.unmerge()
        super()._detach()


Shape = tuple[int, int]


def stack(shapes: Sequence[Shape], like: Tensor, draw: Callable[[Tensor], Tensor]) -> nn.Parameter | nn.ParameterList:
    """Makes a matrix (n, dim) for each layer; those of successive layers of one shape lie in one tensor.

    `draw` fills one like `like`. Returns (layers, n, dim) where all shapes are equal, else a list of such.
    """
    runs = [nn.Parameter(draw(like.new_empty(len(list(run)), *shape))) for shape, run in groupby(shapes)]
    return runs[0] if len(runs) == 1 else nn.ParameterList(runs)


def pick(stacked: nn.Parameter | nn.ParameterList, layer: int) -> Tensor:
    """Takes the matrix of a layer, (n, dim), from what `stack` made."""
    if not isinstance(stacked, nn.ParameterList):  # perhaps no parameter under `torch.func`
        return stacked[layer]
    for run in stacked:
        if layer < len(run):
            return cast("Tensor", run[layer])
        layer -= len(run)
    raise IndexError(layer)


def named_stack(name: str, matrices: Sequence[Tensor]) -> dict[str, Tensor]:
    """Lays matrices (n, dim) out as `stack` does, under the names that the parameters of an attribute `name` have."""
    runs = [torch.stack(list(run)) for _, run in groupby(matrices, key=lambda matrix: matrix.shape)]
    return {name: runs[0]} if len(runs) == 1 else {f"{name}.{index}": run for index, run in enumerate(runs)}


def chosen_blocks(depth: int, layers: Sequence[int] | None, option: str = "layers") -> list[int]:
    """Blocks in ``[first, last + 1]`` of `depth`, from 0; None for all. A ConfigError where there are none."""
    if layers is None:
        return list(range(depth))
    if len(layers) != 2 or not 0 <= layers[0] < layers[1] <= depth:
        raise ConfigError(f"{option} is [first, last + 1] of {depth} blocks, counted from 0, got {list(layers)}.")
    return list(range(layers[0], layers[1]))


def numbers_by_layer(num_tokens: int | Sequence[int], layers: int, least: int = 1) -> list[int]:
    """Keys of each layer, of one number or a list, all at least 1, or 0 where `least` is that but for one of them.

    A ConfigError for others, or a list of another length.
    """
    numbers = [num_tokens] * layers if isinstance(num_tokens, int) else list(num_tokens)
    if len(numbers) != layers:
        raise ConfigError(f"num_tokens lists {len(numbers)} numbers for {layers} layers with prompts.")
    if min(numbers) < least or not any(numbers):
        raise ConfigError(f"num_tokens must be at least 1, got {min(numbers)}; for no prompts use a linear probe.")
    return numbers
