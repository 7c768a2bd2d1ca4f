"""How far to trust a tuned model: answers kept once, scores made of them."""

from vpt.robustness.evaluation.evaluate import ALPHAS, run
from vpt.robustness.evaluation.records import Record
from vpt.robustness.evaluation.result import RobustnessResult, Row, choose_alpha

__all__ = ["ALPHAS", "Record", "RobustnessResult", "Row", "choose_alpha", "run"]
