"""Records of benchmarks: one line a key, and the runs of the protocol as folders again."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from benchmarks import examples, real_protocol, robustness_runs
from benchmarks.docs import found_blocks, write_blocks
from benchmarks.records import RESULTS, Records, Row, markdown
from vpt.experiments.trial import ANSWERS_FILE
from vpt.robustness import logit_records as records
from vpt.run_record import RUN_FILE


def test_a_line_takes_the_place_of_that_with_its_key(tmp_path: Path) -> None:
    kept = Records(tmp_path / "new" / "table.jsonl", "task", "seed")
    assert kept.rows() == []
    assert kept.find("a", 1) is None
    kept.put({"task": "a", "seed": 1, "top1": 0.5}, {"task": "b", "seed": 1, "top1": 0.6})
    kept.put({"task": "a", "seed": 1, "top1": 0.7}, {"task": "a", "seed": 2, "top1": 0.8})
    assert [row["top1"] for row in kept.rows()] == [0.7, 0.6, 0.8]
    assert kept.find("b", 1) == {"task": "b", "seed": 1, "top1": 0.6}
    assert kept.path.read_text(encoding="utf-8").splitlines()[0] == '{"task":"a","seed":1,"top1":0.7}'
    assert [path.name for path in kept.path.parent.iterdir()] == ["table.jsonl"]


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.jsonl")), ids=lambda path: path.stem)
def test_records_of_the_repository_are_written_compactly(path: Path) -> None:
    for line in path.read_text(encoding="utf-8").splitlines():
        assert line == json.dumps(json.loads(line), ensure_ascii=False, separators=(",", ":"))


def test_a_table_has_words_at_the_left() -> None:
    assert markdown(["method", "n"], [["a", 1]]) == "| method | n |\n|---|--:|\n| a | 1 |"


def test_runs_are_unpacked_with_their_answers(tmp_path: Path) -> None:
    place = real_protocol.Place(tmp_path, RESULTS, tmp_path, quick=False)
    real_protocol.unpack(place, tmp_path)
    assert len(list(tmp_path.rglob(RUN_FILE))) == 180
    answers = list(tmp_path.rglob(ANSWERS_FILE))
    assert len(answers) == 48  # those of the first seed, without the 102 classes of caltech101
    for path in (answers[0], answers[-1]):
        run = json.loads(path.with_name(RUN_FILE).read_text())
        assert records.read(path).accuracy == pytest.approx(run["metrics"]["test/acc"], abs=1e-6)
    cell = place.cells.find("digits", "ssf")
    assert cell is not None
    run = json.loads((tmp_path / "digits" / "ssf" / "seed-44" / RUN_FILE).read_text())
    assert cell["tests"]["44"] == run["metrics"]["test/acc"]


def test_a_trial_with_corruptions_of_version_0_1_is_measured_again(tmp_path: Path) -> None:
    place = robustness_runs.Place(tmp_path, tmp_path, tmp_path, tmp_path, quick=False)
    row: Row = {"kind": "fog", "severity": 3, "top1": 0.1}
    first = place.kept("imagenet", "trial", lambda: {"rows": [row]})
    assert first["rows"] == [row]
    new = {"rows": [row | {"corruptions": "imagenet-c", "top1": 0.2}]}
    for make in (new, first):  # the second is not made
        assert place.kept("imagenet", "trial", partial(dict, make))["rows"] == new["rows"]
    assert len(robustness_runs.trials(tmp_path, "imagenet").rows()) == 1


def test_the_demo_is_read_from_its_runs(tmp_path: Path) -> None:
    for method in examples.DEMO:
        folder = tmp_path / "digits" / method / "version_0"
        (folder / "robustness").mkdir(parents=True)
        run = {"parameters": {"trainable": 5}, "epochs": 6, "read": {"test": 797}, "metrics": {"test/acc": 0.25}}
        (folder / RUN_FILE).write_text(json.dumps(run))
    place = {"n": 200, "alpha": 0.5, "top1": 0.5}
    rows = [{"set": "clean", "kind": "clean", "severity": None, **place}]
    rows.append({"set": "gaussian_noise-3", "kind": "gaussian_noise", "severity": 3, **place, "top1": 0.25})
    (folder / "robustness" / "robustness.json").write_text(json.dumps({"rows": rows}))
    examples.read_demo(tmp_path, tmp_path)
    made = examples.blocks(tmp_path)
    assert "| VPT-deep, 10 tokens | 5 | 6 | 25.0 |" in made["demo"]
    assert "| gaussian noise, severity 3 | 25.0 |\n| mean of the 1 corruptions above | 25.0 |" in made["demo shift"]


def test_blocks_are_replaced_and_others_left(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n\n<!-- one -->\nold\nold\n\nb\n\n<!-- two -->\nkept\n")
    assert list(write_blocks(page, {"one": "new", "three": "-"})) == ["one"]
    assert page.read_text() == "a\n\n<!-- one -->\nnew\n\nb\n\n<!-- two -->\nkept\n"
    assert found_blocks(page) == {"one": "new", "two": "kept"}


def test_what_follows_an_empty_place_stays(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("Before.\n\n<!-- one -->\n\nAfter.\n\n<!-- two -->\nold\n\nEnd.\n", encoding="utf-8")
    assert found_blocks(page) == {"one": "", "two": "old"}
    assert list(write_blocks(page, {"one": "new", "two": "newer"})) == ["one", "two"]
    told = "Before.\n\n<!-- one -->\nnew\n\nAfter.\n\n<!-- two -->\nnewer\n\nEnd.\n"
    assert page.read_text(encoding="utf-8") == told
    assert list(write_blocks(page, {"one": "new", "two": "newer"})) == []
    assert page.read_text(encoding="utf-8") == told
