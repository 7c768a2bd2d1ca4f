"""The mean of deltas of one configuration, tensor by tensor where that means something, and else in another form.

A change of low rank is averaged as the matrix that it is: the mean of m of rank r is one of rank m·r, exactly; of DoRA
so is that of the directions, beside the mean of the lengths. Prompts and prefixes are sets, whose order says nothing:
those of each layer are matched to the first file's by assignment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import layer_norm

from vpt.deltas import DeltaSpec
from vpt.deltas.prompts.pruning import prunes_whole
from vpt.errors import ConfigError

Tensors = Mapping[str, Tensor]
Spec = dict[str, Any]
Shares = Mapping[str, Sequence[Tensor]]
"""By tensor, what each ingredient counts: numbers, or what has the tensor's dimensions."""

LOW_RANK = ("lora", "dora", "mlae")
"""Deltas whose tensors `down` and `up` are A and B of a change; DoRA's is that of the directions, MLAE's has a
`coefficient` of each rank."""


def mean(ingredients: Sequence[Tensors], shares: Shares | None = None) -> dict[str, Tensor]:
    """The mean of floating tensors, summed in double precision; others are equal and stay, or are the first's.

    The latter are batch norm's counters of batches; its means and variances are averaged. With `shares` it is a
    weighted mean. A ConfigError where deltas train other weights than each other.
    """
    first = ingredients[0]
    if len(ingredients) == 1:
        return dict(first)
    found = dict(first)
    for key, tensor in first.items():
        if tensor.is_floating_point():
            each = torch.stack([one[key].double() for one in ingredients])
            whole = each.mean(dim=0) if shares is None else _weighted(each, shares[key])
            found[key] = whole.to(tensor.dtype)
        elif key.startswith("delta.") and any(not torch.equal(tensor, one[key]) for one in ingredients[1:]):
            raise ConfigError(
                "These files have selected other weights to train, so that their values have no mean: start all runs "
                "from the selection of one of them, with init_delta."
            )
    return found


def _weighted(each: Tensor, shares: Sequence[Tensor]) -> Tensor:
    return torch.stack([share.to(one.device) * one for share, one in zip(shares, each, strict=True)]).sum(dim=0)


def averaged(
    specs: Sequence[Spec], ingredients: Sequence[Tensors], shares: Shares | None = None
) -> tuple[list[Spec], dict[str, Tensor]]:
    """The specs and tensors of the mean of models whose tensors are named as in delta files.

    `shares` say how much of each tensor comes from each model; None for the same of all.
    """
    if len(ingredients) == 1:
        return list(specs), dict(ingredients[0])
    matched: list[Tensors] = [dict(each) for each in ingredients]
    for index, spec in enumerate(specs):
        if matches := _SETS.get(spec["name"], _none)(spec):
            matched = [
                matched[0],
                *(_matched(f"delta.parts.{index}.", *matches, matched[0], each) for each in matched[1:]),
            ]
    found, made = mean(matched, shares), list(specs)
    for index, spec in enumerate(specs):
        if spec["name"] in LOW_RANK:
            room = f"delta.parts.{index}."
            made[index] = widened(spec, len(ingredients))
            equal = [1 / len(ingredients)] * len(ingredients)
            own = {
                target: equal if shares is None else list(map(float, shares[f"{room}up.{target}"]))
                for target in _targets(room, ingredients[0])
            }
            found |= stacked(room, ingredients, own)
    return made, found


def widened(spec: Spec, times: int) -> Spec:
    """The same of so many times the rank, and the same factor."""
    scale = {} if spec.get("scale") is None else {"scale": times * spec["scale"]}
    return DeltaSpec.read({**spec, "rank": times * spec["rank"], **scale}).plain()


def stacked(room: str, ingredients: Sequence[Tensors], shares: Mapping[str, Sequence[float]]) -> dict[str, Tensor]:
    """A and B of the sum of changes of low rank, beside each other; each change counts by its share of the target."""
    found = {}
    for target, own in shares.items():
        down, up = f"{room}down.{target}", f"{room}up.{target}"
        found[down] = torch.cat([each[down] for each in ingredients])
        found[up] = torch.cat([each[up] * share for each, share in zip(ingredients, own, strict=True)], dim=1)
        if (scales := f"{room}coefficient.{target}") in ingredients[0]:
            found[scales] = torch.cat([each[scales] for each in ingredients])
    return found


def _targets(room: str, tensors: Tensors) -> list[str]:
    return [key.removeprefix(f"{room}down.") for key in tensors if key.startswith(f"{room}down.")]


def low_rank_changes(room: str, tensors: Tensors) -> dict[str, Tensor]:
    """B A of each target of a LoRA, (outputs, inputs), in double precision, without its factor; B Λ A of an MLAE."""
    found = {}
    for target in _targets(room, tensors):
        down = tensors[f"{room}down.{target}"].double().flatten(1)
        up = tensors[f"{room}up.{target}"].double()
        scales = tensors.get(f"{room}coefficient.{target}")
        found[target] = (up if scales is None else up * scales) @ down
    return found


Matching = tuple[str, tuple[str, ...], Callable[[Tensor], Tensor]]
"""What is matched, what else is put into the same order, and what of it is compared."""


def _none(spec: Spec) -> None:
    return None


def _prompts(spec: Spec) -> Matching | None:
    # A transform over prompts, a function of the image, and prompts that lack segments know their order.
    if spec["fourier"] or spec["adaptive"] is not None or not prunes_whole(spec["mask"] or ()):
        return None
    return "tokens", (), lambda tokens: layer_norm(tokens, tokens.shape[-1:])  # what a block's norm lets through


_SETS: dict[str, Callable[[Spec], Matching | None]] = {
    "prompt": _prompts,
    "prefix": lambda spec: ("keys", () if spec["shared"] else ("values",), lambda keys: keys),
}


def _matched(
    room: str, name: str, others: Sequence[str], compared: Callable[[Tensor], Tensor], first: Tensors, second: Tensors
) -> Tensors:
    """The second file's tensors with each layer's rows in the order that is nearest to the first's."""
    found = dict(second)
    for key in [key for key in second if key == room + name or key.startswith(f"{room}{name}.")]:
        rows = second[key]
        ours, theirs = (compared(each[key].double()) for each in (first, second))
        layers = range(len(rows)) if rows.ndim == 3 else [...]
        for layer in layers:
            _, order = linear_sum_assignment(torch.cdist(ours[layer], theirs[layer]).square().cpu().numpy())
            for each in (key, *(key.replace(room + name, room + other, 1) for other in others)):
                if found[each] is second[each]:
                    found[each] = second[each].clone()
                found[each][layer] = second[each][layer][torch.from_numpy(order)]
    return found
