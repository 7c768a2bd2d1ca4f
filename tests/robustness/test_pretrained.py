from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from vpt.backbones import create_backbone, pretrained_head
from vpt.data import DigitsDataModule, ImageNetDataModule, ShapeTextureDataModule
from vpt.robustness.pretrained import pretrained_logits
from vpt.tasks.groups import mean_probability

TINY = "vit_tiny_patch16_224"


def test_answers_come_in_list_order_whatever_the_batch_size() -> None:
    dataset = DigitsDataModule(image_size=64).split("val")
    backbone = create_backbone("vit_nano_patch8_64")
    head = nn.Linear(192, 5)
    few = pretrained_logits(backbone, head, dataset, batch_size=200)
    many = pretrained_logits(backbone, head, dataset, batch_size=64)
    assert few.shape == (200, 5)
    torch.testing.assert_close(few, many)
    with torch.inference_mode():
        torch.testing.assert_close(few[7:8], head(backbone(dataset[7]["image"][None])), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_vit_ti_scores_what_an_independent_run_scored(real_data: Path) -> None:
    weights = str(real_data / "weights" / f"{TINY}.augreg_in21k_ft_in1k.safetensors")
    backbone, head = create_backbone(TINY, weights), pretrained_head(TINY, weights)
    photos = ImageNetDataModule("flickr_in1k_1000", real_data)
    test = photos.split("test")
    answers = pretrained_logits(backbone, head, test).argmax(dim=1).numpy()
    assert abs(np.mean(answers == test.labels) - 0.882) < 0.005
    stimuli = ShapeTextureDataModule(real_data)
    for name, expected in (("edges", 0.306), ("silhouettes", 0.494), ("test", 0.150)):
        split = stimuli.split(name)
        logits = pretrained_logits(backbone, head, split)
        answers = mean_probability(logits, stimuli.class_ids()).argmax(dim=1).numpy()
        assert abs(np.mean(answers == split.labels) - expected) < 0.005
    assert abs(np.mean(answers == stimuli.texture_labels) - 0.435) < 0.005
    assert photos.describe()["complete"] is True
    assert stimuli.describe()["complete"] is True
