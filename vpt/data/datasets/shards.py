"""Images inside other files: shards of tar as WebDataset writes them, and Parquet with embedded images.

Nothing is unpacked: an image of a tar file is read from its place, one of Parquet with its row group. Shards may lie at
any address of fsspec, such as ``hf://datasets/...`` or ``s3://...``, where the package that reads it is installed.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, cast

import fsspec  # type: ignore[import-untyped]
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vpt.data.cache.content_hashes import Hashes, content_hash, file_state, is_settled, kept_hashes
from vpt.data.datasets.table import UNDERSTOOD, Lists, Rows, label_rows, split_name
from vpt.data.images import ImageList, decode_content, is_image_name, reason
from vpt.errors import DataError

SUFFIXES = (".tar", ".parquet")
_GROUPS = 4  # row groups that a process keeps: images of one are often asked for one after another


@dataclass(frozen=True)
class Shard:
    """A file that holds images: its address, its name below the root, and what changes with it."""

    address: str
    name: str
    state: str

    @property
    def remote(self) -> bool:
        """Whether it is read through fsspec."""
        return is_address(self.address)

    def read(self, start: int, end: int) -> bytes:
        """Bytes from one place to another."""
        if self.remote:
            system, path = _system(self.address)
            content: bytes = system.cat_file(path, start=start, end=end)
            return content
        return os.pread(_opened(self.address, os.getpid()), end - start, start)


@dataclass(frozen=True)
class PackedList(ImageList):
    """Images inside shards: `paths` are names of shard and image, `places` int64 (N, 3) where each lies.

    Of a tar file that is its shard, where it starts and where it ends; of Parquet its shard, row group and row there.
    """

    shards: Sequence[Shard]
    columns: Sequence[str]
    places: NDArray[np.int64]

    def take(self, positions: NDArray[np.int64]) -> PackedList:
        """Returns the list of the images at some positions, int64 (M,)."""
        paths = [self.paths[position] for position in positions]
        return replace(self, paths=paths, labels=self.labels[positions], places=self.places[positions])

    def joined(self, other: ImageList) -> PackedList:
        """See `ImageList`."""
        places = np.concatenate([self.places, cast("PackedList", other).places])
        labels = np.concatenate([self.labels, other.labels])
        return replace(self, paths=[*self.paths, *other.paths], labels=labels, places=places)

    def content(self, position: int) -> bytes:
        """The image as it is encoded; an OSError where it cannot be read."""
        number, first, second = map(int, self.places[position])
        shard = self.shards[number]
        if not self.columns[number]:
            return shard.read(first, second)
        with _lock(os.getpid()):
            return _row_group(shard.address, first, self.columns[number], os.getpid())[second]

    def decode(self, position: int) -> Any:
        """See `ImageList`."""
        try:
            return decode_content(self.content(position))
        except Exception as error:  # PIL raises a dozen unrelated types on damaged files.
            raise DataError(f"{self.paths[position]} of {self.folder} cannot be decoded ({reason(error)}).") from error

    def contents(self) -> Hashes:
        """Returns the hash of each image's bytes, as those of files are."""
        about = json.dumps([[shard.name, shard.state] for shard in self.shards])
        about += content_hash(self.places.tobytes()).hex()
        local = [shard.address for shard in self.shards if not shard.remote]
        return kept_hashes(self.title, about, local, len(self), self._content)

    def _content(self, position: int) -> bytes:
        try:
            return content_hash(b"", self.content(position))
        except Exception as error:  # of whatever reads the address
            raise OSError(str(error)) from error

    def state(self, position: int) -> bytes | None:
        """See `ImageList`: that of the shard when it was listed, and the place in it."""
        shard = self.shards[int(self.places[position, 0])]
        if not shard.remote and not is_settled(file_state(shard.address)[1]):
            return None
        return content_hash(shard.state.encode(), self.places[position].tobytes())


def is_address(root: str | Path) -> bool:
    """Whether a root is an address of fsspec and no path of this machine."""
    return re.match(r"[a-z][a-z0-9+.-]*://", str(root)) is not None


