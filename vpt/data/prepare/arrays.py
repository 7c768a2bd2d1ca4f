"""Originals that are arrays: CIFAR-100, SVHN, PatchCamelyon, dSprites, smallNORB."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vpt.data.catalog.cards import Card
from vpt.data.datasets.published_files import damaged, read_mat
from vpt.data.prepare.originals import Part, home, pixels
from vpt.errors import DataError

_CIFAR_RECORD = 2 + 3 * 32 * 32  # coarse label, fine label, then the red, green and blue plane
_DSPRITES = "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz"
_NORB = {
    "train": "smallnorb-5x46789x9x18x6x2x96x96-training",
    "test": "smallnorb-5x01235x9x18x6x2x96x96-testing",
}
_NORB_TYPES: dict[int, np.dtype[Any]] = {0x1E3D4C55: np.dtype(np.uint8), 0x1E3D4C54: np.dtype("<i4")}


def read_cifar100(source: Path, card: Card) -> dict[str, Part]:
    """The binary version, ``train.bin`` and ``test.bin``; the Python version is a pickle, which is never opened."""
    folder = home(source, "train.bin", "test.bin")

    def part(name: str) -> Part:
        file = folder / f"{name}.bin"
        size = file.stat().st_size
        if not size or size % _CIFAR_RECORD:
            raise damaged(file, f"records of {_CIFAR_RECORD} bytes", f"it has {size} bytes")
        records = np.memmap(file, np.uint8, "r").reshape(-1, _CIFAR_RECORD)
        return pixels(name, records[:, 1], lambda position: records[position, 2:].reshape(3, 32, 32).transpose(1, 2, 0))

    return {name: part(name) for name in ("train", "test")}


def read_svhn(source: Path, card: Card) -> dict[str, Part]:
    """The cropped digits, ``train_32x32.mat`` and ``test_32x32.mat``: X (32, 32, 3, N), y (N, 1)."""
    folder = home(source, "train_32x32.mat", "test_32x32.mat")

    def part(name: str) -> Part:
        file = folder / f"{name}_32x32.mat"
        images, labels = read_mat(file, "X", "y")
        if images.shape != (32, 32, 3, labels.size) or images.dtype != np.uint8:
            raise damaged(file, "32×32 images with a label each", f"X has the shape {images.shape}, y {labels.shape}")
        return pixels(name, svhn_digit(labels.ravel()), lambda position: images[..., position])

    return {name: part(name) for name in ("train", "test")}


def svhn_digit(stored: NDArray[np.integer]) -> NDArray[np.int64]:
    """The digit, int64 (N,) in 0..9; 0 is stored as 10."""
    return stored.astype(np.int64) % 10


def read_camelyon(source: Path, card: Card) -> dict[str, Part]:
    """``camelyonpatch_level_2_split_{train,valid,test}_{x,y}.h5``: x (N, 96, 96, 3), y (N, 1, 1, 1)."""
    stem = "camelyonpatch_level_2_split"
    folder = home(source, *(f"{stem}_{name}_{kind}.h5" for name in ("train", "valid", "test") for kind in "xy"))

    def part(name: str) -> Part:
        images = _open_h5(folder / f"{stem}_{name}_x.h5", "x")
        labels = _open_h5(folder / f"{stem}_{name}_y.h5", "y")[()].ravel()
        if images.shape[1:] != (96, 96, 3) or len(images) != len(labels):
            what = f"x has the shape {images.shape} for {len(labels)} labels"
            raise damaged(folder / f"{stem}_{name}_x.h5", "96×96 images with a label each", what)
        return pixels(name, labels, lambda position: np.asarray(images[position], dtype=np.uint8))

    return {name: part(name) for name in ("train", "valid", "test")}


def dsprites(label: Callable[[NDArray[np.int64]], NDArray[np.int64]]) -> Callable[[Path, Card], dict[str, Part]]:
    """Makes the reader of dSprites for a label of ``latents_classes`` (N, 6): colour, shape, scale, orientation, x, y.

    Its metadata are a pickle, which is never opened.
    """

    def read(source: Path, card: Card) -> dict[str, Part]:
        file = home(source, _DSPRITES) / _DSPRITES
        try:
            with np.load(file, allow_pickle=False) as archive:
                images, latents = archive["imgs"], archive["latents_classes"]
        except Exception as error:  # zipfile, zlib and numpy each have their own
            raise damaged(file, "an archive with imgs and latents_classes", error) from error
        if images.shape != (len(latents), 64, 64) or latents.shape[1:] != (6,):
            raise damaged(file, "64×64 images with six latents each", f"imgs has the shape {images.shape}")
        return {"train": pixels("train", label(latents), lambda position: images[position].astype(np.uint8) * 255)}

    return read


def dsprites_bin(latent: NDArray[np.integer], values: int) -> NDArray[np.int64]:
    """Sixteen bins of a latent (N,) of 32 x positions, by 2, or 40 orientations, by 2.5: int64 (N,), 0..15."""
    return latent.astype(np.int64) * 16 // values


def smallnorb(label: Callable[[NDArray[np.int32]], NDArray[np.int64]]) -> Callable[[Path, Card], dict[str, Part]]:
    """Makes the reader of smallNORB, first camera, for a label of ``info``: instance, elevation, azimuth, lighting."""

    def read(source: Path, card: Card) -> dict[str, Part]:
        folder = home(source, *(f"{stem}-{kind}.mat" for stem in _NORB.values() for kind in ("dat", "info")))
        return {
            name: part(name, folder / f"{stem}-dat.mat", folder / f"{stem}-info.mat") for name, stem in _NORB.items()
        }

    def part(name: str, dat: Path, info: Path) -> Part:
        images, records = read_matrix(dat), read_matrix(info)
        if images.shape[1:] != (2, 96, 96) or records.shape != (len(images), 4):
            raise damaged(dat, "stereo pairs of 96×96 with four numbers each", f"its shape is {images.shape}")
        return pixels(name, label(records), lambda position: np.asarray(images[position, 0]))

    return read


def smallnorb_azimuth(info: NDArray[np.integer]) -> NDArray[np.int64]:
    """Azimuth, stored as 0, 2, .. 34 in tens of degrees, as label 0 to 17."""
    return info[:, 2].astype(np.int64) // 2


def smallnorb_elevation(info: NDArray[np.integer]) -> NDArray[np.int64]:
    """Elevation, stored as 0 to 8 (30° to 70° by 5°), which is the label."""
    return info[:, 1].astype(np.int64)


def read_matrix(file: Path) -> NDArray[Any]:
    """Maps an unpacked file in the binary matrix format of NORB (LeCun et al. 2004), of uint8 or int32, read-only.

    Little-endian int32 for the type's code, the number of dimensions and each of them (at least three are stored); then
    the elements. A DataError where it is not in that format, or truncated.
    """
    what = "an unpacked NORB matrix"
    with file.open("rb") as stream:
        code, dimensions, *sides = np.frombuffer(stream.read(40).ljust(40, b"\0"), "<i4").tolist()
    if code not in _NORB_TYPES:
        raise damaged(file, what, "it does not begin with the code of bytes or integers; unpack .gz files first")
    shape = tuple(sides[:dimensions])
    if not 1 <= dimensions <= len(sides) or min(shape) < 1:
        raise damaged(file, what, f"it states the shape {shape} in {dimensions} dimensions")
    kind, offset, size = _NORB_TYPES[code], 8 + 4 * max(3, dimensions), file.stat().st_size
    stated = offset + math.prod(shape) * kind.itemsize
    if size != stated:
        raise damaged(file, what, f"it has {size} bytes and states {stated}")
    return np.memmap(file, kind, "r", offset, shape)


def _open_h5(file: Path, name: str) -> Any:
    try:
        import h5py
    except ImportError:
        raise DataError(f"{file} is an HDF5 file, which needs h5py: pip install 'vpt[data]'.") from None
    try:
        return h5py.File(file, "r")[name]
    except (OSError, KeyError) as error:
        raise damaged(file, f"an HDF5 file with {name}", error) from error
