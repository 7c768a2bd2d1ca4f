"""Losses, metrics and training controls from YAML: what is trained, recorded and printed, and which epoch is tested."""

from __future__ import annotations

from pathlib import Path

import yaml

from vpt.run_record import cell_protocol, epoch_rule, read_record

from .conftest import DEMO, QUICK, SMALL, Run, Vpt

_CONFIG = {
    "model": {
        "init_args": {
            "loss": "focal",
            "focal_gamma": 1.5,
            "class_weights": {"3": 2.0},
            "mixup": 0.2,
            "cutmix": 1.0,
            "head_lr_scale": 5.0,
            "metrics": ["MulticlassF1Score", {"name": "MulticlassCohenKappa", "weights": "quadratic"}],
        }
    },
    "trainer": {
        "callbacks": [{"class_path": "ModelCheckpoint", "init_args": {"monitor": "val/f1_score", "mode": "max"}}]
    },
}


def test_a_config_trains_with_them_and_its_best_epoch_is_not_its_last(vpt: Vpt, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(_CONFIG))
    fitted = vpt("fit", *DEMO, "-c", "own.yaml", "--data.train=train800", *SMALL, *QUICK)
    assert fitted.status == 0, fitted.err
    run = Run(Path("runs/digits/vpt_deep/version_0"))
    (best,) = (run.folder / "checkpoints").glob("epoch=*.ckpt")
    assert f"or its best epoch by val/f1_score:   vpt test -c {run.folder}/config.yaml --ckpt_path {best}" in fitted.out
    record = run.record
    assert record["best"] == {"val/f1_score": best.name}
    assert record["hyperparameters"]["class_weights"] == {"3": 2.0}
    assert {"val/f1_score", "val/cohen_kappa"} <= record["metrics"].keys()
    rules = {}
    for path in (str(best), run.checkpoint):  # of one state: there was one epoch
        tested = vpt("test", *run.config, "--ckpt_path", path, "--trainer.limit_test_batches=2")
        assert tested.status == 0, tested.err
        rules[path] = epoch_rule(read_record(run.folder))
    assert list(rules.values()) == ["best val/f1_score", "last"]
    protocols = [cell_protocol(run.record), cell_protocol(record | {"evaluated": {"test": {"chosen_by": "val/acc"}}})]
    assert {key for key in protocols[0] if protocols[0][key] != protocols[1].get(key)} >= {"epoch rule"}
    (apart,) = run.folder.glob("test-digits-*.json")
    assert "chosen_by" in apart.read_text()


def test_a_test_prints_counts_classes_and_what_comes_next(vpt: Vpt, copied: Run) -> None:
    tested = vpt("test", *copied.config, "--ckpt_path", copied.checkpoint, "--trainer.limit_test_batches=3")
    assert tested.status == 0, tested.err
    hits, n = round(copied.record["metrics"]["test/acc"] * copied.record["read"]["test"]), copied.record["read"]["test"]
    assert f"({hits} of {n}; 95 %: " in tested.out
    assert "Test metric" not in tested.out
    assert "Accuracy by class" in tested.out
    assert f"written to {copied.folder.resolve()}/run.json" in tested.out
    assert f"vpt robustness run --delta {copied.folder.resolve()}/delta.safetensors" in tested.out
    silent = vpt("test", *copied.config, "--ckpt_path", copied.checkpoint, *SMALL, "--verbose=false")
    assert "Accuracy by class" not in silent.out


def test_what_is_measured_may_be_chosen_after_training(vpt: Vpt, copied: Run) -> None:
    more = '--model.metrics=["MulticlassF1Score"]'
    validated = vpt("validate", *copied.config, "--ckpt_path", copied.checkpoint, more, *SMALL)
    assert validated.status == 0, validated.err
    assert "trained/f1_score" in validated.out
    assert "Accuracy by class" in validated.out
    assert "trained/f1_score" in copied.record["metrics"]
