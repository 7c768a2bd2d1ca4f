"""Services that do not answer, names on the hub, and where weights come from."""

from __future__ import annotations

from pathlib import Path

from . import Row


def files(here: Path) -> None:
    """Makes what the rows name."""
    (here / "text.safetensors").write_text("no tensors")
    (here / "folder").mkdir()


_SWEEP = "-c {configs}/demo.yaml --grid {configs}/sweep/rates.yaml --out new"
_FIT = "fit -c {configs}/demo.yaml --trainer.logger false"
_HEAD = "robustness head --data {configs}/demo.yaml --out head.safetensors"
_DEAD = "No Ray cluster answers at"
_FORM = "The address of a Ray cluster is `auto` or HOST:PORT"
_TAKEN = "No weights file"
_TINY = "--model.backbone vit_tiny_patch16_224"

_ADDRESSES = {
    "127.0.0.1:9": _DEAD,
    "nowhere.invalid:6379": _DEAD,
    "6379": _FORM,
    "''": "an empty argument after --address",
}
_WEIGHTS = {
    "nowhere.safetensors": _TAKEN,
    "folder": "No weights file folder, which is a folder",
    "text.safetensors": "is not a readable weights file",
    "random:x": "Random weights are 'random', or 'random:N'",
    "random:-1": "Random weights are 'random', or 'random:N'",
    "n" * 300: "must be text or a path that can exist",
}
_WITH_WEIGHTS = {
    f"{_FIT} --model.weights": "fit",
    "attention --delta {delta} --weights": "attention",
    "export --delta {delta} --format torch --weights": "export",
    "robustness run --delta {delta} --out new --weights": "robustness run",
    "robustness strengths --delta {delta} --out new --weights": "robustness strengths",
    "robustness statistics --delta {delta} --out new --weights": "robustness statistics",
    f"{_HEAD} --backbone vit_nano_patch8_64 --weights": "robustness head",
    "profile -c {configs}/demo.yaml --classes 3 --model.weights": "profile",
}
_REPOS = ("ann", "a/b/c", "ann/", "/digits", "'ann/my digits'", "hf://ann/digits")

ROWS = [
    *(Row(f"sweep {_SWEEP} --address {each}", "no cluster there", says) for each, says in _ADDRESSES.items()),
    Row("fewshot -c {configs}/demo.yaml --shots 2 --out new --address 127.0.0.1:9", "no cluster there", _DEAD),
    Row("combine -c {configs}/demo.yaml --deltas lora --out new --address 127.0.0.1:9", "no cluster there", _DEAD),
    Row(
        "transfer {run} --out new --address auto --serial", "no cluster wanted", "--address has no effect with --serial"
    ),
    *(
        Row(f"{start} {weights}", "weights that are none", says)
        for start in _WITH_WEIGHTS
        for weights, says in _WEIGHTS.items()
    ),
    *(
        Row(f"push --delta {{delta}} --repo {repo}", "no name of a repository", "is no name of a repository")
        for repo in _REPOS
    ),
    Row("push --delta {delta} --repo ann/digits", "offline", "The hub could not be reached for ann/digits"),
    Row("push --delta {delta} --repo ann/digits --endpoint nope", "no URL", "The hub could not be reached"),
    Row("push --delta {delta} --repo ann/digits --endpoint ''", "no URL", "an empty argument after --endpoint"),
    Row("push --delta {delta} --repo ''", "no name", "an empty argument after --repo"),
    Row("push --delta nowhere.safetensors --repo ann/digits", "no delta", "No delta file nowhere.safetensors"),
    Row("push --delta folder --repo ann/digits", "a folder", "folder is a folder: name the delta.safetensors"),
    Row("push --delta text.safetensors --repo ann/digits", "no delta file", "is not a delta file"),
    Row(f"{_FIT} {_TINY}", "weights that only the hub has", "--model.weights FILE"),
    Row(f"{_FIT} {_TINY}.x", "a tag that is none", "Unknown backbone 'vit_tiny_patch16_224.x'"),
    Row(f"{_FIT} --model.backbone vit_tinny", "a name misspelt", "did you mean"),
    Row(f"{_FIT} --model.backbone ''", "no name", "Unknown backbone ''"),
    Row(f"{_HEAD} --backbone vit_tiny_patch16_224", "weights that only the hub has", "--model.weights FILE"),
    Row(f"{_HEAD} --backbone vit_tinny", "a name misspelt", "did you mean"),
    Row(f"{_HEAD} --backbone vit_nano_patch8_64 --clip x", "one name of two", "--clip: expected 2 arguments"),
    Row("scale -c {configs}/demo.yaml --backbones vit_tinny --out new --serial", "a name misspelt", "did you mean"),
    Row("profile", "no config", "vpt profile needs a config"),
    Row("profile -c {configs}/demo.yaml --classes 0", "no classes", "0 is not a whole number of at least 1"),
    Row("profile -c {configs}/demo.yaml --classes x", "a word", "invalid whole number value: 'x'"),
    Row("profile -c {configs}/demo.yaml --classes 3 --batch 0", "no images", "0 is not a whole number of at least 1"),
    Row(
        "profile -c {configs}/demo.yaml --classes 3 --rounds -1",
        "less than no rounds",
        "-1 is not a whole number of at least 1",
    ),
    Row("profile -c {configs}/demo.yaml --classes 1", "one class", "num_classes is 1"),
    Row("profile --run folder", "no run", "folder is no run: it has no run.json"),
    Row("profile --run nowhere", "no folder", "nowhere is no run: it has no run.json"),
    Row("profile -c nowhere.yaml --classes 3", "no config", "nowhere.yaml: name a file"),
]
