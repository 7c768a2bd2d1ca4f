"""PACE against both of its passes written out in float64, and what it leaves as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy, gelu, linear

from tests.tasks.test_losses import _Stop
from tests.tasks.test_tasks import BASE, data, trainer
from vpt.errors import ConfigError, UnknownNameError
from vpt.run_record import training_protocol
from vpt.tasks import DeltaTuning, FineTuning, LinearProbe, PromptTuning
from vpt.tasks.regularization import Pace
from vpt.tasks.run_protocol import protocol

LORA: dict[str, Any] = {"name": "lora", "rank": 2, "targets": ["q", "v", "fc2"]}
ADAPTER: dict[str, Any] = {"name": "adapter", "rank": 2, "placement": "houlsby", "factor": 0.5}


def published_sigmas(sigma: float, layers: int, spared: int) -> NDArray[np.float64]:
    """Of blocks and head, with NumPy's words of the released code (MaxwellYaoNi/PACE, Vision/train.py)."""
    falling = np.linspace(0, sigma, layers - spared + 1)[-1:0:-1]
    return np.concatenate([np.zeros(spared), falling])


class WrittenOut:
    """A ViT with LoRA and adapters whose change of each layer's outputs is multiplied by noise, drawn in order."""

    def __init__(self, model: Any, sigmas: NDArray[np.float64]) -> None:
        self.model, self.sigmas = model, sigmas
        self.parts = {spec["name"]: part for spec, part in zip(model.delta.specs, model.parts(), strict=True)}

    def noisy(self, change: Tensor, index: int) -> Tensor:
        images, channels = change.shape[0], change.shape[-1]
        if self.sigmas[index] == 0:
            return change
        z = 1 + float(self.sigmas[index]) * torch.randn(images, channels, dtype=change.dtype)
        return z.view(images, *[1] * (change.ndim - 2), channels) * change

    def low_rank(self, index: int, name: str, x: Tensor) -> Tensor:
        lora = self.parts["lora"]
        key = f"{index}_{name}"
        change: Tensor = lora.factor * linear(linear(x, lora.down[key]), lora.up[key])
        return change

    def adapted(self, index: int, name: str, out: Tensor) -> Tensor:
        if "adapter" not in self.parts:
            return out
        adapter = self.parts["adapter"]
        down, up = adapter.down[f"{index}_{name}"], adapter.up[f"{index}_{name}"]
        hidden = gelu(linear(out, down.weight, down.bias))
        return out + self.noisy(adapter.factor * linear(hidden, up.weight, up.bias), index)

    def attention(self, index: int, attn: Any, x: Tensor) -> Tensor:
        qkv = linear(x, attn.qkv.weight, attn.qkv.bias)
        if "lora" in self.parts:
            q, v = self.low_rank(index, "q", x), self.low_rank(index, "v", x)
            qkv = qkv + self.noisy(torch.cat([q, torch.zeros_like(q), v], dim=-1), index)
        q, k, v = qkv.reshape(*x.shape[:2], 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1) @ v
        return linear(mixed.transpose(1, 2).flatten(2), attn.proj.weight, attn.proj.bias)

    def perceptron(self, index: int, mlp: Any, x: Tensor) -> Tensor:
        hidden = gelu(linear(x, mlp.fc1.weight, mlp.fc1.bias))
        out = linear(hidden, mlp.fc2.weight, mlp.fc2.bias)
        return out + self.noisy(self.low_rank(index, "fc2", hidden), index) if "lora" in self.parts else out

    def __call__(self, images: Tensor) -> Tensor:
        timm, head = self.model.backbone.model, self.model.head
        x = timm.norm_pre(timm._pos_embed(timm.patch_embed(self.model.backbone.normalize(images))))
        for index, block in enumerate(timm.blocks):
            x = x + self.adapted(index, "attn", self.attention(index, block.attn, block.norm1(x)))
            x = x + self.adapted(index, "mlp", self.perceptron(index, block.mlp, block.norm2(x)))
        pooled = timm.forward_head(timm.norm(x), pre_logits=True)
        return self.noisy(linear(pooled, head.weight, head.bias), len(timm.blocks))


