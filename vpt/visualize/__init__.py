"""See what prompts attend to and which classes are confused."""

from vpt.reports.style import confusion_figure
from vpt.visualize.attention_figure import attention_figure, attention_figure_from_batch, attention_figure_from_data
from vpt.visualize.attention_maps import AttentionMaps, attention_maps
from vpt.visualize.callbacks import AttentionLogger, FigureLogger
from vpt.visualize.figure_kinds import Scene, draw, write_gallery
from vpt.visualize.segmentation_figure import segmentation_figure

__all__ = [
    "AttentionLogger",
    "AttentionMaps",
    "FigureLogger",
    "Scene",
    "attention_figure",
    "attention_figure_from_batch",
    "attention_figure_from_data",
    "attention_maps",
    "confusion_figure",
    "draw",
    "segmentation_figure",
    "write_gallery",
]
