"""Backbone, delta and head together: classifiers and segmenters, and the files and caches they live in. Pure torch."""

from vpt.models.classifier import TunedModel
from vpt.models.delta_file import load, save_delta

__all__ = ["TunedModel", "load", "save_delta"]
