"""What is trained on a frozen backbone, one kind a file. Pure torch: no Lightning, no data, no head but its own."""

from vpt.deltas.composition import DELTAS, Delta, attach

__all__ = ["DELTAS", "Delta", "attach"]
