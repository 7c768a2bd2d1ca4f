"""Photos without labels: `vpt predict`, `embed` and `calibrate`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from . import Row


def files(here: Path) -> None:
    """Makes what the rows name."""
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(here / "photo.png")
    (here / "empty").mkdir()
    (here / "texts").mkdir()
    (here / "texts" / "readme.txt").write_text("no image")
    (here / "table.csv").write_text("file,label\nphoto.png,a\n")
    (here / "none.csv").write_text("path\n")
    (here / "there.csv").write_text("mine\n")
    (here / "file").write_text("")
    (here / "notes.json").write_text("{}")
    (here / "page").mkdir()
    (here / "page" / "index.html").write_text("mine")


_ONE = "--delta {delta} --images photo.png --out found.csv"
_RATES = {"--max-risk": "max_risk", "--coverage": "coverage", "--false-alarms": "false_alarms"}

ROWS = [
    *(
        row
        for command in ("predict", "embed")
        for row in (
            Row(f"{command} --images photo.png --out found.csv", "no model", "required: --delta"),
            Row(f"{command} --delta {{delta}} --out found.csv", "no image", "required: --images"),
            Row(f"{command} --delta {{delta}} --images photo.png", "no place", "required: --out"),
            Row(f"{command} --delta nothere --images photo.png --out found.csv", "no file", "No delta file nothere"),
            Row(f"{command} --delta photo.png --images photo.png --out found.csv", "a photo", "is not a delta file"),
            Row(f"{command} --delta {{delta}} --images gone.png --out found.csv", "gone", "gone.png does not exist"),
            Row(f"{command} --delta {{delta}} --images empty --out found.csv", "empty", "empty holds no image"),
            Row(f"{command} --delta {{delta}} --images texts --out found.csv", "no image", "1 .txt"),
            Row(f"{command} --delta {{delta}} --images table.csv --out found.csv", "a table", "has no column 'path'"),
            Row(f"{command} --delta {{delta}} --images none.csv --out found.csv", "a table", "lists no images"),
            Row(
                f"{command} --delta {{delta}} --images photo.png photo.png --out found.csv", "twice", "photo.png twice"
            ),
            Row(f"{command} --delta {{delta}} --images photo.png --out found.txt", "a text", "name a .csv, .parquet"),
            Row(f"{command} --delta {{delta}} --images photo.png --out there.csv", "is there", "there.csv"),
            Row(f"{command} --delta {{delta}} --images photo.png --out file/x.csv", "in a file", "file"),
            Row(f"{command} {_ONE} --batch-size 0", "no batch", "0 is not a whole number from 1"),
            Row(f"{command} {_ONE} --weights nothere", "no weights", "nothere"),
            Row(f"{command} {_ONE} --shard 5/4", "no share", "A shard is I/N, the I-th of N"),
            Row(f"{command} {_ONE} --shard half", "no share", "for instance 2/8: got 'half'"),
            Row(f"{command} {_ONE} --data.root x", "data", "unrecognized arguments: --data.root"),
        )
    ),
    *(
        Row(f"predict {_ONE} {flag} 0.1", "no calibration", f"{name} needs a calibrated")
        for flag, name in _RATES.items()
    ),
    *(Row(f"predict {_ONE} {flag} 1.5", "out of range", "1.5 is not a number from 0 to 1") for flag in _RATES),
    Row(f"predict {_ONE} --top 0", "no class", "0 is not a whole number from 1"),
    Row(f"predict {_ONE} --set-rule aps", "without sets", "--set-rule has no effect without --coverage"),
    Row(f"predict {_ONE} --set-rule raps --coverage 0.9", "no rule", "invalid choice: 'raps'"),
    Row(f"predict {_ONE} --page page", "is there", "page/index.html"),
    Row(f"predict {_ONE} --page new --shard 1/2", "of all images", "--shard has no effect with --page"),
    Row(f"predict {_ONE} --shard 1/2 --max-risk 0.1", "no calibration", "max_risk needs a calibrated"),
    Row(f"predict {_ONE} --page file", "a file", "file"),
    Row("tune --out out", "no folder", "required: folder"),
    Row("tune texts", "no place", "required: --out"),
    Row("tune gone --out out", "no folder", "gone"),
    Row("tune empty --out out", "no image", "empty"),
    Row("tune photo.png --out out", "a photo", "photo.png is no folder"),
    Row("tune table.csv --out out", "no column", "has no column 'path'"),
    Row("tune texts --out page", "not empty", "page is not empty: --resume goes on in it"),
    Row("tune texts --out file", "a file", "file"),
    Row("tune texts --out out --minutes 0", "no time", "0 is not a number from 0.1"),
    Row("tune texts --out out --minutes soon", "no number", "invalid number value: 'soon'"),
    Row("tune texts --out out --seed -1", "no seed", "-1 is not a whole number from 0"),
    Row("tune texts --out out --backbone nope", "no backbone", "nope"),
    Row("tune texts --out out --weights gone.safetensors", "no weights", "texts"),
    Row("tune texts --out out --data.batch_size 3", "decided", "the experiment sets it to 10"),
    Row("tune texts --out out --data.train_on_val true", "decided", "sets it to what --calibrate says"),
    Row("tune texts --out out --data.sise 3", "no option", "'sise' is not accepted"),
    Row("tune texts --out out --data.val_fraction x", "no number", "val_fraction: Expected a number, got x"),
    Row("tune texts --out texts/out", "among the images", "lies among the images"),
    Row("tune texts --out out --model.base_lr 1", "of fit", "unrecognized arguments: --model.base_lr"),
    Row("calibrate --delta nothere", "no file", "nothere"),
    Row("calibrate --delta {delta} --out x.csv", "no delta file", "let it end in .safetensors"),
    Row("calibrate --delta {delta} --out notes.safetensors", "a file beside", "notes.json exists already"),
    Row("calibrate --delta {delta} --unknown nose", "no score", "invalid choice: 'nose'"),
    Row("calibrate --delta {delta} --batch-size 0", "no batch", "0 is not a whole number from 1"),
    Row("calibrate --delta {delta} --weights nothere", "no weights", "nothere"),
    Row("calibrate --delta {delta} --data nothere.yaml", "no config", "No config nothere.yaml"),
    Row("calibrate --delta {delta} --data.root x", "no data there", "root"),
    Row("calibrate --delta {delta}", "trained on", "were trained on"),
]
