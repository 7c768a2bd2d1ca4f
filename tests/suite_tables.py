"""The tables of docs/suites, made of the cards, the configs and the rules of the splits.

``python -m tests.suite_tables`` writes them, as `benchmarks.docs` writes the tables of measured numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import yaml

from benchmarks.docs import write_blocks
from vpt.data.catalog.cards import Card, card_names, load_card
from vpt.data.catalog.overview import MANY_SETS
from vpt.data.prepare.vtab_tasks import TASKS

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
DOCS = ROOT / "docs"
SUITES = ("vtab", "fgvc", "imagenet", "segmentation", "demo")
OTHERS = {
    "vtab": ("pacs7_photo", "signdigits10"),
    "imagenet": ("flickr_in1k_1000", "shape_texture16"),
    "segmentation": ("oxford_pet_trimaps", "shape_scenes"),
}
"""Tasks that a page has beside those of the suite of its name."""
SPLIT = ("train800", "train", "val200", "val", "train800val200", "trainval", "test")
GROUPS = ("natural", "specialized", "structured")


def page(suite: str) -> Path:
    """Where the documentation of a suite is."""
    return DOCS / "segmentation.md" if suite == "segmentation" else DOCS / "suites" / f"{suite}.md"


def cards(suite: str) -> list[Card]:
    """The cards of a suite: VTAB's in the order of the paper, others by name."""
    names = TASKS if suite == "vtab" else card_names()
    return [card for name in names if (card := load_card(name)) is not None and card.suite == suite]


def other_cards(suite: str) -> list[Card]:
    """The cards of the other tasks of a page."""
    return [card for name in OTHERS.get(suite, ()) if (card := load_card(name)) is not None]


def configs(suite: str) -> list[Path]:
    """The configs that belong on a page; ``configs/local/folder.yaml`` is for no suite."""
    local = {"vtab": ("pacs_photo.yaml", "signdigits10.yaml"), "demo": ("shapes.yaml",)}.get(suite, ())
    alone = [CONFIGS / "demo.yaml"] if suite == "demo" else []
    return [*alone, *sorted((CONFIGS / suite).glob("*.yaml")), *(CONFIGS / "local" / name for name in local)]


def blocks(suite: str) -> dict[str, str]:
    """All blocks that the page of a suite has."""
    own, others = cards(suite), other_cards(suite)
    made: dict[str, str] = {}
    if own:
        made["tasks"] = tasks(own)
    if others:
        made["other tasks" if own else "tasks"] = tasks(others)
    if suite in ("vtab", "fgvc", "demo"):
        made["configs"] = recipes(configs(suite))
    if suite in ("fgvc", "imagenet"):
        made["papers"] = papers(own)
        made["layout"] = layouts(own)
    if any(card.published for card in own):
        made["published"], made["sources"] = published(own)
    return made


def tasks(chosen: Sequence[Card]) -> str:
    """What each dataset is."""
    grouped = any(card.group for card in chosen)
    head = ["task", *(["group"] if grouped else []), "classes", "train", "val", "test", "metric", "to get", "licence"]
    rows = []
    for card in chosen:
        metric = "mIoU" if card.name in OTHERS["segmentation"] else "top-1"
        got = "built in" if card.suite == "demo" else "fetched" if card.downloads else "by hand"
        group = [card.group] if grouped else []
        rows.append([f"`{card.name}`", *group, _classes(card), *_sizes(card), metric, got, card.licence])
    return _table(head, rows, {"classes", "train", "val", "test"})


def _classes(card: Card) -> str:
    return (f"{card.tested_classes:,} of " if card.tested_classes else "") + f"{card.num_classes:,}"