def find_shards(root: str | Path) -> list[Shard]:
    """Lists the shards that a root is, or holds beside no folder of images; none where it is something else.

    A DataError where nothing can be read at an address, or no package here reads it.
    """
    if is_address(root):
        return _remote(str(root))
    root = Path(root)
    if root.is_file():
        return [_local(root, root.name)] if _holds_images(root) else []
    homes = [root, *(Path(each.path) for each in _entries(root) if Path(each.path).is_dir())]
    found = [Path(each.path) for home in homes for each in _entries(home) if each.name.lower().endswith(SUFFIXES)]
    shards = [path for path in found if path.is_file() and _holds_images(path)]
    if not shards or _has_photos(root):
        return []
    return [_local(path, path.relative_to(root).as_posix()) for path in shards]


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What lies in a folder, by name; nothing where it cannot be read, which listing its photos then says."""
    try:
        return sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return []


def _local(path: Path, name: str) -> Shard:
    return Shard(str(path.resolve()), name, file_state(path)[0].decode())


def _has_photos(root: Path) -> bool:
    return any(is_image_name(name) for _, _, names in os.walk(root) for name in names if not name.startswith("."))


def _holds_images(path: Path) -> bool:
    """Whether a file is tar, or Parquet with a column of images: a table of paths is none."""
    if path.suffix.lower() == ".tar":
        return True
    try:
        return path.suffix.lower() == ".parquet" and bool(_image_columns(pq.read_schema(path)))
    except (OSError, pa.ArrowInvalid):
        return False


def _remote(address: str) -> list[Shard]:
    system, path = _system(address)
    scheme = address.partition("://")[0]
    try:
        files = [path] if system.isfile(path) else sorted(system.find(path))
        shards = [each for each in files if PurePosixPath(each).suffix.lower() in SUFFIXES]
        states = [str(system.ukey(each)) for each in shards]
    except Exception as error:  # of whatever reads the address
        raise DataError(f"{address} cannot be read ({reason(error)}): mend the address, or log in.") from error
    if not shards:
        raise DataError(f"{address} holds no shards: they are files {' or '.join(SUFFIXES)}.")
    names = [each.removeprefix(path).strip("/") or PurePosixPath(each).name for each in shards]
    return [Shard(f"{scheme}://{each}", name, state) for each, name, state in zip(shards, names, states, strict=True)]


@lru_cache(maxsize=8)
def _file_system(scheme: str, process: int) -> Any:
    """That of a scheme, in each process anew: connections do not live through a fork."""
    return fsspec.filesystem(scheme)


def _system(address: str) -> tuple[Any, str]:
    scheme = address.partition("://")[0]
    try:
        system = _file_system(scheme, os.getpid())
    except (ImportError, ValueError) as error:
        raise DataError(f"{address} cannot be read here ({error}).") from error
    return system, system._strip_protocol(address)


@lru_cache(maxsize=64)
def _opened(path: str, process: int) -> int:
    return os.open(path, os.O_RDONLY)


@lru_cache(maxsize=1)
def _lock(process: int) -> threading.Lock:
    """What threads take turns by: a Parquet file is not read by several at once."""
    return threading.Lock()


@lru_cache(maxsize=64)
def _parquet(address: str, process: int) -> pq.ParquetFile:
    if is_address(address):
        system, path = _system(address)
        return pq.ParquetFile(system.open(path))
    return pq.ParquetFile(address)


@lru_cache(maxsize=_GROUPS)
def _row_group(address: str, group: int, column: str, process: int) -> list[bytes]:
    """The images of a row group, encoded; a missing one as no bytes."""
    values = _parquet(address, process).read_row_group(group, columns=[column], use_threads=False).column(0)
    rows = values.to_pylist()
    return [(row.get("bytes") if isinstance(row, dict) else row) or b"" for row in rows]


def read_shards(root: str | Path, shards: Sequence[Shard], label: str, column: str | None) -> Lists:
    """Lists the images of shards, split by split.

    Args:
        root: What they were found in.
        shards: Of one kind or several.
        label: Of Parquet, and of JSON beside the images of tar, the name of what holds the class.
        column: Of Parquet, the column of images; None where there is one.

    Raises:
        DataError: An image has no class, some shards name a split and others none, or there is nothing to train on.
    """
    home = Path(str(root))
    found: dict[str, Rows] = {}
    places: dict[str, list[tuple[int, int, int]]] = {}
    columns = ["" for _ in shards]
    splits = [_split_of(shard.name) for shard in shards]
    if None in splits and any(splits):
        unnamed = shards[splits.index(None)].name
        raise DataError(f"{unnamed} names no split, and other shards do: name all by {UNDERSTOOD}.")
    for number, shard in enumerate(shards):
        split = splits[number] or "train"
        rows, where = found.setdefault(split, Rows(home)), places.setdefault(split, [])
        if shard.address.lower().endswith(".tar"):
            each = _members(shard, label)
        else:
            columns[number] = column or _image_column(shard)
            each = _rows(shard, columns[number], label)
        for name, label_name, first, second in each:
            rows.paths.append(f"{shard.name}/{name}")
            rows.names.append(label_name)
            where.append((number, first, second))
    if "train" not in found or not all(rows.paths for rows in found.values()):
        raise DataError(f"{root} has no images to train on: name shards by {UNDERSTOOD}, or leave splits out of names.")
    class_names, lists = label_rows(home, found)
    packed: dict[str, Any] = {}
    for split, images in lists.items():
        where_now = np.array(places[split], dtype=np.int64)
        packed[split] = PackedList(
            home, home, images.paths, images.labels, (), shards=shards, columns=columns, places=where_now
        )
    return class_names, packed


def _split_of(name: str) -> str | None:
    """The split that a shard's name or folder says: ``train-0000.tar``, ``data/validation-00000-of-00001.parquet``."""
    path = PurePosixPath(name)
    parts = [re.sub(r"[-_.]?\d+([-_]of[-_]\d+)?$", "", part) for part in (*path.parts[:-1], path.stem)]
    words = [word for part in parts for word in (part, *re.split(r"[^A-Za-z]+", part))]
    return next((found for word in words if (found := split_name(word, name)) is not None), None)


