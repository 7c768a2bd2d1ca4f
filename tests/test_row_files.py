"""Tables written row by row: a column keeps its kind, whatever its first rows hold."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pandas as pd
import pytest

from vpt.row_files import row_writer


@pytest.mark.parametrize("damaged", [0, 3, 1024, 1500])
def test_numbers_stay_numbers_behind_any_count_of_rows_without_one(tmp_path: Path, damaged: int) -> None:
    with row_writer(tmp_path / "a.parquet") as write:
        for place in range(1500):
            write({"path": str(place), "probability": None if place < damaged else 0.5, "error": ""})
    found = pd.read_parquet(tmp_path / "a.parquet")
    assert found["probability"].dtype == "float64"
    assert found["probability"].isna().sum() == damaged
    assert found["path"].tolist() == [str(place) for place in range(1500)]


def test_lists_and_names_that_are_no_text_come_back_from_every_form(tmp_path: Path) -> None:
    row = {"path": "bad\udcff.png", "set": ["a|b", "c\\d", "=1"], "probability": 0.5}
    for name in ("a.csv", "a.jsonl", "a.parquet"):
        with row_writer(tmp_path / name) as write:
            write(row | {"set": []})
            write(row)
    with (tmp_path / "a.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    assert [each["path"] for each in rows] == [row["path"]] * 2
    assert [each["set"] for each in rows] == ["", r"a\|b|c\\d|=1"]
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    table = pd.read_parquet(tmp_path / "a.parquet")
    for found in (lines[1], {key: table[key][1] for key in row}):
        assert found["path"] == "bad\\udcff.png"
        assert list(found["set"]) == row["set"]
        assert found["probability"] == 0.5
