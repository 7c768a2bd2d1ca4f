"""What is trained. Pure torch: no Lightning, no data."""

from vpt.tuning.delta import DELTAS, Delta, attach

__all__ = ["DELTAS", "Delta", "attach"]
