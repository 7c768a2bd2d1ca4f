"""What an earlier version wrote is still read. The stored file is the ``config.yaml`` of a run of version 0.1.0."""

from __future__ import annotations

from pathlib import Path

import yaml

from .conftest import Run, Vpt

STORED = Path(__file__).parent / "stored" / "config-0.1.0.yaml"


def test_a_config_of_version_0_1_0_means_what_it_meant(vpt: Vpt) -> None:
    answer = vpt("fit", "-c", str(STORED), "--print_config")
    assert answer.status == 0, answer.err
    before, now = yaml.safe_load(STORED.read_text()), yaml.safe_load(answer.out)
    for part in ("model", "data"):
        assert now[part]["class_path"] == before[part]["class_path"]
        assert now[part]["init_args"].items() >= before[part]["init_args"].items()
    assert now["trainer"].items() >= before["trainer"].items()


def test_a_config_of_version_0_1_0_trains_and_tests(vpt: Vpt, trained: Run) -> None:
    answer = vpt("fit", "-c", str(STORED), "--trainer.fast_dev_run=true")
    assert answer.status == 0, answer.err
    answer = vpt("test", "-c", str(STORED), "--ckpt_path", trained.checkpoint)
    assert answer.status == 0, answer.err
