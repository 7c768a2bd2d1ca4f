from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from vpt.backbones import create_backbone
from vpt.errors import ConfigError
from vpt.experiments.profile import profile, scalars, step_memory, steps_to_share
from vpt.models import TunedModel

SPECS: list[list[dict[str, Any]]] = [
    [],
    [{"name": "prompt", "num_tokens": 5}],
    [{"name": "lora", "rank": 2, "targets": ["q", "v"]}, {"name": "bias"}],
]


@pytest.mark.parametrize("specs", SPECS, ids=str)
def test_counted_and_formula_agree(specs: list[dict[str, Any]]) -> None:
    ledger = profile(TunedModel(create_backbone("vit_nano_patch8_64"), 10, specs), batch=2, rounds=1)
    assert ledger.formula == ledger.trainable
    assert ledger.delta_bytes > 4 * ledger.trainable
    assert 1.0 < ledger.step_flops / ledger.forward_flops < 3.5
    assert ledger.memory > 0


def test_prompts_cost_less_than_full_fine_tuning() -> None:
    prompts = profile(TunedModel(create_backbone("vit_nano_patch8_64"), 10, SPECS[1]), batch=2, rounds=1)
    full = TunedModel(create_backbone("vit_nano_patch8_64"), 10)
    full.backbone.unfreeze()
    whole = profile(full, batch=2, rounds=1)
    assert whole.formula is None
    assert whole.trainable == whole.total
    assert whole.step_flops > prompts.step_flops
    assert whole.delta_bytes > 50 * prompts.delta_bytes


def test_steps_to_most_of_its_own_best(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        for step, value in ((9, 0.5), (19, 0.94), (29, 0.96), (39, 1.0), (49, 0.99)):
            writer.add_scalar("val/acc", value, step)
    assert steps_to_share(tmp_path) == (30, 50)
    assert steps_to_share(tmp_path, 0.5) == (10, 50)
    assert scalars(tmp_path, "other") == []
    with pytest.raises(ConfigError, match="has no other in its TensorBoard events"):
        steps_to_share(tmp_path, tag="other")


@pytest.mark.parametrize(("batch", "rounds"), [(0, 1), (1, 0)])
def test_nothing_cannot_be_measured(batch: int, rounds: int) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        profile(TunedModel(create_backbone("vit_nano_patch8_64"), 10), batch, rounds)


def test_measuring_memory_leaves_nothing_behind() -> None:
    """A softmax saves its own output, which would keep itself alive."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Softmax(dim=-1))
    images = torch.rand(2, 4)
    before = _tensors()
    assert step_memory(model, images) == images.nbytes + 2 * 4 * 4  # the layer's input and the softmax's output
    assert _tensors() == before


def _tensors() -> int:
    gc.collect()
    return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())
