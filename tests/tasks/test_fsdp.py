"""A backbone in shares on two processes computes, and is written, as that of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn

from tests.deltas.families import make
from tests.deltas.test_strength import DELTAS
from vpt.backbones import create_backbone
from vpt.backbones.checkpoints import fingerprint
from vpt.models.classifier import AdaptedModel, TunedModel
from vpt.models.segmenter import DenseModel
from vpt.tasks.parallel import gathered, joint, shard, share_gradients, shared_as, whole

NARROW = "vit_nano_patch8_64"
OTHERS = ("dinov2-reg", "beit", "beit-shared", "dinov3", "eva02-split", "swin", "swinv2")
MORE: dict[str, list[dict[str, Any]]] = {kind: [{"name": kind}] for kind in ("partial", "convpass", "sidetune")}
CASES: list[tuple[str, str, type[AdaptedModel]]] = [
    *(("vit", name, TunedModel) for name in (*DELTAS, *MORE, "tuned", "none")),
    *((family, name, TunedModel) for family in OTHERS for name in ("deep", "shallow", "recipe", "tuned")),
    *((family, name, DenseModel) for family in ("vit", "swin") for name in ("deep", "tuned")),
    (NARROW, "deep", TunedModel),
]
SHARES = {("vit", "full"): 1.0, ("vit", "gps"): 1.0, ("vit", "spt"): 1.0, ("vit", "partial"): 0.7}
"""The largest share of a backbone on a process, where a delta computes others from whole weights of it."""


def model_of(family: str, name: str, kind: type[AdaptedModel]) -> AdaptedModel:
    backbone = create_backbone(NARROW, frozen_dtype="bfloat16") if family == NARROW else make(family)[0]
    torch.manual_seed(1)
    model = kind(backbone, 3, (DELTAS | MORE).get(name, []))
    if name == "tuned":
        backbone.unfreeze()
    for key, parameter in model.named_parameters():
        if key.startswith(("delta.", "head.")):
            nn.init.normal_(parameter, std=0.3)
    return model.eval()  # where nothing is drawn at random


def gradients(model: AdaptedModel, rank: int = 0, processes: int = 1) -> dict[str, Tensor]:
    """Of a mean over four images, after other passes forward, with and without a backward pass."""
    x = model.backbone.random_images(4)[rank::processes]
    model.classify(model.encode(x[:1])).sum().backward()  # type: ignore[no-untyped-call]
    with torch.inference_mode():
        model(x)
    model.zero_grad()
    model.classify(model.encode(x)).square().mean(dim=0).sum().backward()  # type: ignore[no-untyped-call]
    if processes > 1:
        share_gradients(model)
    return {name: joint(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}


def local(tensor: Tensor) -> Tensor:
    own: Any = tensor.detach()
    return cast("Tensor", own.to_local() if isinstance(own, DTensor) else own)


def _two_processes(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    found: list[Any] = []
    for case in CASES:
        model = model_of(*case)
        shard(model, mesh)
        shard(model, mesh)  # in shares already
        own = dict(model.backbone.model.named_parameters())
        share = sum(local(each).numel() for each in own.values()) / sum(each.numel() for each in own.values())
        trained = gradients(model, rank, 2)
        with whole(model):
            told = fingerprint(model.backbone.model) if rank == 0 else ""
        for name, each in model.named_parameters():
            assert torch.equal(local(shared_as(joint(each.detach()), each)), local(each)), (case, name)
        for name, again in gradients(model, rank, 2).items():
            assert torch.equal(again, trained[name]), (case, name)
        found.append((gathered(trained), told, share))
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_with_shares_give_the_gradients_of_one(tmp_path: Path) -> None:
    spawn(_two_processes, args=(str(tmp_path),), nprocs=2)  # type: ignore[no-untyped-call]
    for case, (theirs, told, share) in zip(CASES, torch.load(tmp_path / "found.pt", weights_only=True), strict=True):
        model = model_of(*case)
        ours = gradients(model)
        assert ours.keys() == theirs.keys(), case
        for name, gradient in ours.items():
            least = float(gradient.abs().max()) * (1e-2 if case[0] == NARROW else 1e-11)
            assert float((theirs[name] - gradient).abs().max()) <= least, (case, name)
        assert told == fingerprint(model.backbone.model)
        assert share <= SHARES.get(case[:2], 0.65), case
