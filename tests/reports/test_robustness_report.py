from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.robustness.fakes import PROMPTS, kept, task, write_delta
from vpt.cli import main
from vpt.data import ImageDataModule
from vpt.errors import ConfigError, DataError
from vpt.metrics.accuracy import correct, difference, wilson
from vpt.metrics.calibration import temperature
from vpt.metrics.effective_robustness import effective_robustness
from vpt.metrics.summary import summary
from vpt.models import TunedModel
from vpt.reports.page import document, p_value
from vpt.reports.robustness_figures import scatter
from vpt.reports.robustness_report import tables
from vpt.reports.robustness_values import effective_rows, model_names, report
from vpt.robustness import RobustnessResult, Row, logit_records, per_image, run
from vpt.robustness.alpha_curve import accuracy_curve

NAMES = ("gate", "head", "half")


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gate, a head, and the head once more in half precision; one evaluation of fewer images, one of other data."""
    root = tmp_path_factory.mktemp("report")
    probe, other = (write_delta(root / f"{seed}.safetensors", (), seed) for seed in (1, 2))
    prompts = write_delta(root / "prompts.safetensors", PROMPTS)
    options: dict[str, Any] = {"alphas": (0.0, 0.5, 1.0), "severities": (1, 3), "anchor": probe}
    options |= {"corruptions": ("contrast", "pixelate")}
    for name, delta, changes in (
        ("gate", prompts, {}),
        ("head", other, {}),
        ("half", other, {"half": True}),
        ("fewer", other, {"max_images": 4, "severities": ()}),
    ):
        run(delta, task(), out=root / name, **options | changes)
    run(other, task(shift=None), out=root / "elsewhere", alphas=(1.0,), severities=())
    return root


@pytest.fixture(scope="session")
def written(root: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TunedModel, "forward", None)  # nothing is classified again
        folders = [str(root / name) for name in NAMES]
        assert main(["robustness", "report", *folders, "--out", str(root / "out")]) == 0
    return root / "out"


@pytest.fixture(scope="session")
def values(written: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((written / "report.json").read_text(encoding="utf-8"))
    return content


class Page(HTMLParser):
    """What a page refers to, its images, and the cells of its tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.tables: list[list[list[str]]] = []
        self._open = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [str(value) for key, value in attrs if key in ("src", "href", "srcset", "data", "action")]
        self._open = tag in ("td", "th")
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif self._open:
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._open = self._open and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._open:
            self.tables[-1][-1][-1] += data


def test_the_page_needs_nothing_beside_itself(written: Path) -> None:
    text = (written / "report.html").read_text(encoding="utf-8")
    found = Page(text).references
    assert len(found) == 5  # scatter, plane, curves, reliability, heat map
    for reference in found:
        kind, data = reference.split(",")
        assert kind == "data:image/png;base64"
        image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
        image.load()
        assert np.ptp(np.asarray(image.convert("L"))) > 200
    rest = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", text).lower()
    assert not re.search(r"https?:|url\(|@import|<script|<link|<iframe|//", rest)


def cells(values: dict[str, Any]) -> list[list[list[str]]]:
    return [[list(table.columns), *map(list, table.rows)] for table in tables(values)]


def test_the_cells_of_page_and_markdown_are_those_of_the_json(written: Path, values: dict[str, Any]) -> None:
    assert Page((written / "report.html").read_text(encoding="utf-8")).tables == cells(values)
    lines = (written / "report.md").read_text(encoding="utf-8").splitlines()
    rows = [line[2:-2].split(" | ") for line in lines if line.startswith("| ") and not line.startswith("| ---")]
    assert rows == [row for table in cells(values) for row in table]


