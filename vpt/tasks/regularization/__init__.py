"""What training is kept from: leaving the pretrained model, by decay towards the start or by second losses."""

from vpt.tasks.regularization.keep_answers import KeepAnswers
from vpt.tasks.regularization.metric_learning import MetricLearning
from vpt.tasks.regularization.pace import Pace
from vpt.tasks.regularization.second_loss import SecondLoss, Seen, State
from vpt.tasks.regularization.start_decay import DecayToStart, StartDecay

SECOND_LOSSES: dict[str, type[SecondLoss]] = {
    "keep_answers": KeepAnswers,
    "pace": Pace,
    "metric_learning": MetricLearning,
}
"""Each is an option of `ClassificationTask` of its name."""

__all__ = [
    "SECOND_LOSSES",
    "DecayToStart",
    "KeepAnswers",
    "MetricLearning",
    "Pace",
    "SecondLoss",
    "Seen",
    "StartDecay",
    "State",
]
