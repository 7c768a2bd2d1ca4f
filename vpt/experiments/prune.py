"""`prune`: a finished run starts again, without the prompts that mattered least in it.

E²VPT (Han et al., "E²VPT: An Effective and Efficient Approach for Visual Prompt Tuning", ICCV 2023, section 3.3):
prompts, and segments of their channels, are scored by the gradient of a mask, the lowest are masked, and training
starts again from the initial values.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from rich.progress import track
from torch import Tensor, nn

from vpt.argument_types import checked
from vpt.atomic_write import check_unused, write_text
from vpt.data import ImageDataModule
from vpt.deltas import DeltaSpec
from vpt.deltas.prompts.prompt import Prompt
from vpt.deltas.prompts.pruning import least_important, mask_gradients
from vpt.errors import ConfigError, check_number
from vpt.models import TunedModel
from vpt.models.delta_file import load_classifier
from vpt.robustness.evaluate import check_data
from vpt.screen import console
from vpt.tasks.targets.objectives import OBJECTIVES

SEGMENTS = 8
"""Of a prompt's channels, which segments are pruned of, as published."""


@dataclass(frozen=True)
class Pruned:
    """A way to prune, and what it leaves.

    Attributes:
        tokens: Per cent of each layer's prompts that it prunes, rounded down.
        segments: Per cent of the 8 segments of each other prompt's channels that it prunes, likewise.
        prompts: How many are left, and how many there were.
        numbers: How many of them train, and how many did.
        deltas: Of the run that starts again.
    """

    tokens: int
    segments: int
    prompts: tuple[int, int]
    numbers: tuple[int, int]
    deltas: list[dict[str, Any]]


