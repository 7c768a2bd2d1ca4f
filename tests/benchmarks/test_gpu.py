"""The record of a card is complete, within its time, and says what it lacks; its program runs on a processor, too."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import gpu, gpu_sections
from benchmarks.gpu_sections import TINY, Scale
from benchmarks.plain import CLASSES, Concatenated
from benchmarks.records import Records, Row
from vpt.backbones import create_backbone
from vpt.models import TunedModel

NO_CARD = pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a card")


def rows(out: Path) -> list[Row]:
    return Records(out / "gpu.jsonl").rows()


def notes(out: Path) -> dict[str, str]:
    return {row["section"]: row["note"] for row in rows(out) if row["what"] == "note"}


def test_every_section_runs_at_a_tiny_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(variable, "0")  # Lightning sets them; this puts them back afterwards
    threads = torch.get_num_threads()
    gpu.main(["--tiny", "--out", str(tmp_path)])
    assert notes(tmp_path) == {}
    assert {row["section"] for row in rows(tmp_path)} == set(gpu.SECTIONS)
    tests = next(row for row in rows(tmp_path) if row["what"] == "tests")
    assert tests["failed"] == tests["not_run"] == 0
    assert tests["passed"] + tests["skipped"] > 60
    assert torch.get_num_threads() == threads
    made = gpu.blocks(tmp_path)
    assert (tmp_path / "gpu.md").read_text(encoding="utf-8") == "\n\n".join(made.values()) + "\n"
    printed = capsys.readouterr().out
    assert all(table in printed for table in made.values())
    assert "| vit_nano_patch8_64 | compiled | 2 |" in made["gpu steps"]
    for row in rows(tmp_path):
        assert all(value > 0 for key in ("step_ms", "memory_mib", "tflops") for value in row.get(key, {}).values())


def finds(scale: Scale, device: str) -> Iterator[Row]:
    yield {"what": "matmul", "tflops": {"bf16": 400.0}}


def hangs(scale: Scale, device: str) -> Iterator[Row]:
    yield from finds(scale, device)
    try:
        time.sleep(60)
    except Exception:  # as a library may do
        time.sleep(60)


def fails(scale: Scale, device: str) -> Iterator[Row]:
    yield from finds(scale, device)
    raise RuntimeError("CUDA error: no kernel image\nand more")


def test_a_section_that_fails_or_hangs_leaves_what_it_found_and_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "SECTIONS", {"bad": (9, fails), "slow": (0.2, hangs), "ceiling": (9, finds)})
    gpu.measure(TINY, "cpu", 1.0, tmp_path)
    assert [row["section"] for row in rows(tmp_path) if row["what"] == "matmul"] == ["bad", "slow", "ceiling"]
    assert notes(tmp_path) == {
        "bad": "failed: RuntimeError: CUDA error: no kernel image",
        "slow": "stopped after 0 s: the rest is left out",
    }
    table = gpu.blocks(tmp_path)["gpu"]
    assert "| matrix product, bf16 | 400 TFLOP/s |" in table
    assert "| section *bad* | failed: RuntimeError: CUDA error: no kernel image |" in table


def test_what_does_not_fit_into_the_minutes_is_left_out_and_an_earlier_record_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "SECTIONS", {"old": (9, finds)})
    gpu.measure(TINY, "cpu", 1.0, tmp_path)
    monkeypatch.setattr(gpu, "SECTIONS", {"ceiling": (9, finds)})
    gpu.measure(TINY, "cpu", 0.05, tmp_path)
    assert notes(tmp_path) == {"ceiling": "left out: 0.05 minutes were over"}
    assert "matmul" not in {row["what"] for row in rows(tmp_path)}


IMPORTS = "import pytest\nfrom benchmarks.gpu_sections import OutOfTime"


def test_tests_that_do_not_end_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bodies = {"a": "assert True", "b": "assert 1 == 2", "c_compiled": "raise AssertionError", "d": "raise OutOfTime"}
    tests = "".join(f"@pytest.mark.gpu\ndef test_{name}(): {body}\n\n" for name, body in bodies.items())
    (tmp_path / "test_of_a_card.py").write_text(f"{IMPORTS}\n\n{tests}def test_e(): assert False\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    monkeypatch.setattr(gpu_sections, "TESTS", tmp_path)
    monkeypatch.setattr(gpu, "SECTIONS", {"tests": (60, gpu_sections.tests)})
    gpu.measure(TINY, "cpu", 2.0, tmp_path / "out")
    (row,) = (row for row in rows(tmp_path / "out") if row["what"] == "tests")
    assert {key: row[key] for key in ("passed", "failed", "skipped", "not_run")} == {
        "passed": 1,
        "failed": 1,
        "skipped": 0,
        "not_run": 2,
    }
    assert row["failures"] == ["test_b: assert 1 == 2"]
    assert "| tests passed, failed, skipped, not run | 1, 1, 0, 2 |" in gpu.blocks(tmp_path / "out")["gpu"]
    assert notes(tmp_path / "out") == {}
    monkeypatch.setattr(gpu_sections, "TESTS", tmp_path / "out")
    gpu.measure(TINY, "cpu", 2.0, tmp_path / "none")
    assert notes(tmp_path / "none") == {"tests": "failed: RuntimeError: pytest ended with NO_TESTS_COLLECTED"}


@pytest.mark.parametrize(
    ("flags", "reason"),
    [(["--tiny"], "--tiny needs --out"), pytest.param([], "PyTorch sees no CUDA device", marks=NO_CARD)],
)
def test_numbers_that_would_be_no_result_are_refused(
    flags: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        gpu.main(flags)
    assert reason in capsys.readouterr().err


def test_the_models_of_a_card_are_known_to_timm_and_take_prompts() -> None:
    import timm

    full = dataclasses.asdict(gpu_sections.FULL)
    assert [name for name in full["backbones"] if not timm.is_model(name)] == []
    assert sorted(full["tokens"]) == [10, 50, 100, 200]


@pytest.mark.parametrize("name", ["vit_nano_patch8_64", "swin_nano_patch4_window8_64", "vit_small_patch16_dinov3"])
def test_the_concatenation_is_the_same_function(name: str) -> None:
    torch.manual_seed(0)
    plain = Concatenated(create_backbone(name, "random", image_size=64), 5)
    ours = TunedModel(create_backbone(name, "random", image_size=64), CLASSES, [{"name": "prompt", "num_tokens": 5}])
    assert ours.delta is not None
    theirs = [*plain.prompts, plain.head.weight, plain.head.bias]
    with torch.no_grad():
        for parameter in plain.prompts:
            nn.init.normal_(parameter)
        for model in (plain.backbone.model, ours.backbone.model):
            for key, parameter in model.named_parameters():
                if "gamma" in key:  # layer scales, with which random blocks would hardly matter
                    parameter.fill_(1.0)
        layers = [layer for stack in ours.delta.parameters() for layer in stack]
        for target, source in zip([*layers, ours.head.weight, ours.head.bias], theirs, strict=True):
            target.copy_(source)
    images = plain.backbone.random_images(2)
    torch.testing.assert_close(ours(images), plain(images), rtol=1e-4, atol=1e-5)
    ours.set_strength(0.0)
    assert float((ours(images) - plain(images)).detach().abs().max()) > 1e-3
