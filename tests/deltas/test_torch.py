"""What torch and timm offer keeps working with deltas attached."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from tests.deltas.families import images, make, relative
from vpt.backbones.factory import Backbone
from vpt.deltas import attach
from vpt.models import TunedModel

KINDS = ["vit", "dinov2-reg", "beit", "dinov3", "eva02-split", "swin", "swinv2"]
SPECS = [{"name": "prompt", "num_tokens": 5}, {"name": "lora", "rank": 2}]


def prepared(family: str, deep: bool = True) -> tuple[Backbone, list[nn.Parameter]]:
    backbone, _ = make(family)
    torch.manual_seed(1)
    delta = attach(backbone, [SPECS[0] | {"deep": deep}, SPECS[1]])
    for parameter in delta.parameters():
        nn.init.normal_(parameter, std=0.3)
    return backbone, list(delta.parameters())


def gradients(output: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    return list(torch.autograd.grad(output.square().sum(), parameters))


@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
@pytest.mark.parametrize("family", KINDS)
def test_activation_checkpointing_changes_nothing(family: str, deep: bool) -> None:
    backbone, parameters = prepared(family, deep)
    plain = backbone(images(family))
    expected = gradients(plain, parameters)
    cast("Any", backbone.model).set_grad_checkpointing(True)
    again = backbone(images(family))
    assert relative(again, plain) <= 1e-12
    for ours, theirs in zip(gradients(again, parameters), expected, strict=True):
        assert relative(ours, theirs) <= 1e-12


@pytest.mark.parametrize("family", ["vit", "dinov3", "swin"])
def test_compiled_models_give_the_same_features_and_gradients(family: str) -> None:
    backbone, parameters = prepared(family)
    plain = backbone(images(family))
    expected = gradients(plain, parameters)
    compiled = torch.compile(backbone, backend="aot_eager")
    again = compiled(images(family))
    assert relative(again, plain) <= 1e-10
    for ours, theirs in zip(gradients(again, parameters), expected, strict=True):
        assert relative(ours, theirs) <= 1e-10


@pytest.mark.parametrize("family", KINDS)
def test_autocast_to_bfloat16_stays_near_and_trains(family: str) -> None:
    backbone, parameters = prepared(family)
    backbone.float()
    parameters = [parameter for parameter in parameters if parameter.data.is_floating_point()]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    full = backbone(images(family).float())
    with torch.autocast("cpu", torch.bfloat16):
        half = backbone(images(family).float())
    assert relative(half.float(), full) <= 0.1
    assert all(gradient.isfinite().all() for gradient in gradients(half.float(), parameters))


@pytest.mark.parametrize("family", KINDS)
def test_intermediate_features_are_those_of_a_forward_pass_and_hold_no_prompts(family: str) -> None:
    backbone, _ = prepared(family)
    model: Any = backbone.model
    final, maps = model.forward_intermediates(backbone.normalize(images(family)))
    expected = model.forward_features(backbone.normalize(images(family)))
    assert relative(final, expected) <= 1e-12
    rows, columns = backbone.layout.grid
    assert tuple(maps[-1].shape[2:]) == (rows, columns)


def _two_processes(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    backbone, _ = make("vit")
    torch.manual_seed(1)
    model = TunedModel(backbone, 3, SPECS)
    batch = torch.cat([images(), images()[:1]])[2 * rank : 2 * rank + 2]
    parallel = DistributedDataParallel(model)  # kept: its reducer goes with it
    parallel(batch).square().mean().backward()
    if rank == 0:
        torch.save([p.grad for p in model.parameters() if p.requires_grad], f"{folder}/gradients.pt")
    dist.destroy_process_group()


def test_two_processes_give_the_gradients_of_one(tmp_path: Path) -> None:
    spawn(_two_processes, args=(str(tmp_path),), nprocs=2)  # type: ignore[no-untyped-call]
    backbone, _ = make("vit")
    torch.manual_seed(1)
    model = TunedModel(backbone, 3, SPECS)
    model(torch.cat([images(), images()[:1]])).square().mean().backward()
    ours = torch.load(tmp_path / "gradients.pt", weights_only=True)
    theirs = [p.grad for p in model.parameters() if p.requires_grad]
    for a, b in zip(ours, theirs, strict=True):
        assert b is not None
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)
