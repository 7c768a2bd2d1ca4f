"""`PromptBank`: many tuned tasks on one backbone, mixed freely within a batch.

Prompts and prefixes act through keys and values that do not depend on the image, so each image of a batch can be given
those of its own task. Tasks with fewer keys are padded with keys that are masked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from vpt.argument_types import checked
from vpt.backbones.attention.base import OpenAttention
from vpt.backbones.factory import Backbone
from vpt.deltas.extra_key_values import Edited, ExtraKeys, FixedKeys
from vpt.errors import ConfigError, UnknownNameError
from vpt.models.classifier import TunedModel
from vpt.models.delta_file import check_fingerprint, fill, rebuild, recorded_backbone
from vpt.models.delta_format import DTYPES, read_delta


class PromptBank(nn.Module):
    """A frozen backbone with the prompts and heads of many tasks.

    Attributes:
        tasks: Their names, in order.
        heads: A linear head for each in their order, of any number of classes.
        class_names: By task.
        presets: The preprocessing that each task expects, by task.
    """

    @checked
    def __init__(self, files: Mapping[str, str | Path], weights: str | Path | None = None) -> None:
        """Loads delta files.

        Args:
            files: Name of each task to its delta file, of deep prompts or prefixes; at least one.
            weights: Where the backbone's weights are on this machine; None for where they were in training.

        Raises:
            ConfigError: There is no file, a file holds another kind of delta, or backbones differ.
            DeltaFileError: A file is not a delta file, or was trained on other weights.
        """
        super().__init__()
        if not files:
            raise ConfigError("A bank needs at least one delta file.")
        read = {task: read_delta(path) for task, path in files.items()}
        self.tasks = list(read)
        first = read[self.tasks[0]][0]["backbone"]
        for task, (header, _) in read.items():
            for key in ("name", "image_size", "normalization", "pool", "frozen_dtype"):
                ours, theirs = first.get(key), header["backbone"].get(key)
                if ours != theirs:
                    raise ConfigError(
                        f"A bank has one backbone: {self.tasks[0]} was trained with {key} {ours}, {task} with {theirs}."
                    )
            if header["backbone_tuned"]:
                raise ConfigError(f"A bank mixes deep prompts and prefixes; {task} trained more: backbone.")
        with torch.random.fork_rng(devices=[]):
            self.backbone = recorded_backbone(str(files[self.tasks[0]]), first, weights)
            precisions = {str(header["dtype"]) for header, _ in read.values()}
            self.backbone.to(DTYPES[precisions.pop()] if len(precisions) == 1 else torch.float32)
            for task, (header, _) in read.items():
                check_fingerprint(str(files[task]), header["backbone"], self.backbone)
            models = [_alone(str(files[task]), *read[task], self.backbone) for task in self.tasks]
        self.class_names = {task: model.class_names for task, model in zip(self.tasks, models, strict=True)}
        self.presets = {task: model.preset for task, model in zip(self.tasks, models, strict=True)}
        self.heads = nn.ModuleList(model.head for model in models)
        self._install([_extras(task, model) for task, model in zip(self.tasks, models, strict=True)])
        self.requires_grad_(False)
        self.eval()

    @torch.no_grad()
    def forward(self, images: Tensor, tasks: Sequence[str]) -> list[Tensor]:
        """Classifies each image by the model of its task, in one pass.

        Args:
            images: (B, 3, H, W), uint8 in [0, 255] or float in [0, 1], preprocessed as their tasks expect.
            tasks: The task of each image.

        Returns:
            The logits of each image, (classes of its task,).

        Raises:
            ConfigError: Images and tasks are not equally many.
            UnknownNameError: A task is not in the bank.
        """
        if not isinstance(tasks, list | tuple) or not all(isinstance(task, str) for task in tasks):
            raise ConfigError(f"tasks is a list with the name of a task for each image, got {tasks!r:.80}.")
        if not isinstance(images, Tensor):
            raise ConfigError(f"Images are a tensor (B, 3, H, W), got a {type(images).__name__}.")
        if len(tasks) != len(images):
            raise ConfigError(f"{len(images)} images were given with {len(tasks)} tasks: name one for each image.")
        with self.assigned(tasks):
            features = self.backbone(images)
        heads = [cast("nn.Linear", self.heads[self.tasks.index(task)]) for task in tasks]
        return [head(row) for head, row in zip(heads, features, strict=True)]

    @contextmanager
    def assigned(self, tasks: Sequence[str]) -> Iterator[None]:
        """Gives the backbone the prompts of the task of each image of a batch while it is open; else it has none.

        An UnknownNameError where a task is not in the bank.
        """
        for task in tasks:
            if task not in self.tasks:
                raise UnknownNameError("task", task, self.tasks)
        places = [self.tasks.index(task) for task in tasks]
        index = torch.tensor(places, dtype=torch.long, device=self.backbone.mean.device)
        before = _PRESENT.set({**_PRESENT.get(), self.backbone: index})
        try:
            yield
        finally:
            _PRESENT.reset(before)

    def _install(self, extras: list[dict[int, Edited]]) -> None:
        for block, attention in enumerate(self.backbone.attention_layout.attentions):
            of_tasks = [task.get(block) for task in extras]
            if any(layer is not None for layer in of_tasks):
                keys = _KeysOfTasks(*_padded(attention, of_tasks, self.backbone.mean))
                keys.backbone.append(self.backbone)
                keys.install(attention)


_PRESENT: ContextVar[Mapping[Backbone, Tensor]] = ContextVar("tasks of the batch", default=MappingProxyType({}))
"""Which task each image of the present batch is of, by the backbone of the bank."""


class _KeysOfTasks(FixedKeys):
    """A set of keys for each task; each image sees that of its own."""

    def __init__(self, keys: Tensor, values: Tensor, bias: Tensor | None) -> None:
        """See `FixedKeys`."""
        super().__init__(keys, values, bias)
        self.backbone: list[Backbone] = []  # in a list, so that it does not become a part of this module

    @property
    def active(self) -> bool:
        """While the batch has tasks."""
        return self.backbone[0] in _PRESENT.get()

    def seen(self, images: int) -> Edited:
        """See `FixedKeys`."""
        index = _PRESENT.get()[self.backbone[0]]
        if len(index) != images:
            raise ConfigError(f"{images} images were given with {len(index)} tasks: name one for each image.")
        return self.keys[index], self.values[index], None if self.bias is None else self.bias[index]


def _alone(what: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor], backbone: Backbone) -> TunedModel:
    """The model of a task, whose delta is off again so that the next one finds the backbone alone."""
    model = cast("TunedModel", rebuild(what, header, tensors, backbone))
    fill(model, tensors, what)
    if model.delta is not None:
        model.delta.detach()
    return model


@torch.no_grad()
def _extras(task: str, model: TunedModel) -> dict[int, Edited]:
    """The keys, values and logit bias of a task by block, (1, heads, n, head_dim) and (1, heads or 1, 1, n)."""
    found: dict[int, Edited] = {}
    for part in () if model.delta is None else model.delta.parts:
        if not isinstance(part, ExtraKeys) or not part.constant:
            more = " that does more than to add the same keys for each image" if isinstance(part, ExtraKeys) else ""
            raise ConfigError(
                f"A bank mixes deep prompts and prefixes; {task} has a {type(part).__name__.lower()}{more}."
            )
        for block, layer in part.constants().items():
            found[block] = _joined(found[block], layer) if block in found else layer
    return found


def _joined(before: Edited, after: Edited) -> Edited:
    keys, values = torch.cat([before[0], after[0]], dim=2), torch.cat([before[1], after[1]], dim=2)
    heads = _bias_heads(before, after)
    return keys, values, torch.cat([_filled(before, heads), _filled(after, heads)], dim=-1)


def _bias_heads(*layers: Edited) -> int:
    """How many heads have a bias of their own in some layer; 1 where none has."""
    return max(1 if bias is None else bias.shape[1] for _, _, bias in layers)


def _filled(layer: Edited, heads: int) -> Tensor:
    """The bias of a layer, zeros where it has none: (1, heads, 1, n)."""
    keys, _, bias = layer
    return keys.new_zeros(1, heads, 1, keys.shape[2]) if bias is None else bias.expand(-1, heads, -1, -1)


def _padded(attention: OpenAttention, layers: Sequence[Edited | None], like: Tensor) -> Edited:
    """Stacks the tasks of one block; those with fewer keys get masked ones behind."""
    heads, size = attention.key_shape()
    empty = like.new_zeros(1, heads, 0, size)
    whole = [(empty, empty, None) if layer is None else layer for layer in layers]
    most = max(layer[0].shape[2] for layer in whole)
    keys = torch.cat([pad(layer[0], (0, 0, 0, most - layer[0].shape[2])) for layer in whole])
    values = torch.cat([pad(layer[1], (0, 0, 0, most - layer[1].shape[2])) for layer in whole])
    biases = _bias_heads(*whole)
    bias = torch.cat([pad(_filled(layer, biases), (0, most - layer[0].shape[2]), value=-math.inf) for layer in whole])
    return keys, values, bias if bool((bias != 0).any()) else None
