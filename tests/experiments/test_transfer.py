from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.fakes import make_task
from vpt.errors import ConfigError, RecordError
from vpt.experiments.executors import serially
from vpt.experiments.pretrain import compare, pretrain
from vpt.experiments.sweep import Plan
from vpt.experiments.transfer import Mode, transfer
from vpt.experiments.trial import Config, Failure, Record, Trial, finished, merged, run_trial
from vpt.models.delta_format import read_delta
from vpt.run_record import read_record

from .conftest import small_config, whole


def make_two(root: Path) -> dict[str, Config]:
    """A run each on two fakes, of three and of two classes, tested on all of a list."""
    config = small_config()
    config["trainer"].pop("limit_test_batches")
    tasks = {}
    for classes, name in ((3, "warm"), (2, "cold")):
        folder = make_task(root / "data" / name, classes, (12, 6, 15), seed=classes)
        given = {"task": name, "root": str(folder.parent), "train": "train800", "image_size": 64, "batch_size": 8}
        tasks[name] = config | {"data": {"class_path": "vpt.data.VTABDataModule", "init_args": given}}
    return tasks


@pytest.fixture
def two(tmp_path: Path) -> dict[str, Config]:
    return make_two(tmp_path)


Runs = dict[Path, Config]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Finished runs that no test changes."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PL_GLOBAL_SEED", "0")
        patch.setenv("PL_SEED_WORKERS", "1")
        configs = make_two(root)
        for name, config in configs.items():
            run_trial(Trial(name, config, test=True), root)
    return {root / name: config for name, config in configs.items()}


def test_the_diagonal_is_what_is_stored_and_is_measured_again(runs: Runs, root: Path) -> None:
    stored = [json.loads((run / "run.json").read_text())["metrics"]["test/acc"] for run in runs]
    names = [json.loads((run / "run.json").read_text())["data"]["name"] for run in runs]
    for mode in ("init", "frozen"):
        matrix = transfer(runs, root, serially, mode)
        assert [matrix[name][name] for name in names] == stored
        assert all(0 <= matrix[one][other] <= 1 for one in names for other in names)
        assert json.loads((root / f"transfer-{mode}.json").read_text())["accuracy"] == matrix
    (folder,) = root.glob(f"{names[0]}-to-{names[1]}-*")
    start = read_record(folder)["hyperparameters"]["init_delta"]
    assert start == str((next(iter(runs)) / "delta.safetensors").resolve())
    assert transfer(runs, root, serially, "frozen") == matrix


def test_a_run_in_half_precision_is_measured_again_as_it_was_tested(two: dict[str, Config], root: Path) -> None:
    for name, config in two.items():
        half = merged(config, {"trainer.precision": "bf16-mixed", "trainer.max_epochs": 1})
        run_trial(Trial(name, half, test=True), root / "runs")
    half = {"trainer.precision": "bf16-mixed", "trainer.max_epochs": 1}
    runs = {root / "runs" / name: merged(config, half) for name, config in two.items()}
    stored = [json.loads((run / "run.json").read_text())["metrics"]["test/acc"] for run in runs]
    matrix = transfer(runs, root, serially, "frozen")
    assert [matrix[name][name] for name in matrix] == stored