def test_cells_are_the_numbers_of_the_json(values: dict[str, Any]) -> None:
    first, together, scores, _, differences, _ = tables(values)
    lines = {(line["set"], line["model"]): line for line in values["headline"]}
    assert len(first.rows) == len(lines)
    for name, model, _, n, *found in first.rows:
        line = lines[name, model]
        assert int(n) == line["n"]
        for cell, key in zip(found, ("zero", "fixed", "chosen_on_val", "tuned", "oracle"), strict=True):
            keys = ("top1", "low", "high")
            expected = [line[key][k] for k in keys if line[key][k] is not None] if line[key] else []
            numbers = [float(number) for number in re.findall(r"[\d.]+", cell.split("(")[0])]
            assert numbers == pytest.approx([100 * number for number in expected], abs=0.0501)
    rows = {(row["set"], row["model"], row["alpha"]): row for row in values["rows"]}
    for name, model, alpha, *found in scores.rows:
        row = rows[name, model, float(alpha)]
        assert float(found[scores.columns.index("NLL") - 3]) == pytest.approx(row["nll"], abs=5e-4)
        assert float(found[scores.columns.index("ECE") - 3]) == pytest.approx(row["ece"], abs=5e-4)
    assert len(differences.rows) == len(values["differences"])
    assert len(together.rows) == 3 * (3 + 2)  # models, α and both ways by image


def test_rows_are_scores_of_records(root: Path, values: dict[str, Any]) -> None:
    assert len(values["rows"]) == 3 * 8 * 3  # val, the same corrupted, clean, art and four corrupted sets
    record, val = (logit_records.read(kept(root / "gate", f"{name}-alpha-0.5")) for name in ("art", "val"))
    row = next(r for r in values["rows"] if (r["model"], r["set"], r["alpha"]) == ("gate", "art", 0.5))
    expected = summary(record.logits, record.label, temperature(val.logits, val.label))
    assert {key: row[key] for key in expected} == expected
    assert row["protocol"]["delta_sha256"] == record.protocol["delta"]["sha256"]
    assert str(root) not in json.dumps(values)


def test_all_shifts_together_are_means_of_the_rows_and_by_image_of_the_records(
    root: Path, values: dict[str, Any]
) -> None:
    top1 = {(row["set"], row["alpha"]): row["top1"] for row in values["rows"] if row["model"] == "gate"}
    own = {row["way"]: row for row in values["shifts"] if row["model"] == "gate"}
    half = own["α = 0.5"]
    assert (half["clean"], half["shifts"], half["worst_set"]) == (top1["clean", 0.5], top1["art", 0.5], "art")
    both = half["clean"] + half["shifts"]
    assert half["harmonic"] == pytest.approx(2 * half["clean"] * half["shifts"] / both if both else 0)
    start, middle, end = (logit_records.read(kept(root / "gate", f"art-alpha-{a}")) for a in (0.0, 0.5, 1.0))
    found = per_image.answers(start.logits, end.logits).argmax(axis=1) == end.label
    assert own["by image, answers"]["shifts"] == pytest.approx(found.mean())
    mixed = per_image.models({0.0: start.logits, 0.5: middle.logits, 1.0: end.logits}).argmax(axis=1) == end.label
    assert own["by image, models"]["shifts"] == pytest.approx(mixed.mean())


def test_means_are_over_severities_and_then_over_all(values: dict[str, Any]) -> None:
    own = [row for row in values["rows"] if row["model"] == "head" and row["severity"] and row["alpha"] == 1.0]
    found = {row["set"]: row for row in values["averages"] if row["model"] == "head" and row["alpha"] == 1.0}
    assert len(found) == 3
    contrast = [row["nll"] for row in own if row["kind"] == "contrast"]
    assert found["contrast (mean of severities 1, 3)"]["nll"] == pytest.approx(np.mean(contrast))
    assert found["mean of contrast, pixelate (severities 1, 3)"]["top1"] == pytest.approx(
        np.mean([row["top1"] for row in own])
    )


def test_the_oracle_is_best_and_no_validation_line_has_one(values: dict[str, Any]) -> None:
    for line in values["headline"]:
        if line["set"].startswith("val"):
            assert line["oracle"] is None
        else:
            assert line["oracle"]["top1"] >= max(line[key]["top1"] for key in ("zero", "fixed", "tuned"))