def _sizes(card: Card) -> tuple[str, str, str]:
    sizes = card.sizes
    train, val = (next((sizes[each] for each in names if each in sizes), None) for names in (SPLIT[:2], SPLIT[2:4]))
    if train is None and "trainval" in sizes:
        train, rest = sizes["trainval"], "out of train"
    else:
        rest = "–"
    more = "".join(f", {name.removeprefix('shift_')} {size:,}" for name, size in sizes.items() if name not in SPLIT)
    many = f"{MANY_SETS} × " if card.name == "imagenet_c" else ""
    split = TASKS[card.name].split if card.name in TASKS else None
    return (
        "–" if train is None else f"{train:,}{f' of {split.train}' if split else ''}",
        rest if val is None else f"{val:,}{f' of {split.val}' if split else ''}",
        f"{many}{sizes['test']:,}{f' = {split.test}' if split else more}",
    )


def papers(chosen: Sequence[Card]) -> str:
    """Who made each dataset."""
    return "\n".join(f"- `{card.name}`: {card.citation.rstrip('.')}." for card in chosen)


def layouts(chosen: Sequence[Card]) -> str:
    """The folder of each dataset."""
    trees = "\n".join(card.layout.rstrip().replace("<root>/", "") for card in chosen)
    return f"```text\n{trees}\n```"


def recipes(files: Sequence[Path]) -> str:
    """What the configs say; those that say the same share a row."""
    found: dict[tuple[str, ...], list[str]] = {}
    for file in files:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        model, data = content["model"]["init_args"], content["data"]["init_args"]
        values = (
            f"`{model['backbone']}`",
            data.get("preset", "square"),
            str(content["trainer"]["max_epochs"]),
            str(data["batch_size"]),
            str(model["num_tokens"]),
            f"{model['optimizer']} {model['base_lr']:g}",
        )
        found.setdefault(values, []).append(f"`{file.relative_to(ROOT).as_posix()}`")
    head = ["backbone", "preset", "epochs", "batch", "prompts", "optimizer, `base_lr`", "configs"]
    return _table(
        head, [[*values, ", ".join(names)] for values, names in found.items()], {"epochs", "batch", "prompts"}
    )


def published(chosen: Sequence[Card]) -> tuple[str, str]:
    """Published numbers, a column for each method and source; and the sources."""
    sources: dict[str, int] = {}
    cells: dict[tuple[int, str], dict[str, float]] = {}
    for card in chosen:
        for row in card.published:
            preset = f", preset {row['preset']}" if "preset" in row else ""
            number = sources.setdefault(f"{row['source']}; {row['backbone']}{preset}", len(sources) + 1)
            cells.setdefault((number, row["method"]), {})[card.name] = row["accuracy"]
    columns = sorted(cells, key=lambda column: column[0])  # stable: methods stay in the order of the cards
    rows = [[f"`{card.name}`", *(f"{cells[column].get(card.name, '–')}" for column in columns)] for card in chosen]
    if chosen[0].suite == "vtab":
        rows += _means(chosen, [cells[column] for column in columns])
    head = ["task", *(f"`{method}` ({number})" for number, method in columns)]
    return _table(head, rows, set(head[1:])), "\n".join(f"{number}. {source}" for source, number in sources.items())


def _means(chosen: Sequence[Card], columns: Sequence[dict[str, float]]) -> list[list[str]]:
    """Rows of means over groups, over all tasks and over the means of groups, where a column has all tasks."""
    groups = {group: [card.name for card in chosen if card.group == group] for group in GROUPS}
    rows = [[f"mean, {group}"] for group in GROUPS] + [[f"mean of {len(chosen)} tasks"], ["mean of 3 groups"]]
    for column in columns:
        parts = [[column[name] for name in names if name in column] for names in groups.values()]
        whole = len(column) == len(chosen)
        values = [fmean(part) for part in parts] + [fmean(column.values()), fmean(map(fmean, parts))] if whole else []
        for number, row in enumerate(rows):
            row.append(f"{values[number]:.2f}" if whole else "–")
    return rows


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], right: set[str]) -> str:
    rule = ["--:" if name in right else "---" for name in head]
    lines = [f"| {' | '.join(head)} |", f"|{'|'.join(rule)}|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


if __name__ == "__main__":
    for each in SUITES:
        for changed in write_blocks(page(each), blocks(each)):
            print(f"{page(each).relative_to(ROOT)}: {changed}")
