"""Writes vpt/data/catalog/classes/*.txt: the classes of ImageNet-1k and of its shifted test sets. No line is typed.

    python datasets/classes/make.py MAPPINGS

The ImageNet lists come from the installed timm (`timm/data/_info`, Apache-2.0). MAPPINGS is `objectnet-1.0/mappings` of
ObjectNet's archive (Barbu et al. 2019), which holds `folder_to_objectnet_label.json` and
`objectnet_to_imagenet_1k.json`; the WiSE-FT repository keeps the same two files in `src/datasets/objectnet_metadata`.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

TARGET = Path(__file__).parents[2] / "vpt" / "data" / "classes"


def lines(name: str) -> list[str]:
    """Returns the lines of one of timm's lists."""
    timm = find_spec("timm")
    if timm is None or timm.origin is None:
        raise SystemExit("timm is not installed.")
    return (Path(timm.origin).parent / "data" / "_info" / name).read_text(encoding="utf-8").splitlines()


def class_names(wnids: list[str], synonyms: list[str]) -> list[str]:
    """Returns a different name for each class: its first synonym, else all of them, else these and the WordNet id."""
    first = [each.split(", ")[0] for each in synonyms]
    short, whole = Counter(first), Counter(synonyms)
    return [
        one if short[one] == 1 else every if whole[every] == 1 else f"{every} ({wnid})"
        for wnid, one, every in zip(wnids, first, synonyms, strict=True)
    ]


def objectnet(mappings: Path, synonyms: list[str]) -> list[tuple[str, str, list[int]]]:
    """Returns folder, name and ImageNet ids of the classes that ObjectNet shares with ImageNet, by folder."""
    folders = json.loads((mappings / "folder_to_objectnet_label.json").read_text(encoding="utf-8"))
    matches = json.loads((mappings / "objectnet_to_imagenet_1k.json").read_text(encoding="utf-8"))
    ids = {each: position for position, each in enumerate(synonyms)}  # only "crane" occurs twice and is not matched
    rows = [
        (folder, name, sorted(ids[label] for label in matches[name].split("; ")))
        for folder, name in folders.items()
        if name in matches
    ]
    if len(rows) != len(matches):
        raise SystemExit(f"{mappings}: {len(matches)} classes are matched, {len(rows)} of them have a folder.")
    return sorted(rows)


def write(name: str, rows: list[str], comment: str) -> None:
    TARGET.mkdir(exist_ok=True)
    text = "\n".join([f"# {comment} Written by datasets/classes/make.py.", *rows])
    (TARGET / name).write_text(text + "\n", encoding="utf-8")


def main(mappings: Path) -> None:
    wnids = lines("imagenet_synsets.txt")
    lemmas = dict(line.split("\t") for line in lines("imagenet_synset_to_lemma.txt"))
    synonyms = [lemmas[wnid] for wnid in wnids]
    rows = [f"{wnid}\t{name}" for wnid, name in zip(wnids, class_names(wnids, synonyms), strict=True)]
    write("imagenet_1k.txt", rows, "WordNet id and name of ImageNet-1k's classes 0..999 (timm, Apache-2.0).")
    for subset in ("imagenet_a", "imagenet_r"):
        comment = f"ImageNet-1k ids of the classes of {subset} (timm, Apache-2.0)."
        write(f"{subset}.txt", lines(f"{subset}_indices.txt"), comment)
    matched = objectnet(mappings, synonyms)
    comment = "ObjectNet's folder, its name, the ImageNet-1k ids it matches (Barbu et al. 2019)."
    write("objectnet.txt", [f"{folder}\t{name}\t{','.join(map(str, ids))}" for folder, name, ids in matched], comment)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]))
