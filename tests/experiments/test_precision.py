"""Which precision is taken: by the ratio of steps, on a model that is afterwards what it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from vpt.backbones import create_backbone
from vpt.experiments import precision
from vpt.experiments.precision import Speed, measure
from vpt.models import TunedModel


@pytest.mark.parametrize(("speed_up", "chosen"), [(1.8, "bf16-mixed"), (1.1, "bf16-mixed"), (1.09, "32-true")])
def test_bfloat16_has_to_be_a_tenth_faster(speed_up: float, chosen: str) -> None:
    assert Speed(speed_up, 8).precision == chosen


@pytest.mark.parametrize(
    ("milliseconds", "images"), [(1, 12), (20, 8), (200, 1)], ids=["a whole batch", "as many as time allows", "one"]
)
def test_a_measurement_takes_the_images_that_time_suffices_for_and_leaves_the_model(
    monkeypatch: pytest.MonkeyPatch, milliseconds: float, images: int
) -> None:
    """With a step in single precision of so many milliseconds an image, and one in bfloat16 of half of that."""
    kinds: list[torch.dtype] = []

    def interleaved(runs: Sequence[Callable[[], None]], rounds: int) -> list[float]:
        for run in runs:
            run()
        seconds = seen.pop(0) * milliseconds / 1000
        return [seconds, seconds / 2][: len(runs)]

    model = TunedModel(create_backbone("vit_nano_patch8_64"), 3, [{"name": "lora", "rank": 2}])
    forward, seen = model.forward, list[int]()

    def watched(x: torch.Tensor) -> torch.Tensor:
        seen[:] = [len(x)]
        outputs = forward(x)
        kinds.append(outputs.dtype)
        return outputs

    monkeypatch.setattr(model, "forward", watched)
    monkeypatch.setattr(precision, "interleaved", interleaved)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    assert measure(model, 12, torch.device("cpu")) == Speed(2.0, images)
    assert kinds[-2:] == [torch.float32, torch.bfloat16]
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert not model.backbone.model.training
