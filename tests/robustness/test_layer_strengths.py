"""Strengths learned on noise: what is found proves nothing, that it is kept, taken up and refused as it should does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.robustness.fakes import PROMPTS, split, task, write_delta, write_full
from vpt.backbones.target_modules import layer_numbers
from vpt.cli import main
from vpt.data import ImageDataModule
from vpt.errors import ConfigError, DataError
from vpt.models import load_classifier
from vpt.robustness import RobustnessResult, run
from vpt.robustness import layer_strengths as module
from vpt.robustness.layer_strengths import learn, score, strengths_of


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("strengths")


@pytest.fixture(scope="session")
def delta(folder: Path) -> Path:
    return write_delta(folder / "delta.safetensors", (*PROMPTS, {"name": "lora", "rank": 2}))


@pytest.fixture(scope="session")
def probe(folder: Path) -> Path:
    return write_delta(folder / "probe.safetensors", (), seed=1)


@pytest.mark.parametrize("objective", ["accuracy", "nll"])
@pytest.mark.parametrize("corrupted", [False, True])
def test_what_is_learned_scores_what_it_says(
    objective: Any, corrupted: bool, delta: Path, probe: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"objective": objective, "corrupted": corrupted, "evaluations": 30}
    found = learn(delta, task(), tmp_path / "s.json", probe, **options)
    assert found.score >= found.alpha_score
    assert learn(delta, task(), tmp_path / "again.json", probe, **options) == found
    assert learn(delta, task(), tmp_path / "again.json", probe, **options) == found  # from its file
    assert strengths_of([str(tmp_path / "s.json")], delta, probe) == list(found.strengths)
    with pytest.raises(ConfigError, match="learned with another anchor"):
        strengths_of([str(tmp_path / "s.json")], delta, None)
    name = "val-corrupted" if corrupted else "val"
    result = run(delta, task(), (0.0, 1.0), tmp_path / "out", probe, None, (), strengths=found.strengths)
    row = next(row for row in result.rows if (row.set, row.alpha) == (name, 1.0))
    record = result.record(row)
    logits, labels = torch.from_numpy(record.logits), torch.from_numpy(record.label)
    assert score(logits, labels, objective)[0] == pytest.approx(found.score, abs=1e-5)
    single = run(delta, task(), (found.alpha, 0.0), tmp_path / "one", probe, None, ())
    row = next(row for row in single.rows if (row.set, row.alpha) == (name, found.alpha))
    record = single.record(row)
    logits = torch.from_numpy(record.logits)
    assert score(logits, torch.from_numpy(record.label), objective)[0] == pytest.approx(found.alpha_score, abs=1e-5)


def test_an_interrupted_search_goes_on_to_the_same_strengths(
    delta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = learn(delta, task(), tmp_path / "whole.json", evaluations=40)
    calls = [0]

    def stopping(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 25:
            raise KeyboardInterrupt
        return score(*args)

    monkeypatch.setattr(module, "score", stopping)
    with pytest.raises(KeyboardInterrupt):
        learn(delta, task(), tmp_path / "part.json", evaluations=40)
    with pytest.raises(DataError, match="was not finished"):
        strengths_of([str(tmp_path / "part.json")], delta, None)
    monkeypatch.setattr(module, "score", score)
    assert learn(delta, task(), tmp_path / "part.json", evaluations=40) == whole
    assert strengths_of([str(tmp_path / "part.json")], delta, None) == list(whole.strengths)
    kept = json.loads((tmp_path / "part.json").read_text())
    assert kept["scores"] == json.loads((tmp_path / "whole.json").read_text())["scores"]
    with pytest.raises(ConfigError, match=r"another search \(evaluations differ\)"):
        learn(delta, task(), tmp_path / "part.json", evaluations=41)


def test_what_cannot_be_learned_is_refused(delta: Path, probe: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="trains a head alone"):
        learn(probe, task(), tmp_path / "s.json")
    splits = {"train": split("val", 6, 2), "val": split("val", 6, 2), "test": split("test", 10, 3)}
    data = ImageDataModule("fake", task().class_names, splits, "square", 64, 4, 0, 0, "none", None)
    with pytest.raises(ConfigError, match="learned on validation images: 6 of its 6"):
        learn(delta, data, tmp_path / "s.json")
    with pytest.raises(ConfigError, match="seed"):
        learn(delta, task(), tmp_path / "s.json", seed=2**32)
    with pytest.raises(ConfigError, match="evaluations"):
        learn(delta, task(), tmp_path / "s.json", evaluations=3)
    with pytest.raises(ConfigError, match="numbers from 0 to 1 or one file"):
        strengths_of(["linear"], delta, None)
    learn(delta, task(), tmp_path / "s.json", evaluations=12)
    with pytest.raises(ConfigError, match="another delta file"):
        strengths_of([str(tmp_path / "s.json")], probe, None)
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(ConfigError, match="no file of"):
        strengths_of([str(tmp_path / "t.json")], delta, None)
    with pytest.raises(ConfigError, match="move nothing here"):
        run(probe, task(), (1.0,), tmp_path / "head", None, None, (), strengths=[0.0, 1.0])
    with pytest.raises(ConfigError, match="as a whole"):
        run(delta, task(), (0.0, 1.0), tmp_path / "start", probe, None, (), start=delta, strengths=[0.0, 1.0])


def test_a_line_of_a_fully_tuned_model_moves_each_layer_by_its_own(folder: Path, probe: Path, tmp_path: Path) -> None:
    whole = write_full(folder / "whole.safetensors")
    result = run(whole, task(), (0.0, 0.5, 1.0), tmp_path / "line", probe, None, (), strengths=[0.0, 1.0])
    assert isinstance(result, RobustnessResult)
    model, bare = load_classifier(whole), load_classifier(probe)
    numbers, last = layer_numbers(model.backbone)
    with torch.no_grad():
        start = dict(bare.backbone.model.named_parameters())
        for name, tensor in model.backbone.model.named_parameters():
            tensor.copy_(start[name] + 0.5 * numbers[name] / last * (tensor - start[name]))
        model.head.weight.copy_((model.head.weight + bare.head.weight) / 2)
        model.head.bias.copy_((model.head.bias + bare.head.bias) / 2)
        expected = model(torch.stack([task().split("test")[row]["image"] for row in range(10)]))
    row = next(row for row in result.rows if (row.set, row.alpha) == ("clean", 0.5))
    torch.testing.assert_close(torch.from_numpy(result.record(row).logits), expected, rtol=1e-3, atol=1e-3)
    strengths = result.protocol["strengths"]
    assert strengths == pytest.approx([number / last for number in range(last + 1)])


@pytest.mark.parametrize("kind", ["delta", "whole", "probe"])
def test_a_model_is_exported_at_its_strengths(
    kind: str, delta: Path, probe: Path, folder: Path, tmp_path: Path
) -> None:
    file = {"delta": delta, "probe": probe}.get(kind) or write_full(folder / "exported.safetensors")
    anchor = write_delta(folder / "anchor.safetensors", (), seed=9) if kind == "probe" else probe
    strengths = ["0.3", "0.9"] if kind != "probe" else ["0.4"]
    out = tmp_path / "model.pt2"
    command = ["export", "--delta", str(file), "--format", "torch", "--out", str(out), "--anchor", str(anchor)]
    assert main([*command, "--strengths", *strengths]) == 0
    images = torch.stack([task().split("test")[row]["image"] for row in range(3)])
    found = torch.export.load(out).module()(images)
    given: Any = [float(each) for each in strengths] if len(strengths) > 1 else None
    alphas = (0.0, 1.0) if given else (0.0, 0.4, 1.0)
    result = run(file, task(3), alphas, tmp_path / "out", anchor, None, (), strengths=given)
    row = next(row for row in result.rows if (row.set, row.alpha) == ("clean", 1.0 if given else 0.4))
    logits = torch.from_numpy(result.record(row).logits)
    torch.testing.assert_close(found, logits, rtol=1e-3, atol=2e-3)
    extra = {"vpt.json": ""}
    torch.export.load(out, extra_files=extra)
    told = json.loads(extra["vpt.json"])["provenance"]
    assert np.allclose(told["strengths"][0] if given else told["strengths"], float(strengths[0]))
    assert "metrics" not in told
    assert main(["export", "--delta", str(file), "--format", "torch", "--anchor", str(anchor)]) != 0
    if kind == "probe":
        assert main([*command[:6], str(tmp_path / "none.pt2"), "--strengths", "0.4"]) != 0
