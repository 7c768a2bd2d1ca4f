"""Trials that train together are those that train one after another, to rounding."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vpt.errors import DivergedError, VPTWarning
from vpt.experiments.executors import serially
from vpt.experiments.packs import packs
from vpt.experiments.sweep import Plan, sweep
from vpt.experiments.trial import Config, Failure, Record, Trial, merged, run_trial
from vpt.models import together
from vpt.models.delta_format import read_delta
from vpt.models.together import Member, Pack
from vpt.run_record import DELTA_FILE, read_record
from vpt.tasks import ClassificationTask

from .conftest import small_config

RECIPE = [
    {"name": "prompt", "num_tokens": 4},
    {"name": "bias"},
    {"name": "norm", "bias": False},
    {"name": "lora", "rank": 2, "targets": ["q", "v"]},
]
WAYS: dict[str, dict[str, Any]] = {
    "prompt": {"class_path": "vpt.tasks.PromptTuning", "init_args": {"num_tokens": 3}},
    "lora": {"class_path": "vpt.tasks.DeltaTuning", "init_args": {"deltas": [{"name": "lora", "rank": 4}]}},
    "bias": {"class_path": "vpt.tasks.DeltaTuning", "init_args": {"deltas": [{"name": "bias"}]}},
    "recipe": {"class_path": "vpt.tasks.DeltaTuning", "init_args": {"deltas": RECIPE}},
    "late layers": {
        "class_path": "vpt.tasks.DeltaTuning",
        "init_args": {"deltas": [{"name": "adapter", "layers": [4, 6]}]},
    },
    "probe": {"class_path": "vpt.tasks.LinearProbe", "init_args": {}},
    "penalty": {
        "class_path": "vpt.tasks.DeltaTuning",
        "init_args": {"deltas": [{"name": "prompt", "num_tokens": 3, "koopman": {"width": 8}}]},
    },
}
POINTS: tuple[dict[str, Any], ...] = (
    {"model.base_lr": 0.1, "seed_everything": 0},
    {"model.base_lr": 0.4, "seed_everything": 1, "model.weight_decay": 0.1, "model.label_smoothing": 0.1},
    {"model.base_lr": 0.02, "seed_everything": 2, "model.loss": "focal", "model.optimizer": "sgd"},
)


RESUMED = 1e-7
"""Lightning reads a checkpoint before it makes a model one of double precision."""
FOURTH = {"model.base_lr": 0.2, "seed_everything": 5}


def in_double() -> Config:
    return merged(small_config(), {"trainer.precision": "64-true"})


@pytest.fixture
def double() -> Config:
    """In double precision."""
    return in_double()


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl+C is an error in the main thread, also where the tests run in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All points with prompts in double precision, one after another."""
    root = tmp_path_factory.mktemp("apart")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
            patch.setenv(name, "0")
        patch.setattr("vpt.models.feature_cache._shared", None)
        records(serially(of(in_double(), [*POINTS, FOURTH]), root))
    return root


