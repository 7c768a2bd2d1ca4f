from __future__ import annotations

import copy
import csv as csvfile
import functools
import html
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from vpt.data import DigitsDataModule
from vpt.data.catalog.cards import card_names, load_card
from vpt.errors import ConfigError
from vpt.experiments.executors import serially
from vpt.experiments.trial import Config, Trial
from vpt.reports.page import document, markdown
from vpt.reports.run_report import TITLE, csv, latex, notes, tables
from vpt.reports.run_values import GROUPS, ranks_of, report
from vpt.run_record import cell_protocol, training_protocol
from vpt.tasks import PromptTuning, RunRecord

VTAB = [name for name in card_names() if (card := load_card(name)) is not None and card.suite == "vtab"]


def run(folder: Path, task: str, accuracy: float, seed: int = 1, **changes: Any) -> Path:
    """A run's record as `RunRecord` writes it."""
    data = {
        "name": task,
        "preset": "vpt",
        "image_size": 224,
        "complete": True,
        "subset": None,
        "counts": {"train": 1000, "test": 500},
        "lists": {"test": "test"},
        "fingerprint": "f",
    } | changes.pop("data", {})
    record = {
        "task": "PromptTuning",
        "hyperparameters": {"deep": True, "base_lr": 0.1, "num_tokens": 10},
        "seed": seed,
        "max_epochs": 100,
        "epochs": 100,
        "seconds": 10.0,
        "epoch_rule": "last",
        "data": data,
        "backbone": {"weights_id": "vit", "fingerprint": "b"},
        "parameters": {"trainable": 10, "total": 100},
        "metrics": {"test/acc": accuracy},
    } | changes
    path = folder / f"{task}-{seed}-{len(list(folder.glob('*')))}"
    path.mkdir(parents=True)
    (path / "run.json").write_text(json.dumps(record))
    return path


def text_of(values: dict[str, Any]) -> str:
    return markdown(TITLE, notes(values), tables(values))


def test_both_means_of_vtab_by_hand(tmp_path: Path) -> None:
    assert len(VTAB) == 19
    groups = {"natural": 0.8, "specialized": 0.6, "structured": 0.4}
    for task in VTAB:
        card = load_card(task)
        assert card is not None
        run(tmp_path, task, groups[card.group])
    (method,) = report([tmp_path])["methods"]
    assert method["means"]["mean of 3 groups"] == pytest.approx((0.8 + 0.6 + 0.4) / 3)
    assert method["means"]["mean of 19 tasks"] == pytest.approx((7 * 0.8 + 4 * 0.6 + 8 * 0.4) / 19)
    assert {name: method["means"][name] for name in GROUPS} == pytest.approx(groups)


def test_a_single_task_has_no_mean_and_what_lightning_adds_is_no_option(tmp_path: Path) -> None:
    run(tmp_path, "a", 0.5, 1)
    told = {"deep": True, "base_lr": 0.1, "num_tokens": 10, "_class_path": "vpt.PromptTuning", "_instantiator": "x"}
    run(tmp_path, "a", 0.7, 2, hyperparameters=told)
    (method,) = report([tmp_path])["methods"]
    assert method["means"] == {}
    assert method["numbers"]["a"]["seeds"] == [1, 2]


