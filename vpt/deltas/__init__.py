"""What is trained on a frozen backbone, one kind a file. Pure torch: no Lightning, no data, no head but its own.

Every module of this package is imported with it, so that each delta in one registers itself.
"""

from importlib import import_module
from pkgutil import walk_packages

from vpt.deltas.base import DeltaPart
from vpt.deltas.composition import Delta, attach
from vpt.deltas.registry import DELTAS, DeltaSpec, register_delta

for _module in walk_packages(__path__, f"{__name__}."):
    import_module(_module.name)

__all__ = ["DELTAS", "Delta", "DeltaPart", "DeltaSpec", "attach", "register_delta"]
