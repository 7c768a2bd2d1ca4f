"""Shared training itself: what trains, at which rate, in one process and in two."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from vpt.errors import ConfigError
from vpt.experiments.pretrain import MultiTask, SharedData, pretrain
from vpt.experiments.trial import Config, Trial, merged, run_trial
from vpt.models.delta_format import read_delta
from vpt.tasks.build import build, build_data

from .test_transfer import make_two

DELTAS: list[list[dict[str, Any]]] = [
    [{"name": "prompt", "num_tokens": 2, "deep": True}],
    [{"name": "prompt", "num_tokens": 2, "deep": False, "project": 8}],
    [{"name": "prefix", "num_tokens": 2, "hidden": 8}],
    [{"name": "adapter"}, {"name": "mlp_head", "layers": 2}],
    [{"name": "lora"}, {"name": "bias"}],
    [{"name": "ssf"}],
]


@pytest.fixture
def two(tmp_path: Path) -> dict[str, Config]:
    """Two tasks of 36 and of 24 training images, in batches of 8."""
    all_of_it = {"trainer.max_epochs": 1, "trainer.limit_train_batches": None}
    return {name: merged(config, all_of_it) for name, config in make_two(tmp_path).items()}


def with_deltas(configs: dict[str, Config], deltas: list[dict[str, Any]]) -> dict[str, Config]:
    arguments = {"backbone": "vit_nano_patch8_64", "deltas": deltas, "base_lr": 0.1}
    model = {"class_path": "vpt.tasks.DeltaTuning", "init_args": arguments}
    return {name: config | {"model": model} for name, config in configs.items()}


def saved(root: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(root / "shared" / "last.ckpt", weights_only=True)
    return checkpoint


def rate(root: Path) -> float:
    (optimizer,) = saved(root)["optimizer_states"]
    (found,) = {group["initial_lr"] for group in optimizer["param_groups"]}
    return float(found)


class Gradients(L.Callback):
    """Notes after every backward pass which parameters require a gradient, and which have one."""

    def __init__(self) -> None:
        self.seen: list[tuple[set[str], set[str]]] = []

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        named = dict(pl_module.named_parameters())
        due = {name for name, parameter in named.items() if parameter.requires_grad}
        self.seen.append((due, {name for name, parameter in named.items() if parameter.grad is not None}))


@pytest.mark.parametrize("deltas", DELTAS, ids=lambda deltas: "+".join(spec["name"] for spec in deltas))
def test_all_that_trains_has_a_gradient_in_every_step(deltas: list[dict[str, Any]], two: dict[str, Config]) -> None:
    warm, cold = with_deltas(two, deltas).values()
    task, data = build(warm)
    parts = {"warm": data, "cold": build_data(cold)}
    together = MultiTask(task, {name: part.num_classes for name, part in parts.items()})
    heads = {f"heads.{number}.{kind}" for number in (0, 1) for kind in ("weight", "bias")}
    own = {f"delta.{name}" for name, _ in task.model.delta.named_parameters()} if task.model.delta else set()
    gradients = Gradients()
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    short: dict[str, Any] = {"max_epochs": 1, "limit_train_batches": 2, "enable_checkpointing": False}
    trainer = L.Trainer(accelerator="cpu", callbacks=[gradients], **short, **quiet)
    trainer.fit(together, datamodule=SharedData(parts))
    assert gradients.seen == [(own | heads, own | heads)] * 2


def test_the_rate_follows_the_batch_of_one_task_and_accumulation_is_refused(
    two: dict[str, Config], tmp_path: Path
) -> None:
    pretrain(two, tmp_path / "1")
    assert rate(tmp_path / "1") == pytest.approx(0.1 * 8 / 256)  # the larger task alone: they share a batch of 8 each
    assert saved(tmp_path / "1")["global_step"] == 5
    with pytest.raises(ConfigError, match="accumulate_grad_batches"):
        pretrain({k: merged(c, {"trainer.accumulate_grad_batches": 2}) for k, c in two.items()}, tmp_path / "2")


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_two_processes_take_three_steps_and_write_one_delta(
    two: dict[str, Config], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    flags = {"trainer.devices": 2, "trainer.strategy": strategy}
    (tmp_path / "configs.json").write_text(json.dumps({name: merged(config, flags) for name, config in two.items()}))
    (tmp_path / "shared.py").write_text(
        "import json, sys, pathlib\n"
        "from vpt.experiments.pretrain import pretrain\n"
        "if __name__ == '__main__':\n"
        "    pretrain(json.loads(pathlib.Path(sys.argv[1]).read_text()), pathlib.Path(sys.argv[2]))\n"
    )
    command = [sys.executable, str(tmp_path / "shared.py"), str(tmp_path / "configs.json"), str(root)]
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.delenv(name)
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-2000:]
    assert saved(root)["global_step"] == 3  # of 36 images in batches of 2 · 8
    assert rate(root) == pytest.approx(0.1 * 16 / 256)
    start = merged(two["cold"], {"model.init_delta": str(root / "shared.safetensors"), "model.base_lr": 1e-12})
    run_trial(Trial("next", merged(start, {"model.weight_decay": 0.0})), root)
    _, shared = read_delta(root / "shared.safetensors")
    _, tuned = read_delta(root / "next" / "delta.safetensors")
    torch.testing.assert_close(tuned["delta.parts.0.tokens"], shared["delta.parts.0.tokens"], rtol=0, atol=1e-6)


def test_a_checkpoint_holds_delta_and_heads_whatever_requires_a_gradient(two: dict[str, Config], root: Path) -> None:
    pretrain(two, root)
    kept = saved(root)["state_dict"]
    assert {name.partition(".")[0] for name in kept} == {"delta", "heads"}
    task, _ = build(two["warm"])
    together = MultiTask(task, {"warm": 3, "cold": 2})
    together.requires_grad_(False)
    checkpoint: dict[str, Any] = {}
    together.on_save_checkpoint(checkpoint)
    assert checkpoint["state_dict"].keys() == kept.keys()
    together.on_load_checkpoint(found := {"state_dict": kept})
    together.load_state_dict(found["state_dict"])
    assert all(torch.equal(together.state_dict()[name], tensor) for name, tensor in kept.items())


def test_what_was_shared_otherwise_is_not_taken_for_it(two: dict[str, Config], root: Path) -> None:
    path = pretrain(two, root)
    before = path.read_bytes()
    others = [
        with_deltas(two, [{"name": "prompt", "num_tokens": 3, "deep": True}]),
        {name: merged(config, {"data.train": "train800val200"}) for name, config in two.items()},
        {name: merged(config, {"seed_everything": 5}) for name, config in two.items()},
        {"warm": two["warm"], "third": two["cold"]},
    ]
    for other in others:
        with pytest.raises(ConfigError, match="differs in its tasks: name another --out"):
            pretrain(other, root)
    data = Path(two["cold"]["data"]["init_args"]["root"]) / "cold"
    shutil.copy(next((data / "images").rglob("*.jpg")), data / "images" / "new.jpg")
    with (data / "train800.txt").open("a") as file:
        file.write("images/new.jpg 0\n")
    with pytest.raises(ConfigError, match="differs in its tasks"):
        pretrain(two, root)
    (root / "shared" / "trial.json").unlink()
    with pytest.raises(ConfigError, match="does not say what its shared delta was trained on"):
        pretrain(two, root)
    assert path.read_bytes() == before


def test_the_trainer_of_the_tasks_trains_what_they_share(two: dict[str, Config], tmp_path: Path) -> None:
    for clip in (None, 1e-9):
        pretrain({n: merged(c, {"trainer.gradient_clip_val": clip}) for n, c in two.items()}, tmp_path / str(clip))
    steps = {name: merged(config, {"trainer.max_epochs": None, "trainer.max_steps": 2}) for name, config in two.items()}
    pretrain(steps, tmp_path / "steps")
    assert saved(tmp_path / "steps")["global_step"] == 2
    free, clipped = (read_delta(tmp_path / str(clip) / "shared.safetensors")[1] for clip in (None, 1e-9))
    assert not torch.equal(free["delta.parts.0.tokens"], clipped["delta.parts.0.tokens"])


@pytest.mark.parametrize(
    "values", [{"model.mixup": 0.5}, {"model.head_lr_scale": 2.0}, {"model.ema_decay": 0.9}], ids=str
)
def test_what_shared_training_would_ignore_is_refused(
    values: dict[str, Any], two: dict[str, Config], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=rf"plain cross-entropy and one rate: leave {next(iter(values))[6:]} out"):
        pretrain({name: merged(config, values) for name, config in two.items()}, tmp_path)


def test_a_delta_without_parameters_is_nothing_to_share(two: dict[str, Config], root: Path) -> None:
    with pytest.raises(ConfigError, match="needs a delta that the tasks share"):
        pretrain(with_deltas(two, [{"name": "linear"}]), root)
