"""Heads on the features of a frozen backbone."""

from vpt.tasks.probes.linear_probe import LinearProbe
from vpt.tasks.probes.nearest_neighbours import NearestNeighbours

__all__ = ["LinearProbe", "NearestNeighbours"]
