"""The 19 tasks of VTAB-1k: how each original is read, and which ranges its lists are taken from.

Sizes and ranges are those of VTAB (Zhai et al. 2019) on TensorFlow Datasets; the cards have the versions.
"""

from __future__ import annotations

from dataclasses import dataclass

from vpt.data.prepare import arrays, clevr_kitti, image_folders, vtab_rules
from vpt.data.prepare.image_folders import read_retinopathy
from vpt.data.prepare.originals import Reader
from vpt.data.prepare.tfrecord import read_dmlab
from vpt.data.prepare.vtab_rules import Split


@dataclass(frozen=True)
class Task:
    """How an original becomes a task.

    Attributes:
        read: Reads the original.
        split: Which images are in which list.
    """

    read: Reader
    split: Split


_CLEVR = Split({"train": 70_000, "val": 15_000}, "train[:90%]", "train[90%:]", "val")
_DSPRITES = Split({"train": 737_280}, "train[:80%]", "train[80%:90%]", "train[90%:]")
_SMALLNORB = Split({"train": 24_300, "test": 24_300}, "train", "test[:50%]", "test[50%:]")

TASKS: dict[str, Task] = {
    "cifar": Task(arrays.read_cifar100, Split({"train": 50_000, "test": 10_000}, "train[:90%]", "train[90%:]", "test")),
    "caltech101": Task(
        image_folders.read_caltech101, Split({"train": 3_060, "test": 6_084}, "train[:90%]", "train[90%:]", "test")
    ),
    "dtd": Task(image_folders.read_dtd, Split({"train": 1_880, "val": 1_880, "test": 1_880}, "train", "val", "test")),
    "oxford_flowers102": Task(
        image_folders.read_flowers, Split({"train": 1_020, "val": 1_020, "test": 6_149}, "train", "val", "test")
    ),
    "oxford_iiit_pet": Task(
        image_folders.read_pets, Split({"trainval": 3_680, "test": 3_669}, "trainval[:80%]", "trainval[80%:]", "test")
    ),
    "svhn": Task(arrays.read_svhn, Split({"train": 73_257, "test": 26_032}, "train[:90%]", "train[90%:]", "test")),
    "sun397": Task(
        image_folders.read_sun397, Split({"train": 76_128, "val": 10_875, "test": 21_750}, "train", "val", "test")
    ),
    "patch_camelyon": Task(
        arrays.read_camelyon, Split({"train": 262_144, "valid": 32_768, "test": 32_768}, "train", "valid", "test")
    ),
    "eurosat": Task(
        image_folders.read_class_folders, Split({"train": 27_000}, "train[:60%]", "train[60%:80%]", "train[80%:]")
    ),
    "resisc45": Task(
        image_folders.read_class_folders, Split({"train": 31_500}, "train[:60%]", "train[60%:80%]", "train[80%:]")
    ),
    "diabetic_retinopathy": Task(
        read_retinopathy,
        Split({"train": 35_126, "validation": 10_906, "test": 42_670}, "train", "validation", "test"),
    ),
    "clevr_count": Task(clevr_kitti.clevr(vtab_rules.clevr_count), _CLEVR),
    "clevr_dist": Task(clevr_kitti.clevr(vtab_rules.clevr_distance), _CLEVR),
    "dmlab": Task(
        read_dmlab, Split({"train": 65_550, "validation": 22_628, "test": 22_735}, "train", "validation", "test")
    ),
    "kitti": Task(clevr_kitti.read_kitti, Split({"train": 6_347, "val": 423, "test": 711}, "train", "val", "test")),
    "dsprites_loc": Task(arrays.dsprites(lambda latents: vtab_rules.dsprites_bin(latents[:, 4], 32)), _DSPRITES),
    "dsprites_ori": Task(arrays.dsprites(lambda latents: vtab_rules.dsprites_bin(latents[:, 3], 40)), _DSPRITES),
    "smallnorb_azi": Task(arrays.smallnorb(vtab_rules.smallnorb_azimuth), _SMALLNORB),
    "smallnorb_ele": Task(arrays.smallnorb(vtab_rules.smallnorb_elevation), _SMALLNORB),
}
