"""`vpt prune` and the run that starts again, as a user types them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
import yaml

import vpt as package
from vpt.deltas.prompts.prompt import Prompt

from .conftest import DEMO, QUICK, SMALL, Run, Vpt

FEW = ["--data.shots", "1"]


def prompt_of(file: Path) -> Prompt:
    return cast("Prompt", package.load(file).parts()[0])


@pytest.fixture
def started(vpt: Vpt, tmp_path: Path) -> Run:
    """A run that keeps what it started from."""
    assert vpt("fit", *DEMO, *SMALL, *QUICK, "--trainer.callbacks=vpt.tasks.InitWriter").status == 0
    return Run(tmp_path / "runs" / "digits" / "vpt_deep" / "version_0")


def test_a_run_starts_again_from_its_initial_values_without_the_least_important_prompts(
    vpt: Vpt, started: Run, tmp_path: Path
) -> None:
    delta = started.folder / "delta.safetensors"
    said = vpt("prune", "--delta", str(delta), "--tokens", "30", "--segments", "25", *FEW)
    assert said.status == 0, said.err
    assert "tokens 30 %, segments 25 %: 42 of 60 prompts are left, 6,048 of 11,520 numbers" in said.out
    config = started.folder / "pruned.yaml"
    assert f"vpt fit -c {config}" in said.out
    model = yaml.safe_load(config.read_text())["model"]
    (spec,) = model["init_args"]["deltas"]
    assert model["class_path"] == "vpt.tasks.DeltaTuning"
    assert spec["num_tokens"] == 10
    assert [sum(word == "........" for word in line.split()) for line in spec["mask"]] == [3] * 6
    assert {word.count("x") for line in spec["mask"] for word in line.split()} == {0, 6}

    assert vpt("fit", "-c", str(config)).status == 0
    again = Run(tmp_path / "runs" / "digits" / "prompt" / "version_0")
    before, after = (prompt_of(run.folder / "init.safetensors") for run in (started, again))
    assert after.mask is not None
    for layer in range(6):
        kept = after.mask.filled(layer, after.mask.cut(layer, before.prompts(layer)))
        assert torch.equal(after.prompts(layer), kept)
    ours, theirs = (cast("Any", package.load(run.folder / "init.safetensors").head) for run in (started, again))
    assert torch.equal(ours.weight, theirs.weight)
    assert again.record["parameters"]["trainable"] == 6_048 + 10 * 193
    assert vpt("test", *again.config, "--ckpt_path", again.checkpoint).status == 0
    assert again.record["metrics"]["test/loss"] > 0

    tuned = again.folder / "delta.safetensors"
    pruned = package.load(tuned)
    pixels = pruned.backbone.random_images(2, seed=1)
    bank = package.PromptBank({"whole": delta, "pruned": tuned})
    answers = bank(pixels, ["whole", "pruned"])
    torch.testing.assert_close(answers[1], pruned(pixels)[1], rtol=1e-4, atol=1e-5)
    assert vpt("export", "--delta", str(tuned), "--format", "torch").status == 0
    assert vpt("robustness", "run", "--delta", str(tuned), "--max-images", "4", "--severities").status == 0
    assert vpt("attention", "--delta", str(tuned), "--kind", "share").status == 0
    assert "is pruned already" in vpt("prune", "--delta", str(tuned), "--tokens", "50", *FEW).sentence


def test_several_ways_to_prune_are_a_grid(vpt: Vpt, trained: Run, tmp_path: Path) -> None:
    out = tmp_path / "ways.yaml"
    args = ["--tokens", "0", "10", "15", "50", "--segments", "0", "50", *FEW]
    said = vpt("prune", "--delta", str(trained.folder / "delta.safetensors"), "--out", str(out), *args)
    assert said.status == 0, said.err
    # 0 % of both prunes nothing, 15 % of 10 prompts are as many as 10 %.
    ways = [line.partition(":")[0] for line in said.out.splitlines() if line.startswith("tokens")]
    assert ways == [
        f"tokens {tokens} %, segments {segments} %"
        for tokens, segments in [(0, 50), (10, 0), (10, 50), (50, 0), (50, 50)]
    ]
    grid = tmp_path / "ways_grid.yaml"
    assert f"vpt sweep -c {out} --grid {grid} --out FOLDER" in said.out
    content: dict[str, Any] = yaml.safe_load(grid.read_text())
    assert content["seeds"] == [0]
    left = [sum(line.count("x") for line in spec[0]["mask"]) for spec in content["grid"]["model.deltas"]]
    assert left == [6 * 5 * 4, 6 * 9 * 4, 6 * 10 * 4, 6 * 5, 6 * 9]  # smallest first: segments of 24, tokens of 192
    content["grid"]["model.deltas"] = content["grid"]["model.deltas"][:2]
    grid.write_text(yaml.safe_dump(content))
    searched = vpt(
        "sweep", "-c", str(out), "--grid", str(grid), "--out", "found", "--serial", "--data.train", "train800"
    )
    assert searched.status == 0, searched.err
    assert (tmp_path / "found" / "sweep.json").is_file()


def test_what_has_no_prompts_or_no_seed_is_refused(vpt: Vpt, tmp_path: Path) -> None:
    def delta(*args: str) -> str:
        assert vpt("fit", *DEMO, *args, *SMALL, *QUICK).status == 0
        (run,) = tmp_path.glob("runs/digits/*/version_0")
        run.rename(tmp_path / "run")
        return "run/delta.safetensors"

    args = ["--tokens", "50", *FEW]
    lora = delta("--model", "DeltaTuning", "--model.deltas", "[{name: lora}]")
    assert "has no prompts to prune: its deltas are lora" in vpt("prune", "--delta", lora, *args).sentence
    (tmp_path / "run").rename(tmp_path / "lora")
    shared = delta("--model", "DeltaTuning", "--model.deltas", "[{name: prompt, num_tokens: 4, shared: true}]")
    assert "leave shared out" in vpt("prune", "--delta", shared, *args).sentence
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("seed_everything: 0", "seed_everything: false"))
    assert "had no seed" in vpt("prune", "--delta", shared, *args).sentence
    config.write_text(config.read_text().replace("seed_everything: false", "seed_everything: 0"))
    text = config.read_text()
    config.write_text(text.replace("init_delta: null", f"init_delta: {shared}"))
    assert "began with the prompts of run/delta.safetensors" in vpt("prune", "--delta", shared, *args).sentence
    config.write_text(text.replace("shared: true", "koopman: {}"))
    assert "trained with koopman" in vpt("prune", "--delta", shared, *args).sentence
    config.write_text(text.replace("num_tokens: 4", "num_tokens: [1, 0, 1, 1, 1, 1]"))
    assert "Some layers of run/delta.safetensors have no prompts" in vpt("prune", "--delta", shared, *args).sentence
    config.write_text(text.replace("name: prompt", "name: prefix"))
    assert "has the deltas prompt, but the config beside it prefix" in vpt("prune", "--delta", shared, *args).sentence
