"""What each of several processes computes of a step, put together by hand to what one computes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from vpt.data.masks import IGNORED
from vpt.data.samplers import EpochSampler
from vpt.tasks.parallel import Weighed, images_of_step, joint_mean, without_repeat
from vpt.tasks.targets.losses import weight_of, weighted_loss


class Process:
    """A trainer of one of several processes: its loader, and what the sum over all of them would be."""

    def __init__(self, rank: int, count: int, images: int, batch_size: int, total: Tensor | None = None) -> None:
        sampler = EpochSampler(range(images), 0)
        sampler.rank, sampler.num_replicas = rank, count
        sampler.num_samples = -(-images // count)
        sampler.total_size = sampler.num_samples * count
        self.world_size = count
        self.train_dataloader = DataLoader(cast("Any", range(images)), batch_size, sampler=sampler, collate_fn=list)
        self.strategy = SimpleNamespace(reduce=lambda tensor, reduce_op: total)

    def batches(self) -> list[dict[str, Tensor]]:
        indices = [index for _, index in cast("Any", self.train_dataloader.sampler)]
        parts = torch.split(torch.tensor(indices), cast("int", self.train_dataloader.batch_size))
        return [{"index": part} for part in parts]


@pytest.mark.parametrize(("images", "count"), [(35, 2), (33, 2), (32, 2), (37, 3), (34, 3), (36, 3), (2, 3), (1, 4)])
def test_each_image_counts_once_in_the_step_in_which_one_process_has_it(images: int, count: int) -> None:
    alone = [set(batch["index"].tolist()) for batch in Process(0, 1, images, 4 * count).batches()]
    assert sum(map(len, alone)) == images
    found: list[list[int]] = [[] for _ in alone]
    told: list[set[int]] = [set() for _ in alone]
    for rank in range(count):
        process = Process(rank, count, images, 4)
        trainer = cast("L.Trainer", process)
        for step, batch in enumerate(process.batches()):
            rest, counts = without_repeat(batch, step, trainer)
            assert len(rest["index"])
            found[step] += rest["index"].tolist() if counts else []
            if rank == 0:
                told[step].add(images_of_step(batch, step, trainer))
    assert list(map(sorted, found)) == list(map(sorted, alone))
    assert told == [{len(each)} for each in alone]


def test_parts_of_weighted_means_are_the_mean_over_all_and_have_its_gradient() -> None:
    torch.manual_seed(0)
    weights = torch.tensor([1.0, 5.0, 0.2], dtype=torch.float64)
    logits = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 1, 2, 0])
    pixels = torch.tensor([9, 0, 4, 1, 2])

    def losses(rows: slice) -> list[Weighed]:
        mean = weighted_loss(logits[rows], labels[rows], weights)
        square = logits[rows].square().mean()
        of_pixels = (logits[rows, 0] * pixels[rows]).sum() / pixels[rows].sum().clamp(min=1)
        own = logits[rows]
        return [(mean, weight_of(labels[rows], weights)), (square, len(own)), (of_pixels, pixels[rows].sum())]

    shares, counted = (slice(0, 3), slice(3, 5), slice(1, 2)), (True, True, False)
    total = torch.stack([
        torch.stack([torch.as_tensor(w, dtype=torch.float64) for _, w in losses(rows)]) * counts
        for rows, counts in zip(shares, counted, strict=True)
    ]).sum(dim=0)  # fmt: skip
    parts = []
    for rows, counts in zip(shares, counted, strict=True):
        trainer = cast("L.Trainer", Process(0, 3, 5, 2, total))
        parts.append(joint_mean(losses(rows), trainer, counts))
    assert parts[2] == 0
    joint = torch.stack(parts).mean()
    expected = (
        cross_entropy(logits, labels, weights) + logits.square().mean() + (logits[:, 0] * pixels).sum() / pixels.sum()
    )
    torch.testing.assert_close(joint, expected, rtol=1e-14, atol=1e-14)
    for one, other in zip(*(torch.autograd.grad(each, logits) for each in (joint, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-14)


def test_no_pixel_that_counts_in_any_process_is_a_loss_of_zero() -> None:
    mean = torch.zeros((), requires_grad=True)
    masks = torch.full((2, 3), IGNORED)
    trainer = cast("L.Trainer", Process(0, 2, 4, 2, torch.zeros(1, dtype=torch.float64)))
    part = joint_mean([(mean, (masks != IGNORED).sum())], trainer)
    part.backward()  # type: ignore[no-untyped-call]
    assert part == 0
    assert mean.grad == 0


def test_one_process_has_the_mean_itself() -> None:
    mean = torch.rand(())
    assert torch.equal(joint_mean([(mean, 3)], cast("L.Trainer", Process(0, 1, 3, 2))), mean)


def test_mixed_images_weigh_by_their_shares() -> None:
    weights = torch.tensor([2.0, 3.0])
    shares = torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    assert weight_of(shares, weights) == 0.25 * 2 + 0.75 * 3 + 2
