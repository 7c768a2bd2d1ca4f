"""Places that cannot be written to, and what is there already."""

from __future__ import annotations

from pathlib import Path

from . import Row


def files(here: Path) -> None:
    """Makes what the rows name."""
    (here / "a_file").write_text("text")
    (here / "folder.png").mkdir()
    (here / "dangling").symlink_to("nowhere")
    (here / "kept").mkdir()
    for name in ("README.md", "demo.yaml", "model.onnx", "model.pt2", "delta.safetensors"):
        (here / "kept" / name).write_text("mine")


_DEMO = "-c {configs}/demo.yaml"
_LONG = "n" * 300
_FOLDERS = {
    "fit": f"fit {_DEMO} --trainer.default_root_dir",
    "fit's logger": f"fit {_DEMO} --trainer.logger CSVLogger --trainer.logger.save_dir",
    "robustness run": "robustness run --delta {delta} --out",
    "robustness report": "robustness report {run} --out",
    "report": "report {run} --out",
    "rerun": "rerun {run} --out",
    "sweep": f"sweep {_DEMO} --grid {{configs}}/sweep/rates.yaml --serial --out",
    "fewshot": f"fewshot {_DEMO} --shots 1 --serial --out",
    "combine": f"combine {_DEMO} --deltas bias lora --serial --out",
    "scale": f"scale {_DEMO} --backbones vit_nano_patch8_64 --serial --out",
    "pretrain": f"pretrain {_DEMO} --tasks {{configs}}/demo.yaml --serial --out",
    "transfer": "transfer {run} --serial --out",
    "configs": "configs --copy",
    "prepare": "data prepare vtab/svhn --root",
    "peft": "export --delta {delta} --format peft --out",
    "gallery": "attention --delta {delta} --kind share mass --out",
}
_FILES = {
    "soup": "robustness soup --deltas {delta} other.safetensors --out",
    "greedy soup": "robustness soup --greedy --deltas {delta} other.safetensors --out",
    "head": "robustness head --backbone vit_nano_patch8_64 --data {configs}/demo.yaml --out",
    "statistics": "robustness statistics --delta {delta} --out",
    "strengths": "robustness strengths --delta {delta} --out",
    "corruptions": "data corruptions --out",
    "onnx": "export --delta {delta} --format onnx --out",
    "torch": "export --delta {delta} --format torch --out",
    "attention": "attention --delta {delta} --out",
    "one kind": "attention --delta {delta} --kind share --out",
}
_ALL = _FOLDERS | _FILES

ROWS = [
    *(Row(f"{start} a_file/x", "a folder that is a file", "a_file is not a folder") for start in _ALL.values()),
    *(Row(f"{start} dangling/x", "a folder that is a dangling link", "not a folder") for start in _ALL.values()),
    *(Row(f"{start} {_LONG}", "a name of 300 characters", "File name too long") for start in _ALL.values()),
    *(Row(f"{start} a_file", "a file", "a_file is ") for start in _FOLDERS.values()),
    *(Row(f"{start} folder.png", "a folder", "folder.png is a folder: name a file") for start in _FILES.values()),
    *(
        Row(f"{_FILES[name]} kept/delta.safetensors", "a file that is there", "exists already")
        for name in _FILES
        if name in ("soup", "greedy soup", "statistics", "head")
    ),
    Row(f"{_FILES['onnx']} kept/model.onnx", "a file that is there", "kept/model.onnx exists already"),
    Row(f"{_FILES['torch']} kept/model.pt2", "a file that is there", "kept/model.pt2 exists already"),
    Row(f"{_FOLDERS['peft']} kept", "a file of that name is there", "kept/README.md exists already"),
    Row("configs demo.yaml --copy kept", "a file that is there", "kept/demo.yaml exists already"),
    *(
        Row(f"{_FOLDERS[name]} kept", "another folder that is in use", "kept is not empty: --resume goes on")
        for name in ("sweep", "fewshot", "combine", "scale", "pretrain", "transfer")
    ),
    Row(f"{_FILES['corruptions']} x.jpg", "no format of figures", "not as 'x.jpg'"),
    Row(f"{_FILES['attention']} x.jpg", "no format of figures", "not as 'x.jpg'"),
    Row(f"{_FILES['onnx']} x.pt2", "the suffix of another format", "ends in .onnx"),
    Row(f"{_FILES['torch']} x.onnx", "the suffix of another format", "ends in .pt2"),
    Row(f"{_FOLDERS['gallery']} x.png", "a file for two figures", "names one figure"),
    Row("robustness run --delta {delta} {delta} --out x", "a folder for two deltas", "--out is for one delta"),
    Row(f"fit {_DEMO} --trainer.logger false", "a run without a folder", "neither delta nor record"),
]
