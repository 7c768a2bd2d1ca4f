"""The forward pass under `torch.compile`, in place: names, files and figures stay those of an eager model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from vpt.errors import ConfigError

_SAME_DRAWS: dict[str, Any] = {"options": {"fallback_random": True}}
"""Inductor's own generator would draw another dropout than an eager model."""
_VARIANTS = 64  # strengths, batch sizes, training and evaluation; behind them PyTorch would go on without compiling


class CompiledCalls:
    """Functions of tensors under `torch.compile`, each compiled when it is called first."""

    def __init__(self, **options: Any) -> None:
        """Takes the options of `torch.compile`; without any it draws what an eager model draws."""
        self._options = options or _SAME_DRAWS
        self._compiled: dict[str, Callable[..., Tensor]] = {}

    def __call__(self, function: Callable[..., Tensor], *args: Any) -> Tensor:
        """Calls a method of the one object that they are of."""
        if torch.compiler.is_compiling():  # within a graph of the caller's
            return function(*args)
        from torch._dynamo import config  # it takes seconds to import

        name = function.__name__
        if name not in self._compiled:
            self._compiled[name] = torch.compile(function, **self._options)
        # What is attached or detached later are hooks, which PyTorch by default does not look at again.
        with cast("Any", config).patch(skip_nnmodule_hook_guards=False, recompile_limit=_VARIANTS):
            return self._compiled[name](*args)


@contextmanager
def eagerly() -> Iterator[None]:
    """Within it nothing runs compiled: for what looks into a forward pass."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and to import it takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def compile_for(model: nn.Module, device: torch.device) -> None:
    """Compiles a model in place, once one line could be; a ConfigError where none can, as on a CPU without C++."""
    try:
        torch.compile(_line)(torch.zeros(2, device=device))
    except Exception as error:  # inductor raises whatever its parts raise
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(
            f"Nothing can be compiled for {device.type} here ({reason:.160}): install a compiler (g++ for a CPU), or "
            "leave compile out."
        ) from error
    model.compile()


def _line(x: Tensor) -> Tensor:
    return x * 2 + 1
