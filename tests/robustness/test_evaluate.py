from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from tests.robustness.fakes import CLASSES, PROMPTS, kept, split, task, weights, write_delta
from vpt.backbones.strength import Strength
from vpt.data import ImageDataModule, ImageDataset
from vpt.errors import ConfigError, DataError
from vpt.models import TunedModel, load_classifier
from vpt.robustness import RobustnessResult, run
from vpt.robustness.logit_records import read, resume, write
from vpt.robustness.pairs import table
from vpt.run_record import identity

ALPHAS = (0.0, 0.5, 1.0)
TWO = ("gaussian_noise", "jpeg_compression")  # they show all that five would, in less time


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("deltas")


@pytest.fixture(scope="session")
def prompts(folder: Path) -> Path:
    return write_delta(folder / "prompts.safetensors", PROMPTS)


@pytest.fixture(scope="session")
def linear(folder: Path) -> Path:
    return write_delta(folder / "linear.safetensors", (), seed=1)


def measure(
    delta: Path, out: Path, alphas: Sequence[float] = ALPHAS, data: ImageDataModule | None = None, **changes: Any
) -> RobustnessResult:
    arguments: dict[str, Any] = {"severities": (2,), "batch_size": 4, "corruptions": TWO} | changes
    return run(delta, data or task(), alphas, out, **arguments)