@checked
def prune(
    delta: Path,
    config: Mapping[str, Any],
    data: ImageDataModule,
    out: Path,
    tokens: Sequence[int] = (0,),
    segments: Sequence[int] = (0,),
    batch_size: int = 16,
    weights: str | None = None,
) -> list[Pruned]:
    """Writes the config of the run that starts again with the most important prompts of a finished run.

    Importance is E|∂L(x)/∂ρ| over all training images x, not augmented, with ρ = 1 the mask of a prompt or of a
    segment, and L the plain loss, in double precision. Prompts are ranked in their layer, segments in their prompt. The
    run has the same seed, and with it the same initial values. Of several ways to prune the config has the first, and
    `grid_of` `out` is a grid of all for `vpt sweep`, as published.

    Args:
        delta: The delta file of the finished run.
        config: The config of that run, as `vpt fit` wrote it.
        data: The task that it was trained on.
        out: The config to write, a new file.
        tokens: Per cent of each layer's prompts to prune, from 0 to 99; each is combined with each of `segments`.
        segments: Per cent of the 8 segments of each other prompt's channels to prune, likewise.
        batch_size: Images in a pass.
        weights: Where the backbone's weights are; None for where they were at training time.

    Returns:
        The ways, without those that prune nothing or the same as another.

    Raises:
        ConfigError: Nothing would be pruned, the run has no prompts that can be, or no seed, or delta, config and data
            do not belong together.
        DeltaFileError: The file is not a delta file of a classifier.
    """
    for path in (out, grid_of(out)):
        check_unused(path)
    for name, values in (("tokens", tokens), ("segments", segments)):
        for value in values:
            check_number(f"{name} to prune", value, 0, 99, whole=True)
    model = load_classifier(delta, weights)
    check_data(delta, model, data)
    specs = _specs(delta, config, model)
    prompts = {index: part for index, part in enumerate(model.parts()) if isinstance(part, Prompt)}
    parts = SEGMENTS if any(SEGMENTS * each // 100 for each in segments) else 1
    for index, part in prompts.items():  # refuses what cannot be masked before images are read
        word = "x" if parts == 1 else "." + "x" * (parts - 1)
        _masked(specs[index], [" ".join([word] * number) for number, _ in part.shapes]).build(model.backbone)
    if model.backbone.narrow:
        model.backbone.widen()
    # The norm in front of a block leaves of a prompt's own scale what its ε is: single precision would round that away.
    model.to("cuda" if torch.cuda.is_available() else "cpu", torch.float64)
    scores = importance(model, data, parts, batch_size)
    found: dict[str, Pruned] = {}
    for each in itertools.product(tokens, segments):
        masks = {i: [least_important(*layer, *each) for layer in scores[part]] for i, part in prompts.items()}
        if any("." in line for mask in masks.values() for line in mask):
            found.setdefault(str(masks), _way(*each, specs, masks, prompts, model))
    if not found:
        raise ConfigError(
            f"{max(tokens)} % of the prompts of a layer and {max(segments)} % of {SEGMENTS} segments, rounded down, "
            "are none: give more to prune with --tokens or --segments."
        )
    ways = list(found.values())
    write_text(out, _yaml(_next(config, ways[0].deltas)))
    if len(ways) > 1:
        smallest_first = sorted(ways, key=lambda way: way.numbers[0])  # of equal scores `vpt sweep` takes the first
        grid = {"grid": {"model.deltas": [way.deltas for way in smallest_first]}, "seeds": [config["seed_everything"]]}
        write_text(grid_of(out), _yaml(grid))
    return ways


def grid_of(out: Path) -> Path:
    """The grid beside a config of several ways to prune."""
    return out.with_name(f"{out.stem}_grid.yaml")


def _way(
    tokens: int,
    segments: int,
    specs: Sequence[DeltaSpec],
    masks: Mapping[int, list[str]],
    prompts: Mapping[int, Prompt],
    model: TunedModel,
) -> Pruned:
    made = [_masked(spec, masks[index]) if index in masks else spec for index, spec in enumerate(specs)]
    parts = [cast("Prompt", made[index].build(model.backbone)) for index in masks]
    both = parts, prompts.values()
    left, there = (sum(number for part in each for number, _ in part.shapes) for each in both)
    trains, trained = (sum(part.expected_parameters() for part in each) for each in both)
    return Pruned(tokens, segments, (left, there), (trains, trained), [spec.brief() for spec in made])


def importance(
    model: TunedModel, data: ImageDataModule, segments: int, batch_size: int
) -> dict[nn.Module, list[tuple[Tensor, Tensor]]]:
    """E|∂L(x)/∂ρ| of all prompts of a model in eval mode, (n,), and their segments, (n, segments), by layer and delta.

    Over all training images x of a task, of the plain loss; in double precision on the CPU.
    """
    split, objective = data.split("train"), OBJECTIVES[model.targets]
    shapes: dict[nn.Module, Any] = {part: part.shapes for part in model.parts() if isinstance(part, Prompt)}
    sums = {
        part: [(torch.zeros(n).double(), torch.zeros(n, segments).double()) for n, _ in layers]
        for part, layers in shapes.items()
    }
    starts = range(0, len(split), batch_size)
    like = model.backbone.mean
    for start in track(starts, description="Scoring prompts on training images", console=console(stderr=True)):
        batch = split.batch(range(start, min(start + batch_size, len(split))))
        images, labels = batch["image"].to(like.device), batch["label"].to(like.device)
        loss = partial(_summed_loss, model, objective, images, labels)
        for part, layers in mask_gradients(shapes, segments, len(images), loss, like).items():
            for (of_tokens, of_segments), found in zip(sums[part], layers, strict=True):
                exact = found.cpu().double()
                of_tokens += exact.sum(2).abs().sum(0)
                of_segments += exact.abs().sum(0)
    return {part: [(a / len(split), b / len(split)) for a, b in layers] for part, layers in sums.items()}


def _summed_loss(model: TunedModel, objective: Any, images: Tensor, labels: Tensor) -> Tensor:
    loss: Tensor = objective.loss(model, model(images), labels)
    return loss * len(images)


def _specs(delta: Path, config: Mapping[str, Any], model: TunedModel) -> list[DeltaSpec]:
    """The deltas of a run, from its config; a ConfigError where they are not those of its file, or none is a prompt."""
    found = [] if model.delta is None else [str(spec["name"]) for spec in model.delta.specs]
    if "prompt" not in found:
        raise ConfigError(f"{delta} has no prompts to prune: its deltas are {', '.join(found) or 'none'}.")
    arguments = (config.get("model") or {}).get("init_args") or {}
    given = arguments.get("deltas")
    if given is None:
        given = [{"name": "prompt"} | {key: arguments[key] for key in _PROMPT if key in arguments}]
    specs = [DeltaSpec.read(spec) for spec in given]
    if (names := [spec.name for spec in specs]) != found:
        raise ConfigError(
            f"{delta} has the deltas {', '.join(found)}, but the config beside it {', '.join(names)}: it is that of "
            "another run."
        )
    if any(spec.arguments.get("mask") is not None for spec in specs):
        raise ConfigError(f"{delta} is pruned already: prune more of the run that it was made from.")
    if any(spec.arguments.get("koopman") is not None for spec in specs):
        raise ConfigError(f"The prompts of {delta} trained with koopman, which needs all of them: prune a run without.")
    if any(isinstance(number := spec.arguments.get("num_tokens"), list) and not all(number) for spec in specs):
        raise ConfigError(f"Some layers of {delta} have no prompts: prune a run that has some in each of its layers.")
    if any(spec.arguments.get("relocate") is not None for spec in specs):
        raise ConfigError(
            f"The prompts of {delta} moved between layers, and would move otherwise in a run that starts "
            "again: prune a run without relocate."
        )
    if (begun := arguments.get("init_delta")) is not None:
        raise ConfigError(f"The run began with the prompts of {begun}, which has no mask: prune one that drew its own.")
    if type(config.get("seed_everything")) is not int:
        raise ConfigError("The run had no seed, so that its initial values cannot be drawn again: train with one.")
    return specs


_PROMPT = ("num_tokens", "deep", "dropout", "dropout_mode")


def _masked(spec: DeltaSpec, mask: list[str]) -> DeltaSpec:
    return DeltaSpec.read(spec.plain() | {"mask": mask})


def _yaml(content: Any) -> str:
    return yaml.safe_dump(content, sort_keys=False, width=10_000)


def _next(config: Mapping[str, Any], deltas: list[dict[str, Any]]) -> dict[str, Any]:
    """The config of a run with other deltas, from its beginning."""
    new = copy.deepcopy(dict(config)) | {"ckpt_path": None}
    section = new["model"]
    kept = {key: value for key, value in section["init_args"].items() if key not in _PROMPT}
    section["init_args"] = kept | {"deltas": deltas}
    if section["class_path"].rpartition(".")[2] == "PromptTuning":
        section["class_path"] = "vpt.tasks.DeltaTuning"
    return new
