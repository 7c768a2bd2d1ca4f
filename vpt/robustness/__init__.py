"""How far to trust a tuned model: answers kept once, scores made of them."""

from vpt.robustness.records import Record
from vpt.robustness.result import RobustnessResult, Row, choose_alpha
from vpt.robustness.run import ALPHAS, run

__all__ = ["ALPHAS", "Record", "RobustnessResult", "Row", "choose_alpha", "run"]
