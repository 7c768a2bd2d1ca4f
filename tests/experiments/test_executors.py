from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.hub.fake import serving
from vpt.cli import main
from vpt.errors import ConfigError
from vpt.experiments.executors import RayEngine, serially
from vpt.experiments.trial import Config, Failure, Trial, merged

ray = pytest.importorskip("ray", reason="needs the sweep extra")


def test_a_failing_trial_is_a_failure_and_the_others_finish(
    config: Config, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trials = [Trial("bad", merged(config, {"model.backbone": "vit_nano"})), Trial("good", config)]
    found = serially(trials, root)
    assert list(found) == ["bad", "good"]
    assert isinstance(found["bad"], Failure)
    assert "did you mean" in found["bad"].reason
    assert isinstance(found["good"], dict)
    assert "bad  failed  Unknown backbone" in capsys.readouterr().err


def test_without_ray_the_way_out_is_named(config: Config, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match="--serial"):
        RayEngine()([Trial("a", config)], root)


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("127.0.0.1:9", "No Ray cluster answers at 127.0.0.1:9"),
        ("ray://127.0.0.1:9", "No Ray cluster answers at ray://127.0.0.1:9"),
        ("127.0.0.1", "The address of a Ray cluster is `auto` or HOST:PORT, got '127.0.0.1'"),
        ("127.0.0.1:port", "HOST:PORT, got '127.0.0.1:port'"),
        ("127.0.0.1:99999", "HOST:PORT, got '127.0.0.1:99999'"),
        (":6379", "HOST:PORT, got ':6379'"),
        ("x" * 300 + ":1", "No Ray cluster answers at xxx"),
        ("a\0b:1", "No Ray cluster answers at"),
    ],
)
def test_a_cluster_that_is_not_there_is_told_at_once(address: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        RayEngine(address)


def test_another_server_is_no_cluster() -> None:
    with serving() as hub, pytest.raises(ConfigError, match="No Ray cluster answers at"):
        RayEngine(hub.url.removeprefix("http://"))


def test_auto_without_a_cluster_is_one_sentence(
    config: Config, root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def none_found(*args: object, **options: object) -> None:
        raise ConnectionError("Could not find any running Ray instance.\nPlease specify the one to connect to.")

    monkeypatch.setattr(ray, "init", none_found)
    with pytest.raises(ConfigError, match=r"Ray finds no cluster at auto: Could not .* instance\. Please"):
        RayEngine("auto")([Trial("a", config)], root)


def test_ray_gives_what_a_serial_run_gives_and_survives_killed_workers(
    config: Config, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three trials on Ray; a worker is killed as soon as the first trial has begun."""
    monkeypatch.setenv("RAY_worker_niceness", "0")  # the other tests would starve it
    trials = [Trial(f"rate={rate}", merged(config, {"model.base_lr": rate}), test=True) for rate in (0.1, 0.2)]
    bad = Trial("bad", merged(config, {"model.base_lr": 1e30, "model.optimizer": "sgd"}))
    alone = serially(trials, root / "serial")
    killer = subprocess.Popen([sys.executable, "-c", _KILLER, str(root / "ray" / "rate=0.1" / "trial.json")])
    found = RayEngine(workers=2)([*trials, bad], root / "ray")
    assert killer.wait(timeout=10) == 0, "no worker was killed"
    for trial in trials:
        one, other = alone[trial.name], found[trial.name]
        assert isinstance(one, dict)
        assert isinstance(other, dict), other
        assert one["metrics"] == other["metrics"]
    assert isinstance(found["bad"], Failure)
    assert "not finite" in found["bad"].reason
    assert not ray.is_initialized()


def test_trials_that_train_together_are_one_task_of_ray(
    config: Config, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_worker_niceness", "0")
    trials = [Trial(f"rate={rate}", merged(config, {"model.base_lr": rate}), test=True) for rate in (0.1, 0.2, 0.3)]
    trials.append(Trial("bad", merged(config, {"model.base_lr": 1e30, "model.optimizer": "sgd"})))
    alone = serially(trials, root / "serial")
    found = RayEngine(workers=1, together=2)(trials, root / "ray")
    for trial in trials[:3]:
        one, other = alone[trial.name], found[trial.name]
        assert isinstance(one, dict)
        assert isinstance(other, dict), other
        assert other["metrics"] == pytest.approx(one["metrics"], rel=1e-4)
    assert isinstance(found["bad"], Failure)
    assert "not finite" in found["bad"].reason


_KILLER = """
import os, signal, subprocess, sys, time
from pathlib import Path
for _ in range(3000):
    if Path(sys.argv[1]).exists():
        found = subprocess.run(["pgrep", "-f", "^ray::_worker"], capture_output=True, text=True).stdout.split()
        if found:
            os.kill(int(found[0]), signal.SIGKILL)
            sys.exit(0)
    time.sleep(0.1)
sys.exit(1)
"""


def test_a_killed_driver_resumes_to_the_same_table(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config["data"]["init_args"]["image_size"] = 64
    config["trainer"]["max_epochs"] = 1
    Path("config.yaml").write_text(yaml.safe_dump(config))
    Path("grid.yaml").write_text("grid: {model.base_lr: [0.1, 0.2, 0.4]}\nseeds: [1]\n")
    command = ["sweep", "-c", "config.yaml", "--grid", "grid.yaml", "--serial", "--out"]
    driver = subprocess.Popen(
        [sys.executable, "-m", "vpt", *command, "cut"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    for _ in range(6000):
        if list(Path("cut").glob("choose/base_lr=0.1-*/delta.safetensors")):
            break
        time.sleep(0.05)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    assert main([*command, "whole"]) == 0
    whole = capsys.readouterr().out
    assert main([*command, "cut"]) == 1
    assert "cut is not empty: --resume goes on in it" in capsys.readouterr().err
    (first,) = Path("cut").glob("choose/base_lr=0.1-*/run.json")
    before = first.stat().st_mtime_ns
    assert main([*command, "cut", "--resume"]) == 0
    assert first.stat().st_mtime_ns == before
    assert _table(capsys.readouterr().out) == _table(whole)


def _table(text: str) -> list[str]:
    return [line.replace("whole", "cut").replace(" ", "") for line in text.splitlines() if "│" in line]
