"""Experiments of seconds: two classes of training images a few pixels wide would do, the digits are as fast."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from vpt.experiments.sweep import Outcome
from vpt.experiments.trial import Config, Failure


@pytest.fixture(autouse=True)
def _seed_stays_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # Lightning sets it; this puts it back afterwards
    monkeypatch.setenv("PL_SEED_WORKERS", "1")
    monkeypatch.setattr("vpt.models.feature_cache._shared", None)


@pytest.fixture
def config() -> Config:
    return small_config()


def small_config() -> Config:
    """VPT-deep on the digits, two epochs of two batches."""
    model: dict[str, Any] = {"backbone": "vit_nano_patch8_64", "num_tokens": 2, "base_lr": 0.1}
    return {
        "seed_everything": 0,
        "trainer": {
            "max_epochs": 2,
            "limit_train_batches": 2,
            "limit_val_batches": 2,
            "limit_test_batches": 2,
            "accelerator": "cpu",
            "num_sanity_val_steps": 0,
        },
        "model": {"class_path": "vpt.tasks.PromptTuning", "init_args": model},
        "data": {"class_path": "vpt.data.DigitsDataModule", "init_args": {"train": "train800", "batch_size": 8}},
    }


def whole(found: Mapping[str, Outcome | Failure]) -> dict[str, Outcome]:
    """Outcomes of which none failed."""
    outcomes = {name: each for name, each in found.items() if not isinstance(each, Failure)}
    assert len(outcomes) == len(found)
    return outcomes


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "experiment"
