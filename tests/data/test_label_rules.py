"""Label rules against records computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpt.data.prepare import arrays, image_files


@pytest.mark.parametrize(
    ("distance", "label"),
    [
        (7.999, 0), (8.0, 0), (8.001, 1), (8.5, 1), (8.501, 2), (9.0, 2), (9.001, 3), (9.5, 3), (9.501, 4), (10.0, 4),
        (10.001, 5), (100.0, 5), (100.1, 6), (0.0, -1),
    ],
)  # fmt: skip
def test_clevr_distance_is_that_of_the_nearest_object_and_a_boundary_is_near(distance: float, label: int) -> None:
    assert image_files.clevr_distance([[10, 20, 120.0], [5, 5, distance], [1, 2, 120.0]]) == label


def test_distances_are_compared_in_single_precision() -> None:
    assert image_files.clevr_distance([[0, 0, 8.0 + 1e-9]]) == 0
    assert image_files.clevr_distance([[0, 0, 8.0 + 1e-6]]) == 1


@pytest.mark.parametrize("objects", range(3, 11))
def test_clevr_count_begins_at_three(objects: int) -> None:
    assert image_files.clevr_count([[0, 0, 9.0]] * objects) == objects - 3


@pytest.mark.parametrize(
    ("objects", "label"),
    [
        ([], 3),
        ([("Pedestrian", 3.0), ("Cyclist", 5.0), ("Tram", 6.0), ("DontCare", -1000.0), ("Misc", 1.0)], 3),
        ([("Car", 8.0)], 0),
        ([("Car", 8.01)], 1),
        ([("Van", 20.0)], 1),
        ([("Van", 20.01)], 2),
        ([("Truck", 999.0)], 2),
        ([("Car", 50.0), ("Truck", 7.5), ("Pedestrian", 1.0)], 0),
        ([("Car", -2.0)], 0),
    ],
)
def test_kitti_distance_is_that_of_the_nearest_vehicle(objects: list[tuple[str, float]], label: int) -> None:
    assert image_files.kitti_distance(objects) == label


@given(st.floats(-99, 998, width=32))
def test_kitti_distance_is_the_last_bound_below(distance: float) -> None:
    expected = max(label for label, bound in enumerate((-100, 8, 20)) if bound < distance)
    assert image_files.kitti_distance([("Car", distance)]) == expected


def test_dsprites_bins_are_floors_of_a_half_and_of_two_fifths() -> None:
    x, orientation = np.arange(32), np.arange(40)
    np.testing.assert_array_equal(arrays.dsprites_bin(x, 32), np.floor(x / 2))
    np.testing.assert_array_equal(arrays.dsprites_bin(orientation, 40), np.floor(orientation / 2.5))
    assert arrays.dsprites_bin(orientation, 40)[[0, 2, 3, 4, 5, 39]].tolist() == [0, 0, 1, 1, 2, 15]


def test_smallnorb_columns() -> None:
    info = np.array([[4, 0, 0, 1], [9, 8, 34, 5], [6, 3, 12, 0]], np.int32)
    assert arrays.smallnorb_azimuth(info).tolist() == [0, 17, 6]
    assert arrays.smallnorb_elevation(info).tolist() == [0, 8, 3]


def test_svhn_stores_zero_as_ten() -> None:
    assert arrays.svhn_digit(np.array([1, 9, 10], np.uint8)).tolist() == [1, 9, 0]
