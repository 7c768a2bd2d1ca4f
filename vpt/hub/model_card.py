"""The model card: what was trained on what, how well it does on how many images, and what it is not for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import yaml

from vpt.deltas.registry import DeltaSpec
from vpt.image_size import as_size, sides
from vpt.run_record import epoch_rule, images_read, method_name
from vpt.screen import markdown

if TYPE_CHECKING:
    from vpt.data.catalog.cards import Card

Record = Mapping[str, Any]
_NAMES = {
    "acc": "accuracy",
    "mean_per_class": "mean accuracy over classes",
    "mean_ap": "mean average precision",
    "f1": "mean F1 score at a probability of 0.5",
    "mae": "mean absolute error",
    "r2": "R²",
}
_PURPOSES = {
    "multiclass": "telling the {classes} classes of {data} apart",
    "multilabel": "finding which of the {classes} classes of {data} an image shows",
    "regression": "estimating the numbers of {data} ({names})",
}
_NOT_SHOWN = ("loss", "n")
_PARTS = ("trainable", "total")
_COMPLETE = {True: "yes", False: "no, a part of it", None: "not known"}

_BODY = """# {title}

{what} Written by {writer}.

## How to load it

```python
import vpt

model = vpt.load({call})  # {kind} images (B, {channels}, {height}, {width}) to {outputs} (B, {classes})
```
{weights}
Images are prepared by the preset `{preset}`{read}; normalisation is inside the model. The delta file is safetensors and refuses other backbone weights than those it was trained on.

## What was trained

{facts}

## Results

{results}

## Intended use and limits

Meant for {purpose} on images like those it was trained on, and for research on prompt tuning and other small deltas. The numbers above hold for the test images and the preprocessing named, for one seed, and say nothing on images from elsewhere: {elsewhere} before you rely on it. What the backbone learned in pretraining, its biases included, is still there. Do not decide about people with it.

## Licences

{licences}
"""  # noqa: E501  # paragraphs of Markdown


def model_card(repo: str, header: Record, record: Record, stored: int) -> str:
    """Writes the card, README.md, with YAML front matter in the form that the hub's leaderboards read.

    Args:
        repo: ``user/name``.
        header: Of the delta file, without places of this machine.
        record: Its ``run.json`` likewise, or what the delta file knows of it; may be empty.
        stored: Numbers in the delta file.
    """
    from vpt.data.catalog.cards import load_card  # when used: vpt.data is made of Lightning's data modules

    data = record.get("data") or {}
    card = load_card(data["name"]) if "name" in data else None
    measured = list(_measured(record))
    title = repo.partition("/")[2]
    backbone = header["backbone"]
    elsewhere = backbone["weights_id"].startswith("file:")
    weights = f"\n`weights` is the file {backbone['weights']} of the backbone, which is not uploaded.\n"
    name = markdown(card.title if card else data.get("name", "its training data"))
    height, width = sides(as_size(backbone["image_size"]))
    body = _BODY.format(
        title=title,
        what=f"`{_method(header, record)}` on {backbone['weights_id']}, trained on {name}.",
        writer=f"vpt {record.get('versions', {}).get('vpt', '')}".strip(),
        call=f'"hf://{repo}"' + (', weights="…"' if elsewhere else ""),
        weights=weights if elsewhere else "",
        read=_read(header["preset"].get("channels")),
        kind="uint8" if isinstance(backbone["normalization"], str) else "float32",
        channels=3 if isinstance(backbone["normalization"], str) else len(backbone["normalization"]["mean"]),
        height=height,
        width=width,
        classes=len(header["class_names"]),
        outputs="numbers" if header.get("targets") == "regression" else "logits",
        elsewhere="measure those" + ("" if "targets" in header else " with `vpt robustness`"),
        purpose=_PURPOSES[header.get("targets", "multiclass")].format(
            classes=len(header["class_names"]), data=name, names=", ".join(map(markdown, header["class_names"]))
        ),
        preset=data.get("preset") or header["preset"].get("name", "of the data"),
        data=name,
        facts="\n".join(f"- {what}: {value}" for what, value in _facts(header, record, stored) if value is not None),
        results=_table(measured),
        licences=_licences(card),
    )
    front = _front(title, header, record, card, measured)
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n{body}"


def _read(channels: Any) -> str:
    if channels is None:
        return ""
    which = f"{channels} channels" if isinstance(channels, int) else f"channels {channels}, counted from 0,"
    return f"; {which} of a file are read, in the file's own unit"


def _method(header: Record, record: Record) -> str:
    if record.get("task") and record.get("hyperparameters"):
        return method_name(record["task"], record["hyperparameters"])
    return "+".join(str(spec["name"]) for spec in header["specs"]) or ("knn" if "head" in header else "linear")


def _front(
    title: str, header: Record, record: Record, card: Card | None, measured: list[tuple[str, str, float, int]]
) -> dict[str, Any]:
    """What the hub reads; a base model only where it is one of the hub's own."""
    weights_id, data = header["backbone"]["weights_id"], record.get("data") or {}
    front: dict[str, Any] = {
        "library_name": "vpt",
        **({} if header.get("targets") == "regression" else {"pipeline_tag": "image-classification"}),
        "tags": ["visual-prompt-tuning", "parameter-efficient-fine-tuning", _method(header, record)],
    }
    if weights_id.startswith("timm/"):
        relation = "finetune" if _method(header, record) == "full" else "adapter"
        front |= {"base_model": weights_id, "base_model_relation": relation}
    if "name" in data:
        front["datasets"] = [data["name"]]
    numbers = [
        {"type": "accuracy" if key == "acc" else key, "value": value, "name": f"{_NAMES.get(key, key)} (n = {n})"}
        for split, key, value, n in measured
        if split == "test"
    ]
    if numbers:
        front["metrics"] = sorted({number["type"] for number in numbers})
        named = data.get("name", "unknown")
        dataset = {"type": named, "name": card.title if card else named, "split": "test"}
        task = "image-regression" if header.get("targets") == "regression" else "image-classification"
        result = {"task": {"type": task}, "dataset": dataset, "metrics": numbers}
        front["model-index"] = [{"name": title, "results": [result]}]
    return front