def test_models_are_compared_on_the_same_images(root: Path, values: dict[str, Any]) -> None:
    one, two = (logit_records.read(kept(root / name, "clean-alpha-1.0")) for name in ("gate", "head"))
    found = {(row["first"], row["second"], row["set"], row["alpha"]): row for row in values["differences"]}
    assert len(found) == 3 * 2 * 2  # pairs, sets, α
    row, expected = (
        found["gate", "head", "clean", 1.0],
        difference(correct(one.logits, one.label), correct(two.logits, two.label)),
    )
    assert (row["value"], row["low"], row["high"]) == (expected.value, expected.low, expected.high)


def test_a_head_has_an_exact_curve_unless_its_records_are_reduced(
    root: Path, written: Path, values: dict[str, Any]
) -> None:
    assert {(curve["model"], curve["set"]) for curve in values["curves"]} == {("head", "clean"), ("head", "art")}
    start, end = (logit_records.read(kept(root / "head", f"art-alpha-{alpha}")) for alpha in (0.0, 1.0))
    exact = accuracy_curve(start.logits, end.logits, end.label)
    curve = next(curve for curve in values["curves"] if curve["set"] == "art")
    assert curve["top1"] == exact.accuracy(curve["alpha"]).tolist()
    half = values["models"][2]
    assert "too coarse for exact intervals" in half["why_no_exact_curve"]
    assert all(("float16" in row["marks"]) == (row["model"] == "half") for row in values["rows"])
    assert "too coarse" in (written / "report.html").read_text(encoding="utf-8")


def test_other_numbers_of_images_are_marked_and_not_compared(root: Path) -> None:
    values = report([root / "head", root / "fewer"])
    marks = {(row["model"], row["set"]): row["marks"] for row in values["rows"]}
    assert marks["fewer", "clean"] == ["4 of 10 drawn", "n differs"]
    assert marks["head", "clean"] == ["n differs"]
    assert not values["differences"]
    assert "hold different images" in values["not_compared"][0]


