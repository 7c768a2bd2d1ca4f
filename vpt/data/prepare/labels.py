"""Label rules of VTAB (Zhai et al. 2019, arXiv:1910.04867), pure functions of what the originals record.

Distances are compared as float32, as there. A distance on a boundary belongs to the nearer class.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

CLEVR_DISTANCES = (0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0)
KITTI_DISTANCES = (-100.0, 8.0, 20.0, 999.0)
KITTI_VEHICLES = ("Car", "Van", "Truck")
NO_VEHICLE = 1000.0  # metres


def clevr_count(scene: Sequence[Sequence[float]]) -> int:
    """Number of objects, 3 to 10, as label 0 to 7.

    Args:
        scene: ``pixel_coords`` (x, y, distance to the camera) of each object.
    """
    return len(scene) - 3


def clevr_distance(scene: Sequence[Sequence[float]]) -> int:
    """Distance of the nearest object in the classes (0, 8], (8, 8.5], (8.5, 9], (9, 9.5], (9.5, 10], (10, 100].

    Args:
        scene: ``pixel_coords`` (x, y, distance to the camera) of each object, at least one.

    Returns:
        Label 0 to 5; -1 or 6 for a distance outside all classes.
    """
    return _class_of(min(coordinates[2] for coordinates in scene), CLEVR_DISTANCES)


def kitti_distance(objects: Iterable[tuple[str, float]]) -> int:
    """Distance of the nearest car, van or truck: up to 8 m, up to 20 m, farther, and label 3 for no vehicle.

    Args:
        objects: Type and z of the location, in metres in front of the camera, of each object.

    Returns:
        Label 0 to 3.
    """
    return _class_of(min([z for kind, z in objects if kind in KITTI_VEHICLES] + [NO_VEHICLE]), KITTI_DISTANCES)


def dsprites_bin(latent: NDArray[np.integer], values: int) -> NDArray[np.int64]:
    """Sixteen bins of a latent: x positions by 2, orientations by 2.5.

    Args:
        latent: (N,), 0..values-1.
        values: 32 for the x position, 40 for the orientation.

    Returns:
        int64 (N,), 0..15.
    """
    return latent.astype(np.int64) * 16 // values


def smallnorb_azimuth(info: NDArray[np.integer]) -> NDArray[np.int64]:
    """Azimuth, stored as 0, 2, .. 34 in tens of degrees, as label 0 to 17.

    Args:
        info: (N, 4): instance, elevation, azimuth, lighting.

    Returns:
        int64 (N,).
    """
    return info[:, 2].astype(np.int64) // 2


def smallnorb_elevation(info: NDArray[np.integer]) -> NDArray[np.int64]:
    """Elevation, stored as 0 to 8 (30° to 70° by 5°), which is the label.

    Args:
        info: (N, 4): instance, elevation, azimuth, lighting.

    Returns:
        int64 (N,).
    """
    return info[:, 1].astype(np.int64)


def svhn_digit(stored: NDArray[np.integer]) -> NDArray[np.int64]:
    """The digit; 0 is stored as 10.

    Args:
        stored: (N,), 1..10.

    Returns:
        int64 (N,), 0..9.
    """
    return stored.astype(np.int64) % 10


def _class_of(value: float, bounds: Sequence[float]) -> int:
    """Number of the last bound that lies below a value; -1 if none does."""
    return int(np.searchsorted(np.asarray(bounds, np.float32), np.float32(value), side="left")) - 1
