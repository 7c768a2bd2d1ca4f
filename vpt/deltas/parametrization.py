"""Parameters of the backbone that are computed from their own values and from what is trained, whenever they are read.

As `torch.nn.utils.parametrize`, but the original keeps its name and its place: state dicts, `.to()` and
`torch.func.functional_call` see the backbone as it is, and taking the computation off again leaves no trace.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
        if not computed:
            module.__class__ = _computing(type(module))
        _add_property(type(module), name)
        computed[name] = compute
        self.module, self.name = module, name

    @property
    def value(self) -> Tensor:
        """What is used in its place."""
        used: Tensor = getattr(self.module, self.name)
        return used

    def remove(self) -> None:
        """Takes it off."""
        computed = self.module.__dict__["_computed"]
        del computed[self.name]
        if not computed:
            del self.module.__dict__["_computed"]
            self.module.__class__ = type(self.module).__bases__[0]


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _computing(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a class of modules whose parameters may be computed; one for all its modules."""
    if base not in _CLASSES:
        members: dict[str, Any] = {"__reduce_ex__": _reduce, "__module__": base.__module__}
        _CLASSES[base] = type(base.__name__, (base,), members)
    return _CLASSES[base]


def _add_property(computing: type[nn.Module], name: str) -> None:
    def read(module: nn.Module) -> Any:
        original, compute = module._parameters[name], module._computed.get(name)  # type: ignore[operator, union-attr]
        if compute is None:
            return original
        try:
            return compute(original)
        except AttributeError as error:  # Python would ask `nn.Module.__getattr__` instead, which has the original
            raise RuntimeError(f"{name} of {type(module).__name__} cannot be computed: {error}") from error

    if name not in vars(computing):
        setattr(computing, name, property(read))


def _reduce(module: nn.Module, protocol: int) -> tuple[Any, ...]:
    """A copy, or what is unpickled, computes the same parameters; its class is made where it is not there yet."""
    return _made_again, (type(module).__bases__[0], tuple(module.__dict__["_computed"])), module.__dict__


def _made_again(base: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    computing = _computing(base)
    for name in names:
        _add_property(computing, name)
    return computing.__new__(computing)
