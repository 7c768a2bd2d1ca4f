"""The names of methods as in the tables of the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_NAMES = {"LinearProbe": "linear", "FineTuning": "full"}


def method_name(task: str, hyperparameters: Mapping[str, Any]) -> str:
    """Names the method of a task.

    Args:
        task: Name of its class.
        hyperparameters: Its own.

    Returns:
        E.g. ``vpt_deep``, ``prompt+lora``, ``linear`` or ``full``.
    """
    if task == "PromptTuning":
        return "vpt_deep" if hyperparameters["deep"] else "vpt_shallow"
    if task == "SegmentationTask":
        names = [str(delta["name"]) for delta in hyperparameters["deltas"] or []]
        return "full" if hyperparameters["full"] else "+".join(names) or "frozen"
    if task == "DeltaTuning":
        return "+".join(str(delta["name"]) for delta in hyperparameters["deltas"])
    return _NAMES.get(task, task.lower())
