from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.robustness.fakes import BACKBONE, SIZE, task
from vpt.errors import ConfigError
from vpt.tasks import LinearProbe, PromptTuning
from vpt.tasks.callbacks import DeltaWriter
from vpt.visualize import AttentionLogger
from vpt.visualize.attention_maps import measure_attention
from vpt.visualize.figure_kinds import sample_images

ARCHITECTURE: dict[str, Any] = {"backbone": BACKBONE, "weights": "random", "num_classes": 3, "image_size": SIZE}


def fit(folder: Path, epochs: int, *callbacks: L.Callback, probe: bool = False) -> tuple[Path, L.LightningModule]:
    """Prompt dropout and the order of the images are drawn at random: any draw of the callback's would be seen."""
    L.seed_everything(0)
    module = LinearProbe(**ARCHITECTURE) if probe else PromptTuning(num_tokens=2, dropout=0.5, **ARCHITECTURE)
    trainer = L.Trainer(
        logger=TensorBoardLogger(folder, name="", version="run"),
        callbacks=[DeltaWriter(), *callbacks],
        max_epochs=epochs,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        log_every_n_steps=1,
    )
    trainer.fit(module, datamodule=task(shift=None))
    return folder / "run", module


def test_training_with_it_writes_the_same_bytes(tmp_path: Path) -> None:
    without, _ = fit(tmp_path / "without", 3)
    with_it, _ = fit(tmp_path / "with", 3, AttentionLogger())
    delta = (without / "delta.safetensors").read_bytes()
    assert (with_it / "delta.safetensors").read_bytes() == delta
    other, _ = fit(tmp_path / "other", 2)
    assert (other / "delta.safetensors").read_bytes() != delta


def test_figure_and_shares_are_logged_every_k_epochs(tmp_path: Path) -> None:
    folder, _ = fit(tmp_path, 5, AttentionLogger(every_n_epochs=2, num_images=3))
    events = EventAccumulator(str(folder))
    events.Reload()
    assert events.Tags()["images"] == ["attention/figure"]
    assert len(events.Images("attention/figure")) == 2
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("attention_on_prompts/")]
    assert sorted(tags) == [f"attention_on_prompts/layer_{layer}" for layer in range(1, 7)]
    steps = [event.step for event in events.Scalars(tags[0])]
    assert len(steps) == 2
    assert steps[1] == 2 * steps[0]


def test_the_last_shares_are_those_of_the_trained_model(tmp_path: Path) -> None:
    folder, module = fit(tmp_path, 2, AttentionLogger(num_images=3))
    shown, _ = sample_images(task(shift=None).split("val"), 3)
    expected = measure_attention(module.model, shown)  # type: ignore[arg-type]
    events = EventAccumulator(str(folder))
    events.Reload()
    for layer in range(6):
        logged = events.Scalars(f"attention_on_prompts/layer_{layer + 1}")[-1].value
        assert logged == pytest.approx(expected.share[layer].mean(), rel=1e-5)


def test_a_model_without_prompts_has_nothing_to_log(tmp_path: Path) -> None:
    folder, _ = fit(tmp_path, 1, AttentionLogger(), probe=True)
    events = EventAccumulator(str(folder))
    events.Reload()
    assert not events.Tags()["images"]


@pytest.mark.parametrize("numbers", [{"every_n_epochs": 0}, {"num_images": 0}])
def test_numbers_below_1_are_refused(numbers: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        AttentionLogger(**numbers)
