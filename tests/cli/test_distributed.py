"""Several processes, started by Lightning's own flags."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.fakes import make_task
from tests.fakes_suites import make_pets
from vpt.models.delta_format import read_delta

from .conftest import CONFIGS, DEMO, QUICK, Vpt

TWO = ["--trainer.devices=2", "--trainer.accelerator=cpu"]


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_two_processes_train_one_run_as_one_does_with_the_same_global_batch(
    vpt: Vpt, tmp_path: Path, strategy: str
) -> None:
    """33 test images in two processes: an odd number, so that counting one twice would show.

    In batches of 8 the first process has one batch more than the second.
    """
    folder = make_task(tmp_path / "fake", per_class=(32, 5, 11))
    data = ["--data=VTABDataModule", "--data.task=fake", f"--data.root={folder.parent}", "--data.image_size=64"]
    found = []
    for name, batch, flags in (("one", "16", []), ("two", "8", [*TWO, f"--trainer.strategy={strategy}"])):
        whole = [*QUICK, "--trainer.default_root_dir", name]
        train = [*DEMO, *whole, *data, "--data.train=train800", f"--data.batch_size={batch}", *flags]

        def run(*args: str, alone: bool = not flags) -> None:
            if alone:
                answer = vpt(*args)
                assert answer.status == 0, answer.err
            else:
                _started(tmp_path, *args)

        run("fit", *train)
        (folder,) = (tmp_path / name).glob("*/*/*")
        assert json.loads((folder / "run.json").read_text())["status"] == "finished"
        assert (folder / "checkpoints" / "last.ckpt").is_file()
        run("test", "-c", str(folder / "config.yaml"), "--ckpt_path", str(folder / "checkpoints" / "last.ckpt"))
        record = json.loads((folder / "run.json").read_text())
        assert len(list((tmp_path / name).rglob("delta.safetensors"))) == 1
        predict = [
            "predict",
            "-c",
            str(folder / "config.yaml"),
            "--ckpt_path",
            str(folder / "checkpoints" / "last.ckpt"),
        ]
        run(*predict)
        rows = _rows(folder)
        assert [int(row["index"]) for row in rows] == list(range(33))
        if flags:  # one process replaces what two have written: it is of the same model and data
            run(*predict, "--trainer.devices=1", "--trainer.strategy=auto", alone=True)
            assert [row["predicted"] for row in _rows(folder)] == [row["predicted"] for row in rows]
        found.append((record["metrics"], read_delta(folder / "delta.safetensors")[1]))
    (one, tensors), (two, others) = found
    assert one["val/acc"] == two["val/acc"] > 0.2
    assert one["test/acc"] == two["test/acc"]
    assert one["test/mean_per_class"] == pytest.approx(two["test/mean_per_class"], abs=1e-6)
    assert one["test/loss"] == pytest.approx(two["test/loss"], rel=1e-4)
    assert one["train/loss"] == pytest.approx(two["train/loss"], rel=1e-3)
    for key, tensor in tensors.items():
        torch.testing.assert_close(others[key], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_process_with_a_batch_more_of_a_sharded_model_does_not_wait_for_ever(tmp_path: Path) -> None:
    """Nine validation images are five and four, in batches of four."""
    folder = make_task(tmp_path / "fake", classes=3, per_class=(11, 3, 1))
    data = ["--data=VTABDataModule", "--data.task=fake", f"--data.root={folder.parent}", "--data.image_size=64"]
    full = ["-c", str(CONFIGS / "method" / "full.yaml"), *TWO, "--trainer.strategy=fsdp2"]
    options = ["--data.train=train800", "--data.batch_size=4", "--trainer.max_epochs=1", *QUICK[1:]]
    _started(tmp_path, "fit", *DEMO, *full, *data, *options, "--trainer.default_root_dir=run")
    (record,) = tmp_path.rglob("run.json")
    assert json.loads(record.read_text())["status"] == "finished"


def _rows(folder: Path) -> list[dict[str, str]]:
    (path,) = folder.glob("predictions*.csv")
    with path.open() as file:
        return list(csv.DictReader(file))


def _started(folder: Path, *args: str, module: Sequence[str] = ("vpt",)) -> None:
    command = [sys.executable, "-m", *module, *args]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]


SCRIPT = """
import json
from pathlib import Path
from vpt.cli import main
for command in json.loads(Path("commands.json").read_text()):
    assert main(command) == 0, command
