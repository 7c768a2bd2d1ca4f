"""Fakes of the originals of VTAB-1k, in their authors' layouts and formats, tens of tiny images each.

The picture of an image tells its label (:func:`shade`), so that a test can see that both stayed together.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.io import savemat

from vpt.data.catalog.cards import load_card
from vpt.data.prepare.tfrecord import masked_crc32c

Pixels = NDArray[np.uint8]
CLEVR_NEAREST = {8.0: 0, 8.25: 1, 8.75: 2, 9.25: 3, 9.75: 4, 10.5: 5}
KITTI_NEAREST = {
    0: "Car 0.00 0 -1.57 1 2 3 4 1.5 1.6 3.7 1.0 1.7 7.50 -1.6\nVan 0 0 0 1 2 3 4 1.5 1.6 3.7 1.0 1.7 30.0 0\n",
    1: "Pedestrian 0.00 0 0 1 2 3 4 1.8 0.5 1.2 1.0 1.7 3.0 0\nTruck 0 0 0 1 2 3 4 1.5 1.6 3.7 1.0 1.7 20.0 0\n",
    2: "Van 0.00 0 0 1 2 3 4 1.5 1.6 3.7 1.0 1.7 20.1 0\n",
    3: "DontCare -1 -1 -10 1 2 3 4 -1 -1 -1 -1000 -1000 -1000 -10\nTram 0 0 0 1 2 3 4 3.5 2.6 20 1.0 1.7 5.0 0\n",
}


def shade(label: int) -> int:
    """Grey level that a label is drawn with."""
    return 8 + 6 * (label % 40)


def flat(label: int, size: int = 8) -> Pixels:
    """A square of one grey, uint8 (size, size, 3)."""
    return np.full((size, size, 3), shade(label), np.uint8)


def _encoded(label: int, kind: str = "JPEG") -> bytes:
    stream = BytesIO()
    Image.fromarray(flat(label)).save(stream, kind)
    return stream.getvalue()


def _image(file: Path, label: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(_encoded(label, "PNG" if file.suffix == ".png" else "JPEG"))


def class_names(task: str) -> list[str]:
    card = load_card(task)
    assert card is not None
    return card.class_names


def cifar(folder: Path, random: np.random.Generator) -> None:
    (folder / "cifar-100-binary").mkdir()
    for name, count in (("train", 30), ("test", 8)):
        labels = random.integers(0, 100, count).tolist()
        records = [bytes([label // 5, label]) + flat(label, 32).transpose(2, 0, 1).tobytes() for label in labels]
        (folder / "cifar-100-binary" / f"{name}.bin").write_bytes(b"".join(records))


def svhn(folder: Path, random: np.random.Generator) -> None:
    for name, count in (("train", 30), ("test", 8)):
        labels = random.permutation(np.arange(count) % 10)
        images = np.stack([flat(int(label), 32) for label in labels], axis=3)
        stored = np.where(labels == 0, 10, labels)[:, None].astype(np.uint8)
        savemat(folder / f"{name}_32x32.mat", {"X": images, "y": stored})


def camelyon(folder: Path, random: np.random.Generator) -> None:
    import h5py

    for name, count in (("train", 6), ("valid", 4), ("test", 4)):
        labels = random.permutation(np.arange(count) % 2)
        for kind, values in (
            ("x", np.stack([flat(int(label), 96) for label in labels])),
            ("y", labels.reshape(-1, 1, 1, 1).astype(np.uint8)),
        ):
            with h5py.File(folder / f"camelyonpatch_level_2_split_{name}_{kind}.h5", "w") as file:
                file[kind] = values


def caltech101(folder: Path, random: np.random.Generator) -> None:
    for label, name in enumerate(class_names("caltech101")):
        for number in range(34 if label % 40 == 7 else 1):  # 30 of a class are for training
            _image(folder / f"101_ObjectCategories/{name}/image_{number + 1:04d}.jpg", label)
    (folder / "101_ObjectCategories/BACKGROUND_Google/tmp").write_text("not an image, as in the original")


def dtd(folder: Path, random: np.random.Generator) -> None:
    names = class_names("dtd")
    (folder / "dtd/labels").mkdir(parents=True)
    for start, part in enumerate(("train", "val", "test")):
        lines = [
            f"{names[label]}/{names[label]}_{number:04d}.jpg" for label in (0, 20, 46) for number in (start, start + 3)
        ]
        (folder / f"dtd/labels/{part}1.txt").write_text("\n".join(lines) + "\n")
        for line in lines:
            _image(folder / "dtd/images" / line, names.index(line.partition("/")[0]))


def flowers(folder: Path, random: np.random.Generator) -> None:
    labels = random.integers(1, 103, 12)
    numbers = random.permutation(12) + 1
    for number, label in enumerate(labels.tolist(), start=1):
        _image(folder / f"jpg/image_{number:05d}.jpg", label - 1)
    savemat(folder / "imagelabels.mat", {"labels": labels[None]})
    savemat(folder / "setid.mat", {"trnid": numbers[None, :4], "valid": numbers[None, 4:7], "tstid": numbers[None, 7:]})


def pets(folder: Path, random: np.random.Generator) -> None:
    (folder / "annotations").mkdir()
    for part, numbers in (("trainval", (1, 2, 3)), ("test", (4, 5))):
        pairs = [
            (f"{name}_{number}", label)
            for label, name in enumerate(class_names("oxford_iiit_pet"))
            for number in numbers
        ]
        lines = [f"{name} {label + 1} {1 if name[0].isupper() else 2} 1" for name, label in pairs[::9]]
        (folder / f"annotations/{part}.txt").write_text("\n".join(lines) + "\n")
        for name, label in pairs[::9]:
            _image(folder / f"images/{name}.jpg", label)


def sun397(folder: Path, random: np.random.Generator) -> None:
    names = class_names("sun397")
    for start, part in enumerate(("tr", "va", "te")):
        paths = [f"{names[label][0]}/{names[label]}/sun_{part}{label}.jpg" for label in (0, 8, 200 + start, 396)]
        (folder / f"sun397_tfds_{part}.txt").write_text("".join(f"/{path}\n" for path in paths))
        for path, label in zip(paths, (0, 8, 200 + start, 396), strict=True):
            _image(folder / "SUN397" / path, label)


def eurosat(folder: Path, random: np.random.Generator) -> None:
    for label, name in enumerate(class_names("eurosat")):
        for number in range(1, 5):
            _image(folder / f"2750/{name}/{name}_{number}.jpg", label)


def resisc45(folder: Path, random: np.random.Generator) -> None:
    for label, name in enumerate(class_names("resisc45")):
        for number in range(1, 3):
            _image(folder / f"NWPU-RESISC45/{name}/{name}_{number:03d}.jpg", label)


def retinopathy(folder: Path, random: np.random.Generator) -> None:
    train, test = ["image,level"], ["image,level,Usage"]
    for patient in range(1, 6):
        name, grade = f"{patient}_{'left' if patient % 2 else 'right'}", patient % 5
        for part, rows, usage in (("train", train, ""), ("test", test, f",{'Public' if patient < 3 else 'Private'}")):
            (folder / part).mkdir(exist_ok=True)
            Image.fromarray(eye_photo(40, grade)).save(folder / part / f"{name}.jpeg")
            rows.append(f"{name},{grade}{usage}")
    (folder / "trainLabels.csv").write_text("\n".join(train) + "\n")
    (folder / "retinopathy_solution.csv").write_text("\n".join(test) + "\n")


def eye_photo(radius: int, label: int = 3) -> Pixels:
    """A disc of one grey on black, as wide as 3 radii and as high as 2, uint8 (2r, 3r, 3)."""
    rows, columns = np.ogrid[: 2 * radius, : 3 * radius]
    inside = (rows - radius) ** 2 + (columns - 1.5 * radius) ** 2 <= radius**2
    return np.where(inside[..., None], np.full(3, 60 + shade(label), np.uint8), np.uint8(0))


def clevr(folder: Path, random: np.random.Generator, by_count: bool) -> None:
    (folder / "CLEVR_v1.0/scenes").mkdir(parents=True)
    for part, count in (("train", 20), ("val", 8)):
        scenes = []
        for number in range(count):
            distance, label = list(CLEVR_NEAREST.items())[number % 6]
            objects = 3 + number % 8
            coordinates = [[1, 2, distance]] + [[1, 2, 11.0]] * (objects - 1)
            name = f"CLEVR_{part}_{number:06d}.png"
            scenes.append({
                "image_index": number, "image_filename": name, "split": part,
                "objects": [{"pixel_coords": place, "shape": "cube"} for place in coordinates],
            })  # fmt: skip
            _image(folder / f"CLEVR_v1.0/images/{part}/{name}", objects - 3 if by_count else label)
        (folder / f"CLEVR_v1.0/scenes/CLEVR_{part}_scenes.json").write_text(json.dumps({"scenes": scenes}))


def kitti(folder: Path, random: np.random.Generator) -> None:
    (folder / "training/label_2").mkdir(parents=True)
    (folder / "mapping").mkdir()
    for number in range(24):
        _image(folder / f"training/image_2/{number:06d}.png", number % 4)
        (folder / f"training/label_2/{number:06d}.txt").write_text(KITTI_NEAREST[number % 4])
    lines = [f"2011_09_26 2011_09_26_drive_{video:04d}_sync {frame:010d}" for video in range(6) for frame in range(4)]
    (folder / "mapping/train_mapping.txt").write_text("\n".join(lines) + "\n")
    (folder / "mapping/train_rand.txt").write_text(",".join(map(str, random.permutation(24) + 1)))


def dsprites(folder: Path, random: np.random.Generator, column: int, values: int) -> None:
    latents = np.zeros((40, 6), np.int64)
    latents[:, column] = random.integers(0, values, 40)
    images = np.zeros((40, 64, 64), np.uint8)
    for image, value in zip(images, latents[:, column].tolist(), strict=True):
        image[:, : 4 * (value * 16 // values)] = 1
    metadata = np.array({"title": "a pickle, as in the original"}, dtype=object)
    file = folder / "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz"
    np.savez_compressed(file, imgs=images, latents_classes=latents, metadata=metadata)


def norb_matrix(values: NDArray[Any]) -> bytes:
    """An array in the binary matrix format of NORB, uint8 or int32."""
    code = {"uint8": 0x1E3D4C55, "int32": 0x1E3D4C54}[values.dtype.name]
    sides = [*values.shape] + [1] * (3 - values.ndim)
    return struct.pack(f"<{2 + len(sides)}i", code, values.ndim, *sides) + values.tobytes()


def smallnorb(folder: Path, random: np.random.Generator, column: int, step: int) -> None:
    for stem in ("smallnorb-5x46789x9x18x6x2x96x96-training", "smallnorb-5x01235x9x18x6x2x96x96-testing"):
        info = random.integers(0, 9, (12, 4)).astype(np.int32)
        info[:, 2] *= 2
        first = np.stack([flat(label, 96)[..., 0] for label in (info[:, column] // step).tolist()])
        (folder / f"{stem}-dat.mat").write_bytes(norb_matrix(np.stack([first, 255 - first], axis=1)))
        (folder / f"{stem}-info.mat").write_bytes(norb_matrix(info))


def message(*fields: tuple[int, bytes | int]) -> bytes:
    """A protocol buffer message of byte strings and integers below 128."""
    parts = []
    for number, value in fields:
        if isinstance(value, int):
            parts.append(bytes([number << 3, value]))
        else:
            length = len(value)
            parts.append(
                bytes([number << 3 | 2])
                + (bytes([length & 127 | 128, length >> 7]) if length > 127 else bytes([length]))
                + value
            )
    return b"".join(parts)


def example(features: Mapping[str, bytes | int]) -> bytes:
    """A serialised tf.train.Example; integers are packed, as TensorFlow writes them."""
    entries = []
    for name, value in features.items():
        listed = (
            message((3, message((1, bytes([value]))))) if isinstance(value, int) else message((1, message((1, value))))
        )
        entries.append((1, message((1, name.encode()), (2, listed))))
    return message((1, message(*entries)))


def tfrecord(records: Iterable[bytes]) -> bytes:
    """A TFRecord file."""
    parts = []
    for data in records:
        length = struct.pack("<Q", len(data))
        parts += [length, struct.pack("<I", masked_crc32c(length)), data, struct.pack("<I", masked_crc32c(data))]
    return b"".join(parts)


def dmlab(folder: Path, random: np.random.Generator) -> None:
    for part, count in (("train", 8), ("validation", 4), ("test", 6)):
        labels = random.integers(0, 6, count).tolist()
        records = [example({"image": _encoded(label), "filename": b"a.jpg", "label": label}) for label in labels]
        for shard in range(2):
            name = f"dmlab-{part}.tfrecord-0000{shard}-of-00002"
            (folder / name).write_bytes(tfrecord(records[shard * count // 2 : (shard + 1) * count // 2]))


ORIGINALS: dict[str, Callable[[Path, np.random.Generator], None]] = {
    "cifar": cifar,
    "caltech101": caltech101,
    "dtd": dtd,
    "oxford_flowers102": flowers,
    "oxford_iiit_pet": pets,
    "svhn": svhn,
    "sun397": sun397,
    "patch_camelyon": camelyon,
    "eurosat": eurosat,
    "resisc45": resisc45,
    "diabetic_retinopathy": retinopathy,
    "clevr_count": lambda folder, random: clevr(folder, random, by_count=True),
    "clevr_dist": lambda folder, random: clevr(folder, random, by_count=False),
    "dmlab": dmlab,
    "kitti": kitti,
    "dsprites_loc": lambda folder, random: dsprites(folder, random, column=4, values=32),
    "dsprites_ori": lambda folder, random: dsprites(folder, random, column=3, values=40),
    "smallnorb_azi": lambda folder, random: smallnorb(folder, random, column=2, step=2),
    "smallnorb_ele": lambda folder, random: smallnorb(folder, random, column=1, step=1),
}


def make_original(task: str, folder: Path, seed: int = 0) -> Path:
    """Writes the fake of an original and returns its folder.

    Args:
        task: A key of `ORIGINALS`.
        folder: Created.
        seed: Of the labels.
    """
    folder.mkdir(parents=True)
    ORIGINALS[task](folder, np.random.default_rng(seed))
    return folder
