"""Variants of one recipe, by name, and the search of all: numbers of shots, combinations of deltas, backbones."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vpt.atomic_write import write_json
from vpt.errors import ConfigError
from vpt.experiments.executors import Engine
from vpt.experiments.sweep import Outcome, Plan, sweeps
from vpt.experiments.trial import Config, Failure, merged

SERIES_FILE = "series.json"


def sweep_variants(
    variants: Mapping[str, Config], plan: Plan | Mapping[str, Plan], root: Path, engine: Engine
) -> dict[str, Outcome | Failure]:
    """Runs `sweeps` of every variant, by its name, and sums the outcomes up in ``series.json``."""
    outcomes = sweeps(variants, plan, root, engine)
    write_json(root / SERIES_FILE, rows_of(outcomes))
    return outcomes


def rows_of(outcomes: Mapping[str, Outcome | Failure]) -> list[dict[str, Any]]:
    """What ``series.json`` holds: a row for each variant, with why it failed where it has no result."""
    return [
        {"variant": name, "failed": each.reason}
        if isinstance(each, Failure)
        else {"variant": name, "chosen": each.chosen, "val": each.val, "tests": list(each.tests.values())}
        | {"mean": each.mean, "std": each.std, "seeds": list(each.tests), "seconds": round(each.seconds, 1)}
        | {"images": each.images}
        for name, each in outcomes.items()
    ]


def by_shots(config: Config, shots: Sequence[int]) -> dict[str, Config]:
    """Variants with so many training images of each class, ``shots=N``; smaller subsets lie within larger ones."""
    return {f"shots={each}": merged(config, {"data.shots": each}) for each in dict.fromkeys(shots)}


def few_shot_plan(plan: Plan) -> Plan:
    """The same search with a subset of its own for each seed."""
    return replace(plan, by_seed=(*plan.by_seed, "data.subset_seed"))


def combinations(config: Config, deltas: Sequence[dict[str, Any]]) -> dict[str, Config]:
    """All 2^k on/off combinations of deltas (Ding et al., "Delta Tuning", 2022, section 4.2).

    Each has a ``name`` and its arguments (a ConfigError if not, or if one occurs twice); the task of the config is
    replaced. Variants are named by what is on, joined by ``+``; ``none`` is the linear probe.
    """
    names = [each.get("name") for each in deltas]
    if None in names or len(set(names)) < len(names):
        raise ConfigError(f"Combinations need deltas with different names, got {names}.")
    dropped = {"solver", "l2", "num_tokens", "deep", "dropout", "dropout_mode", "deltas"}  # of single tasks
    dropped |= {"k", "temperature"}
    shared = {key: value for key, value in config["model"]["init_args"].items() if key not in dropped}
    found = {}
    for count in range(len(deltas) + 1):
        for chosen in itertools.combinations(deltas, count):
            task = "DeltaTuning" if chosen else "LinearProbe"
            args = shared | ({"deltas": [dict(each) for each in chosen]} if chosen else {})
            model = {"class_path": f"vpt.tasks.{task}", "init_args": args}
            found["+".join(str(each["name"]) for each in chosen) or "none"] = {**config, "model": model}
    return found


def by_backbone(
    config: Config, backbones: Sequence[str], weights: Mapping[str, str] | None = None
) -> dict[str, Config]:
    """One recipe on several of timm's backbones, whose image sizes are their own unless the data fix it.

    `weights` says where those of a backbone are, if not as in the config.
    """
    own = {name: {"model.weights": path} for name, path in (weights or {}).items()}
    return {name: merged(config, {"model.backbone": name} | own.get(name, {})) for name in dict.fromkeys(backbones)}
