"""A training that starts at the exact probe: which head that is, and that nothing else moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.linear_model import LogisticRegression

from tests.tasks.test_tasks import BASE, data, trainer
from vpt.backbones import create_backbone
from vpt.errors import ConfigError
from vpt.models import logistic_regression
from vpt.models.logistic_regression import choose_l2
from vpt.run_record import cell_protocol
from vpt.tasks import ClassificationTask, DeltaTuning, FineTuning, LinearProbe, PromptTuning, classification
from vpt.tasks.initialization import start_at_probe
from vpt.tasks.run_protocol import protocol


def started(kind: type[ClassificationTask], **options: Any) -> Any:
    L.seed_everything(0, verbose=False)
    task = kind(**BASE | {"init_head": "probe"} | options)
    trainer(epochs=0).fit(task, datamodule=data())
    return task


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (PromptTuning, {}),
        (DeltaTuning, {"deltas": [{"name": "lora", "rank": 2}, {"name": "mlp_head"}]}),
        (DeltaTuning, {"deltas": [{"name": "bias"}]}),
        (FineTuning, {}),
    ],
)
def test_the_head_is_the_minimum_on_the_frozen_backbone_and_all_else_stays(
    kind: type[ClassificationTask], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[float] = []

    def start(*args: Any) -> float:
        found.append(start_at_probe(*args))
        return found[0]

    monkeypatch.setattr(classification, "start_at_probe", start)
    task = started(kind, **options)
    (l2,) = found
    backbone, split = create_backbone("vit_nano_patch8_64").eval(), data().split("train")
    with torch.inference_mode():
        features = backbone(split.batch(range(len(split)))["image"]).double().numpy()
    exact = LogisticRegression(C=1 / (l2 * len(features)), tol=1e-10, max_iter=20000).fit(features, split.labels)
    np.testing.assert_allclose(task.model.head.weight.detach().numpy(), exact.coef_, atol=2e-3)
    assert task.model.strength == 1.0
    assert task.model.training
    L.seed_everything(0, verbose=False)
    plain = kind(**BASE | options)
    for key, tensor in plain.model.owned().items():
        assert key.startswith("head.") or torch.equal(task.model.owned()[key], tensor), key


def test_the_penalty_is_chosen_beyond_an_end_that_is_the_best() -> None:
    random = np.random.default_rng(0)
    features = torch.from_numpy(random.normal(size=(40, 60)))
    labels = (features[:, 0] + torch.from_numpy(random.normal(size=40)) > 0).long()
    train, val = (features[:20], labels[:20]), (features[20:], labels[20:])

    def right(l2: float) -> int:
        weight, bias = logistic_regression.fit_logistic(*train, 2, l2)
        return int(((val[0] @ weight.T + bias).argmax(dim=1) == val[1]).sum())

    for given in ([1e-6 * 10**0.5], [0.01, 0.03], [100.0]):
        found = choose_l2(train, val, 2, given, widen=True)
        assert right(found) == max(right(each) for each in (*given, found))
        wider = found * 10**0.5
        assert wider > 100 or right(wider) < right(found) or found < max(given)
    assert choose_l2(train, val, 2, [0.01, 0.03]) in (0.01, 0.03)


@pytest.mark.parametrize("l2", [0.01, 3.0])
def test_a_given_penalty_needs_no_validation_images(l2: float) -> None:
    task = started(PromptTuning, probe_l2=l2)
    backbone, split = create_backbone("vit_nano_patch8_64").eval(), data().split("train")
    with torch.inference_mode():
        features = backbone(split.batch(range(len(split)))["image"]).double().numpy()
    exact = LogisticRegression(C=1 / (l2 * len(features)), tol=1e-10, max_iter=20000).fit(features, split.labels)
    np.testing.assert_allclose(task.model.head.weight.detach().numpy(), exact.coef_, atol=2e-3)


def test_a_resumed_run_is_not_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = BASE | {"init_head": "probe"}
    keep = ModelCheckpoint(tmp_path, filename="last", save_on_train_epoch_end=True)
    trainer(callbacks=[keep], epochs=1).fit(PromptTuning(**options), datamodule=data())
    monkeypatch.setattr(classification, "start_at_probe", None)
    task = PromptTuning(**options)
    trainer(epochs=1).fit(task, datamodule=data(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]["model.head.weight"]
    assert torch.equal(task.model.head.weight, stored)


def test_where_a_training_starts_is_part_of_its_identity() -> None:
    records = [protocol(trainer(), PromptTuning(**BASE, init_head=each)) for each in (None, "probe")]
    assert records[1]["starts"] == {"init_head": "probe"}
    assert cell_protocol(records[0]) != cell_protocol(records[1])


def test_what_cannot_start_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="init_head has no effect with solver lbfgs"):
        LinearProbe(**BASE, solver="lbfgs", init_head="probe")
    with pytest.raises(ConfigError, match="init_head probe is of images with one class each"):
        LinearProbe(**BASE, targets="multilabel", init_head="probe")
    for l2 in (0.0, -1.0):
        with pytest.raises(ConfigError, match="probe_l2"):
            PromptTuning(**BASE, init_head="probe", probe_l2=l2)
    with pytest.raises(ConfigError, match="probe_l2 is a positive penalty of init_head: probe"):
        PromptTuning(**BASE, probe_l2=0.1)
    with pytest.raises(ConfigError, match="needs a data module"):
        trainer().fit(PromptTuning(**BASE, init_head="probe"), data().train_dataloader())
