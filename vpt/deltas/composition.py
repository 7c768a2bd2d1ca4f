"""`Delta`: what is trained on top of a frozen backbone, as a composition of named parts."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from torch import Tensor, nn

from vpt.backbones.factory import Backbone
from vpt.deltas.adapter import Adapter
from vpt.deltas.base import DeltaPart
from vpt.deltas.head import Linear, MlpHead
from vpt.deltas.lora import Lora
from vpt.deltas.partial_tuning import Bias, Full, Norm, Partial
from vpt.deltas.prefix import Prefix
from vpt.deltas.prompt import Prompt
from vpt.deltas.prompt_add_pad import PromptAdd, PromptPad
from vpt.deltas.side_tuning import SideTune
from vpt.deltas.ssf import ScaleShift
from vpt.errors import ConfigError, UnknownNameError, VPTError

_PLAIN: dict[Any, tuple[tuple[type, ...], str]] = {
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    bool: ((bool,), "true or false"),
    str: ((str,), "a name"),
    NoneType: ((NoneType,), "null"),
}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a plain type, a sequence of one, a union, or a literal, whose names are checked later."""
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return isinstance(value, str)
    if get_origin(hint) is Sequence:
        return isinstance(value, list | tuple) and all(_fits(entry, get_args(hint)[0]) for entry in value)
    return isinstance(value, _PLAIN[hint][0]) and (hint is bool or not isinstance(value, bool))


def _words(hint: Any) -> str:
    """Such a type in words."""
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_words(option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) is Sequence:
        return f"a list (each {_words(get_args(hint)[0])})"
    return _PLAIN[hint][1]


DELTAS: dict[str, type[DeltaPart]] = {
    "prompt": Prompt,
    "prompt_add": PromptAdd,
    "prompt_pad": PromptPad,
    "prefix": Prefix,
    "adapter": Adapter,
    "sidetune": SideTune,
    "lora": Lora,
    "ssf": ScaleShift,
    "linear": Linear,
    "mlp_head": MlpHead,
    "bias": Bias,
    "norm": Norm,
    "partial": Partial,
    "full": Full,
}
"""Every delta by the name that configurations use."""


class Delta(nn.Module):
    """An ordered composition of deltas on one backbone.

    Attributes:
        specs: The plain dicts it was built from.
        parts: The deltas, in order.
    """

    def __init__(self, backbone: Backbone, specs: Sequence[dict[str, Any]]) -> None:
        """Builds the parts; `attach` puts them on.

        Args:
            backbone: The backbone that the delta is for.
            specs: One dict per part: ``name`` and the arguments of the class of that name in `DELTAS`.

        Raises:
            UnknownNameError: A name or an argument does not exist.
            ConfigError: An argument is missing or out of range.
            UnsupportedBackboneError: The backbone cannot take one of the parts.
        """
        super().__init__()
        self.specs = [dict(spec) for spec in specs]
        self.parts = nn.ModuleList(_build(backbone, spec) for spec in self.specs)

    def _all(self) -> list[DeltaPart]:
        return [cast("DeltaPart", part) for part in self.parts]

    def attach(self) -> None:
        """Puts every part on the backbone, or none if one of them is refused.

        Raises:
            ConfigError: Two parts train the same parameter.
        """
        try:
            for part in self._all():
                part.attach()
        except VPTError:
            self.detach()
            raise

    def detach(self) -> None:
        """Takes every part off again; the backbone is bit for bit what it was."""
        for part in reversed(self._all()):
            part.detach()

    def folded(self) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        """What a delta file keeps of each part.

        Returns:
            The specs and the tensors of an equal delta.
        """
        specs: list[dict[str, Any]] = []
        tensors: dict[str, Tensor] = {}
        for index, (spec, part) in enumerate(zip(self.specs, self._all(), strict=True)):
            changes, own = part.folded()
            specs.append(spec | changes)
            tensors |= {f"parts.{index}.{key}": tensor for key, tensor in own.items()}
        return specs, tensors

    @property
    def strength(self) -> float:
        """α in [0, 1] of all parts: 1 is the tuned model exactly, 0 the bare backbone exactly."""
        return self._all()[0].strength

    def set_strength(self, alpha: float) -> None:
        """Sets the strength of every part.

        Args:
            alpha: 1 for the tuned model, 0 for the backbone. Between them log α is added to the attention logits of
                prompt keys (scaling the prompts themselves would do nothing: the norm removes it), trained parameters
                of the backbone are interpolated, and the changes of all other deltas are scaled.

        Raises:
            ConfigError: α lies outside [0, 1].
        """
        for part in self._all():
            part.strength = alpha


def attach(backbone: Backbone, specs: Sequence[dict[str, Any]]) -> Delta:
    """Puts a delta on a backbone.

    Args:
        backbone: A backbone from `create_backbone`.
        specs: One dict per part, e.g. ``[{"name": "prompt", "num_tokens": 10, "deep": True}]``.

    Returns:
        The handle: its parameters are the trained ones, `detach()` restores the backbone bit for bit.

    Raises:
        UnknownNameError: A name or an argument does not exist.
        ConfigError: An argument is missing or out of range.
        UnsupportedBackboneError: The backbone cannot take one of the parts.
    """
    if not specs:
        raise ConfigError('An empty delta changes nothing: give at least one part, e.g. {"name": "prompt"}.')
    delta = Delta(backbone, specs)
    delta.attach()
    return delta


def _build(backbone: Backbone, spec: dict[str, Any]) -> DeltaPart:
    arguments = dict(spec)
    name = str(arguments.pop("name", ""))
    if name not in DELTAS:
        raise UnknownNameError("delta", name, DELTAS)
    signature = inspect.signature(DELTAS[name].__init__)
    known = [parameter for parameter in signature.parameters if parameter not in ("self", "backbone")]
    for key in arguments:
        if key not in known:
            raise UnknownNameError(f"argument of delta {name!r}", key, known)
    needed = [key for key in known if signature.parameters[key].default is inspect.Parameter.empty]
    if absent := [key for key in needed if key not in arguments]:
        raise ConfigError(f"Delta {name!r} needs {', '.join(absent)}.")
    hints = get_type_hints(DELTAS[name].__init__)
    for key, value in arguments.items():
        if not _fits(value, hints[key]):
            raise ConfigError(f"{key} of delta {name!r} must be {_words(hints[key])}, got {value!r}.")
    return DELTAS[name](backbone, **arguments)  # checked against the signature above
