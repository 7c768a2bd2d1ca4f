"""How far to trust a tuned model: logits stored once, scores computed from them."""

from vpt.robustness.evaluate import ALPHAS, run, run_shard
from vpt.robustness.evaluation_result import RobustnessResult, Row, choose_alpha
from vpt.robustness.logit_records import Record

__all__ = ["ALPHAS", "Record", "RobustnessResult", "Row", "choose_alpha", "run", "run_shard"]
