"""Generated datasets in the layouts in which the authors of FGVC's and ImageNet's sets publish them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from io import BytesIO
from pathlib import Path
from zlib import crc32

import numpy as np
from PIL import Image
from scipy.io import savemat

from vpt.data.catalog.classes import imagenet_wnids, objectnet_folders, subset_ids

TRAIN, VAL, TEST = 10, 3, 4  # images of each class


@cache
def picture(seed: int = 0, size: tuple[int, int] = (20, 16)) -> bytes:
    """A small noisy JPEG."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, "jpeg")
    return file.getvalue()


def _write(paths: Iterable[Path]) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(crc32("/".join(path.parts[-3:]).encode())))  # no two are the same


def _cells(texts: Sequence[str]) -> np.ndarray:
    return np.array([[text] for text in texts], dtype=object)


def _lines(file: Path, rows: Iterable[tuple[object, object]]) -> None:
    file.write_text("".join(f"{key} {value}\n" for key, value in rows), encoding="utf-8")


def make_birds(folder: Path, classes: dict[str, str], unused: dict[str, str], uuid: bool) -> None:
    """CUB-200-2011 or NABirds: classes by id, those without images, and whether images have long ids."""
    names = [
        (kind, f"{int(kind):03d}.{classes[kind].replace(' ', '_')}/été {number:02d}.jpg", number < TRAIN)
        for kind in classes
        for number in range(TRAIN + TEST)
    ]
    ids = [f"{row:08x}-21dc-4d0c" if uuid else str(row + 1) for row in range(len(names))]
    _write(folder / "images" / path for _, path, _ in names)
    _lines(folder / "images.txt", zip(ids, (path for _, path, _ in names), strict=True))
    _lines(folder / "image_class_labels.txt", zip(ids, (kind for kind, _, _ in names), strict=True))
    _lines(folder / "train_test_split.txt", zip(ids, (int(train) for _, _, train in names), strict=True))
    _lines(folder / "classes.txt", (unused | classes).items())


def make_flowers(folder: Path, classes: int = 3) -> None:
    each = TRAIN + VAL + TEST
    labels = np.repeat(np.arange(1, classes + 1), each)
    numbers = np.arange(1, len(labels) + 1).reshape(classes, each)
    _write(folder / "jpg" / f"image_{number:05d}.jpg" for number in numbers.flatten())
    savemat(folder / "imagelabels.mat", {"labels": labels[None].astype(np.uint8)})
    train, val, test = np.split(numbers, [TRAIN, TRAIN + VAL], axis=1)
    savemat(
        folder / "setid.mat", {"trnid": train.reshape(1, -1), "valid": val.reshape(1, -1), "tstid": test.reshape(1, -1)}
    )


def make_dogs(
    folder: Path, breeds: Sequence[str] = ("n02085620-Chihuahua", "n02107142-Doberman", "n02086240-Shih-Tzu")
) -> None:
    (folder / "lists").mkdir(parents=True)
    for name, numbers in (("train", range(TRAIN)), ("test", range(TRAIN, TRAIN + TEST))):
        paths = [f"{breed}/{breed.split('-')[0]}_{number}.jpg" for breed in breeds for number in numbers]
        labels = np.repeat(np.arange(1, len(breeds) + 1), len(numbers))[:, None].astype(np.uint8)
        _write(folder / "Images" / path for path in paths)
        savemat(folder / "lists" / f"{name}_list.mat", {"file_list": _cells(paths), "labels": labels})


