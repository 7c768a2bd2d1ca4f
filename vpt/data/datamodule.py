"""The base of all data modules: named splits in, loaders of batches of pixels out."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Sampler

from vpt.argument_types import checked
from vpt.data.augmentation import Augmentation
from vpt.data.cache.content_hashes import Hashes, as_hashes, kept_numbers
from vpt.data.cache.image_cache import end_with_parent
from vpt.data.catalog.cards import Card
from vpt.data.channels import channel_statistics
from vpt.data.image_dataset import Batch, Batches, BatchLoader, ImageDataset, as_it_is
from vpt.data.samplers import EpochSampler, ListSampler
from vpt.data.splits import Split, few_shot, position_hash
from vpt.data.targets import Targets, check_multiclass, fits, positives, renumbered
from vpt.data.transforms import Preset, get_preset
from vpt.errors import ConfigError, DataError, UnknownNameError, VPTWarning, check_number
from vpt.image_size import GivenSize, as_size, plain_size
from vpt.run_record import global_seed
from vpt.screen import progress
from vpt.version import pixel_versions

_STAGE_SPLITS = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("test",)}


class ImageDataModule(L.LightningDataModule):
    """Labelled images in named splits; a subclass says which.

    Batches are ``{"image": uint8 (B, 3, H, W), "label": int64 (B,), "index": int64 (B,)}`` where ``index`` is the
    position in the list of that split; images of channels are float32 (B, C, H, W), in their own unit. Nothing is
    decoded before a split is asked for.

    Attributes:
        augmented: False if the training images are a constant of their index.
        targets: What images are labelled with; ``label`` is int64 (B,) only where that is one class each, else (B, C).
        partial: True if a list has not its official number of images; None where no such number is asked for.
    """

    _dataset_class: type[ImageDataset] = ImageDataset
    _labelled = True
    partial: bool | None = None

    @checked
    def __init__(
        self,
        name: str,
        class_names: Sequence[str],
        splits: Mapping[str, Split],
        preset: str | Preset,
        image_size: GivenSize,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int | None = None,
        augment: str | list[dict[str, Any]] = "none",
        card: Card | None = None,
        shots: int | None = None,
        fraction: float | None = None,
        subset_seed: int = 0,
        targets: Targets = "multiclass",
    ) -> None:
        """Keeps the description; reads no image.

        Args:
            name: Name of the task.
            class_names: One name a class.
            splits: ``"train"``, ``"val"``, ``"test"``, then the shifts.
            preset: The preprocessing, or its name.
            image_size: Pixels of the images, or [height, width].
            batch_size: Images in a batch.
            num_workers: Loader processes; 0 loads in the main process, which is fastest without augmentation.
            seed: Seed of shuffling and augmentation of training images, ≥ 0; None for the run's (`seed_everything`), or
                0 where no run has set one.
            augment: Training augmentation: ``"none"``, ``"flip"``, ``"crop_flip"``, ``"fgvc"``, a recipe (``"photos"``,
                ``"documents"``, ``"satellite"``, ``"trivial"``), or a list of albumentations' transforms, each a
                mapping of ``name`` and arguments (:mod:`vpt.data.augmentation`).
            card: The dataset's card, where one exists.
            shots: Train on this number of images per class only (:mod:`vpt.data.splits`).
            fraction: Train on this fraction of each class only, in (0, 1].
            subset_seed: Seed of that sample, ≥ 0; nested: 8 shots are among the 16 shots of the same seed.
            targets: What the labels of the splits are: see :data:`vpt.data.targets.Targets`.

        Raises:
            ConfigError: A number is out of range, a class has too few images, augmentation and preset contradict, or a
                transform cannot be applied.
            UnknownNameError: Preset, augmentation, transform or an argument of a transform is unknown.
        """
        super().__init__()
        if seed is None:  # what Lightning's `seed_everything` was given last, in this process or for it
            seed = global_seed() or 0
        for flag, value, least, most in (
            ("batch_size", batch_size, 1, 10**6),
            ("num_workers", num_workers, 0, 1024),
            ("seed", seed, 0, 2**63 - 1),
            ("subset_seed", subset_seed, 0, 2**63 - 1),
        ):
            check_number(flag, value, least, most, whole=True)
        for split in splits.values():
            if not fits(split.labels, targets):
                raise ConfigError(f"The labels of {split.source} are not {targets}: leave targets out, or give others.")
        self.name = name
        self.targets = targets
        self.class_names = list(class_names)
        self.num_classes = len(self.class_names)
        self.image_size = as_size(image_size)
        self.preset = preset if isinstance(preset, Preset) else get_preset(preset)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        channels = None if self.preset.channels is None else self.preset.num_channels
        self.augmentation = Augmentation(augment, seed, self.image_size, channels)
        if self.augmentation.before_crop and self.preset.resize != "shorter_crop":
            raise ConfigError(
                f"Augmentation {augment!r} needs a preset that crops, such as 'fgvc', not {self.preset.name!r}."
            )
        self.augmented = self.augmentation.name != "none"
        self.card = card
        self._splits = dict(splits)
        self._listed = dict(splits)
        self._datasets: dict[str, ImageDataset] = {}
        self._found: dict[tuple[str, str], NDArray[np.bool_]] = {}
        self._subset: dict[str, Any] | None = None
        self._statistics: dict[str, list[float]] | None = None
        if shots is not None or fraction is not None:
            check_multiclass(targets, "shots and fraction are")
            train = splits["train"]
            chosen = few_shot(train.paths, train.labels, self.class_names, shots, fraction, subset_seed)
            self._splits["train"] = train.take(chosen)
            self._subset = {"shots": shots, "fraction": fraction, "seed": subset_seed, "sha256": position_hash(chosen)}

    def shift_names(self) -> list[str]:
        """Returns the names of the extra test lists."""
        return [name for name in self._splits if name not in {"train", "val", "test"}]

    def split(self, name: str) -> ImageDataset:
        """Returns a split, ``"train"``, ``"val"``, ``"test"`` or a shift's, decoded on first use.

        An UnknownNameError where there is no such split; a DataError where the data have no such images, or one of them
        is missing or damaged.
        """
        if name in {"train", "val", "test"} - self._splits.keys():
            raise DataError(f"The data {self.name!r} have no {name} images: add them to use them.")
        if name not in self._splits:
            raise UnknownNameError(f"split of {self.name}", name, self._splits)
        if name not in self._datasets:
            augmentation = self.augmentation if name == "train" and self.augmented else None
            self._datasets[name] = self._dataset_class(self._splits[name], augmentation)
        return self._datasets[name]

    @property
    def normalization(self) -> str | dict[str, list[float]]:
        """What the backbone has to apply: ``preset.normalization``, or where images have channels their statistics.

        These are ``mean`` and ``std`` of each channel over all pixels of the training images, in their own unit.
        """
        if self.preset.channels is None:
            return self.preset.normalization
        if self._statistics is None:
            form = [self.fingerprint("train"), self.preset.to_dict(), plain_size(self.image_size), pixel_versions()]
            self._statistics = kept_numbers(form, self._measured)
        return self._statistics

    def _measured(self) -> dict[str, list[float]]:
        images = self._splits["train"].pixels()
        each = progress(range(len(images)), f"Statistics of the channels of {self.name}", len(images))
        return channel_statistics(images, each)

    def class_counts(self) -> NDArray[np.int64]:
        """How many images of each class are trained on, (num_classes,)."""
        labels = self._splits["train"].labels if "train" in self._splits else np.zeros(0, np.int64)
        return positives(labels, self.num_classes)

    def value_scale(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The mean and the standard deviation of each number that the training images are labelled with, (K,)."""
        labels = self._splits["train"].labels.astype(np.float64)
        return labels.mean(axis=0).astype(np.float32), labels.std(axis=0).astype(np.float32)

    def number_classes_as(self, names: Sequence[str]) -> None:
        """Numbers the classes as a model does, by name; all classes of the model are then those of the data.

        A ConfigError where the model does not know a class, or the order of these data's classes is fixed.
        """
        if list(names) == self.class_names:
            return
        unknown = [name for name in self.class_names if name not in names]
        fixed = hasattr(self, "groups") or not self._labelled
        fixed |= self.targets != "multiclass" and len(names) != len(self.class_names)  # what is not told may be there
        if unknown or len(set(names)) < len(names) or fixed:
            what = f"class {unknown[0]!r} of" if unknown else "the order of classes of"
            raise ConfigError(
                f"The model does not know {what} {self.name}: give data with the classes it was trained on."
            )
        for splits in (self._splits, self._listed):
            splits |= {
                name: replace(split, labels=renumbered(split.labels, self.class_names, names))
                for name, split in splits.items()
            }
        for dataset in self._datasets.values():
            dataset.labels = renumbered(dataset.labels, self.class_names, names)
        self.class_names, self.num_classes = list(names), len(names)

    def fingerprint(self, name: str) -> str:
        """Returns what a split is, sha256 of its images' contents, labels and names, hexadecimal."""
        return self._splits[name].fingerprint if name in self._splits else ""

    def hashes(self, name: str) -> Hashes:
        """Returns the hash of each image's content of a split, uint8 (N, 16); of none where there is no such split."""
        return self._splits[name].hashes if name in self._splits else as_hashes([])

    def shared(self, name: str, other: str = "train") -> NDArray[np.bool_]:
        """Says which of the N images of a split are in another one, bool (N,), by the hashes of their contents."""
        if (name, other) not in self._found:
            ours, theirs = (self.hashes(each).view("<u8,<u8").ravel() for each in (name, other))
            there = theirs[theirs != np.zeros((), theirs.dtype)]  # zeros are of files that are missing
            self._found[name, other] = np.isin(ours, there)
        return self._found[name, other]

    @property
    def hashed(self) -> bool:
        """Whether it is known, or soon, what the images are: see `Split.hashed`."""
        return all(split.hashed for split in (*self._splits.values(), *self._listed.values()))

    def shared_names(self, name: str, other: str = "train") -> NDArray[np.bool_]:
        """Says which of the N images of a split are in another one by their paths, bool (N,), without reading any."""
        ours, theirs = (self._splits[each].paths if each in self._splits else () for each in (name, other))
        there = set(theirs)
        return np.array([path in there for path in ours], dtype=bool)

    def describe(self) -> dict[str, Any]:
        """Says which data these are, in plain values for JSON: `outline`, and what the images are, which reads them.

        ``fingerprints`` are those of the whole lists: of the images' contents, labels and names; ``fingerprint`` is of
        all of them and the class names. ``shared_with_train`` counts the images of a split that are trained on
        (:meth:`shared`).
        """
        fingerprints = {name: split.fingerprint for name, split in self._listed.items()}
        content = [self.class_names, fingerprints, self._subset and self._subset["sha256"]]
        return self.outline() | {
            "shared_with_train": {name: int(self.shared(name).sum()) for name in self._splits if name != "train"},
            "fingerprints": fingerprints,
            "fingerprint": hashlib.sha256(json.dumps(content).encode()).hexdigest(),
        }

    def outline(self) -> dict[str, Any]:
        """Says in plain values which data these are as far as that is known without reading an image.

        ``complete`` is True if every list has the official number of images, False if
        one has not, None if no card states the numbers; ``partial`` is there where it is not None. ``preset_papers`` is
        what the preset's papers read and split. ``transforms`` is the whole list where ``augment`` is a recipe or
        ``"custom"``. ``channels`` are there where the preset has some. ``subset`` is None if all training images are;
        its ``sha256`` is that of their positions.
        """
        counts = {name: len(split.labels) for name, split in self._splits.items()}
        sizes = self.card.sizes if self.card else {}
        official = {name: sizes[key] for name, split in self._splits.items() if (key := _stem(split.source)) in sizes}
        wrong = [name for name, size in official.items() if len(self._listed[name].labels) != size]
        described: dict[str, Any] = {
            "name": self.name,
            "preset": self.preset.name,
            "preset_papers": {"source": self.preset.source, "splits": self.preset.splits},
            "image_size": plain_size(self.image_size),
            "num_classes": self.num_classes,
            "augment": self.augmentation.name,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "lists": {name: split.source for name, split in self._splits.items()},
            "counts": counts,
            "official_counts": official,
            "complete": not wrong if official else None,
            "subset": self._subset,
        }
        if self.targets != "multiclass":
            described["targets"] = self.targets
        if self.preset.channels is not None:
            described["channels"] = self.preset.to_dict()["channels"]
        if self.augmentation.transforms:
            described["transforms"] = self.augmentation.transforms
        return described if self.partial is None else described | {"partial": self.partial}

    def prepare_data(self) -> None:
        """Decodes in one process what the others then map (Lightning's hook)."""
        stage = self.trainer.state.fn if self.trainer is not None else None
        if stage is not None:
            self.setup(stage.value)

    def setup(self, stage: str) -> None:
        """Decodes what a stage needs (Lightning's hook); an UnknownNameError where there is no such stage."""
        if stage not in _STAGE_SPLITS:
            raise UnknownNameError("stage", stage, _STAGE_SPLITS)
        for name in _STAGE_SPLITS[stage]:
            self.split(name)
        if stage == "fit" and self._splits["train"].hashed:
            self.warn_of_contradictions()

    def warn_of_contradictions(self) -> None:
        """Warns, by a VPTWarning, of training images that are there again with another label."""
        train = self._splits["train"]
        if self._labelled and (found := train.contradictions()):
            one, two = (f"{train.paths[i]} {self._labelled_as(train.labels[i])}" for i in found[0])
            text = f"{len(found):,} training images are others of another class again, for instance {one} and {two}"
            warnings.warn(f"{text}: correct the labels, or remove one of them.", VPTWarning, stacklevel=2)

    def _labelled_as(self, label: Any) -> str:
        if self.targets == "multiclass":
            return f"of class {self.class_names[label]!r}"
        return f"labelled {np.asarray(label).tolist()}"

    def train_dataloader(self) -> DataLoader[Batch]:
        """Returns the training images, shuffled by (seed, epoch); the last batch may be smaller."""
        return self._loader("train", EpochSampler(self.split("train"), self.seed))

    def val_dataloader(self) -> DataLoader[Batch]:
        """Returns the validation images in list order."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        """Returns the test images in list order."""
        return self._loader("test")

    predict_dataloader = test_dataloader

    def _loader(self, name: str, sampler: Sampler[Any] | None = None) -> DataLoader[Batch]:
        return BatchLoader(
            Batches(self.split(name)),
            batch_size=self.batch_size,
            collate_fn=as_it_is,
            sampler=sampler or ListSampler(self.split(name)),
            num_workers=self.num_workers,
            worker_init_fn=end_with_parent,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


def _stem(source: str) -> str:
    return source.rsplit("/", 1)[-1].removesuffix(".txt")
