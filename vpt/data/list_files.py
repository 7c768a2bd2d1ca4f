"""Text that lists images: lists, tables, JSON and class names, read to the letter; what is wrong is said by line."""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vpt.data.images import ImageList, first_repeated, is_text, reason, regular_file
from vpt.errors import DataError, VPTWarning

SEPARATORS = {".csv": ",", ".tsv": "\t"}
_SIGNS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}

Table = dict[str, list[str]]


def read_text(file: Path, what: str = "a readable text file") -> str:
    """Reads a text file in UTF-8; a DataError that says `what` it is not where it cannot be read, or a line is none."""
    try:
        content = regular_file(file).read_bytes()
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(f"{file} is not {what}: line {line} is not UTF-8; save it as text in UTF-8.") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{file} is not {what} ({reason(error)}).") from error
    if "\0" in text:
        line = text.partition("\0")[0].count("\n") + 1
        raise DataError(f"{file} is not {what}: line {line} has a NUL; save it as text in UTF-8.")
    return text


def read_json(file: Path, what: str) -> Any:
    """Reads a JSON file; a DataError that says `what` it is not where it is none, or gives a key twice."""
    text = read_text(file, what)
    try:
        return json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is not {what} ({error}).") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError(f"the key {_repeated(key for key, _ in pairs)!r} is given twice")
    return content


