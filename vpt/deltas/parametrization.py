"""Parameters of the backbone that are computed from their own values and from what is trained, whenever they are read.

As `torch.nn.utils.parametrize`, but the original keeps its name and its place: state dicts, `.to()` and
`torch.func.functional_call` see the backbone as it is, and taking the computation off again leaves no trace.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from vpt.errors import ConfigError

Compute = Callable[[Any], Tensor]
"""From the original parameter, or None where there is none, to what is used in its place."""


class Parametrization:
    """One parameter of a module that is computed; a handle, as of a hook."""

    def __init__(self, module: nn.Module, name: str, compute: Compute) -> None:
        """Puts it on.

        Args:
            module: Owns the parameter.
            name: Of the parameter in the module, which may be None, as a missing bias is.
            compute: Gives what the module's attribute is from now on, from the original parameter.

        Raises:
            ConfigError: The parameter is computed already.
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