def fitted(deltas: list[dict[str, Any]], **options: Any) -> DeltaTuning:
    L.seed_everything(4)
    task = DeltaTuning(deltas, **BASE, **options)
    trainer(epochs=1, batches=4).fit(task, datamodule=data())
    return task


@pytest.mark.parametrize("deltas", [[LORA], [ADAPTER], [LORA, ADAPTER]])
@pytest.mark.parametrize("spare_first", [True, False])
def test_loss_and_gradient_are_those_of_two_passes_written_out(deltas: list[dict[str, Any]], spare_first: bool) -> None:
    task = fitted(deltas, pace={"rate": 0.7, "sigma": 1.3, "spare_first": spare_first}).double()
    batch = data().split("train").batch(range(5))
    depth = len(task.model.backbone.layout.blocks)
    written = WrittenOut(task.model, published_sigmas(1.3, depth + 1, int(spare_first)))
    trained = [p for p in task.model.parameters() if p.requires_grad]
    torch.manual_seed(11)
    found = torch.stack([mean for mean, _ in task.training_losses(batch)]).sum()
    gradients = torch.autograd.grad(found, trained)
    torch.manual_seed(11)
    task.model.delta.detach()  # type: ignore[union-attr]
    first, second = written(batch["image"]), written(batch["image"])
    labels, difference = cross_entropy(first, batch["label"]), ((first - second) ** 2).sum(dim=1).mean()
    expected = labels + 0.7 * difference
    assert difference.item() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    for one, other in zip(gradients, torch.autograd.grad(expected, trained), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_nothing_of_the_noise_is_left_on_the_model_and_no_evaluation_has_any() -> None:
    task = fitted([LORA, ADAPTER], pace={})
    hooks = [len(module._forward_hooks) for module in task.model.modules()]
    batch = data().split("train").batch(range(4))
    before = task.model(batch["image"])
    with Pace().around(task.model):
        noisy = task.logits(batch, "train")
    task.training_losses(batch)
    assert torch.equal(task.model(batch["image"]), before)
    assert torch.equal(task.logits(batch, "val"), before)
    assert not torch.equal(noisy, before)
    assert [len(module._forward_hooks) for module in task.model.modules()] == hooks
    broken = batch | {"image": batch["image"][:, :1]}
    with pytest.raises(Exception, match=r".+"):
        task.training_losses(broken)
    assert [len(module._forward_hooks) for module in task.model.modules()] == hooks


def test_features_that_are_kept_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    late = {"name": "lora", "rank": 2, "layers": [2, 4]}
    kept = fitted([late], pace={})
    assert kept.model.constant_blocks() == 2
    assert kept._kept is not None
    monkeypatch.setattr("vpt.models.classifier.TunedModel.constant_part", lambda self: None)
    plain = fitted([late], pace={})
    assert plain._kept is None
    for name, tensor in kept.model.owned().items():
        torch.testing.assert_close(tensor, plain.model.owned()[name], rtol=1e-4, atol=1e-6)


def test_a_training_with_noise_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    def leg(stop: int, checkpoint: Path | None = None) -> DeltaTuning:
        L.seed_everything(0)
        task = DeltaTuning([LORA, ADAPTER], **BASE, pace={"sigma": 0.5}, mixup=0.2)
        keep = ModelCheckpoint(dirpath=tmp_path / str(stop), save_last=True)
        run = trainer(epochs=3, callbacks=[keep, _Stop(stop)])
        run.fit(task, datamodule=data(), ckpt_path=checkpoint, weights_only=True)
        return task

    whole, _ = leg(3), leg(1)
    resumed = leg(3, tmp_path / "1" / "last.ckpt")
    for key, tensor in whole.model.owned().items():
        assert torch.equal(resumed.model.owned()[key], tensor), key


@pytest.mark.parametrize(
    ("backbone", "delta"),
    [
        ("swin_nano_patch4_window8_64", LORA),
        ("swin_nano_patch4_window8_64", {"name": "adapter", "rank": 2}),
        ("vit_nano_patch8_64", {"name": "adapter", "targets": ["patch_embed.proj"]}),
        ("vit_nano_patch8_64", {"name": "lora", "targets": ["all-linear"]}),
        ("vit_nano_patch8_64", {"name": "dora"}),
        ("vit_nano_patch8_64", {"name": "glora"}),
        ("vit_nano_patch8_64", {"name": "convpass"}),
        ("swin_nano_patch4_window8_64", {"name": "convpass"}),
        ("vit_nano_patch8_64", {"name": "adapter", "placement": "post", "channel_scale": True, "std": 0.01}),
        ("swin_nano_patch4_window8_64", {"name": "fact", "rank": 4, "format": "tt"}),
    ],
)
def test_it_trains_what_else_adds_to_outputs(backbone: str, delta: dict[str, Any]) -> None:
    L.seed_everything(0)
    options = {**BASE, "backbone": backbone, "pace": {"spare_first": False}}
    task = DeltaTuning([delta], **options)
    trainer(epochs=1, batches=3).fit(task, datamodule=data())
    batch = data().split("train").batch(range(3))
    second, both = task.training_losses(batch)
    assert float(second[0]) > 0
    assert second[1] == both[1] == 3
    sigmas = Pace.of(options["pace"]).sigmas(task.model)
    assert max(sigmas.values()) == 1
    assert min(sigmas.values()) == sigmas[task.model.head] > 0


def test_noise_is_of_each_image_and_channel_and_has_mean_1() -> None:
    pace: dict[str, Any] = {"sigma": 0.5, "spare_first": False}
    task = fitted([{"name": "adapter", "targets": ["patch_embed.proj"]}], pace=pace).double()
    added: Any = task.model.parts()[0]
    up = added.up["patch_embed/proj"]
    torch.nn.init.zeros_(up.weight)
    torch.nn.init.ones_(up.bias)  # so that 1 is added everywhere
    layer = added.adds_to()[0]
    images = task.model.backbone.normalize(data().split("train").batch(range(64))["image"])
    torch.manual_seed(0)
    with torch.no_grad(), Pace(**pace).around(task.model):
        noisy = layer(images)
    z = noisy - (layer(images).detach() - 1)
    assert float((z - z[:, :, :1, :1]).abs().max()) < 1e-12  # the same for all tokens
    drawn = z[:, :, 0, 0]
    assert len(drawn.unique()) == drawn.numel() > 10_000
    assert float(drawn.mean()) == pytest.approx(1, abs=0.02)
    assert float(drawn.std()) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        (PromptTuning, {}, "and prompt does not"),
        (FineTuning, {}, "a model without a delta does not"),
        (LinearProbe, {}, "a model without a delta does not"),
        (DeltaTuning, {"deltas": [LORA, {"name": "ssf"}]}, "and ssf does not"),
        (DeltaTuning, {"deltas": [{"name": "lora", "targets": ["all-conv"]}]}, "LoRA of linear layers do and lora"),
        (DeltaTuning, {"deltas": [LORA], "micro_batch": 4}, "leave micro_batch out"),
    ],
)
def test_where_nothing_is_added_or_batches_are_split_training_does_not_begin(
    kind: Any, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        trainer().fit(kind(**BASE, **options, pace={}), datamodule=data())


def test_numbers_are_checked_and_part_of_the_protocol() -> None:
    for given, said in (({"rate": 0}, "must be positive"), ({"sigma": -1}, "sigma of pace"), ({"sigmas": 1}, "sigmas")):
        with pytest.raises((ConfigError, UnknownNameError), match=said):
            DeltaTuning([LORA], **BASE, pace=given)
    plain, noisy = (protocol(trainer(), DeltaTuning([LORA], **BASE, pace=each)) for each in (None, {"sigma": 2.0}))
    assert training_protocol(plain) != training_protocol(noisy)
    for name in ("pace", "keep_answers", "start_decay", "metric_learning"):  # {} is an option with all its defaults
        given = plain["hyperparameters"] | {name: {}}
        assert training_protocol(plain) != training_protocol({**plain, "hyperparameters": given})
    old = {**plain, "hyperparameters": {k: v for k, v in plain["hyperparameters"].items() if k != "pace"}}
    assert training_protocol(old) == training_protocol(plain)