def test_fewer_tasks_have_no_mean_of_vtab(tmp_path: Path) -> None:
    run(tmp_path, VTAB[0], 0.5)
    run(tmp_path, VTAB[1], 0.7)
    (method,) = report([tmp_path])["methods"]
    assert method["means"] == {"mean of 2 tasks": pytest.approx(0.6)}


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"data": {"preset": "timm"}}, "preset"),
        ({"data": {"complete": False}}, "partial data"),
        ({"data": {"image_size": 64}}, "image size"),
        ({"data": {"lists": {"train": "b/train800.txt", "test": "test"}}}, "train list"),
        ({"data": {"batch_size": 8}}, "batch size"),
        ({"data": {"augment": "flip"}}, "augment"),
        ({"data": {"augment": "photos", "transforms": [{"name": "D4"}]}}, "augment"),
        ({"data": {"transforms": [{"name": "D4"}]}}, "transforms"),
        ({"data": {"subset": {"shots": 8, "fraction": None, "seed": 1, "sha256": "a"}}}, "shots"),
        ({"precision": "bf16-mixed"}, "precision"),
        ({"training": {"accumulate_grad_batches": 2}}, "training accumulate grad batches"),
        ({"backbone": {"weights_id": "vit", "fingerprint": "c"}}, "fingerprint"),
        ({"read": {"train": 1000, "test": 20}}, "partial data"),
        ({"read": {"train": 20}}, "partial data"),
        ({"epoch_rule": "best"}, "epoch rule"),
        ({"status": "interrupted", "epochs": 99}, "epoch rule"),
        ({"steps": 10, "evaluated": {"test": {"steps": 5, "epochs": 50}}}, "epoch rule"),
    ],
)
def test_what_differs_in_its_protocol_is_not_averaged_unless_told(
    tmp_path: Path, change: dict[str, Any], what: str
) -> None:
    run(tmp_path, "a", 0.5)
    run(tmp_path, "b", 0.7, **change)
    (method,) = report([tmp_path])["methods"]
    assert method["means"] == {}
    assert method["no_means"] == f"its tasks differ in {what}"
    (method,) = report([tmp_path], mixed=True)["methods"]
    assert method["means"] == {"mean of 2 tasks": pytest.approx(0.6)}
    assert method["mixed"] == [what]
    text = text_of(report([tmp_path], mixed=True))
    assert f"mixes {what}" in text
    assert ("Partial data, by missing images or limited batches: b." in text) == (what == "partial data")


def test_methods_without_a_mean_for_the_same_reason_share_a_sentence(tmp_path: Path) -> None:
    for deep in (True, False):
        run(tmp_path, "a", 0.5, hyperparameters={"deep": deep})
        run(tmp_path, "b", 0.7, hyperparameters={"deep": deep}, data={"preset": "timm"})
    said = [line for line in notes(report([tmp_path])) if line.startswith("No mean of")]
    assert said == ["No mean of vpt_deep, vpt_shallow on vit: its tasks differ in preset (--mixed averages anyway)."]


def test_seeds_are_averaged_and_other_options_stay_apart(tmp_path: Path) -> None:
    for seed, accuracy in ((1, 0.5), (2, 0.6), (3, 0.7)):
        run(tmp_path, "a", accuracy, seed)
    run(tmp_path, "a", 0.9, 1, hyperparameters={"deep": True, "base_lr": 0.2, "num_tokens": 10})
    methods = {row["method"]: row["numbers"]["a"] for row in report([tmp_path])["methods"]}
    assert set(methods) == {"vpt_deep (base_lr 0.1)", "vpt_deep (base_lr 0.2)"}
    number = methods["vpt_deep (base_lr 0.1)"]
    assert (number["mean"], number["std"]) == (pytest.approx(0.6), pytest.approx(0.1))
    assert number["seeds"] == [1, 2, 3]
    assert methods["vpt_deep (base_lr 0.2)"]["std"] is None


def test_tasks_of_different_sizes_and_rates_have_a_mean(tmp_path: Path) -> None:
    run(tmp_path, "a", 0.5)
    options = {"deep": True, "base_lr": 0.3, "num_tokens": 50}
    run(tmp_path, "b", 0.7, data={"counts": {"train": 9, "test": 5}, "fingerprint": "g"}, hyperparameters=options)
    (method,) = report([tmp_path])["methods"]
    assert method["means"] == {"mean of 2 tasks": pytest.approx(0.6)}


def test_one_more_run_of_one_task_renames_no_cell_that_belongs_to_others(tmp_path: Path) -> None:
    for task in "abc":
        run(tmp_path, task, 0.5)
    run(tmp_path, "a", 0.9, data={"batch_size": 8})
    methods = {row["method"]: list(row["numbers"]) for row in report([tmp_path])["methods"]}
    assert methods == {"vpt_deep": ["a", "b", "c"], "vpt_deep (batch size 8)": ["a"]}