def test_other_labels_are_not_compared(root: Path, tmp_path: Path) -> None:
    other = copied(root / "gate", tmp_path / "other")
    path = kept(other, "clean-alpha-1.0")
    record = logit_records.read(path)
    logit_records.write(path, replace(record, label=record.label[::-1]))
    (refused,) = report([root / "gate", other])["not_compared"]
    assert "on clean: The records of sets 'clean' (10 images) and 'clean' (10 images) hold different labels" in refused


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (("gate", "elsewhere"), ConfigError, "other images: report them apart"),
        (("gate", "gate"), ConfigError, "named twice"),
        (("nowhere",), DataError, "holds no evaluation"),
    ],
)
def test_what_cannot_be_reported_together_is_refused(
    names: Sequence[str], error: type[Exception], message: str, root: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        report([root / name for name in names])
    assert main(["robustness", "report", *(str(root / name) for name in names), "--out", str(tmp_path / "out")]) == 1
    assert not (tmp_path / "out").exists()


def aged(folder: Path, out: Path) -> Path:
    """What version 0.1 would have left."""
    path = copied(folder, out) / "robustness.json"
    content = json.loads(path.read_text())
    del content["protocol"]["corruptions"]
    for row in content["rows"]:
        new = out / "records" / row["record"]
        record = logit_records.read(new)
        older = {key: value for key, value in record.protocol.items() if key != "corruptions"}
        row["record"] = f"{new.stem.rpartition('-')[0]}.parquet"
        logit_records.write(new.with_name(row["record"]), replace(record, protocol=older))
        new.unlink()
    path.write_text(json.dumps(content))
    return out


@pytest.mark.parametrize("command", ["report", "compare"])
def test_corruptions_with_other_parameters_do_not_stand_side_by_side(
    command: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [str(root / "gate"), str(aged(root / "gate", tmp_path / "old"))]
    assert main(["robustness", command, *folders]) == 1
    assert "corruptions" in capsys.readouterr().err
    (old,) = {row["set"] for row in report([tmp_path / "old"])["averages"] if len(row["kinds"]) == 2}
    assert old == "mean of contrast, pixelate (severities 1, 3, parameters of vpt 0.1)"


def test_a_small_p_is_not_printed_as_zero() -> None:
    assert [p_value(value) for value in (1.0, 0.0123, 0.001, 0.00099, 1e-12)] == [
        *("1.000", "0.012", "0.001"),
        *("< 0.001", "< 0.001"),
    ]


def copied(folder: Path, out: Path) -> Path:
    (out / "records").mkdir(parents=True)
    for path in (folder / "robustness.json", *(folder / "records").iterdir()):
        (out / path.relative_to(folder)).write_bytes(path.read_bytes())
    return out


def test_missing_unfinished_and_strange_records_are_refused(root: Path, tmp_path: Path) -> None:
    folder = copied(root / "gate", tmp_path / "copy")
    path = kept(folder, "art-alpha-0.5")
    record = logit_records.read(path)
    path.unlink()
    with pytest.raises(DataError, match=r"lacks records/art-alpha-0\.5-\w+\.parquet"):
        report([folder])
    part = {key: getattr(record, key)[:2] for key in ("index", "label", "logits")}
    logit_records.write(path, replace(record, **part, complete=False))
    with pytest.raises(DataError, match="unfinished, 2 of 5 images"):
        report([folder])
    logit_records.write(path, replace(record, protocol={**record.protocol, "delta": {"sha256": "0" * 64, "specs": []}}))
    with pytest.raises(DataError, match="belongs to another evaluation"):
        report([folder])


class Masked(ImageDataModule):
    """Data whose shift has two of the three classes, one of two columns."""

    def groups(self, name: str) -> list[tuple[int, ...]] | None:
        return [(0, 2), (1,)] if name == "art" else None


def test_a_mask_counts_in_every_score(root: Path, tmp_path: Path) -> None:
    data = task()
    shift = data._splits["art"]
    object.__setattr__(shift, "labels", shift.labels % 2)
    masked = Masked("fake", data.class_names, data._splits, "square", 64, 4, 0, 0, "none", None)
    options: dict[str, Any] = {"alphas": (0.0, 1.0), "severities": (), "anchor": root / "1.safetensors"}
    run(root / "2.safetensors", masked, out=tmp_path / "masked", **options)
    values = report([tmp_path / "masked"])
    record = logit_records.read(kept(tmp_path / "masked", "art-alpha-1.0"))
    merged = np.stack([record.logits[:, [0, 2]].max(axis=1), record.logits[:, 1]], axis=1)
    row = next(row for row in values["rows"] if (row["set"], row["alpha"]) == ("art", 1.0))
    assert row["top1"] == record.accuracy
    assert row["nll"] == summary(merged, record.label)["nll"]
    assert row["protocol"]["mask"]["classes"] == 2
    assert "class mask" in row["marks"]
    assert values["curves"][1]["top1"][-1] == record.accuracy


def test_effective_robustness_compares_with_the_matched_classes(tmp_path: Path) -> None:
    label, wrong = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 2]), [0, 1, 3]
    answer = label.copy()
    answer[wrong] += 1  # all among the six images of classes 0 and 1
    logits = np.eye(3, dtype=np.float32)[answer]
    protocol: dict[str, Any] = {"backbone": "b", "delta": "d", "data": {"name": "imagenet_1k"}, "logits": "float32"}
    rows = []
    for name, kind, top1, groups in (
        ("clean", "clean", 0.7, None),
        ("imagenet_sketch", "shift", 0.42, None),
        ("imagenet_r", "shift", 0.1, [[0], [1]]),
    ):
        rows.append(Row(name, kind, None, 10, 1.0, top1, 0.0, 1.0, top1, f"{name}.parquet"))
        own = protocol | {"set": name, "alpha": 1.0, "groups": groups}
        logit_records.write(
            tmp_path / "records" / f"{name}.parquet", logit_records.Record(np.arange(10), label, logits, own, True)
        )
    result = RobustnessResult(rows, protocol, tmp_path)
    sketch, by_timm, renditions, _ = effective_rows("clip", result)
    assert [sketch["population"], by_timm["population"]] == ["ImageNet testbed", "timm, 2025-10-30"]
    assert by_timm["points"] == effective_robustness("imagenet_sketch", 0.42, {"imagenet_val": 0.7}, "timm, 2025-10-30")
    assert (sketch["reference"], sketch["reference_accuracy"], sketch["accuracy"]) == ("imagenet_val", 0.7, 0.42)
    assert sketch["points"] == effective_robustness("imagenet_sketch", 0.42, {"imagenet_val": 0.7})
    assert not sketch["extrapolated"]
    assert (renditions["reference"], renditions["reference_accuracy"]) == ("imagenet_val_r", 0.5)
    assert renditions["extrapolated"]
    assert not list(effective_rows("clip", replace(result, protocol=protocol | {"logits": "float16"})))
    assert not list(effective_rows("clip", replace(result, protocol=protocol | {"data": {"name": "pets"}})))


