"""What is trained on a frozen backbone, one kind a file. Pure torch: no Lightning, no data, no head but its own.

Every module of this package is imported with it, so that each delta in one registers itself.
"""

from importlib import import_module
from pkgutil import iter_modules

from vpt.deltas.base import DeltaPart
from vpt.deltas.composition import Delta, attach
from vpt.deltas.registry import DELTAS, DeltaSpec, register_delta

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["DELTAS", "Delta", "DeltaPart", "DeltaSpec", "attach", "register_delta"]
