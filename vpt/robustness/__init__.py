"""How far to trust a tuned model: answers kept once, scores made of them."""

from vpt.robustness.records import Record
from vpt.robustness.result import RobustnessResult, Row
from vpt.robustness.run import ALPHAS, run

__all__ = ["ALPHAS", "Record", "RobustnessResult", "Row", "run"]
