"""A run whose prompts move, as a user types it: what it leaves behind needs to know nothing of that."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
import yaml

import vpt as package
from vpt.deltas.prompts.prompt import Prompt

from .conftest import DEMO, QUICK, SMALL, Run, Vpt

OVERLAY = """
trainer:
  gradient_clip_val: 0.25
model:
  class_path: DeltaTuning
  init_args:
    deltas: [{name: prompt, num_tokens: 2, relocate: {}}]
    optimizer: sgd
"""


def test_prompts_move_and_all_commands_take_the_file(vpt: Vpt, tmp_path: Path) -> None:
    (tmp_path / "relocate.yaml").write_text(OVERLAY)
    # Four prompts of twelve could move behind the first epoch, and with this seed some do.
    said = vpt("fit", *DEMO, "-c", "relocate.yaml", *SMALL, *QUICK[1:], "--trainer.max_epochs=4")
    assert said.status == 0, said.err
    run = Run(tmp_path / "runs" / "digits" / "prompt" / "version_0")
    assert run.record["parameters"]["trainable"] == 6 * 2 * 192 + 10 * 193  # those of VPT-deep and the head
    assert yaml.safe_load((run.folder / "config.yaml").read_text())["model"]["init_args"]["deltas"] == [
        {"name": "prompt", "num_tokens": 2, "relocate": {}}
    ]
    file = run.folder / "delta.safetensors"
    model = package.load(file)
    numbers = [number for number, _ in cast("Prompt", model.parts()[0]).shapes]
    assert sum(numbers) == 12
    assert numbers != [2] * 6

    assert vpt("test", *run.config, "--ckpt_path", run.checkpoint).status == 0
    before = run.record["metrics"]
    pixels = model.backbone.random_images(2, seed=1)
    with torch.no_grad():
        answer = package.PromptBank({"one": file, "two": file})(pixels, ["two", "one"])[1]
        torch.testing.assert_close(answer, model(pixels)[1], rtol=1e-4, atol=1e-5)
    assert vpt("export", "--delta", str(file), "--format", "torch").status == 0
    assert vpt("robustness", "run", "--delta", str(file), "--max-images", "4", "--severities").status == 0
    assert vpt("attention", "--delta", str(file), "--kind", "share").status == 0
    assert "would move otherwise" in vpt("prune", "--delta", str(file), "--tokens", "50").sentence

    tensors = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert vpt("fit", *run.config, "--ckpt_path", run.checkpoint).status == 0  # of a whole run: nothing is left to do
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in package.load(file).state_dict().items())
    assert run.record["metrics"]["test/acc"] == before["test/acc"]