def _repeated(names: Iterable[str]) -> str | None:
    """The first name that is there twice."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def read_table(
    file: Path,
    filled: Sequence[str],
    others: Sequence[str] = (),
    header: Sequence[str] | None = None,
    remedy: str = "",
) -> tuple[Table, list[int]]:
    """Reads a table, .csv, .tsv or .parquet, column by column without empty rows, all fields as text.

    A text file may separate its columns by a comma, a semicolon, a tab or a bar; `header` names the columns of one that
    has no header. Returns the columns by name, and the line of each row: from 1, a header included. A DataError where
    it cannot be read, a row has another number of fields than the header, a column is there twice, or one that is asked
    for is missing (`remedy` ends that sentence); `filled` ones also where a field is empty.
    """
    columns = [*filled, *others]
    if file.suffix.lower() == ".parquet":
        if header is not None:
            raise DataError(f"{file} names its columns itself: leave columns out.")
        names, rows, lines = _parquet_rows(file, columns, filled)
    else:
        names, rows, lines = _text_rows(file, columns, header, remedy)
    _check_header(file, names, columns, remedy)
    if not rows:
        raise DataError(f"{file} lists no images: it needs a row for each, below the names of the columns.")
    table = {name: [row[position] for row in rows] for position, name in enumerate(names)}
    for column in filled:
        if "" in table[column]:
            raise DataError(f"{file}, line {lines[table[column].index('')]}: the {column} is empty.")
    return table, lines


def _check_header(file: Path, names: Sequence[str], columns: Sequence[str], remedy: str) -> None:
    if (twice := _repeated(filter(None, names))) is not None:
        raise DataError(f"{file} has the column {twice!r} twice: remove or rename one.")
    missing = next((column for column in columns if column not in names), None)
    if missing is not None:
        found, wanted = ", ".join(map(repr, names)), ", ".join(map(repr, columns))
        raise DataError(f"{file} has no column {missing!r}; it has {found}, and is asked for {wanted}{remedy}.")


def _sign(file: Path, text: str, columns: Sequence[str], header: Sequence[str] | None) -> str:
    """The sign between columns: by which the first line has those that are asked for, else the most."""
    line = next(filter(str.strip, text.splitlines()), "")

    def fit(sign: str) -> tuple[bool, int]:
        fields = [field.strip() for field in next(csv.reader([line], delimiter=sign), [])]
        whole = set(columns) <= set(fields) if header is None else len(fields) == len(header)
        return whole, len(fields)

    own = SEPARATORS[file.suffix.lower()]
    return max([own, *_SIGNS], key=fit)  # the first of several


def _text_rows(
    file: Path, columns: Sequence[str], header: Sequence[str] | None, remedy: str
) -> tuple[list[str], list[list[str]], list[int]]:
    """Names of the columns, rows and lines of a text file. As text: 007 is a class name, and a class may be NA."""
    text = read_text(file, "a readable table")
    sign = _sign(file, text, columns, header)
    names = list(header or ())
    rows, lines, ended = [], [], 0
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=sign, strict=True)
    try:
        for fields in ([field.strip() for field in row] for row in reader):
            line, ended = ended + 1, reader.line_num
            if not any(fields):
                continue
            if not names:
                names = fields
                _check_header(file, names, columns, remedy)
            elif fields == names:
                raise DataError(f"{file}, line {line} names the columns: leave {'columns' if header else 'it'} out.")
            elif len(fields) != len(names):
                raise DataError(
                    f"{file}, line {line} has {len(fields)} field{'s'[: len(fields) - 1]} and "
                    f"{'the header' if header is None else 'columns names'} {len(names)}: correct it; a field with a "
                    f"{_SIGNS[sign]} in it stands in quotes."
                )
            else:
                rows.append(fields)
                lines.append(line)
    except csv.Error as error:
        raise DataError(
            f"{file}, line {ended + 1}: a quotation mark is not closed, or stands within a field ({error}); write it "
            "twice there."
        ) from error
    if not lines and (header or not names):
        raise DataError(f"{file} is empty: a table needs the columns {' and '.join(columns)}.")
    return names, rows, lines


def _parquet_rows(
    file: Path, columns: Sequence[str], filled: Sequence[str]
) -> tuple[list[str], list[list[str]], list[int]]:
    import pandas as pd

    try:
        frame = pd.read_parquet(regular_file(file))
        if odd := [name for name in filled if name in frame and frame[name].dtype.kind == "f"]:
            raise ValueError(f"its column {odd[0]!r} holds decimal numbers, or lacks some")
        for column in [name for name in columns if name in frame]:
            if any(np.iterable(field) and not isinstance(field, str) for field in frame[column]):
                raise ValueError(f"its column {column!r} holds neither text nor numbers")
        frame = frame.astype(object).where(frame.notna(), "").astype(str)
    except (OSError, ValueError) as error:  # pandas' and pyarrow's own errors are ValueErrors
        raise DataError(f"{file} is not a readable table ({' '.join(reason(error).split())}).") from error
    rows = [[field.strip() for field in row] for row in frame.to_numpy().tolist()]
    kept = [number for number, row in enumerate(rows) if any(row)]
    return [str(column) for column in frame], [rows[number] for number in kept], [number + 1 for number in kept]


def whole_number(text: str) -> int | None:
    """Reads a whole number of at most 18 digits as it is written; None where a text is none."""
    return int(text) if re.fullmatch(r"[+-]?[0-9]{1,18}", text) else None


def read_list(file: Path, folder: Path) -> ImageList:
    """Reads a UTF-8 file of ``path<whitespace>label`` lines, label last; paths may contain spaces.

    They are relative to a folder; empty lines are skipped. A DataError where the file cannot be read or is empty, a
    line has no integer label, or an image is listed twice.
    """
    paths, labels, lines = [], [], []
    for number, line in enumerate(read_text(file, "a readable list of images").split("\n"), start=1):
        fields = line.rsplit(maxsplit=1)
        if not fields:
            continue
        if len(fields) < 2 or (label := whole_number(fields[1])) is None:
            found = line.strip("\r")
            raise DataError(
                f"{file}, line {number}: expected 'path<whitespace>label' with an integer label, found {found!r}."
            )
        paths.append(fields[0].strip())
        labels.append(label)
        lines.append(number)
    if not paths:
        raise DataError(f"{file}: the list is empty; it needs one 'path<whitespace>label' a line.")
    if (twice := first_repeated(paths, folder)) is not None:
        first, again = (lines[position] for position in twice)
        raise DataError(f"{file}, line {again}: {paths[twice[1]]} is listed on line {first} already; remove one line.")
    return ImageList(file, folder, paths, np.asarray(labels, dtype=np.int64), lines)


def class_name(written: str) -> str:
    """Returns a class name in one form of Unicode (NFC), whatever form a file system or an editor has given it."""
    return unicodedata.normalize("NFC", written)


def check_class_names(names: Sequence[str], source: Path, least: int = 2) -> None:
    """Checks the names of a task's classes, which `source` gives.

    A DataError where there are fewer than `least`, two are equal, or one is empty or no text; a warning where two
    differ in case, blanks or leading zeros only.
    """
    if len(names) < least:
        raise DataError(
            f"{source} has only one class, {names[0]!r}: a classifier tells two or more apart; add images of another, "
            "for instance of what it is not."
        )
    if (twice := _repeated(names)) is not None:
        raise DataError(f"{source} names the class {twice!r} twice: rename one of them.")
    for name in names:
        if not name.strip() or not is_text(name):
            raise DataError(f"{source} has a class {name!r}, which cannot be printed: rename it.")
    seen: dict[str, str] = {}
    for name in names:
        plain = " ".join(name.casefold().split())
        other = seen.setdefault(plain.lstrip("0") if plain.isdecimal() else plain, name)
        if other != name:
            text = (
                f"{source} has the classes {other!r} and {name!r}, which differ in case, blanks or leading zeros only"
            )
            warnings.warn(f"{text}: rename one if they are the same.", VPTWarning, stacklevel=2)
