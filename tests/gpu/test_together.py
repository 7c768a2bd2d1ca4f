"""On a card trials that train together are those that train one after another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from vpt.experiments.executors import serially
from vpt.experiments.trial import Trial
from vpt.models.delta_format import read_delta
from vpt.run_record import DELTA_FILE


def test_trials_together_equal_those_one_after_another(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setattr("vpt.models.feature_cache._shared", None)
    trainer = {"max_epochs": 1, "accelerator": "gpu" if device.type == "cuda" else "cpu", "precision": "64-true"}
    trainer |= {"devices": 1, "num_sanity_val_steps": 0} | dict.fromkeys(
        ("limit_train_batches", "limit_val_batches"), 2
    )
    data = {"class_path": "vpt.data.DigitsDataModule", "init_args": {"batch_size": 4}}
    trials = []
    for seed in range(2):
        args: dict[str, Any] = {"backbone": "vit_nano_patch8_64", "num_tokens": 2, "base_lr": 0.1 * (seed + 1)}
        model = {"class_path": "vpt.tasks.PromptTuning", "init_args": args}
        trials.append(Trial(str(seed), {"seed_everything": seed, "trainer": trainer, "model": model, "data": data}))
    apart, together = serially(trials, tmp_path / "apart"), serially(trials, tmp_path / "together", together=2)
    for trial in trials:
        one, other = (read_delta(tmp_path / way / trial.name / DELTA_FILE)[1] for way in ("apart", "together"))
        for key, tensor in one.items():
            torch.testing.assert_close(other[key], tensor, rtol=0, atol=1e-10)
        records = apart[trial.name], together[trial.name]
        assert all(isinstance(record, dict) for record in records), records
