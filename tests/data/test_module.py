from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vpt.data import DigitsDataModule, VTABDataModule
from vpt.data.module import EpochSampler
from vpt.errors import ConfigError, UnknownNameError


def order(data: DigitsDataModule, epoch: int) -> list[int]:
    sampler = EpochSampler(data.split("train"), data.seed)
    sampler.set_epoch(epoch)
    return [index for _, index in sampler]


def test_batch_holds_uint8_images_labels_and_positions(task: Path) -> None:
    data = VTABDataModule("fake", root=task.parent, image_size=16, batch_size=4)
    batches = list(data.test_dataloader())
    assert [len(batch["label"]) for batch in batches] == [4, 4, 1]
    assert batches[0]["image"].shape == (4, 3, 16, 16)
    assert {key: value.dtype for key, value in batches[0].items()} == {
        "image": torch.uint8,
        "label": torch.int64,
        "index": torch.int64,
    }


def test_evaluation_is_in_list_order(task: Path) -> None:
    data = VTABDataModule("fake", root=task.parent, image_size=16, batch_size=4)
    for loader, name in (
        (data.val_dataloader(), "val"),
        (data.test_dataloader(), "test"),
        (data.predict_dataloader(), "test"),
    ):
        batches = list(loader)
        assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(len(data.split(name))))
        assert torch.cat([batch["label"] for batch in batches]).tolist() == data.split(name).labels.tolist()


def test_every_training_image_comes_once_an_epoch() -> None:
    data = DigitsDataModule(batch_size=64, image_size=8)
    batches = list(data.train_dataloader())
    assert len(batches[-1]["label"]) == 1000 % 64
    index = torch.cat([batch["index"] for batch in batches])
    assert sorted(index.tolist()) == list(range(1000))
    assert torch.cat([batch["label"] for batch in batches]).tolist() == data.split("train").labels[index].tolist()


def test_order_is_a_function_of_seed_and_epoch() -> None:
    first, again, other = (DigitsDataModule(seed=seed, image_size=8) for seed in (0, 0, 1))
    assert order(first, 1) == order(again, 1)
    orders = [order(data, epoch) for data in (first, other) for epoch in range(3)]
    assert len({tuple(each) for each in orders}) == 6


class Recorder(L.LightningModule):
    """Notes the order of the training images."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.seen: list[tuple[int, int]] = []

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        self.seen += [(self.current_epoch, int(index)) for index in batch["index"]]
        return self.layer(torch.ones(1)).sum()  # type: ignore[no-any-return]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder: Path, epochs: int) -> L.Trainer:
    return L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )


def test_resumed_run_sees_the_order_it_would_have_seen(tmp_path: Path, task: Path) -> None:
    def data() -> VTABDataModule:
        return VTABDataModule("fake", root=task.parent, image_size=8, batch_size=4)

    whole, start, rest = Recorder(), Recorder(), Recorder()
    trainer(tmp_path / "a", 3).fit(whole, data())
    first = trainer(tmp_path / "b", 1)
    first.fit(start, data())
    first.save_checkpoint(tmp_path / "half.ckpt")
    trainer(tmp_path / "c", 3).fit(rest, data(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert len(whole.seen) == 3 * 18
    assert start.seen + rest.seen == whole.seen
    epochs = [tuple(index for epoch, index in whole.seen if epoch == number) for number in range(3)]
    assert len(set(epochs)) == 3


def augmented_epochs(task: Path, num_workers: int) -> list[dict[int, Any]]:
    data = VTABDataModule(
        "fake", root=task.parent, image_size=16, batch_size=5, num_workers=num_workers, augment="crop_flip"
    )
    loader = data.train_dataloader()
    epochs = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        batches = list(loader)
        epochs.append({int(i): x.numpy() for b in batches for i, x in zip(b["index"], b["image"], strict=True)})
    return epochs


def test_augmented_pixels_do_not_depend_on_the_number_of_workers(task: Path) -> None:
    alone, shared = augmented_epochs(task, 0), augmented_epochs(task, 2)
    for one, other in zip(alone, shared, strict=True):
        assert one.keys() == other.keys()
        for index in one:
            np.testing.assert_array_equal(one[index], other[index])
    assert any((alone[0][index] != alone[1][index]).any() for index in alone[0])


def test_augmentation_touches_training_batches_only(task: Path) -> None:
    plain, augmented = (
        VTABDataModule("fake", root=task.parent, val="train800val200", image_size=16, augment=augment)
        for augment in ("none", "crop_flip")
    )
    assert (plain.augmented, augmented.augmented) == (False, True)
    expected = next(iter(plain.val_dataloader()))["image"]
    assert torch.equal(next(iter(augmented.val_dataloader()))["image"], expected)
    # Asked for without an epoch, a training image is the plain one: features of it can be kept.
    assert torch.equal(augmented.split("train")[3]["image"], expected[3])


def test_setup_decodes_what_the_stage_needs_and_no_more(task: Path) -> None:
    for stage, spoiled, works in (("fit", "test", True), ("test", "train800", True), ("fit", "train800", False)):
        data = VTABDataModule("fake", root=task.parent, image_size=12)
        victim = task / f"images/{spoiled}/class 1/0.jpg"
        content = victim.read_bytes()
        victim.write_bytes(b"")
        try:
            if works:
                data.setup(stage)
            else:
                with pytest.raises(Exception, match="is not an image"):
                    data.setup(stage)
        finally:
            victim.write_bytes(content)


@pytest.mark.parametrize(("flag", "value"), [("batch_size", 0), ("image_size", 0), ("num_workers", -1), ("seed", -1)])
def test_numbers_out_of_range_are_refused(flag: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"{flag} is {value}"):
        DigitsDataModule(**{flag: value})  # type: ignore[arg-type]


def test_unknown_split_suggests_the_nearest(task: Path) -> None:
    data = VTABDataModule("fake", root=task.parent)
    with pytest.raises(UnknownNameError, match="did you mean 'sepia'"):
        data.split("sepa")
