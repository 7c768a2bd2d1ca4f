"""See what prompts attend to and which classes are confused."""

from vpt.visualize.attention import attention_figure, attention_figure_from_batch, attention_figure_from_data
from vpt.visualize.callbacks import FigureLogger
from vpt.visualize.figures import confusion_figure
from vpt.visualize.segmentation import segmentation_figure

__all__ = [
    "FigureLogger",
    "attention_figure",
    "attention_figure_from_batch",
    "attention_figure_from_data",
    "confusion_figure",
    "segmentation_figure",
]
