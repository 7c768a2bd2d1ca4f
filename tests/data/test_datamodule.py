from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import jsonargparse
import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

import vpt.data
from vpt.data import DigitsDataModule, VTABDataModule, samplers
from vpt.data.cache import image_cache
from vpt.data.image_dataset import ImageDataset
from vpt.data.samplers import EpochSampler, ListSampler
from vpt.data.splits import position_hash
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


def test_order_and_augmentation_have_the_seed_of_the_run_unless_they_have_their_own() -> None:
    assert DigitsDataModule(image_size=8).seed == 0
    L.seed_everything(3, verbose=False)
    data, apart = DigitsDataModule(image_size=8, augment="flip"), DigitsDataModule(image_size=8, seed=0)
    assert (data.seed, data.augmentation.seed, data.describe()["seed"], apart.seed) == (3, 3, 3, 0)
    assert order(data, 0) != order(apart, 0)


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


@pytest.mark.parametrize(
    ("flag", "value"),
    [("batch_size", 0), ("image_size", 64.5), ("num_workers", -1), ("seed", -1), ("subset_seed", True)],
)
def test_numbers_out_of_range_are_refused(flag: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{flag} .*must be a whole number.*, got {value}"):
        DigitsDataModule(**{flag: value})  # type: ignore[arg-type]


def test_unknown_split_suggests_the_nearest(task: Path) -> None:
    data = VTABDataModule("fake", root=task.parent)
    with pytest.raises(UnknownNameError, match="did you mean 'sepia'"):
        data.split("sepa")


def test_a_batch_is_its_items_fetched_at_once(task: Path) -> None:
    for augment in ("none", "flip", "fgvc"):
        split = VTABDataModule("fake", root=task.parent, preset="fgvc", image_size=16, augment=augment).split("train")
        for items in ([5, 0, 5], [(1, 5), (0, 2), (1, 2)]):
            expected = default_collate([split[item] for item in items])
            batch = split.batch(items)
            assert batch.keys() == expected.keys()
            assert all(torch.equal(batch[key], expected[key]) for key in batch)
            assert {key: value.dtype for key, value in batch.items()} == {
                key: value.dtype for key, value in expected.items()
            }
            assert batch["image"].is_contiguous()


def test_a_split_can_be_read_by_any_loader(task: Path) -> None:
    data = VTABDataModule("fake", root=task.parent, image_size=16, batch_size=4)
    for own, plain in zip(data.test_dataloader(), DataLoader(data.split("test"), batch_size=4), strict=True):
        assert all(torch.equal(own[key], plain[key]) for key in own)


def test_writing_into_a_batch_changes_no_image(task: Path) -> None:
    split = VTABDataModule("fake", root=task.parent, image_size=16).split("test")
    before = np.array(split.images)
    split.batch([0, 1])["image"].zero_()
    split[0]["image"].zero_()
    np.testing.assert_array_equal(split.images, before)


@pytest.mark.parametrize("make", [lambda folder: VTABDataModule("fake", root=folder), lambda _: DigitsDataModule()])
def test_a_worker_process_is_sent_no_pixels(task: Path, make: Any) -> None:
    split = make(task.parent).split("test")
    sent = pickle.dumps(split)
    assert len(sent) < 80_000 + 200 * len(split) < split.images.nbytes / 4
    again = pickle.loads(sent)  # noqa: S301  # our own
    np.testing.assert_array_equal(again.images, split.images)
    assert torch.equal(again[3]["image"], split[3]["image"])


def test_fgvc_augmentation_cuts_from_the_scaled_image_and_evaluation_from_its_centre(task: Path) -> None:
    plain, augmented = (
        VTABDataModule("fake", root=task.parent, val="train800val200", preset="fgvc", image_size=14, augment=augment)
        for augment in ("none", "fgvc")
    )
    train, expected = augmented.split("train"), plain.split("train")
    assert train.images[0].shape == (3, 16, 22)
    assert torch.equal(augmented.split("val")[3]["image"], expected[3]["image"])
    assert torch.equal(train[3]["image"], expected[3]["image"])
    windows = {train.images[3][:, y : y + 14, x : x + 14].tobytes() for y in range(3) for x in range(9)}
    seen = [train[(epoch, 3)]["image"] for epoch in range(40)]
    assert all(cut.shape == (3, 14, 14) for cut in seen)
    assert all(cut.numpy().tobytes() in windows or cut.flip(2).numpy().tobytes() in windows for cut in seen)
    assert len({cut.numpy().tobytes() for cut in seen}) > 20


def test_generated_tasks_are_cropped_too() -> None:
    data = DigitsDataModule(preset="fgvc", augment="fgvc", image_size=14, batch_size=8)
    assert data.split("train").images.shape == (1000, 3, 16, 16)
    assert next(iter(data.train_dataloader()))["image"].shape == (8, 3, 14, 14)
    assert next(iter(data.val_dataloader()))["image"].shape == (8, 3, 14, 14)


def test_fgvc_augmentation_needs_a_preset_that_crops(task: Path) -> None:
    with pytest.raises(ConfigError, match="'fgvc' needs a preset that crops, such as 'fgvc', not 'vpt'"):
        VTABDataModule("fake", root=task.parent, augment="fgvc")


@pytest.mark.parametrize("augment", ["none", "fgvc"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_images_decoded_on_demand_are_those_of_the_cache(
    task: Path, monkeypatch: pytest.MonkeyPatch, augment: str, num_workers: int
) -> None:
    def batches() -> list[Any]:
        data = VTABDataModule(
            "fake", root=task.parent, preset="fgvc", image_size=14, augment=augment, num_workers=num_workers
        )
        return list(data.train_dataloader())

    cached = batches()
    monkeypatch.setattr(image_cache, "DISK_SHARE", 0)
    image_cache.clear()
    with pytest.warns(UserWarning, match="decoded anew in every epoch"):
        demanded = batches()
    assert image_cache.usage() == (0, 0)
    for one, other in zip(cached, demanded, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)


def modules() -> list[str]:
    found = {name: getattr(vpt.data, name) for name in vpt.data.__all__}
    others = (vpt.data.ImageDataModule, vpt.data.ShapeTextureDataModule)  # the base; nothing to train on
    masks = vpt.data.MaskDataModule  # no classes of images that shots could be of
    classes = {n: c for n, c in found.items() if isinstance(c, type) and issubclass(c, others[0])}
    return [n for n, c in classes.items() if c not in others and not issubclass(c, masks)]


@pytest.mark.parametrize("name", modules())
def test_every_data_module_takes_shots_on_the_command_line(name: str) -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(vpt.data.ImageDataModule, "data")
    parsed = parser.parse_args([f"--data={name}", "--data.shots=4", "--data.subset_seed=1"], _skip_validation=True)
    assert (parsed.data.init_args.shots, parsed.data.init_args.subset_seed) == (4, 1)
    assert not {"card", "splits", "class_names"} & set(parsed.data.init_args.keys())


def test_shots_and_fractions_choose_training_images_only_and_are_recorded(task: Path) -> None:
    whole, few, more, share = (
        VTABDataModule("fake", root=task.parent, image_size=16, **subset)
        for subset in ({}, {"shots": 2}, {"shots": 3}, {"fraction": 0.5})
    )
    assert [data.describe()["counts"] for data in (whole, few, more, share)] == [
        {"train": count, "val": 6, "test": 9, "sepia": 9} for count in (18, 6, 9, 9)
    ]
    assert np.bincount(few.split("train").labels).tolist() == [2, 2, 2]
    assert set(few.split("train").paths) < set(more.split("train").paths)
    positions = [list(whole.split("train").paths).index(path) for path in few.split("train").paths]
    np.testing.assert_array_equal(few.split("train").images, whole.split("train").images[positions])
    assert whole.describe()["subset"] is None
    assert few.describe()["subset"] == {
        "shots": 2, "fraction": None, "seed": 0, "sha256": position_hash(np.array(positions))}  # fmt: skip
    assert len({data.describe()["fingerprint"] for data in (whole, few, more)}) == 3
    assert share.describe()["fingerprint"] == more.describe()["fingerprint"]  # 3 of 6 are the same images by both
    other = VTABDataModule("fake", root=task.parent, shots=2, subset_seed=1)
    assert other.describe()["fingerprint"] != few.describe()["fingerprint"]


def test_a_subset_of_complete_data_is_a_subset_and_not_incomplete() -> None:
    description = DigitsDataModule(shots=5).describe()
    assert description["counts"]["train"] == 50
    assert description["complete"] is True


def test_too_many_shots_are_refused_before_anything_is_decoded(task: Path) -> None:
    with pytest.raises(ConfigError, match="shots is 5, but class 'colour 0' has 4 training images"):
        VTABDataModule("fake", root=task.parent, train="train800", shots=5)


def test_one_process_decodes_for_all_of_a_node(task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []
    split = VTABDataModule.split

    def record(data: VTABDataModule, name: str) -> ImageDataset:
        decoded.append(name)
        return split(data, name)

    monkeypatch.setattr(VTABDataModule, "split", record)
    data = VTABDataModule("fake", root=task.parent, image_size=16)
    data.prepare_data()
    assert decoded == []
    data.trainer = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    data.trainer.state.fn = TrainerFn.TESTING
    data.prepare_data()
    assert decoded == ["test"]


def test_more_processes_than_images_to_evaluate_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in range(3):
        monkeypatch.setattr(samplers, "_share", lambda rank=rank: (3, rank))
        assert list(ListSampler("abcd")) == list(range(rank, 4, 3))
        with pytest.raises(ConfigError, match=r"2 images .* in 3 processes: set --trainer\.devices to 2"):
            ListSampler("ab")