def _measured(record: Record) -> Iterator[tuple[str, str, float, int]]:
    """Split, metric, value and n of everything that was measured on images that were not trained on."""
    data = record.get("data") or {}
    for name, value in record.get("metrics", {}).items():
        split, _, key = name.partition("/")
        n = images_read(record).get(split)
        unseen = split in ("val", "test") and not data.get("shared_with_train", {}).get(split)
        if n and unseen and key not in _NOT_SHOWN:
            yield split, key, value, n


def _table(measured: list[tuple[str, str, float, int]]) -> str:
    if not measured:
        return "None were recorded: `vpt test` evaluates, and writes into the run that is pushed."
    lines = [
        f"| {split} | {markdown(_NAMES.get(key, key))} | {value:.4f} | {n:,} |"
        for split, key, value, n in sorted(measured)
    ]
    return "\n".join(["| split | metric | value | n |", "|---|---|---|---|", *lines])


def _facts(header: Record, record: Record, stored: int) -> Iterator[tuple[str, Any]]:
    """The protocol, as far as it was recorded."""
    backbone, data = header["backbone"], record.get("data") or {}
    name, weights, seal = backbone["name"], backbone["weights_id"], backbone["fingerprint"][:12]
    yield "backbone", f"{name}, weights {weights}, fingerprint {seal}…"
    if parameters := record.get("parameters"):
        yield "trainable parameters", " of ".join(f"{parameters[key]:,}" for key in _PARTS if key in parameters)
    yield "values in the delta file", f"{stored:,}"
    if data:
        counts = ", ".join(f"{split} {n:,}" for split, n in data.get("counts", {}).items())
        yield "data", markdown(f"{data.get('name', 'without a name')}, images: {counts}")
        cut = {split: n for split, n in record.get("read", {}).items() if n != data.get("counts", {}).get(split)}
        yield "read of them", ", ".join(f"{split} {n:,}" for split, n in cut.items()) or None
        yield "complete by its card", _COMPLETE[data.get("complete")]
        yield "preset", data.get("preset")
        yield "augmentation", data.get("augment")
        yield "transforms", markdown(json.dumps(data["transforms"])) if data.get("transforms") else None
    yield "seed", record.get("seed")
    yield "epochs", record.get("epochs", record.get("max_epochs"))
    yield "epoch rule", epoch_rule(record) if record else None
    yield "precision", record.get("precision")
    yield "deltas", ", ".join(f"`{DeltaSpec.read(spec).brief()}`" for spec in header["specs"]) or "none"


def _licences(card: Card | None) -> str:
    data = f"{card.licence} ({card.source})" if card else "no card states their licence; ask whoever gave them to you"
    return (
        f"Code: Apache-2.0. Data: {data}. The backbone's weights have a licence of their own. Nobody has stated one "
        "for this delta: its owner may add `license` to the front matter."
    )