@pytest.fixture(scope="module")
def tested(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The record of a run of this version."""
    tmp_path = tmp_path_factory.mktemp("tested")
    L.seed_everything(7)
    task = PromptTuning(backbone="vit_nano_patch8_64", num_classes=10, image_size=64, normalization="inception")
    trainer = L.Trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=0, limit_test_batches=1,
        logger=TensorBoardLogger(tmp_path, "run", "0"), callbacks=[RunRecord()], enable_progress_bar=False,
        enable_checkpointing=False)  # fmt: skip
    trainer.fit(task, datamodule=DigitsDataModule(image_size=64, shots=4))
    trainer.test(task, datamodule=DigitsDataModule(image_size=64, shots=4), verbose=False)
    return dict(json.loads((tmp_path / "run" / "0" / "run.json").read_text()))


def without_effect(record: dict[str, Any], identity: Callable[[dict[str, Any]], Any]) -> set[str]:
    """What may have another value without a change of an identity, of all that a record holds."""
    same = set()
    for path in paths(record):
        changed = copy.deepcopy(record)
        *above, last = path
        place = functools.reduce(lambda part, key: part[key], above, changed)
        place[last] = "another"
        if identity(changed) == identity(record):
            same.add(".".join(path))
    return same


def test_everything_in_a_protocol_but_the_seed_sets_a_cell_apart(tested: dict[str, Any]) -> None:
    record, same = tested, without_effect(tested, cell_protocol)
    assert "evaluated.test.precision" not in same
    results = {"seconds", "epochs", "images", *(f"metrics.{key}" for key in record["metrics"])}
    results |= {f"parameters.{key}" for key in record["parameters"]} | {
        key for key in same if key.startswith("evaluated")
    }
    environment = {f"{part}.{key}" for part in ("machine", "versions") for key in record[part]}
    places = {"hyperparameters.weights", "hyperparameters.init_delta", "hyperparameters.init_head", "backbone.weights"}
    seeds = {
        "seed",
        "data.seed",
        "data.subset.seed",
        "data.subset.sha256",
        "data.fingerprint",
        "data.shared_with_train.val",
        "data.shared_with_train.test",
    }
    # what else is measured changes nothing
    own = {f"hyperparameters.{key}" for key in ("micro_batch", "metrics", "compile")}
    assert same == results | environment | places | seeds | own


def test_training_goes_on_where_all_but_its_length_is_as_it_was(tested: dict[str, Any]) -> None:
    sections = ("metrics", "read", "evaluated", "parameters", "machine", "versions")  # results and environment
    same = {key for key in without_effect(tested, training_protocol) if key.partition(".")[0] not in sections}
    length = {
        "status",
        "epochs",
        "steps",
        "seconds",
        "images",
        "max_epochs",
        "training.max_steps",
        "training.callbacks",
    }
    places = {"hyperparameters.weights", "hyperparameters.init_delta", "hyperparameters.init_head", "backbone.weights"}
    assert same == length | places | {f"hyperparameters.{key}" for key in ("micro_batch", "metrics", "compile")}


def paths(record: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in record.items():
        if isinstance(value, dict) and value:
            yield from paths(value, (*above, key))
        else:
            yield (*above, key)


def test_cells_that_differ_in_a_count_alone_keep_apart_beside_others(tmp_path: Path) -> None:
    run(tmp_path, "a", 0.5)
    run(tmp_path, "a", 0.6, read={"train": 1000, "test": 16})
    run(tmp_path, "a", 0.7, hyperparameters={"deep": True, "base_lr": 0.2, "num_tokens": 10})
    methods = report([tmp_path])["methods"]
    assert len({row["method"] for row in methods}) == 3
    assert {row["numbers"]["a"]["mean"] for row in methods} == {0.5, 0.6, 0.7}


@pytest.mark.parametrize(("seeds", "cells"), [((0, 0, 0), 1), ((0, 1, 2), 1), ((0, 0, 2), 2), ((5, 5, 5), 1)])
def test_a_seed_of_the_data_is_the_runs_or_one_for_all(tmp_path: Path, seeds: tuple[int, ...], cells: int) -> None:
    for seed, own in enumerate(seeds):
        run(tmp_path, "a", 0.5, seed, data={"seed": own})
    methods = report([tmp_path])["methods"]
    assert len(methods) == cells
    assert sum(len(row["numbers"]["a"]["seeds"]) for row in methods) == 3


def test_the_same_run_twice_is_refused(tmp_path: Path) -> None:
    run(tmp_path, "a", 0.5)
    run(tmp_path, "a", 0.5)
    with pytest.raises(ConfigError, match="are the same run with the same seed"):
        report([tmp_path])


def test_nothing_tested_and_a_damaged_record_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No tested run below"):
        report([tmp_path])
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ConfigError, match=r"run\.json cannot be read"):
        report([tmp_path])


def test_what_is_not_in_a_report_is_said_in_it(tmp_path: Path) -> None:
    run(tmp_path, "a", 0.5)
    untested = run(tmp_path, "a", 0.5, seed=2, metrics={})
    damaged = [run(tmp_path, "a", 0.5, seed=3, metrics=None), run(tmp_path, "b", 0.5, backbone={})]
    values = report([tmp_path])
    assert values["untested"] == [str(untested)]
    assert [str(folder) in sentence for folder, sentence in zip(damaged, values["damaged"], strict=True)] == [True] * 2
    said = notes(values)
    assert f"Not tested, and not here: {untested}." in said
    assert [f"Left out: {sentence}" in said for sentence in values["damaged"]] == [True] * 2
    assert [row["numbers"].keys() for row in values["methods"]] == [{"a"}]


def test_answers_that_cannot_be_read_leave_out_the_agreement_alone(tmp_path: Path) -> None:
    folders = [run(tmp_path, "a", 0.5), run(tmp_path, "a", 0.6, hyperparameters={"deep": False})]
    for folder in folders:
        (folder / "test.parquet").write_text("PAR1")
    values = report([tmp_path])
    assert values["agreement"] == []
    assert len(values["methods"]) == 2
    assert "test.parquet is not a record" in values["damaged"][0]


@pytest.mark.parametrize("task", ["mk[", "[red]x", "a|b", "<b>x", "50 % of a_b & $c$", "x~y^z", "back\\slash"])
def test_a_name_stays_a_name_in_every_form(tmp_path: Path, task: str) -> None:
    run(tmp_path, task, 0.5)
    (tmp_path / "other").mkdir()
    values = report([tmp_path])
    row = next(line for line in text_of(values).splitlines() if line.startswith("| method"))
    cells = [cell.strip() for cell in re.split(r"(?<!\\)(?:\\\\)*\|", row)[1:-1]]
    assert [re.sub(r"\\(.)", r"\1", cell) for cell in cells][-1] == task
    page = document(TITLE, notes(values), tables(values), {}, {})
    assert f'<th class="number">{html.escape(task)}</th>' in page
    assert not re.search(r"^\[|(?<!\\)[&%$#_](?=\w)|(?<![{\\])\[", _body(latex(values)), re.MULTILINE)
    assert next(csvfile.DictReader(io.StringIO(csv(values))))["task"] == task


def _body(text: str) -> str:
    """Table rows, without what separates cells."""
    rows = [line for line in text.splitlines() if line.endswith("\\\\")]
    return "\n".join(line.removesuffix("\\\\").replace(" & ", "   ") for line in rows)


def test_published_numbers_stand_beside_with_their_source(tmp_path: Path) -> None:
    run(tmp_path, "caltech101", 0.9)
    values = report([tmp_path])
    card = load_card("caltech101")
    assert card is not None
    assert [row["accuracy"] for row in values["published"]] == [row["accuracy"] for row in card.published]
    assert "V-PETL Bench README" in text_of(values)
    told = {row["method"]: row["here"] for row in values["published"]}
    assert told == {"vpt_deep": 0.9, "vpt_shallow": None, "linear": None, "full": None}
    (line,) = [line for line in text_of(values).splitlines() if "| vpt_deep, vit, preset vpt |" in line]
    assert [cell.strip() for cell in line.split("|")][-4:-1] == ["90.8", "90.0", "-0.8"]
    run(tmp_path, "caltech101", 0.8, backbone={"weights_id": "other", "fingerprint": "c"})
    both = [row for row in report([tmp_path])["published"] if row["method"] == "vpt_deep"]
    assert [(row["backbone_here"], row["here"]) for row in both] == [("vit", 0.9), ("other", 0.8)]


def test_ranks_share_ties(tmp_path: Path) -> None:
    for task in ("a", "b"):
        run(tmp_path, task, 0.5, hyperparameters={"deep": True})
        run(tmp_path, task, 0.5 if task == "a" else 0.7, hyperparameters={"deep": False})
    ranks = {row["method"]: row["ranks"] for row in report([tmp_path])["ranks"]}
    assert ranks == {"vpt_deep": [1.5, 2.0], "vpt_shallow": [1.5, 1.0]}


def test_a_mean_rank_has_an_interval_over_tasks(tmp_path: Path) -> None:
    """Of two tasks a resample has one of them twice in a quarter of the cases each: the ends are both ranks."""
    for task, other in (("a", 0.5), ("b", 0.7)):
        run(tmp_path, task, 0.5, hyperparameters={"deep": True})
        run(tmp_path, task, other, hyperparameters={"deep": False})
    values = report([tmp_path])
    assert {row["method"]: (row["low"], row["high"]) for row in values["ranks"]} == {
        "vpt_shallow": (1.0, 1.5),
        "vpt_deep": (1.5, 2.0),
    }
    assert "1.00–1.50" in text_of(values)
    (tmp_path / "one").mkdir()
    for deep in (True, False):
        run(tmp_path / "one", "a", 0.5 + deep / 10, hyperparameters={"deep": deep})
    assert [(row["low"], row["high"]) for row in report([tmp_path / "one"])["ranks"]] == [(None, None)] * 2
    many = {name: {str(task): float(rank) for task, rank in enumerate(own)} for name, own in _RANKS.items()}
    for row in ranks_of(many):
        spread = 1.96 * np.std(row["ranks"]) / np.sqrt(len(row["ranks"]))
        assert (row["low"], row["high"]) == pytest.approx((row["mean"] - spread, row["mean"] + spread), abs=0.06)


_RANKS = {"x": [0.1, 0.9] * 40, "y": [0.5] * 80, "z": [0.3] * 60 + [0.7] * 20}


def test_real_runs_give_agreement_and_curves_and_every_form(config: Config, root: Path) -> None:
    probe = {"class_path": "vpt.tasks.LinearProbe", "init_args": {"backbone": "vit_nano_patch8_64", "base_lr": 0.1}}
    serially([Trial("deep", config, test=True), Trial("linear", config | {"model": probe}, test=True)], root)
    values = report([root])
    (pair,) = values["agreement"]
    assert pair["n"] == 16
    assert {pair["first"], pair["second"]} == {"vpt_deep", "linear"}
    assert all(0 <= share <= 1 for share in (pair["agreement"], pair["ensemble"], *pair["accuracies"]))
    stored = [json.loads((root / name / "run.json").read_text())["metrics"]["test/acc"] for name in ("deep", "linear")]
    assert pair["accuracies"] == pytest.approx(stored)
    assert {row["curve"] for row in values["curves"]} == {"validation top-1"}
    rows = list(csvfile.DictReader(io.StringIO(csv(values))))
    assert [float(row["mean"]) for row in rows] == pytest.approx(stored)
    assert r"\toprule" in latex(values)
    assert "vpt\\_deep" in latex(values)
    text = text_of(values)
    for table in tables(values):
        assert f"## {table.title}" in text
        assert all(len(row) == len(table.columns) for row in table.rows)


def test_a_backbone_that_all_share_is_said_once(tmp_path: Path) -> None:
    run(tmp_path, "a_b", 0.5, 1)
    run(tmp_path, "a_b", 0.6, 2)
    values = report([tmp_path])
    assert tables(values)[0].columns == ["method", "trained", "epochs", "seeds", "a_b"]
    assert "All on vit." in text_of(values)
    assert r"vpt\_deep & 10 & 100 & 2 & 55.0 $\pm$ 7.1 \\" in latex(values)
    run(tmp_path, "a_b", 0.5, 1, backbone={"weights_id": "swin", "fingerprint": "c"})
    assert tables(report([tmp_path]))[0].columns == ["backbone", "method", "trained", "epochs", "seeds", "a_b"]


def test_two_presets_of_one_method_are_two_rows(tmp_path: Path) -> None:
    for preset in ("square", "vpt"):
        run(tmp_path, "a", 0.5, data={"preset": preset})
    methods = {row["method"] for row in report([tmp_path])["methods"]}
    assert methods == {"vpt_deep (preset square)", "vpt_deep (preset vpt)"}
