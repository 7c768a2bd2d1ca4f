"""What a test prints: counts and intervals of the confusion matrix, every class or the worst, what is confused."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from vpt.metrics.accuracy import wilson
from vpt.reports.evaluation import class_tables, iou_table, score_lines
from vpt.screen import show


def printed(capsys: pytest.CaptureFixture[str], matrix: NDArray[np.int64], names: list[str]) -> str:
    for table in class_tables(matrix, names):
        show(table)
    return capsys.readouterr().out


def test_top_1_has_its_counts_and_its_interval() -> None:
    matrix = np.diag([100, 46])
    matrix[0, 1] = 4
    low, high = wilson(146, 150)
    lines = list(score_lines({"test/loss": 0.123456, "test/acc": 146 / 150, "test/auroc": 0.98765}, matrix))
    assert lines == [
        "test/loss   0.1235",
        f"test/acc    97.3 % (146 of 150; 95 %: {100 * low:.1f} to {100 * high:.1f})",
        "test/auroc  0.9877",
    ]


def test_few_classes_are_all_listed_and_their_matrix_fits_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    names = [f"a kind of flower {letter}" for letter in "abcdefghij"]
    matrix = np.full((10, 10), 1234)
    matrix[3] = 0  # no image of it
    out = printed(capsys, matrix, names)
    assert max(map(len, out.splitlines())) <= 80
    assert out.count("10.0 %") == 9
    assert out.count("1,234") == 9 * 11  # with the right ones of the first table
    assert "·" in out


def test_of_many_classes_the_worst_are_listed_and_what_they_are_taken_for(capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"c{number}" for number in range(30)]
    matrix = np.diag(np.full(30, 8))
    matrix[7, 9], matrix[3, 4] = 5, 2
    out = printed(capsys, matrix, names)
    rows = [line.split() for line in out.splitlines() if line.startswith("│")]
    assert rows[0][1:] == ["c7", "│", "13", "│", "8", "│", "61.5", "%", "│"]
    assert rows[1][1] == "c3"
    assert len(rows) == 12
    assert [row[1::2][:3] for row in rows[10:]] == [["c7", "c9", "5"], ["c3", "c4", "2"]]


def test_a_segmentation_has_the_iou_of_its_classes(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {"test/miou": 0.5, "test/n": 3.0, "test/iou/cat": 0.25}
    assert list(score_lines(metrics, np.zeros((2, 2), int))) == ["test/miou  50.0 %", "test/n     3"]
    for table in iou_table(metrics):
        show(table)
    assert "25.0 %" in capsys.readouterr().out