@pytest.fixture
def widths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many were computed at once, each time that several were."""
    found: list[int] = []
    compute = together._Pass.__init__

    def counted(self: Any, asked: Sequence[Any]) -> None:
        compute(self, asked)
        found.append(len(asked))

    monkeypatch.setattr(together._Pass, "__init__", counted)
    return found


def of(config: Config, points: Sequence[dict[str, Any]] = POINTS) -> list[Trial]:
    return [Trial(str(place), merged(config, values), test=True) for place, values in enumerate(points)]


def records(found: dict[str, Record | Failure]) -> list[Record]:
    kept = [each for each in found.values() if isinstance(each, dict)]
    assert len(kept) == len(found), [each for each in found.values() if isinstance(each, Failure)]
    return kept


def same(trials: Sequence[Trial], one: Path, other: Path, tolerance: float = 1e-10) -> None:
    """Weights, files by name, and curves."""
    same_weights(trials, one, other, tolerance)
    for trial in trials:
        ours, theirs = one / trial.name, other / trial.name
        assert _files(ours) == _files(theirs)
        curve, expected = _curves(ours), _curves(theirs)
        assert curve.keys() == expected.keys()
        for tag, points in expected.items():
            assert curve[tag] == pytest.approx(points, rel=max(tolerance, 1e-6)), tag  # in single precision


def same_weights(trials: Sequence[Trial], one: Path, other: Path, tolerance: float = 1e-10) -> None:
    for trial in trials:
        (header, weights), (expected, wanted) = (read_delta(at / trial.name / DELTA_FILE) for at in (one, other))
        assert header["specs"] == expected["specs"]
        assert weights.keys() == wanted.keys()
        for key, tensor in wanted.items():
            torch.testing.assert_close(weights[key], tensor, rtol=0, atol=tolerance)


def _files(folder: Path) -> list[str]:
    found = (path for path in folder.rglob("*") if "tfevents" not in path.name)
    return sorted(path.relative_to(folder).as_posix() for path in found)


def _curves(folder: Path) -> dict[str, list[float]]:
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [each.value for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def without_time(record: Record) -> Record:
    rest = {key: value for key, value in record.items() if key not in ("seconds", "metrics")}
    return rest | {"accuracies": {key: value for key, value in record["metrics"].items() if key.endswith("acc")}}


@pytest.mark.parametrize("way", WAYS)
def test_they_equal_trials_one_after_another(double: Config, root: Path, way: str, widths: list[int]) -> None:
    model = {**WAYS[way], "init_args": {"backbone": "vit_nano_patch8_64", **WAYS[way]["init_args"]}}
    trials = of(double | {"model": model})
    apart = records(serially(trials, root / "apart"))
    assert not widths
    start = time.monotonic()
    found = records(serially(trials, root / "together", together=3))
    assert set(widths) == {3}
    assert len(widths) == 2 * (2 + 2) + 2, "every step of two epochs, validation and test"
    assert sum(each["seconds"] for each in found) < time.monotonic() - start
    same(trials, root / "together", root / "apart")
    for one, other in zip(found, apart, strict=True):
        assert without_time(one) == without_time(other)
        assert one["metrics"] == pytest.approx(other["metrics"], rel=1e-10)


def test_single_precision_gives_the_same_table(config: Config, root: Path) -> None:
    plan = Plan({"model.base_lr": [0.05, 0.1, 0.2]}, seeds=(1, 2), halving=2, widen=1)
    config["trainer"]["max_epochs"] = 4

    def three(trials: Sequence[Trial], root: Path) -> dict[str, Record | Failure]:
        return serially(trials, root, together=3)

    one, other = sweep(config, plan, root / "together", three), sweep(config, plan, root / "apart", serially)
    assert replace(one, seconds=0) == replace(other, seconds=0)


def test_what_draws_in_a_step_draws_its_own(config: Config, root: Path, widths: list[int]) -> None:
    points: list[dict[str, Any]] = [
        {"seed_everything": 1},
        {"seed_everything": 2},
        {"seed_everything": 3, "model.mixup": 0.3},
    ]
    trials = of(merged(config, {"model.dropout": 0.3, "data.augment": "flip"}), points)
    apart = records(serially(trials, root / "apart"))
    with pytest.warns(VPTWarning, match="one after another: they draw random numbers, as dropout does"):
        found = records(serially(trials, root / "together", together=3))
    assert set(widths) == {3}, "validation draws nothing"
    same(trials, root / "together", root / "apart", tolerance=0.0)
    assert [without_time(each) for each in found] == [without_time(each) for each in apart]


MOVING = [{"name": "prompt", "num_tokens": 3, "relocate": {"warmup": 0}}]
APART: dict[str, tuple[str, dict[str, Any]]] = {
    "micro-batches": ("PromptTuning", {"num_tokens": 2, "micro_batch": 3}),
    "a second loss": ("DeltaTuning", {"deltas": [{"name": "lora"}], "pace": {}}),
    "all of the backbone": ("FineTuning", {}),
    "prompts that move": ("DeltaTuning", {"deltas": MOVING}),
}


@pytest.mark.parametrize("way", APART)
def test_what_cannot_be_joined_is_computed_as_ever(config: Config, root: Path, widths: list[int], way: str) -> None:
    name, args = APART[way]
    init = {"backbone": "vit_nano_patch8_64", "base_lr": 0.001, **args}
    config = config | {"model": {"class_path": f"vpt.tasks.{name}", "init_args": init}}
    config = merged(config, {"trainer.max_epochs": 1})
    trials = of(config, [{"model.base_lr": 0.001}, {"model.base_lr": 0.002, "seed_everything": 3}])
    records(serially(trials, root / "apart"))
    records(serially(trials, root / "together", together=2))
    same(trials, root / "together", root / "apart", tolerance=0.0)
    assert not widths


def test_models_of_different_functions_are_not_mixed(double: Config, root: Path, widths: list[int]) -> None:
    """A pack is only where trials meet: what is computed at once is decided by the models."""
    points = [
        {"model.num_tokens": number, "seed_everything": seed} for number, seed in ((2, 0), (3, 1), (2, 2), (3, 3))
    ]
    trials = of(merged(double, {"trainer.max_epochs": 1}), points)
    assert [[trial.name for trial in pack] for pack in packs(trials, 4)] == [["0", "2"], ["1", "3"]]
    serially(trials, root / "apart")
    Pack[Record]().run([partial(run_trial, trial, root / "together") for trial in trials])
    assert set(widths) == {2}
    same(trials, root / "together", root / "apart")


def test_a_trial_that_diverges_fails_alone(
    double: Config, root: Path, apart: Path, widths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    trials, losses = of(double), ClassificationTask.training_losses

    def diverging(self: ClassificationTask, batch: Any) -> Any:
        failed = self.hparams["base_lr"] == 0.4 and self.current_epoch == 1
        return [(loss * (np.nan if failed else 1.0), weight) for loss, weight in losses(self, batch)]

    monkeypatch.setattr(ClassificationTask, "training_losses", diverging)
    found = serially(trials, root, together=3)
    bad = found["1"]
    assert isinstance(bad, Failure)
    assert "The loss is not finite in epoch 1" in bad.reason
    assert read_record(root / "1")["status"] == "failed"
    assert {2, 3} == set(widths)
    same([trials[0], trials[2]], root, apart)


def test_a_trial_that_stops_early_leaves_the_others(double: Config, root: Path) -> None:
    stop: dict[str, Any] = {"class_path": "lightning.pytorch.callbacks.EarlyStopping"}
    stop |= {"init_args": {"monitor": "train/loss", "divergence_threshold": 0.1, "check_on_train_epoch_end": True}}
    trials = of(double)
    trials[0] = replace(trials[0], config=merged(trials[0].config, {"trainer.callbacks": [stop]}))
    serially(trials, root / "apart")
    found = Pack[Record]().run([partial(run_trial, trial, root / "together") for trial in trials])
    assert [each["epochs"] for each in found] == [1, 2, 2]
    same(trials, root / "together", root / "apart")


def test_one_that_was_killed_goes_on_to_the_same_numbers(
    double: Config, root: Path, apart: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pauses and one is killed in the second epoch, and all go on together."""
    trials = of(double)
    step = ClassificationTask.training_step

    def dying(self: ClassificationTask, batch: Any, batch_idx: int) -> Any:
        if self.hparams["base_lr"] == 0.4 and self.current_epoch == 1:
            raise RuntimeError("killed")
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(ClassificationTask, "training_step", dying)
        found = serially([replace(trials[0], stop=1), *trials[1:]], root, together=3)
    assert found["1"] == Failure("RuntimeError: killed")
    assert isinstance(found["0"], dict)
    assert found["0"]["status"] == "stopped"
    records(serially(trials, root, together=3))
    same_weights(trials, root, apart, RESUMED)


