"""Which trials train together in one process (`vpt.models.together`): those whose models compute the same function."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Literal

from vpt.experiments.trial import Config, Trial
from vpt.run_record import identity

Together = int | Literal["auto"]
"""How many trials train together; ``auto`` says it by device and memory."""
MOST = 16
"""How many ``auto`` begins with on a GPU, as many of which are computed at once as its memory holds."""

_RATES = ("base_lr", "weight_decay", "momentum", "warmup", "optimizer", "head_lr_scale", "ema_decay")
_STARTS = ("init_delta", "init_head", "probe_l2", "start_decay")
_LOSSES = ("loss", "focal_gamma", "label_smoothing", "class_weights", "mixup", "cutmix", "metrics")
_FREE = {"model": (*_RATES, *_STARTS, *_LOSSES), "data": ("seed", "subset_seed")}
"""Options of which a forward pass of a batch does not depend: on its tensors at most."""


def packs(trials: Sequence[Trial], together: Together, gpu: bool = False, at_once: int | None = 1) -> list[list[Trial]]:
    """Packs of trials to train together, in order, on a GPU or none, of which `at_once` run at a time if that is known.

    Trials of a pack differ in seed, rates, losses and starts only. Others would compute by themselves. One whose time
    is limited has a pack of its own: its clock would count the turns of the others.
    """
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(f"alone {trial.name}" if _timed(trial.config) else _model(trial.config), []).append(trial)
    most = _at_most(len(trials), gpu, at_once) if together == "auto" else together
    found = []
    for group in groups.values():
        number = math.ceil(len(group) / most)
        found += [group[len(group) * each // number : len(group) * (each + 1) // number] for each in range(number)]
    return found


def _at_most(trials: int, gpu: bool, at_once: int | None) -> int:
    """On a processor nothing is gained (`benchmarks.together`); on GPUs none of them is left idle."""
    if not gpu:
        return 1
    return MOST if at_once is None else max(1, min(MOST, math.ceil(trials / at_once)))


def _timed(config: Config) -> bool:
    trainer = config.get("trainer") or {}
    given = trainer.get("callbacks") or []
    callbacks = [str(each.get("class_path")) for each in (given if isinstance(given, list) else [given])]
    return bool(trainer.get("max_time")) or any(name.rpartition(".")[2] == "Timer" for name in callbacks)


def _model(config: Config) -> str:
    rest = copy.deepcopy({key: value for key, value in config.items() if key != "seed_everything"})
    for section, free in _FREE.items():
        for key in free:
            rest[section].get("init_args", {}).pop(key, None)
    return identity(rest)
