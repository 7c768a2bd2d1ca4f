"""See what prompts attend to and which classes are confused."""

from vpt.reports.style import confusion_figure
from vpt.visualize.attention_maps import AttentionMaps, attention_maps
from vpt.visualize.callbacks import AttentionLogger, FigureLogger, segmentation_figure
from vpt.visualize.figure_kinds import Scene, draw, scene_from_data, scene_from_files, write_gallery

__all__ = [
    "AttentionLogger",
    "AttentionMaps",
    "FigureLogger",
    "Scene",
    "attention_maps",
    "confusion_figure",
    "draw",
    "scene_from_data",
    "scene_from_files",
    "segmentation_figure",
    "write_gallery",
]