def make_cars(folder: Path, names: Sequence[str] = ("Audi S4 2012", "BMW M3 2012", "Fiat 500 2012")) -> None:
    (folder / "devkit").mkdir(parents=True)
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": _cells(names).T})
    fields = [(field, object) for field in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")]
    for name, each, file in (
        ("train", TRAIN, folder / "devkit" / "cars_train_annos.mat"),
        ("test", TEST, folder / "cars_test_annos_withlabels.mat"),
    ):
        kinds = [1 + number % len(names) for number in range(each * len(names))]
        rows = [(1, 1, 9, 9, kind, f"{number:05d}.jpg") for number, kind in enumerate(kinds, start=1)]
        _write(folder / f"cars_{name}" / row[5] for row in rows)
        savemat(file, {"annotations": np.array([rows], dtype=fields)})


def make_fgvc(root: Path, dataset: str) -> Path:
    """Writes three classes of an FGVC dataset and returns the folder that its archive unpacks to."""
    if dataset == "cub_200_2011":
        folder = root / dataset / "CUB_200_2011"
        make_birds(
            folder, {"1": "Sooty Albatross", "2": "Groove billed Ani", "10": "Red winged Blackbird"}, {}, uuid=False
        )
    elif dataset == "nabirds":
        folder = root / dataset / "nabirds"
        classes = {"295": "Black Scoter (Female/juvenile)", "817": "Osprey", "1010": "Lesser Goldfinch"}
        make_birds(folder, classes, {"0": "Birds", "22": "Hawks, Kites, and Eagles"}, uuid=True)
        (folder / "hierarchy.txt").write_text("22 0\n295 0\n817 22\n1010 0\n")
    else:
        folder = root / dataset
        make: dict[str, Callable[[Path], None]] = {
            "oxford_flowers": make_flowers,
            "stanford_dogs": make_dogs,
            "stanford_cars": make_cars,
        }
        make[dataset](folder)
    return folder


def make_class_folders(folder: Path, names: Iterable[str], each: int = 1) -> None:
    """Writes images of 20×16 pixels in folders; those of one folder differ from those of the next."""
    _write(folder / name / f"ILSVRC2012_val_{number:08d}.JPEG" for name in names for number in range(each))


def make_imagenet(root: Path, card: str, classes: int = 3, each: int = 2) -> Path:
    """Writes the first classes of an ImageNet test set and returns what holds the class folders."""
    wnids = imagenet_wnids()
    if card == "imagenet_1k":
        make_class_folders(root / "imagenet_1k" / "val", wnids[:classes], each)
        train = root / "imagenet_1k" / "train"
        _write(train / wnid / f"{wnid}_{number}.JPEG" for wnid in wnids[:3] for number in range(20))
        return root / "imagenet_1k" / "val"
    if card == "imagenet_c":
        for kind in ("gaussian_noise", "fog"):
            for severity in (1, 3):
                make_class_folders(root / card / kind / str(severity), wnids[:3], each)
        make_class_folders(root / card / "gaussian_noise" / "3", wnids[:classes], each)
        return root / card / "gaussian_noise" / "3"
    folder, names = {
        "imagenet_v2": ("imagenetv2-matched-frequency-format-val", [str(label) for label in range(1000)]),
        "imagenet_r": ("imagenet-r", [wnids[label] for label in subset_ids("imagenet_r")]),
        "imagenet_a": ("imagenet-a", [wnids[label] for label in subset_ids("imagenet_a")]),
        "imagenet_sketch": ("sketch", wnids),
        "objectnet": ("objectnet-1.0/images", ["air_freshener", *objectnet_folders()]),
    }[card]
    make_class_folders(root / card / folder, names[:classes], each)
    return root / card / folder


def make_pets(root: Path, breeds: int = 2, each: int = 3) -> Path:
    """Writes trimaps of Oxford-IIIT Pet: the left half of each image is a white pet, the right half black background.

    Args:
        root: The data root.
        breeds: Number of breeds.
        each: Images of each breed in trainval; two more are in test.

    Returns:
        The folder of the dataset.
    """
    folder = root / "oxford_pet_trimaps"
    (folder / "annotations" / "trimaps").mkdir(parents=True)
    (folder / "images").mkdir()
    lists: dict[str, list[str]] = {"trainval": [], "test": []}
    columns = np.arange(24)
    trimap = np.tile(np.where(columns < 11, 1, np.where(columns < 13, 3, 2)).astype(np.uint8), (16, 1))
    grey = np.tile(np.where(columns < 12, 255, 0).astype(np.uint8), (16, 1))
    for breed in range(breeds):
        for number in range(each + 2):
            name = f"Breed_{breed}_{number}"
            own = grey.copy()
            own[breed, :8] = 20 * number  # no two images are the same
            Image.fromarray(np.stack([own] * 3, axis=2)).save(folder / "images" / f"{name}.jpg", quality=95)
            Image.fromarray(trimap).save(folder / "annotations" / "trimaps" / f"{name}.png")
            lists["trainval" if number < each else "test"].append(f"{name} {breed + 1} 1 {breed + 1}")
    for stem, lines in lists.items():
        (folder / "annotations" / f"{stem}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
