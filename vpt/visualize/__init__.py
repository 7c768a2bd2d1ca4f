"""See what prompts attend to and which classes are confused."""

from vpt.visualize.attention import attention_figure, attention_figure_from_batch, attention_figure_from_data
from vpt.visualize.attention_logger import AttentionLogger
from vpt.visualize.callbacks import FigureLogger
from vpt.visualize.figures import confusion_figure
from vpt.visualize.kinds import Scene, draw, write_gallery
from vpt.visualize.maps import AttentionMaps, attention_maps
from vpt.visualize.segmentation import segmentation_figure

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
