from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from tests.fakes import make_folder
from vpt.atomic_write import write_json
from vpt.errors import ConfigError, DivergedError
from vpt.experiments.executors import serially
from vpt.experiments.trial import Config, Failure, Trial, claim, finished, identity, merged, run_trial
from vpt.models.delta_file import load_classifier
from vpt.models.delta_format import read_delta
from vpt.tasks import ClassificationTask
from vpt.tasks.build import build, build_data


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
    with pytest.raises(ConfigError, match="holds a trial that differs in its config: name another --out"):
        run_trial(Trial("a", merged(config, {"model.base_lr": 0.2})), root)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *((name, text) for name in ("trial.json", "run.json") for text in ('{"config": {"seed', "[]", "")),
        ("run.json", '{"metrics": null}'),
    ],
)
def test_a_damaged_record_fails_its_own_trial_and_no_other(config: Config, root: Path, name: str, text: str) -> None:
    trials = [Trial(each, config) for each in ("damaged", "whole")]
    for trial in trials:
        claim(root / trial.name, identity(config))
        write_json(root / trial.name / "run.json", {"status": "finished", "epochs": 2, "images": 1, "metrics": {}})
        (root / trial.name / "delta.safetensors").write_text("")
    (root / "damaged" / name).write_text(text)
    found = serially(trials, root)
    assert isinstance(found["whole"], dict)
    assert isinstance(found["damaged"], Failure)
    assert f"damaged/{name} " in found["damaged"].reason
    assert (root / "damaged" / name).read_text() == text


