"""Tables written row by row: a column keeps its kind, whatever its first rows hold."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from vpt.data.row_files import row_writer


@pytest.mark.parametrize("damaged", [0, 3, 1024, 1500])
def test_numbers_stay_numbers_behind_any_count_of_rows_without_one(tmp_path: Path, damaged: int) -> None:
    with row_writer(tmp_path / "a.parquet") as write:
        for place in range(1500):
            write({"path": str(place), "probability": None if place < damaged else 0.5, "error": ""})
    found = pd.read_parquet(tmp_path / "a.parquet")
    assert found["probability"].dtype == "float64"
    assert found["probability"].isna().sum() == damaged
    assert found["path"].tolist() == [str(place) for place in range(1500)]
