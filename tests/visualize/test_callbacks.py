from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.robustness.fakes import BACKBONE, SIZE, task
from vpt.errors import ConfigError
from vpt.tasks import ClassificationTask, LinearProbe, PromptTuning
from vpt.visualize import FigureLogger

ARCHITECTURE: dict[str, Any] = {"backbone": BACKBONE, "weights": "random", "num_classes": 3, "image_size": SIZE}


def fit_and_test(module: ClassificationTask, folder: Path, logger: Logger | bool, **flags: Any) -> L.Trainer:
    trainer = L.Trainer(
        default_root_dir=folder,
        logger=logger,
        callbacks=[FigureLogger(num_images=2)],
        max_epochs=1,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        log_every_n_steps=1,
        **flags,
    )
    data = task(shift=None)
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    return trainer


def prompts() -> PromptTuning:
    return PromptTuning(num_tokens=2, **ARCHITECTURE)


def test_figures_go_to_the_run_folder_and_to_tensorboard(tmp_path: Path) -> None:
    trainer = fit_and_test(prompts(), tmp_path, TensorBoardLogger(tmp_path))
    folder = Path(str(trainer.log_dir))
    assert sorted(file.name for file in (folder / "figures").iterdir()) == ["attention.png", "confusion.png"]
    with Image.open(folder / "figures" / "attention.png") as image:
        assert image.size == (1184, 1136)
    events = EventAccumulator(str(folder))
    events.Reload()
    assert sorted(events.Tags()["images"]) == ["figures/attention", "figures/confusion"]


def test_swin_has_an_attention_figure_too(tmp_path: Path) -> None:
    module = PromptTuning(num_tokens=2, **ARCHITECTURE | {"backbone": "swin_nano_patch4_window8_64"})
    trainer = fit_and_test(module, tmp_path, CSVLogger(tmp_path))
    assert (Path(str(trainer.log_dir)) / "figures" / "attention.png").is_file()


def test_another_logger_gets_files_only_and_a_linear_probe_no_attention(tmp_path: Path) -> None:
    module = LinearProbe(**ARCHITECTURE)
    trainer = fit_and_test(module, tmp_path, CSVLogger(tmp_path))
    assert [file.name for file in (Path(str(trainer.log_dir)) / "figures").iterdir()] == ["confusion.png"]


@pytest.mark.parametrize("flags", [{"logger": False}, {"logger": True, "fast_dev_run": True}])
def test_without_a_run_nothing_is_drawn(flags: dict[str, Any], tmp_path: Path) -> None:
    fit_and_test(prompts(), tmp_path, **flags)
    assert not list(tmp_path.rglob("*.png"))


def test_no_images_are_refused_before_training() -> None:
    with pytest.raises(ConfigError, match="num_images of at least 1, got 0"):
        FigureLogger(num_images=0)