@pytest.fixture(scope="session")
def whole(prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation that tests read and leave as it is."""
    out = tmp_path_factory.mktemp("whole")
    measure(prompts, out)
    return out


def contents(out: Path) -> dict[str, Any]:
    return {path.name: read(path) for path in sorted((out / "records").iterdir())}


def assert_equal(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name, record in ours.items():
        assert np.array_equal(record.logits, theirs[name].logits), name
        assert np.array_equal(record.index, theirs[name].index)
        assert record.protocol == theirs[name].protocol
        assert record.complete
        assert theirs[name].complete


def test_every_set_at_every_strength_leaves_a_record_and_a_row(whole: Path) -> None:
    result = RobustnessResult.read(whole)
    assert len(result.rows) == 6 * 3  # val, the same corrupted, clean, art and two corruptions at one severity
    assert {row.n for row in result.rows if not row.set.startswith(("val", "art"))} == {10}
    assert {row.set: row.n for row in result.rows if row.set in ("val", "art")} == {"val": 6, "art": 5}
    stored = json.loads((whole / "robustness.json").read_text())
    assert len(stored["rows"]) == 18
    for row in stored["rows"]:
        record = read(whole / "records" / row["record"])
        assert (record.protocol["set"], record.protocol["alpha"]) == (row["set"], row["alpha"])
        assert row["top1"] == record.accuracy
        assert row["low"] <= row["top1"] <= row["high"]


def test_a_protocol_says_what_the_number_depends_on_and_no_path(prompts: Path, tmp_path: Path) -> None:
    measure(prompts, tmp_path, max_images=6, seed=5)
    protocol = read(kept(tmp_path, "jpeg_compression-2-alpha-0.5")).protocol
    assert (protocol["kind"], protocol["severity"], protocol["n"], protocol["seed"]) == ("jpeg_compression", 2, 6, 5)
    assert (protocol["corruptions"], protocol["parameter"]) == ("imagenet-c", [18])
    assert protocol["data"]["preset"] == "square"
    assert protocol["head"] == "tuned"
    assert len(protocol["backbone"]["fingerprint"]) == 64
    assert "torch" in protocol["versions"]
    assert str(prompts.parent) not in json.dumps(protocol)


def test_a_part_of_the_list_sees_the_noise_that_the_whole_list_sees(prompts: Path, tmp_path: Path) -> None:
    for name, count in (("whole", None), ("part", 4)):
        measure(prompts, tmp_path / name, (1.0,), max_images=count, corruptions=("gaussian_noise",))
    whole, part = (read(kept(tmp_path / n, "gaussian_noise-2-alpha-1.0")) for n in ("whole", "part"))
    assert part.index.tolist() != list(range(4))
    np.testing.assert_allclose(part.logits, whole.logits[part.index], rtol=1e-4, atol=1e-5)


def test_the_ends_are_the_bare_and_the_tuned_model(prompts: Path, tmp_path: Path) -> None:
    measure(prompts, tmp_path, batch_size=10)
    model = load_classifier(prompts)
    images = torch.stack([task().split("test")[i]["image"] for i in range(10)])
    with torch.no_grad():
        tuned = model(images)
        assert model.delta is not None
        model.delta.detach()
        bare = model(images)
    assert np.array_equal(read(kept(tmp_path, "clean-alpha-1.0")).logits, tuned.numpy())
    assert np.array_equal(read(kept(tmp_path, "clean-alpha-0.0")).logits, bare.numpy())
    assert not torch.allclose(tuned, bare)


def test_the_anchor_is_the_head_at_strength_zero(prompts: Path, linear: Path, tmp_path: Path) -> None:
    result = measure(prompts, tmp_path, anchor=linear, batch_size=10)
    images = torch.stack([task().split("test")[i]["image"] for i in range(10)])
    with torch.no_grad():
        probe = load_classifier(linear)(images)
    assert result.protocol["head"] == "interpolated"
    stored = read(kept(tmp_path, "clean-alpha-0.0")).logits
    np.testing.assert_allclose(stored, probe.numpy(), rtol=1e-5, atol=1e-5)


def test_each_image_is_decoded_once(prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = ImageDataset.__getitem__

    def counted(self: ImageDataset, item: int) -> Any:
        seen.append(item)
        return original(self, item)

    monkeypatch.setattr(ImageDataset, "__getitem__", counted)
    measure(prompts, tmp_path)
    assert seen == [*range(6), *range(10), *range(5)]  # the validation list, the test list, then the shift


def test_an_interrupted_run_continues_to_equal_records(
    prompts: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    original = TunedModel.forward

    def dies(self: TunedModel, images: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 6 + 14:  # in the second corruption of the test list
            raise KeyboardInterrupt
        return original(self, images)

    with monkeypatch.context() as patch:
        patch.setattr(TunedModel, "forward", dies)
        with pytest.raises(KeyboardInterrupt):
            measure(prompts, tmp_path / "cut")
    left = contents(tmp_path / "cut")
    assert {len(record.index) for record in left.values()} == {4, 6, 10}
    assert not all(record.complete for record in left.values())
    measure(prompts, tmp_path / "cut")
    assert_equal(contents(whole), contents(tmp_path / "cut"))


def test_answers_wait_on_disk_in_a_file_without_a_name(tmp_path: Path) -> None:
    answers = table(3, 5, 4, half=True, folder=tmp_path / "records")
    answers[1, 2] = 7
    assert isinstance(answers, np.memmap)
    assert (answers.shape, str(answers.dtype), float(answers.sum())) == ((3, 5, 4), "float16", 28.0)
    assert list((tmp_path / "records").iterdir()) == []


def test_finished_records_are_not_computed_again(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = measure(prompts, tmp_path, alphas=(0.0, 1.0))
    strengths: set[Strength] = set()
    original = TunedModel.forward

    def watched(self: TunedModel, images: torch.Tensor) -> torch.Tensor:
        strengths.add(self.strength)
        return original(self, images)

    monkeypatch.setattr(TunedModel, "forward", watched)
    assert measure(prompts, tmp_path, alphas=(0.0, 1.0)).rows == first.rows
    assert strengths == set()
    measure(prompts, tmp_path, alphas=(0.0, 0.5, 1.0))
    assert strengths == {0.5}


def measured(delta: Path, out: Path) -> Any:
    measure(delta, out, (1.0,), severities=())
    return read(kept(out, "clean-alpha-1.0"))


def test_records_of_another_delta_are_not_reused(prompts: Path, folder: Path, tmp_path: Path) -> None:
    other = write_delta(folder / "other.safetensors", PROMPTS, seed=7)
    before = measured(prompts, tmp_path)
    with pytest.raises(ConfigError, match=r"holds another evaluation \(delta differ\): name another --out"):
        measured(other, tmp_path)
    assert np.array_equal(measured(prompts, tmp_path).logits, before.logits)
    (tmp_path / "robustness.json").unlink()  # as where an evaluation was killed
    result = measure(other, tmp_path, (1.0,), severities=())
    (row,) = (row for row in result.rows if row.set == "clean")
    assert not np.allclose(result.record(row).logits, before.logits)
    assert len(list((tmp_path / "records").glob("clean-*"))) == 2


def test_records_survive_no_change_of_the_images(prompts: Path, tmp_path: Path) -> None:
    """The list is the same; the pixels are others."""
    first = measured(prompts, tmp_path / "first")
    splits = {name: split(name, 6, seed) for name, seed in (("train", 1), ("val", 2), ("test", 99))}
    other = ImageDataModule("fake", CLASSES, splits, "square", 64, 4, 0, 0, "none", None)
    with pytest.raises(ConfigError, match=r"another evaluation \(data differ\)"):
        measure(prompts, tmp_path / "first", (1.0,), data=other, severities=())
    measure(prompts, tmp_path / "second", (1.0,), data=other, severities=())
    assert not np.allclose(read(kept(tmp_path / "second", "clean-alpha-1.0")).logits, first.logits[:6])


def test_every_field_of_a_protocol_is_part_of_what_a_record_is(prompts: Path, tmp_path: Path) -> None:
    measure(prompts, tmp_path, (1.0,), severities=())
    path = kept(tmp_path, "clean-alpha-1.0")
    protocol = dict(read(path).protocol)
    assert path.stem.endswith(identity(protocol)[:12])
    assert resume(path, protocol) is not None
    for key in protocol:
        changed = protocol | {key: "another"}
        assert identity(changed) != identity(protocol)
        assert resume(path, changed) is None
    content = json.loads((tmp_path / "robustness.json").read_text())
    for key, value in content["protocol"].items():
        other: Any = value | {"another": 1} if isinstance(value, dict) else "end-to-end" if key == "way" else "another"
        other = {"sha256": "another"} if key == "start" else other
        changed = content | {"protocol": content["protocol"] | {key: other}}
        (tmp_path / "robustness.json").write_text(json.dumps(changed))
        with pytest.raises(ConfigError, match=rf"another evaluation \({key} differ\)"):
            measure(prompts, tmp_path, (1.0,), severities=())
        result = RobustnessResult.read(tmp_path)
        if key not in ("max_images", "seed", "corruptions"):  # a record has them where they say something of its set
            with pytest.raises(DataError, match="belongs to another evaluation"):
                result.record(result.rows[0])


def test_records_of_the_corruptions_of_version_0_1_are_not_taken_up(prompts: Path, tmp_path: Path) -> None:
    measure(prompts, tmp_path, (1.0,), corruptions=TWO[1:])
    path = kept(tmp_path, "jpeg_compression-2-alpha-1.0")
    new = read(path)
    older = {key: value for key, value in new.protocol.items() if key not in ("corruptions", "title")}
    write(path, replace(new, logits=np.zeros_like(new.logits), protocol=older | {"seeding": "name"}))
    measure(prompts, tmp_path, (1.0,), corruptions=TWO[1:])
    assert_equal({"record": read(path)}, {"record": new})


@pytest.mark.parametrize("size", [1, 7])
def test_batch_size_does_not_change_a_record(size: int, prompts: Path, whole: Path, tmp_path: Path) -> None:
    measure(prompts, tmp_path, batch_size=size, corruptions=TWO[:1])
    fours = contents(whole)
    for name, record in contents(tmp_path).items():
        assert record.protocol == fours[name].protocol
        np.testing.assert_allclose(record.logits, fours[name].logits, rtol=1e-4, atol=1e-4)


def test_a_compiled_evaluation_differs_by_rounding_and_says_so(
    prompts: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vpt.robustness.evaluate.compile_for", lambda model, device: model.compile(backend="eager"))
    measure(prompts, tmp_path, (0.0, 0.5, 1.0), compile=True, severities=())
    for alpha in (0.0, 0.5, 1.0):
        found, plain = (read(kept(out, f"clean-alpha-{alpha}")) for out in (tmp_path, whole))
        assert found.protocol == {**plain.protocol, "compile": True}
        np.testing.assert_allclose(found.logits, plain.logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="a copy of the model that is not compiled"):
        measure(prompts, tmp_path / "other", compile=True, adapt="entropy")


def test_a_model_without_prompts_is_evaluated_once(linear: Path, tmp_path: Path) -> None:
    result = measure(linear, tmp_path)
    assert {row.alpha for row in result.rows} == {1.0}
    assert "No interpolation" in str(result.table().caption)


def test_the_table_is_short_and_says_n_and_head(prompts: Path, linear: Path, tmp_path: Path) -> None:
    result = measure(prompts, tmp_path, anchor=linear, severities=(1, 2))
    console = Console(width=120)
    with console.capture() as capture:
        console.print(result.table())
    text = " ".join(capture.get().split())  # captions are wrapped
    assert "n = 10" in text
    assert "linear probe" in text
    table = result.table()
    headers = [str(column.header) for column in table.columns]
    assert headers == ["test set", "n", "α = 0", "α = 0.5", "α = 1", f"val: α = {result.chosen_alpha:g}", "oracle"]
    assert table.row_count == 2 + 1 + 1 + 2 + 1  # val and corrupted, clean, art, corruptions, their mean
    mean = [row.top1 for row in result.rows if row.alpha == 0.5 and row.severity is not None]
    assert list(table.columns[3].cells)[-1] == f"{100 * np.mean(mean):.1f}"


@pytest.mark.parametrize("alphas", [(), (-0.1,), (0.5, 1.5), (1.0, 1.0)])
def test_impossible_strengths_are_refused_in_one_sentence(
    alphas: tuple[float, ...], prompts: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"distinct numbers between 0 \(backbone\) and 1 \(tuned\)"):
        measure(prompts, tmp_path, alphas=alphas)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"classes": (*CLASSES, "dog")}, "does not know class 'dog' of fake"),
        ({"classes": ("ant", "bee", "cow")}, "does not know class 'cow' of fake"),
        ({"size": 32}, "takes images of 64 px, the data give 32 px"),
        ({"preset": "timm"}, "name 'square' there, 'timm' here"),
    ],
)
def test_data_that_the_delta_was_not_trained_for_are_refused(
    data: dict[str, Any], message: str, prompts: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        measure(prompts, tmp_path, data=task(**data))
    assert not (tmp_path / "records").exists()


def test_an_anchor_that_does_not_belong_is_refused(prompts: Path, linear: Path, folder: Path, tmp_path: Path) -> None:
    others = write_delta(folder / "others.safetensors", (), class_names=("ant", "bee", "cow"))
    with pytest.raises(ConfigError, match="not a linear probe"):
        measure(prompts, tmp_path, anchor=prompts)
    with pytest.raises(ConfigError, match="other classes than the delta"):
        measure(prompts, tmp_path, anchor=others)


def test_weights_may_have_moved(prompts: Path, tmp_path: Path) -> None:
    here = Path(weights(prompts.parent))
    moved = here.rename(tmp_path / "elsewhere.safetensors")
    try:
        assert measure(prompts, tmp_path, alphas=(1.0,), severities=(), weights=str(moved)).rows
    finally:
        moved.rename(here)