@pytest.mark.parametrize("backward", [False, True])
def test_as_many_are_computed_at_once_as_memory_holds(
    double: Config, root: Path, apart: Path, monkeypatch: pytest.MonkeyPatch, widths: list[int], backward: bool
) -> None:
    trials = of(double, [*POINTS, FOURTH])
    name = "backward" if backward else "__init__"
    compute = getattr(together._Pass, name)

    def scarce(self: Any, given: Any) -> None:
        if len(given) > 2:
            raise torch.OutOfMemoryError("gone")
        compute(self, given)

    monkeypatch.setattr(together._Pass, name, scarce)
    records(serially(trials, root, together=4))
    assert widths[-1] == 2
    same(trials, root, apart)


def test_where_memory_does_not_suffice_for_one_its_batch_is_split(
    double: Config, root: Path, apart: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = of(double, POINTS[:2])

    def none(*_: Any) -> None:
        raise torch.OutOfMemoryError("gone")

    monkeypatch.setattr(together._Pass, "backward", none)
    monkeypatch.setattr(together._Pass, "backward_alone", none)
    found = records(serially(trials, root, together=2))
    assert [each["hyperparameters"]["micro_batch"] for each in found] == [4, 4]
    same_weights(trials, root, apart)


def test_all_compute_with_the_weights_of_one_backbone(
    config: Config, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: set[int] = set()
    end = ClassificationTask.on_train_epoch_end

    def look(self: ClassificationTask) -> None:
        places.add(next(self.model.backbone.model.parameters()).data_ptr())
        end(self)

    monkeypatch.setattr(ClassificationTask, "on_train_epoch_end", look)
    records(serially(of(config), root, together=3))
    assert len(places) == 1


@pytest.mark.usefixtures("ctrl_c")
def test_interrupted_trials_say_so_and_go_on(
    double: Config, root: Path, apart: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = of(double)
    step = ClassificationTask.training_step

    def interrupted(self: ClassificationTask, batch: Any, batch_idx: int) -> Any:
        if self.hparams["base_lr"] == 0.4 and self.current_epoch == 1:
            signal.pthread_kill(cast("int", threading.main_thread().ident), signal.SIGINT)
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(ClassificationTask, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            serially(trials, root, together=3)
    assert {read_record(root / trial.name)["status"] for trial in trials} == {"interrupted"}
    records(serially(trials, root, together=3))
    same_weights(trials, root, apart, RESUMED)


def test_what_is_no_error_of_a_trial_ends_all() -> None:
    def fails(member: Member) -> None:
        raise DivergedError("out of luck")

    ended = []
    with pytest.raises(DivergedError, match="out of luck"):
        Pack[None]().run([fails, lambda member: ended.append(member.ended)])
    assert ended == [False]
    assert Pack[None]().run([]) == []


def test_packs_hold_what_computes_the_same(config: Config) -> None:
    values = [{"model.base_lr": rate, "model.num_tokens": n} for rate in (0.1, 0.2, 0.3) for n in (1, 5)]
    names = [[trial.name for trial in pack] for pack in packs(of(config, values), 2)]
    assert names == [["0"], ["2", "4"], ["1"], ["3", "5"]]
    seeds = of(config, [{"seed_everything": seed, "data.subset_seed": seed} for seed in range(5)])
    assert [len(pack) for pack in packs(seeds, 4)] == [2, 3]
    assert [len(pack) for pack in packs(seeds, 1)] == [1] * 5
    for key, value in (("model.dropout", 0.1), ("data.batch_size", 4), ("trainer.max_epochs", 1)):
        assert len(packs(of(config, [{}, {key: value}]), 2)) == 2, key
    for limit in ({"trainer.max_time": {"seconds": 4}}, {"trainer.callbacks": [{"class_path": "Timer"}]}):
        limited = of(config, [{"seed_everything": seed} | limit for seed in range(2)])
        assert [len(pack) for pack in packs(limited, 2)] == [1, 1]  # its clock would count the turns of the other


def test_auto_is_one_on_a_processor_and_fills_the_devices(config: Config) -> None:
    trials = of(config, [{"seed_everything": seed} for seed in range(40)])
    assert len(packs(trials, "auto")) == 40
    assert [len(pack) for pack in packs(trials, "auto", gpu=True)] == [13, 13, 14]
    assert [len(pack) for pack in packs(trials, "auto", gpu=True, at_once=8)] == [5] * 8
    assert [len(pack) for pack in packs(trials, "auto", gpu=True, at_once=None)] == [13, 13, 14]
    assert len(packs(trials[:3], "auto", gpu=True, at_once=8)) == 3


@given(st.lists(st.integers(0, 3), max_size=20), st.integers(1, 6))
def test_each_trial_is_in_one_pack(tokens: list[int], most: int) -> None:
    model: dict[str, Any] = {"init_args": {}}
    trials = [
        Trial(str(place), merged({"model": model, "data": {}}, {"model.num_tokens": each}))
        for place, each in enumerate(tokens)
    ]
    found = packs(trials, most)
    assert sorted(int(trial.name) for pack in found for trial in pack) == list(range(len(tokens)))
    assert all(0 < len(pack) <= most for pack in found)
    assert all(len({trial.config["model"]["init_args"]["num_tokens"] for trial in pack}) == 1 for pack in found)


def test_random_numbers_are_each_ones_own() -> None:
    """Draws between the turns of others, of all generators, as alone."""

    def draws(seed: int, member: Member | None) -> list[Any]:
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        found = []
        for _ in range(3):
            found += [float(torch.rand(())), float(np.random.random())]  # noqa: NPY002
            if member is not None:
                member._wait(together._Logits("key", None, None))  # type: ignore[arg-type]
        return found

    class _Answered(Pack[list[Any]]):
        def answer(self, member: Member) -> None:
            member.asks = None

    calls = [partial(draws, seed) for seed in range(3)]
    before = torch.get_rng_state()
    assert _Answered().run(calls) == [draws(seed, None) for seed in range(3)]
    torch.set_rng_state(before)