def _point(model: str, kind: str, alpha: float, hits: int, n: int = 20) -> dict[str, Any]:
    low, high = wilson(hits, n)
    own = {"model": model, "set": kind, "kind": kind, "severity": None, "alpha": alpha, "n": n, "top1": hits / n}
    return own | {"top1_low": low, "top1_high": high}


def test_all_and_none_of_a_few_images_lie_at_the_ends_of_the_axes() -> None:
    rows = [
        _point("m", kind, alpha, hits) for kind in ("clean", "shift") for alpha, hits in ((0, 0), (0.5, 0), (1, 20))
    ]
    figure = scatter({"models": [{"model": "m"}], "rows": rows, "averages": [], "effective": []})
    assert figure is not None
    (axes,) = figure.axes
    named = {label.get_text(): tick for label, tick in zip(axes.get_yticklabels(), axes.get_yticks(), strict=True)}
    low, high = axes.get_ylim()
    assert (named["0"], named["100"]) == (low, high)
    assert low < min(tick for name, tick in named.items() if name not in ("0", "100"))
    points: list[Any] = [line for line in axes.lines if line.get_linestyle() == "None"]
    places = [(*line.get_xdata(), *line.get_ydata()) for line in points]
    assert places == [(low, low), (low, low), (high, high)]
    sizes = [line.get_markersize() for line in points]
    assert sizes == sorted(set(sizes), reverse=True)  # each is seen behind the next
    interval: Any = axes.collections[0]
    (_, bottom), (_, top) = interval.get_segments()[0]
    assert low < bottom < top == high


def test_figures_scroll_on_a_narrow_screen_before_their_letters_are_too_small(written: Path) -> None:
    text = (written / "report.html").read_text(encoding="utf-8")
    assert re.search(r"figure \{[^}]*overflow-x: auto", text)
    sizes = re.findall(r'<img [^>]*width="(\d+)" style="min-width: (\d+)px"', text)
    assert len(sizes) == 5
    assert [int(least) / int(width) >= 0.79 for width, least in sizes] == [True] * 5


def test_models_are_named_by_what_tells_them_apart() -> None:
    folders = [Path(f"/runs/task/{name}/version_0/robustness") for name in ("linear", "deep")]
    assert model_names(folders) == ["linear", "deep"]
    assert model_names(folders[:1]) == ["linear"]
    assert model_names([Path("/a/x/0"), Path("/a/x")]) == ["x/0", "x"]


def test_names_are_escaped(values: dict[str, Any]) -> None:
    strange = json.loads(json.dumps(values).replace('"gate"', '"<b>|&"'))
    assert Page(document("", (), tables(strange), {}, {})).tables == cells(strange)
