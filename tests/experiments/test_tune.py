"""`tune` on noise: what is chosen proves nothing, that it is chosen, kept and found again as it should does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes import make_folder
from tests.suite_tables import CONFIGS
from vpt.errors import ConfigError, VPTError
from vpt.experiments import tune as module
from vpt.experiments.trial import Failure, run_trial
from vpt.experiments.tune import MODEL_FILE, Scheme, base_config, choose_scheme, recipe_config, tune
from vpt.metrics.accuracy import Difference
from vpt.models import load_classifier
from vpt.reports.tune_report import tune_report
from vpt.run_record import read_record

NANO = "vit_nano_patch8_64"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "photos", {"train": 6, "test": 4})


def config(photos: Path, seed: int = 0) -> dict[str, Any]:
    return base_config({"root": str(photos)}, NANO, "pretrained", seed)


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "choose_scheme", lambda *_: Scheme(("bias", "lora", "prompt"), 2))
    monkeypatch.setattr(module, "FINAL", 4)


@given(st.floats(0, 1e7), st.integers(1, 5000), st.integers(0, 2000))
def test_a_scheme_searches_with_at_most_a_quarter_of_the_passes(affordable: float, train: int, val: int) -> None:
    scheme = choose_scheme(affordable, train, train + val)
    assert scheme.epochs * train <= affordable / 4
    assert scheme.epochs * train + scheme.search * (train + val) <= affordable
    if scheme.recipes:
        assert scheme.search * train >= 1000
        assert 0 < scheme.rung <= scheme.search


def test_more_time_tries_more() -> None:
    found = [choose_scheme(passes, 800, 1000) for passes in (1e3, 1e4, 2e4, 1e5, 1e6)]
    assert [(len(scheme.recipes), scheme.search) for scheme in found] == [(0, 0), (1, 3), (3, 2), (5, 8), (5, 25)]


@pytest.mark.usefixtures("_small")
def test_the_winner_trains_on_all_images_and_is_tested_once(photos: Path, tmp_path: Path) -> None:
    monkey = Difference(3, 0.5, 0.1, 0.9, 0.01)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "difference", lambda *_: monkey)  # else chance decides on noise
        found = tune(config(photos), 60, tmp_path / "out", say=lambda _: None)
    assert found.winner in ("bias", "lora", "prompt")
    epochs = {row["name"]: row["epochs"] for row in found.tried}
    assert sorted(epochs.values()) == [1, 1, 2, 2]  # the probe and who was dropped, and the better two
    record = read_record(found.final)
    assert record["data"]["counts"] == {"train": 18, "val": 3, "test": 12}
    assert record["epochs"] == 4
    assert "test/acc" in record["metrics"]
    assert "test/acc" in read_record(found.probe)["metrics"]
    model = load_classifier(tmp_path / "out" / MODEL_FILE)
    assert model.class_names == ["cat", "dog", "owl"]
    advice = tune_report(found, "pretrained", tmp_path / "out", "vpt rerun there")
    assert advice[0].startswith(f"{found.winner} is better than the probe by more than chance")
    page = (tmp_path / "out" / "report.html").read_text()
    told = json.loads((tmp_path / "out" / "report.json").read_text())
    assert "vpt rerun there" in page
    assert told["right"] == round(12 * record["metrics"]["test/acc"])


@pytest.mark.usefixtures("_small")
def test_a_gain_that_may_be_chance_keeps_the_probe(photos: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "difference", lambda *_: Difference(3, 0.5, 0.0, 0.9, 0.2))
        found = tune(config(photos), 60, tmp_path / "out", say=lambda _: None)
    assert found.winner == "linear"
    assert found.final == found.probe
    assert "keep the probe" in " ".join(tune_report(found, "pretrained", tmp_path / "out", "again"))


@pytest.mark.usefixtures("_small")
def test_what_was_interrupted_goes_on_to_the_same_model(photos: Path, tmp_path: Path) -> None:
    whole = tune(config(photos), 60, tmp_path / "whole", say=lambda _: None)
    run, calls = run_trial, [0]

    def stopping(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return run(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "run_trial", stopping)
        with pytest.raises(KeyboardInterrupt):
            tune(config(photos), 60, tmp_path / "part", say=lambda _: None)
    again = tune(config(photos), 60, tmp_path / "part", say=lambda _: None)
    assert again.winner == whole.winner
    first, second = (load_classifier(tmp_path / name / MODEL_FILE).owned() for name in ("whole", "part"))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.usefixtures("_small")
def test_the_search_ends_with_its_quarter_of_the_time(photos: Path, tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "QUARTER", 1e-9)
        found = tune(config(photos), 60, tmp_path / "out", say=said.append)
    assert (found.winner, found.gain) == ("linear", None)
    assert sum("left out" in line for line in said) == 3
    assert 0 < found.seconds["discarded"] < found.seconds["all"] < found.seconds["given"] == 3600  # the first probe


def test_little_time_is_for_the_probe_alone(photos: Path, tmp_path: Path) -> None:
    said: list[str] = []
    found = tune(config(photos), 0.001, tmp_path / "out", say=said.append)
    assert found.winner == "linear"
    assert [row["name"] for row in found.tried] == ["linear"]
    assert "the time suffices for the probe alone" in said
    assert "give more minutes" in tune_report(found, "pretrained", tmp_path / "out", "again")[0]


def test_a_folder_of_another_experiment_is_refused(photos: Path, tmp_path: Path) -> None:
    tune(config(photos), 0.001, tmp_path / "out", say=lambda _: None)
    with pytest.raises(ConfigError, match="config differ"):
        tune(config(photos, seed=1), 0.001, tmp_path / "out", say=lambda _: None)
    (photos / "train" / "cat" / "0.jpg").write_bytes((photos / "train" / "dog" / "0.jpg").read_bytes())
    with pytest.raises(ConfigError, match="data differ"):
        tune(config(photos), 0.001, tmp_path / "out", say=lambda _: None)


@pytest.mark.usefixtures("_small")
def test_where_a_recipe_fails_the_others_go_on(photos: Path, tmp_path: Path) -> None:
    run = run_trial

    def failing(trial: Any, root: Path) -> Any:
        if trial.name == "search/lora":
            raise VPTError("it does not fit")
        return run(trial, root)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "run_trial", failing)
        found = tune(config(photos), 60, tmp_path / "out", say=lambda _: None)
    assert {row["name"]: row.get("failed") for row in found.tried}["lora"] == "it does not fit"
    assert not isinstance(found, Failure)
    tune_report(found, "pretrained", tmp_path / "out", "again")
    assert "failed: it does not fit" in (tmp_path / "out" / "report.md").read_text()


def test_the_prompts_that_are_tried_are_those_of_the_config(photos: Path) -> None:
    whole = recipe_config(config(photos), "prompt", 2)
    shipped = yaml.safe_load((CONFIGS / "method" / "prompt.yaml").read_text())
    assert whole["trainer"] | shipped["trainer"] == whole["trainer"]
    ours, theirs = whole["model"]["init_args"], shipped["model"]["init_args"]
    assert ours["deltas"] == theirs["deltas"]
    assert ours["base_lr"] == pytest.approx(theirs["base_lr"], rel=0.01)


@pytest.mark.parametrize("name", module.RECIPES)
def test_every_recipe_can_be_built(photos: Path, name: str) -> None:
    from vpt.tasks.build import build

    task, _ = build(recipe_config(config(photos), name, 2))
    assert task.model.parameter_counts()[0] > 0


def test_half_of_the_images_is_not_lost_where_validation_is_given(tmp_path: Path) -> None:
    photos = make_folder(tmp_path / "photos", {"train": 4, "val": 2, "test": 2})
    found = tune(config(photos), 0.001, tmp_path / "out", say=lambda _: None)
    assert read_record(found.final)["data"]["counts"] == {"train": 18, "val": 6, "test": 6}
    assert np.asarray(found.data.split("train").labels).tolist() == [0] * 4 + [1] * 4 + [2] * 4


@pytest.mark.usefixtures("_small")
def test_where_the_time_ends_in_the_final_training_the_model_of_the_search_is_taken(
    photos: Path, tmp_path: Path
) -> None:
    run = run_trial
    said: list[str] = []

    def cut(trial: Any, root: Path) -> Any:
        record = run(trial, root)
        return record | {"status": "stopped", "seconds": 7.0} if trial.name == "final" else record

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "difference", lambda *_: Difference(3, 0.5, 0.1, 0.9, 0.01))
        patch.setattr(module, "run_trial", cut)
        found = tune(config(photos), 60, tmp_path / "out", say=said.append)
    assert said[-1] == "the time ended: the model of the search is taken"
    assert found.final == tmp_path / "out" / "search" / found.winner
    assert found.probe == tmp_path / "out" / "search" / "linear"
    spent = {row["name"]: row["seconds"] for row in found.tried}
    assert found.seconds["discarded"] == pytest.approx(7 + sum(spent.values()) - spent[found.winner])
    assert (tmp_path / "out" / MODEL_FILE).read_bytes() == (found.final / "delta.safetensors").read_bytes()
    tune_report(found, "pretrained", tmp_path / "out", "again")


def test_without_test_images_the_page_is_of_those_that_chose(tmp_path: Path) -> None:
    photos = make_folder(tmp_path / "photos", {"train": 6})
    found = tune(config(photos), 0.001, tmp_path / "out", calibrate=True, say=lambda _: None)
    assert found.tests == 0
    tune_report(found, "pretrained", tmp_path / "out", "again")
    assert "There are no test images" in (tmp_path / "out" / "report.md").read_text()