def test_every_value_of_a_config_is_part_of_what_a_trial_is(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    data = build_data(config)
    monkeypatch.setattr("vpt.experiments.trial.build_data", lambda _: data)
    values = [
        ("seed_everything", None),
        *((part, name) for part in ("trainer", "model", "data") for name in config[part]),
    ]
    for part, name in values:
        changed = copy.deepcopy(config)
        if name == "init_args":
            for key in config[part][name]:
                changed = copy.deepcopy(config)
                changed[part][name][key] = "another"
                assert identity(changed) != identity(config), key
            continue
        (changed if name is None else changed[part])[name or part] = "another"
        assert identity(changed) != identity(config), name


def test_what_lies_behind_the_paths_of_a_config_belongs_to_it(config: Config, root: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "start.safetensors", root / "other" / "delta.safetensors"
    for name, seed in (("one", 0), ("other", 1)):
        run_trial(Trial(name, merged(config, {"seed_everything": seed})), root)
    shutil.copy(root / "one" / "delta.safetensors", one)
    data = {"root": str(make_folder(tmp_path / "images", {"train": 4, "val": 1, "test": 1})), "batch_size": 4}
    folder = config | {"data": {"class_path": "vpt.data.FolderDataModule", "init_args": data}}
    trial = Trial("next", merged(folder, {"model.init_delta": str(one)}))
    run_trial(trial, root)
    assert finished(trial, root) is not None
    shutil.copy(two, one)
    with pytest.raises(ConfigError, match="differs in its files"):
        finished(trial, root)
    shutil.copy(root / "one" / "delta.safetensors", one)
    make_folder(tmp_path / "images", {"train": 5})
    with pytest.raises(ConfigError, match="differs in its data"):
        finished(trial, root)


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
    assert again["images"] == whole["images"] == 32


def test_a_trial_killed_after_its_last_epoch_still_gets_its_numbers(
    config: Config, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_trial(Trial("whole", config), root)
    with monkeypatch.context() as patch:
        patch.setattr("vpt.tasks.callbacks.RunRecord.on_fit_end", _killed)
        with pytest.raises(RuntimeError, match="killed"):
            run_trial(Trial("late", config), root)
    again = run_trial(Trial("late", config), root)
    assert again["metrics"] == whole["metrics"]
    one, two = (read_delta(root / name / "delta.safetensors")[1] for name in ("whole", "late"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def _killed(*_: Any) -> None:
    raise RuntimeError("killed")


@pytest.mark.parametrize("values", [{}, {"model.dropout": 0.3, "data.augment": "flip"}])
def test_a_paused_trial_goes_on_as_if_it_had_not_been(config: Config, root: Path, values: dict[str, Any]) -> None:
    config = merged(config, values)
    whole = run_trial(Trial("whole", config), root)
    trial = Trial("paused", config)
    half = run_trial(replace(trial, stop=1), root)
    assert (half["epochs"], half["status"]) == (1, "stopped")
    assert finished(replace(trial, stop=1), root) == half
    assert finished(trial, root) is None
    assert run_trial(trial, root)["metrics"] == whole["metrics"]
    assert finished(replace(trial, stop=1), root) == half, "a search that resumes compares what it compared before"
    with pytest.raises(ConfigError, match="was trained beyond epoch 1"):
        finished(Trial("whole", config, stop=1), root)


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
    assert json.loads((root / "split" / "trial.json").read_text())["config"] == config


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


def test_time_and_images_of_all_legs_add_up(config: Config, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr("vpt.tasks.callbacks.time.monotonic", lambda: float(next(clock)))
    trial = Trial("paused", merged(config, {"trainer.max_epochs": 3}))
    legs = [run_trial(replace(trial, stop=stop), root) for stop in (1, 2, None)]
    assert [leg["images"] for leg in legs] == [16, 32, 48]
    assert legs[0]["seconds"] < legs[1]["seconds"] < legs[2]["seconds"]
    alone = run_trial(Trial("alone", config), root)
    assert legs[2]["seconds"] > alone["seconds"]


@pytest.mark.parametrize("limits", [{"trainer.max_epochs": None}, {"trainer.max_epochs": -1}])
def test_a_schedule_by_steps_ends_with_the_last(config: Config, root: Path, limits: dict[str, Any]) -> None:
    own = limits | {"trainer.max_steps": 3, "trainer.limit_train_batches": None}
    record = run_trial(Trial("steps", merged(config, own)), root)
    assert (record["status"], record["images"], record["max_epochs"]) == ("finished", 24, -1)
    same = {"trainer.max_epochs": 1, "trainer.limit_train_batches": 3}
    assert run_trial(Trial("epoch", merged(config, same)), root)["metrics"] == record["metrics"]
    one, two = (read_delta(root / name / "delta.safetensors")[1] for name in ("steps", "epoch"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_limit_of_time_alone_is_no_schedule(config: Config, root: Path) -> None:
    limits = {"trainer.max_epochs": None, "trainer.max_time": "00:00:10:00"}
    with pytest.raises(ConfigError, match=r"needs an end: give trainer\.max_epochs or trainer\.max_steps"):
        run_trial(Trial("time", merged(config, limits)), root)
    record = run_trial(Trial("both", merged(config, limits | {"trainer.max_steps": 2})), root)
    assert record["status"] == "finished"


def test_training_does_not_go_on_from_the_middle_of_an_epoch(config: Config, root: Path) -> None:
    task, data = build(config)
    options: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    short = L.Trainer(max_steps=3, default_root_dir=root, **options)
    short.fit(task, datamodule=data)
    path = root / "middle.ckpt"
    short.save_checkpoint(path)
    longer = L.Trainer(max_steps=5, default_root_dir=root, **options)
    with pytest.raises(ConfigError, match=r"ends in the middle of an epoch, .* such as last\.ckpt"):
        longer.fit(task, datamodule=data, ckpt_path=path, weights_only=True)
    longer = L.Trainer(max_steps=3, default_root_dir=root, **options)
    longer.fit(task, datamodule=data, ckpt_path=path, weights_only=True)  # nothing is left to train
    longer.test(task, datamodule=data, ckpt_path=path, weights_only=True)


def test_a_trial_needs_a_seed(config: Config, root: Path) -> None:
    with pytest.raises(ConfigError, match="seed_everything is False: a trial needs a number"):
        run_trial(Trial("a", merged(config, {"seed_everything": False})), root)


@pytest.mark.parametrize("key", ["base_lr", "model", "model.a.b", "loop.epochs", "model.class_path", "trainer.a.b"])
def test_a_key_that_no_config_has_is_refused(config: Config, key: str) -> None:
    with pytest.raises(ConfigError, match=f"'{key}' is no key of a config"):
        merged(config, {key: 1})


def test_merging_leaves_the_config_as_it_was(config: Config) -> None:
    before = json.dumps(config)
    assert merged(config, {"model.base_lr": 9.0})["model"]["init_args"]["base_lr"] == 9.0
    assert json.dumps(config) == before
