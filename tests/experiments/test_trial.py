from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vpt.errors import ConfigError, DivergedError
from vpt.experiments.trial import Config, Trial, finished, merged, run_trial
from vpt.models.delta_file import load_classifier
from vpt.models.delta_format import read_delta
from vpt.tasks import ClassificationTask


def test_a_trial_leaves_a_run_and_is_not_repeated(config: Config, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Trial("a/b", config, test=True)
    record = run_trial(trial, root)
    assert {"val/acc", "test/acc"} <= record["metrics"].keys()
    folder = root / "a" / "b"
    assert {path.name for path in folder.iterdir()} >= {"run.json", "delta.safetensors", "config.yaml", "test.parquet"}
    assert not (folder / "checkpoints" / "last.ckpt").exists()
    assert load_classifier(folder / "delta.safetensors").class_names[0] == "0"
    monkeypatch.setattr("vpt.experiments.trial._run", None)
    assert run_trial(trial, root) == record


def test_another_trial_in_the_same_folder_is_refused(config: Config, root: Path) -> None:
    run_trial(Trial("a", config), root)
    with pytest.raises(ConfigError, match="holds a trial of another config: name another --out"):
        run_trial(Trial("a", merged(config, {"model.base_lr": 0.2})), root)


def test_equal_seeds_give_equal_delta_files(config: Config, root: Path) -> None:
    for name in ("one", "two"):
        run_trial(Trial(name, config), root)
    one, two = ((root / name / "delta.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    other = run_trial(Trial("other", merged(config, {"seed_everything": 1})), root)
    assert (root / "other" / "delta.safetensors").read_bytes() != one
    assert (other["seed"], other["data"]["seed"]) == (1, 1)  # of the order of images, too


def test_a_trial_that_was_killed_goes_on_to_the_same_numbers(
    config: Config, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_trial(Trial("whole", config, test=True), root)
    step, calls = ClassificationTask.training_step, []

    def dying(self: ClassificationTask, batch: Any, batch_idx: int) -> Any:
        calls.append(batch_idx)
        if len(calls) == 4:
            raise RuntimeError("killed")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(ClassificationTask, "training_step", dying)
    with pytest.raises(RuntimeError, match="killed"):
        run_trial(Trial("killed", config, test=True), root)
    assert finished(Trial("killed", config, test=True), root) is None
    again = run_trial(Trial("killed", config, test=True), root)
    assert len(calls) == 6  # two of the first epoch, one, the fatal one, and the second epoch again
    assert again["metrics"] == whole["metrics"]


def test_a_trial_killed_after_its_last_epoch_still_gets_its_numbers(
    config: Config, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_trial(Trial("whole", config), root)
    with monkeypatch.context() as patch:
        patch.setattr("vpt.tasks.callbacks.RunRecord.on_fit_end", _killed)
        with pytest.raises(RuntimeError, match="killed"):
            run_trial(Trial("late", config), root)
    again = run_trial(Trial("late", config), root)
    assert again["metrics"]["val/acc"] == whole["metrics"]["val/acc"]
    one, two = (read_delta(root / name / "delta.safetensors")[1] for name in ("whole", "late"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def _killed(*_: Any) -> None:
    raise RuntimeError("killed")


def test_a_paused_trial_goes_on_as_if_it_had_not_been(config: Config, root: Path) -> None:
    whole = run_trial(Trial("whole", config), root)
    trial = Trial("paused", config)
    half = run_trial(replace(trial, stop=1), root)
    assert (half["epochs"], half["status"]) == (1, "stopped")
    assert finished(replace(trial, stop=1), root) == half
    assert finished(trial, root) is None
    assert run_trial(trial, root)["metrics"] == whole["metrics"]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("gone"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_where_memory_does_not_suffice_batches_are_split_with_the_gradient_of_the_whole(
    config: Config, root: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    whole = run_trial(Trial("whole", config), root)
    logits = ClassificationTask.logits

    def small(self: ClassificationTask, batch: Any, split: str) -> Any:
        if split == "train" and len(batch["label"]) > 2:
            raise type(error)(*error.args)  # a new one: the same would keep the frames of the first alive
        return logits(self, batch, split)

    monkeypatch.setattr(ClassificationTask, "logits", small)
    split = run_trial(Trial("split", config), root)
    assert split["hyperparameters"]["micro_batch"] == 2
    assert split["metrics"]["train/loss"] == pytest.approx(whole["metrics"]["train/loss"], rel=1e-5)
    one, two = (read_delta(root / name / "delta.safetensors")[1] for name in ("whole", "split"))
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=1e-4)
    assert json.loads((root / "split" / "trial.json").read_text()) == config


def test_a_single_image_that_does_not_fit_is_an_error(
    config: Config, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise torch.OutOfMemoryError("gone")

    monkeypatch.setattr(ClassificationTask, "logits", never)
    with pytest.raises(ConfigError, match="does not suffice for a single image"):
        run_trial(Trial("a", merged(config, {"trainer.limit_val_batches": 0})), root)


def test_what_is_no_memory_error_is_not_tried_again(config: Config, root: Path) -> None:
    with pytest.raises(DivergedError):
        run_trial(Trial("a", merged(config, {"model.base_lr": 1e30, "model.optimizer": "sgd"})), root)


@pytest.mark.parametrize("key", ["base_lr", "model", "model.a.b", "loop.epochs"])
def test_a_key_that_no_config_has_is_refused(config: Config, key: str) -> None:
    with pytest.raises(ConfigError, match=f"'{key}' is no key of a config"):
        merged(config, {key: 1})


def test_merging_leaves_the_config_as_it_was(config: Config) -> None:
    before = json.dumps(config)
    assert merged(config, {"model.base_lr": 9.0})["model"]["init_args"]["base_lr"] == 9.0
    assert json.dumps(config) == before
