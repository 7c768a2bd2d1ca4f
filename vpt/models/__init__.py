"""Backbone, delta and head together: classifiers and segmenters, and the files and caches they live in. Pure torch."""

from vpt.models.classifier import TunedModel
from vpt.models.delta_file import load_classifier, load_segmentation, save_delta

__all__ = ["TunedModel", "load_classifier", "load_segmentation", "save_delta"]
