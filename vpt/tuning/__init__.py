"""What is trained. Pure torch: no Lightning, no data."""

from vpt.tuning.delta import DELTAS, Delta, attach
from vpt.tuning.files import load, save_delta
from vpt.tuning.model import TunedModel

__all__ = ["DELTAS", "Delta", "TunedModel", "attach", "load", "save_delta"]
