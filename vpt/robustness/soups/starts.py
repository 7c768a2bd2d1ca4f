"""What runs started from: a mean of weights is one of a basin only where they started from the same values.

What a run draws by its seed is no other start: a change of low rank and an adapter are nothing whatever is drawn, a
drawn head is nearly nothing, and prompts and prefixes are matched before they are averaged.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vpt.errors import ConfigError, VPTWarning
from vpt.models.delta_format import read_delta
from vpt.run_record import DELTA_FILE, INIT_FILE, PROBE

STARTS = {"init_delta": "delta", "init_head": "head"}
"""Options that name what a run starts from, and what of it."""
_UNKNOWN = "unknown"
_ROOMS = {"init_delta": ("delta.", "backbone."), "init_head": ("head.",)}

Start = dict[str, str | None]
"""By option of `STARTS` the sha256 of a file, ``probe``, or None for what the seed draws."""


def common_start(deltas: Sequence[Path], headers: Sequence[Mapping[str, Any]]) -> Start | None:
    """The start that runs have in common; None, and a warning, where that of one is not known.

    It is what the run's record in its delta file tells; where that is another or none, the values that `InitWriter` has
    kept beside the file decide. A ConfigError where two started from other values.
    """
    told = [_told(header["info"]) for header in headers]
    kept = [_kept(path, header) for path, header in zip(deltas, headers, strict=True)]
    unknown: set[Path] = set()
    for one, other in combinations(range(len(deltas)), 2):
        for option, what in STARTS.items():
            ours, theirs = told[one][option], told[other][option]
            same = _same(kept[one], kept[other], option)
            if same or (ours == theirs != _UNKNOWN):
                continue
            known = _UNKNOWN not in (ours, theirs)
            if known or same is False:
                first, second = (_named(each) for each in (ours, theirs)) if known else (INIT_FILE, "another")
                raise ConfigError(
                    f"{deltas[one]} and {deltas[other]} start from other values of the {what} ({first} and {second}): "
                    f"a soup needs runs of one start, such as the same {option}."
                )
            unknown |= {deltas[each] for each in (one, other) if told[each][option] == _UNKNOWN}
    if unknown:
        names = ", ".join(map(str, sorted(unknown)))
        text = f"What {names} started from is not known: a soup is a model only where all runs started alike."
        warnings.warn(text, VPTWarning, stacklevel=4)
    return None if _UNKNOWN in (value for each in told for value in each.values()) else told[0]


def _told(info: Mapping[str, Any]) -> dict[str, str | None]:
    """What a run says of its start."""
    if isinstance(starts := info.get("starts"), Mapping):
        return {option: starts.get(option) for option in STARTS}
    options = info.get("hyperparameters")  # version 0.1 names the files by their paths alone
    if not isinstance(options, Mapping):
        return dict.fromkeys(STARTS, _UNKNOWN)
    return {option: value if (value := options.get(option)) in (None, PROBE) else _UNKNOWN for option in STARTS}


def _kept(path: Path, header: Mapping[str, Any]) -> tuple[bool, dict[str, Tensor]] | None:
    """Whether the head was drawn, and the values before the first step, of a run that has kept them."""
    init = path.parent / INIT_FILE
    if not (path.name == DELTA_FILE or path.name.startswith("delta-best-")) or not init.is_file():
        return None
    theirs, tensors = read_delta(init)
    same = theirs["specs"] == header["specs"]
    same &= theirs["backbone"]["fingerprint"] == header["backbone"]["fingerprint"]
    return (bool(theirs["info"].get("random_head", True)), tensors) if same else None


def _same(
    one: tuple[bool, dict[str, Tensor]] | None, other: tuple[bool, dict[str, Tensor]] | None, option: str
) -> bool | None:
    """Whether the kept values are equal; None where there are not both, or both are drawn heads."""
    if one is None or other is None:
        return None
    (drawn, ours), (too, theirs) = one, other
    ours, theirs = ({k: t for k, t in each.items() if k.startswith(_ROOMS[option])} for each in (ours, theirs))
    if ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items()):
        return True
    return None if option == "init_head" and drawn and too else False


def _named(value: str | None) -> str:
    return "one drawn by the seed" if value is None else value if value == PROBE else f"the file {value!s:.12}"