"""
EXACT = ["--trainer.precision=64-true", "--trainer.accelerator=cpu", "--trainer.max_epochs=2", *QUICK[1:],
         "--trainer.logger=TensorBoardLogger", "--trainer.logger.name=", "--trainer.logger.version=run",
         "--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.monitor=train/loss",
         "--trainer.callbacks.save_top_k=-1", "--model.optimizer=sgd"]  # fmt: skip
COLOURS = [*DEMO, "--data=VTABDataModule", "--data.train=train800", "--data.image_size=64"]
PETS = ["-c", str(CONFIGS / "segmentation" / "pets.yaml"), "--data.train=trainval", "--data.border=ignore",
        "--data.allow_partial=true", "--data.image_size=64", "--model.backbone=vit_nano_patch8_64"]  # fmt: skip


def _overlay(name: str) -> list[str]:
    return [*COLOURS, "-c", str(CONFIGS / "method" / f"{name}.yaml")]


RELOCATE = "{name: prompt, num_tokens: 3, relocate: {warmup: 0}}"
# Of 33 images in batches of 16, the second of two processes has none in the last step; of 35 it has one of three.
METHODS = {
    "prompt": [*COLOURS, "--data.task=rest"],
    "lora": [*_overlay("lora"), "--data.task=odd"],
    "bias": [*_overlay("bias"), "--data.task=rest", '--model.class_weights={"colour 0": 9}', "--model.base_lr=0.01"],
    "full": [
        *_overlay("full"),
        "--data.task=odd",
        "--model.ema_decay=0.9",
        "--trainer.gradient_clip_val=0.5",
        "--model.start_decay={rule: spd, rate: 0.5, head: true}",
        "--model.init_head=probe",
        "--model.probe_l2=10",
        "--model.layer_decay=0.8",
        "--model.base_lr=0.01",
    ],
    "relocate": [*_overlay("prompt"), "--data.task=rest", f"--model.deltas=[{RELOCATE}]"],
    "segmentation": PETS,
}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_are_one_in_double_precision_and_one_goes_on_from_their_checkpoint(
    vpt: Vpt, tmp_path: Path, strategy: str
) -> None:
    """All methods in one launch of torchrun, whose processes import Lightning once."""
    make_task(tmp_path / "odd", classes=3, per_class=(11, 3, 1))
    make_task(tmp_path / "rest", classes=5, per_class=(7, 2, 1))
    _cover(make_pets(tmp_path, each=9) / "annotations" / "trimaps")

    def fit(method: str, root: str, *flags: str) -> list[str]:
        places = [f"--trainer.{key}={root}/{method}" for key in ("default_root_dir", "logger.save_dir")]
        return ["fit", *METHODS[method], f"--data.root={tmp_path}", *EXACT, *places, *flags]

    both = [*TWO, f"--trainer.strategy={strategy}", "--data.batch_size=8"]
    first = {
        method: str(tmp_path / "two" / method / "run" / "checkpoints" / "epoch=0-step=3.ckpt") for method in METHODS
    }
    commands = [fit(method, "two", *both) for method in METHODS]
    commands.append(fit("full", "again", *both, f"--ckpt_path={first['full']}"))
    (tmp_path / "commands.json").write_text(json.dumps(commands))
    (tmp_path / "script.py").write_text(SCRIPT)
    _started(tmp_path, "script.py", module=["torch.distributed.run", "--standalone", "--nproc-per-node=2"])
    alone = ["--trainer.devices=1", "--trainer.strategy=auto", "--data.batch_size=16"]
    for method in METHODS:
        answer = vpt(*fit(method, "one", *alone))
        assert answer.status == 0, answer.err
        start = _trained(tmp_path / "one" / method / "run", "epoch=0-*")
        for name in ("epoch=0-*", "last"):
            ours, theirs = (_trained(tmp_path / root / method / "run", name) for root in ("one", "two"))
            assert ours.keys() == theirs.keys()
            for key, tensor in ours.items():
                torch.testing.assert_close(theirs[key], tensor, rtol=1e-12, atol=1e-12)
        assert any((tensor - start[key]).abs().max() > 1e-5 for key, tensor in ours.items())
        one, two = (json.loads((tmp_path / root / method / "run" / "run.json").read_text()) for root in ("one", "two"))
        assert one["images"] == two["images"]
        for key, value in one["metrics"].items():
            assert two["metrics"][key] == pytest.approx(value, rel=1e-6), key
    moved = _trained(tmp_path / "two" / "relocate" / "run", "epoch=0-*")  # the second move may be the way back
    standing = moved["model.delta.parts.0.assigned._extra_state"]
    assert standing.tolist() != [row // 3 for row in range(len(standing))]
    _same(tmp_path / "again" / "full" / "run", _trained(tmp_path / "two" / "full" / "run", "last"))
    for method in ("prompt", "full"):
        run = tmp_path / "two" / method / "run"
        expected = _trained(run, "last")
        (run / "checkpoints" / "last.ckpt").unlink()
        answer = vpt("fit", "-c", str(run / "config.yaml"), *alone, "--ckpt_path", first[method])
        assert answer.status == 0, answer.err
        _same(run, expected)
    config = ["-c", str(tmp_path / "two" / "prompt" / "run" / "config.yaml")]
    answer = vpt("fit", *config, *alone[:2], "--data.batch_size=8", "--ckpt_path", first["prompt"])
    assert "images of a step 16 then, 8 now" in answer.sentence


def _same(run: Path, expected: dict[str, torch.Tensor]) -> None:
    for key, tensor in _trained(run, "last").items():  # Lightning restores weights before it makes a model double
        torch.testing.assert_close(tensor, expected[key], rtol=1e-6, atol=1e-7)


def _cover(trimaps: Path) -> None:
    """Makes more pixels of some masks count for nothing."""
    for path in sorted(trimaps.iterdir())[::2]:
        mask = np.asarray(Image.open(path)).copy()
        mask[:10] = 3
        Image.fromarray(mask).save(path)


def _trained(run: Path, name: str) -> dict[str, torch.Tensor]:
    (path,) = (run / "checkpoints").glob(f"{name}.ckpt")
    tensors: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return {key: tensor.detach().double() for key, tensor in tensors.items()}
