"""SPT-LoRA (He et al., "Sensitivity-Aware Visual Parameter-Efficient Fine-Tuning", ICCV 2023).

How much a weight matters for the task is its squared gradient on training images. Matrices with many of the most
sensitive weights get LoRA (structured tuning); of all others these weights train alone (unstructured tuning), within a
number of parameters that is given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vpt.backbones.factory import Backbone
from vpt.backbones.target_modules import linear_targets, parameter_names
from vpt.deltas.base import DeltaPart, TrainingImages
from vpt.deltas.host_state import HostState
from vpt.deltas.partial_tuning import to_key
from vpt.deltas.registry import register_delta
from vpt.deltas.selection import Selection, in_batches
from vpt.errors import ConfigError

BATCH = 32
"""Images whose gradient is squared together."""

IMAGES = 512
"""How many of the training images are looked at, at most."""

OF_VECTORS = 0.2
"""The share of a vector that has to be sensitive for all of it to train."""

STRUCTURED = -1
"""In place of the number of its weights, for what trains as a whole."""


@dataclass(frozen=True)
class Item:
    """What gets one kind of tuning: the rows `start` to `stop` of a parameter, a matrix or a vector.

    Attributes:
        key: The parameter, by timm's name with ``/`` for ``.``.
        size: How many weights it has.
        cost: How many train where it is tuned as a whole: those of LoRA, or all of a vector.
        needed: How many of its weights have to be sensitive for that, 1 to `cost`.
    """

    key: str
    start: int
    stop: int
    size: int
    cost: int
    needed: int

    def of(self, parameter: Tensor) -> Tensor:
        """Its weights, flat, of what is shaped as the parameter."""
        return parameter[self.start : self.stop].flatten()


@register_delta("spt_lora")
class SptLora(Selection):
    """LoRA for the matrices with the most sensitive weights, and of others these weights alone.

    `changes` are what trains, (budget · parameters of the backbone,): of each item, in order, the changes of its
    weights, or A (rank, inputs) and B (outputs, rank) of its LoRA, or the change of a whole vector. `counts` says how
    many weights of each item train, or `STRUCTURED`; `positions` where in its item each value stands, -1 where it is
    none of a single weight. Both are int32, the first in host memory. Training selects them at its start
    (`start_from_images`), or a file has them; until then the first weights train.
    """

    def __init__(
        self,
        backbone: Backbone,
        budget: float = 0.005,
        rank: int = 8,
        threshold: float = 0.1,
        vectors: bool = True,
    ) -> None:
        """Changes nothing yet; an UnsupportedBackboneError where the blocks are not known.

        Args:
            backbone: The backbone that the change is for.
            budget: How many parameters train, as a share of all that the backbone has, in (0, 1).
            rank: Of LoRA, at least 1, and so that it has no more parameters than the matrix.
            threshold: A matrix gets LoRA once so many of its weights are sensitive, as a share of the parameters of
                LoRA, in (0, 1].
            vectors: Whether biases and norms may train, too.
        """
        DeltaPart.__init__(self, backbone)
        if not 0 < budget < 1 or not 0 < threshold <= 1 or rank < 1:
            raise ConfigError(
                "spt_lora takes a budget in (0, 1), a threshold in (0, 1] and a rank of at least 1, got "
                f"{budget}, {threshold} and {rank}."
            )
        self.rank = rank
        self.items = _items(backbone, rank, threshold, vectors)
        self._costs = tuple(item.cost for item in self.items)
        self._of_key: dict[str, list[int]] = {}
        for index, item in enumerate(self.items):
            self._of_key.setdefault(item.key, []).append(index)
        self._claim(list(dict.fromkeys(item.key.replace("/", ".") for item in self.items)))
        self._number = round(budget * sum(parameter.numel() for parameter in backbone.model.parameters()))
        most = sum(item.cost for item in self.items)
        if not 1 <= self._number <= most:
            raise ConfigError(
                f"spt_lora of rank {rank} trains 1 to {most:,} parameters of {backbone.name}, and a budget of {budget} "
                f"is {self._number:,}: give another budget or rank."
            )
        self.changes = nn.Parameter(backbone.mean.new_zeros(self._number))
        counts: list[int] = []
        for item in self.items:
            counts.append(min(item.size, self._number - sum(counts)))
        device = backbone.mean.device
        first = [torch.arange(count, dtype=torch.int32, device=device) for count in counts]
        self.counts = HostState(counts, torch.int32)
        self.register_buffer("positions", torch.cat(first))

    def expected_parameters(self) -> int:
        """The budget times the parameters of the backbone, rounded."""
        return self._number

    def _value(self, key: str, original: Tensor) -> Tensor:
        if (strength := self.at(key)) == 0.0:
            return original
        counts: list[int] = self.counts.values.tolist()
        rooms = self._rooms(counts)
        own = self._of_key[key]
        change = [self._of_item(self.items[index], counts[index], rooms[index], original) for index in own]
        return torch.add(original, torch.cat(change).view_as(original), alpha=strength)

    def _rooms(self, counts: Sequence[int]) -> tuple[slice, ...]:
        """Which of the values are those of each item."""
        return _rooms(self._costs, tuple(counts))

    def _of_item(self, item: Item, count: int, room: slice, original: Tensor) -> Tensor:
        """What is added to the weights of an item, flat."""
        values: Tensor = self.changes[room]
        if count != STRUCTURED:
            places = self.get_buffer("positions")[room].long()
            return torch.scatter(values.new_zeros(item.size), 0, places, values)
        if original.ndim == 1:
            return values
        down, up = values[: self.rank * original.shape[1]], values[self.rank * original.shape[1] :]
        return torch.mm(up.view(-1, self.rank), down.view(self.rank, -1)).flatten()

    def _select(self, training: TrainingImages, labels: Tensor, rng: np.random.Generator) -> None:
        """Allocates the budget by the squared gradients of batches of images, summed.

        The loss is the cross-entropy of a linear head, as it is drawn before training; the images, at most `IMAGES`,
        their order, the head and A of every LoRA are drawn from `rng`.
        """
        model = dict(self.backbone.model.named_parameters())
        own = {to_key(name): model[name] for name in self._names}
        like = self.backbone.mean
        head = rng.normal(scale=0.02, size=(int(labels.max()) + 1, self.backbone.num_features))
        weight = torch.from_numpy(head).to(like)

        def loss(images: Tensor, classes: Tensor) -> Tensor:
            return cross_entropy(self.backbone(images) @ weight.T, classes)

        found = {key: torch.zeros_like(parameter) for key, parameter in own.items()}
        order = rng.permutation(training.number)[:IMAGES].tolist()
        for gradients in self._gradients(own, training, labels, in_batches(order, BATCH), loss):
            for key, gradient in gradients.items():
                found[key] += gradient.square()
        places = allocate(self.items, [item.of(found[item.key]) for item in self.items], self._number)
        counts = [STRUCTURED if each is None else len(each) for each in places]
        self.counts.values.copy_(torch.tensor(counts))
        for item, own_places, room in zip(self.items, places, self._rooms(counts), strict=True):
            self.get_buffer("positions")[room] = -1 if own_places is None else own_places.int()
            self.changes[room] = 0.0
            if own_places is None and (parameter := own[item.key]).ndim > 1:
                width = parameter.shape[1]
                drawn = rng.uniform(-1.0, 1.0, size=self.rank * width) / math.sqrt(width)  # as PyTorch draws a layer
                self.changes[room.start : room.start + len(drawn)] = torch.from_numpy(drawn).to(like)

    def misfit(self, tensors: Mapping[str, Tensor]) -> str:
        """See `DeltaPart`: places lie in their items, in ascending order, and are as many as there are values."""
        counts: list[int] = tensors["counts._extra_state"].tolist()
        rooms = self._rooms(counts)
        if min(counts) < STRUCTURED or rooms[-1].stop != self._number:
            return "it trains other numbers of weights than its budget"
        for item, count, room in zip(self.items, counts, rooms, strict=True):
            places = tensors["positions"][room].long()
            if count == STRUCTURED:
                odd = bool((places != -1).any())
            else:
                odd = bool(((places < 0) | (places >= item.size)).any() or (places.diff() <= 0).any())
            if odd:
                return f"it trains weights of {item.key.replace('/', '.')} that are none"
        return ""


@lru_cache(maxsize=64)
def _rooms(costs: tuple[int, ...], counts: tuple[int, ...]) -> tuple[slice, ...]:
    widths = [cost if count == STRUCTURED else count for cost, count in zip(costs, counts, strict=True)]
    return tuple(slice(end - width, end) for end, width in zip(accumulate(widths), widths, strict=True))


def allocate(items: Sequence[Item], scores: Sequence[Tensor], number: int) -> list[Tensor | None]:
    """Which weights of each item train, given how sensitive each of them is.

    The most sensitive weights are taken one by one. Once as many of an item are as it needs they are replaced by
    its tuning as a whole, whose other parameters then cost nothing more. So many are taken as `number` allows; what is
    left of it goes to the next most sensitive weights of items that are not tuned as a whole.

    Args:
        items: What can be tuned.
        scores: The sensitivity of the weights of each, (size,).
        number: How many parameters train in the end, at least 1 and at most the sum of all `cost`.

    Returns:
        For each item the places of the weights, ascending; None for what is tuned as a whole.
    """
    ranked = [
        score.argsort(descending=True, stable=True)[: item.cost] for item, score in zip(items, scores, strict=True)
    ]
    of_item = torch.cat([torch.full_like(places, index) for index, places in enumerate(ranked)])
    steps = torch.cat([_steps(item).to(of_item) for item in items])
    order = torch.cat([score[places] for score, places in zip(scores, ranked, strict=True)]).argsort(
        descending=True, stable=True
    )
    spent = steps[order].cumsum(0)
    taken = int((spent <= number).sum())
    needed = torch.tensor([item.needed for item in items]).to(of_item)
    whole = of_item[order[:taken]].bincount(minlength=len(items)) >= needed
    left = number - (int(spent[taken - 1]) if taken else 0)
    rest = order[taken:]
    chosen = torch.cat([order[:taken], rest[~whole[of_item[rest]]][:left]])
    places = torch.cat(ranked)[chosen]
    return [None if whole[index] else places[of_item[chosen] == index].sort().values for index in range(len(items))]


def _steps(item: Item) -> Tensor:
    """What each of its weights, the most sensitive first, adds to the number of parameters: `cost` values."""
    steps = torch.zeros(item.cost, dtype=torch.long)
    steps[: item.needed] = 1
    steps[item.needed - 1] = item.cost - (item.needed - 1)
    return steps


def _items(backbone: Backbone, rank: int, threshold: float, vectors: bool) -> list[Item]:
    """Everything that can be tuned, in the order of the parameters: the maps of blocks, and biases and norms."""
    names = {id(module): name for name, module in backbone.model.named_modules()}
    rows: dict[str, list[tuple[int, int]]] = {}
    for target in (each for block in linear_targets(backbone) for each in block.values()):
        rows.setdefault(names[id(target.module)], []).append((target.start, target.stop))
    small = {*parameter_names(backbone, "bias"), *parameter_names(backbone, "norm")} if vectors else set()
    items = []
    for name, parameter in backbone.model.named_parameters():
        module, _, last = name.rpartition(".")
        parts = rows.get(module, [(0, len(parameter))] if parameter.ndim else [])
        if last == "weight" and module in rows:
            inputs = parameter.shape[1]
            for start, stop in parts:
                cost = rank * (stop - start + inputs)
                if cost > (size := (stop - start) * inputs):
                    most = size // (stop - start + inputs)
                    raise ConfigError(
                        f"LoRA of rank {rank} has more parameters than {name}: spt_lora takes a rank of 1 to {most}."
                    )
                items.append(Item(to_key(name), start, stop, size, cost, _least(threshold * cost)))
        elif name in small and not name.startswith("patch_embed."):
            items += [
                Item(to_key(name), start, stop, stop - start, stop - start, _least(OF_VECTORS * (stop - start)))
                for start, stop in parts
            ]
    return items


def _least(number: float) -> int:
    """The least whole number that is not below another, but for its rounding; at least 1."""
    return max(1, math.ceil(round(number, 6)))