def test_a_stored_number_that_the_file_does_not_give_is_no_basis(runs: Runs, root: Path) -> None:
    first, second = runs
    changed = shutil.copytree(first, root / "changed")
    record = json.loads((changed / "run.json").read_text())
    record["metrics"]["test/acc"] -= 0.1
    (changed / "run.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="stored, its delta file gives"):
        transfer({changed: runs[first], second: runs[second]}, root, serially)


@pytest.mark.parametrize("mode", ["init", "frozen"])
def test_a_cell_of_another_run_of_the_task_is_not_taken_for_it(
    two: dict[str, Config], runs: Runs, root: Path, mode: Mode
) -> None:
    before = transfer(runs, root, serially, mode)
    assert transfer(runs, root, _nothing_left, mode) == before
    second = list(runs)[1]
    other = merged(two["warm"], {"model.base_lr": 50.0, "seed_everything": 3})
    run_trial(Trial("other", other, test=True), root)
    changed = {root / "other": other, second: runs[second]}
    matrix = transfer(changed, root, serially, mode)
    assert matrix == transfer(changed, root / "afresh", serially, mode)
    assert transfer(runs, root, _nothing_left, mode) == before


def _nothing_left(trials: Sequence[Trial], root: Path) -> dict[str, Record | Failure]:
    assert all(finished(trial, root) for trial in trials)
    return serially(trials, root)


def test_two_runs_of_one_task_or_an_untested_one_are_refused(two: dict[str, Config], runs: Runs, root: Path) -> None:
    first = next(iter(runs))
    with pytest.raises(ConfigError, match="each of another task"):
        transfer({first: runs[first], shutil.copytree(first, root / "again"): runs[first]}, root, serially)
    run_trial(Trial("untested", two["warm"]), root)
    with pytest.raises(ConfigError, match="was not tested"):
        transfer({first: runs[first], root / "untested": two["warm"]}, root, serially)
    with pytest.raises(ConfigError, match=r"is no run: it has no run\.json"):
        transfer({first: runs[first], root: two["warm"]}, root, serially)


@pytest.mark.parametrize("text", ['{"cells": {"a>b', "[]", '{"cells": []}', '{"cells": {"a>b": "good"}}', "{}"])
def test_numbers_kept_by_an_earlier_transfer_that_are_damaged_are_named(runs: Runs, root: Path, text: str) -> None:
    root.mkdir()
    (root / "transfer-frozen.json").write_text(text)
    with pytest.raises(RecordError, match=r"transfer-frozen\.json"):
        transfer(runs, root, serially, "frozen")


def test_training_starts_from_another_tasks_delta_but_not_its_head(
    two: dict[str, Config], runs: Runs, root: Path
) -> None:
    start = str(list(runs)[1] / "delta.safetensors")
    still = merged(two["warm"], {"model.init_delta": start, "model.base_lr": 1e-12, "model.weight_decay": 0.0})
    run_trial(Trial("still", still), root)
    _, tensors = read_delta(root / "still" / "delta.safetensors")
    _, started = read_delta(start)
    prompts = [key for key in tensors if key.startswith("delta.")]
    assert all((tensors[key] - started[key]).abs().max() < 1e-6 for key in prompts)
    assert tensors["head.weight"].shape != started["head.weight"].shape
    longer = merged(two["warm"], {"model.init_delta": start, "model.num_tokens": 3})
    with pytest.raises(Exception, match="are to be trained: give the same"):
        run_trial(Trial("longer", longer), root)


def test_one_prompt_is_trained_on_all_tasks_and_each_starts_from_it(two: dict[str, Config], root: Path) -> None:
    few = {"data.train": "val200", "trainer.max_epochs": 1}  # shared training reads all of them
    two = {name: merged(config, few) for name, config in two.items()}
    found = whole(compare(two, Plan({}, seeds=(1,)), root, serially))
    assert list(found) == ["warm/alone", "cold/alone", "warm/shared", "cold/shared"]
    header, tensors = read_delta(root / "shared.safetensors")
    assert set(header["info"]["shared"]) == {"warm", "cold"}
    assert any(tensor.abs().max() > 0 for key, tensor in tensors.items() if key.startswith("delta."))
    before = (root / "shared.safetensors").stat().st_mtime_ns
    assert pretrain(two, root).stat().st_mtime_ns == before


def test_a_shared_prompt_does_not_know_the_images_that_choose(two: dict[str, Config], root: Path) -> None:
    plan = Plan({"model.base_lr": [0.1, 0.2]}, {"data.train": "train800"}, {"data.train": "train800val200"}, seeds=(1,))
    once = {name: merged(config, {"trainer.max_epochs": 1}) for name, config in two.items()}
    compare(once, plan, root, serially)
    seen = read_delta(root / "shared.safetensors")[0]["info"]["shared"]
    assert [each["shared_with_train"]["val"] for each in seen.values()] == [0, 0]
    assert {name: each["counts"]["train"] for name, each in seen.items()} == {"warm": 36, "cold": 24}  # of train800


def test_sharing_needs_one_model_and_a_delta(two: dict[str, Config], root: Path) -> None:
    with pytest.raises(ConfigError, match="same model section"):
        pretrain({"a": two["warm"], "b": merged(two["cold"], {"model.num_tokens": 3})}, root)
    with pytest.raises(ConfigError, match="at least two tasks"):
        pretrain({"a": two["warm"]}, root)
    probe = {"class_path": "vpt.tasks.LinearProbe", "init_args": {"backbone": "vit_nano_patch8_64"}}
    with pytest.raises(ConfigError, match="needs a delta"):
        pretrain({name: config | {"model": probe} for name, config in two.items()}, root)