def _members(shard: Shard, label: str) -> Iterator[tuple[str, str, int, int]]:
    """Yields name, class, start and end of each image of a tar file."""
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        system, path = _system(shard.address) if shard.remote else (None, shard.address)
        with (
            system.open(path) if system else Path(path).open("rb") as file,
            tarfile.open(fileobj=file, mode="r:") as tar,
        ):
            for member in tar:
                if member.isreg():
                    home, _, name = member.name.rpartition("/")
                    stem, _, suffix = name.partition(".")
                    samples.setdefault(f"{home}/{stem}".lstrip("/"), {})[suffix.lower()] = member
    except (OSError, tarfile.TarError) as error:
        raise DataError(
            f"{shard.name} is no tar file that can be read ({reason(error)}): it must not be compressed."
        ) from error
    for key, parts in samples.items():
        image = next((member for suffix, member in parts.items() if is_image_name(f".{suffix}")), None)
        if image is not None:
            yield image.name, _class_of(shard, key, parts, label), image.offset_data, image.offset_data + image.size


def _class_of(shard: Shard, key: str, parts: Mapping[str, tarfile.TarInfo], label: str) -> str:
    """Of ``.cls``, of JSON, or else the folder that the image lies in."""

    def text(suffix: str) -> str:
        member = parts[suffix]
        content = shard.read(member.offset_data, member.offset_data + member.size)
        return content.decode("utf-8", "replace").strip()

    if "cls" in parts and (found := text("cls")):
        return found
    if "json" in parts:
        try:
            told = json.loads(text("json"))
        except ValueError as error:
            raise DataError(f"{shard.name}: {key}.json is no JSON ({error}).") from error
        if isinstance(told, dict) and isinstance(told.get(label), int | str):
            return str(told[label])
    home = key.rpartition("/")[0].rpartition("/")[2]
    if home in ("", "."):
        raise DataError(
            f"{shard.name}: {key} has no class: it needs {key}.cls, {key}.json with {label!r}, or a folder named by it."
        )
    return home


def _image_columns(schema: pa.Schema) -> list[str]:
    """Columns of encoded images: bytes, or Hugging Face's structure of bytes and path."""

    def embeds(kind: pa.DataType) -> bool:
        if pa.types.is_struct(kind):
            return any(field.name == "bytes" for field in kind)
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    return [field.name for field in schema if embeds(field.type)]


def _image_column(shard: Shard) -> str:
    found = _image_columns(_parquet(shard.address, os.getpid()).schema_arrow)
    if len(found) != 1:
        raise DataError(
            f"{shard.name} has {len(found)} columns of images{f' ({chr(44).join(found)})' if found else ''}: name one "
            "by path_column."
        )
    return found[0]


def _rows(shard: Shard, column: str, label: str) -> Iterator[tuple[str, str, int, int]]:
    """Yields name, class, row group and row of each image of a Parquet file."""
    file = _parquet(shard.address, os.getpid())
    names = file.schema_arrow.names
    if missing := [name for name in (column, label) if name not in names]:
        option = "path_column" if missing[0] == column else "label_column"
        raise DataError(f"{shard.name} has no column {missing[0]!r}; it has {', '.join(names)}: name one by {option}.")
    known = _class_names(file.schema_arrow, label)
    number = 0
    for group in range(file.num_row_groups):
        labels = file.read_row_group(group, columns=[label], use_threads=False).column(0).to_pylist()
        for row, value in enumerate(labels):
            if not (isinstance(value, int) and 0 <= value < len(known) if known else isinstance(value, int | str)):
                raise DataError(f"{shard.name}, row {number}: {label} is {value!r}: give a class, or remove the row.")
            yield f"{number:06d}", known[value] if known else str(value), group, row
            number += 1


def _class_names(schema: pa.Schema, label: str) -> list[str]:
    """The names that Hugging Face's datasets write beside numbers; none where there are none."""
    try:
        told = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        names = told["info"]["features"][label]["names"]
    except (ValueError, KeyError, TypeError):
        return []
    return [str(name) for name in names] if isinstance(names, list) else []
