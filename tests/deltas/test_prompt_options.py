"""Options of prompts after VPT, a gate, a Fourier share, a start from images: each against a formulation of its own."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from tests.deltas.families import FAMILIES, images, make, relative
from tests.deltas.oracle import concatenated_features
from tests.tasks.test_tasks import BASE, data, trainer
from vpt.backbones import create_backbone
from vpt.backbones.attention.recording import recording
from vpt.deltas import attach
from vpt.deltas.base import TrainingImages
from vpt.deltas.prefix import Prefix
from vpt.deltas.prompts.adaptive import Adaptive, ImagePrompts
from vpt.deltas.prompts.prompt import Prompt
from vpt.errors import ConfigError, UnknownNameError, VPTError
from vpt.models import TunedModel, load_classifier
from vpt.models.delta_file import fill
from vpt.models.delta_format import read_header
from vpt.tasks import DeltaTuning, DeltaWriter
from vpt.tasks.initialization import agree
from vpt.tasks.optimizers import rate_scales


def prompt_on(family: str, **options: Any) -> tuple[Any, Any, Any, Prompt]:
    """Backbone, twin of its timm model, delta and its only part, whose prompts are large enough to matter."""
    backbone, twin = make(family)
    delta = attach(backbone, [{"name": "prompt", "num_tokens": 4} | options])
    part = cast("Prompt", delta.parts[0])
    with torch.no_grad():
        tensors = part.tokens if isinstance(part.tokens, torch.nn.ParameterList) else [part.tokens]
        for tensor in tensors:
            tensor.copy_(torch.randn(tensor.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4)))
    return backbone, twin, delta, part


def tokens_of(part: Prompt) -> list[Tensor]:
    return [part.prompts(layer) for layer in range(len(part.blocks))]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gate_of_log_3_is_each_prompt_three_times(family: str) -> None:
    backbone, twin, _, part = prompt_on(family, gate={"init": math.log(3), "per": "block"})
    theirs = concatenated_features(twin, images(family), [each.repeat(3, 1) for each in tokens_of(part)])
    assert relative(backbone(images(family)), theirs) <= 1e-10


def test_a_gate_scales_the_odds_head_by_head_and_with_the_strength() -> None:
    backbone, _, delta, part = prompt_on("vit", gate={"init": 0.0})
    attention, x = backbone.layout.attentions[1], torch.randn(2, 17, 24, dtype=torch.float64)

    def odds() -> Tensor:
        share: Tensor = attention.weights(None, x)[..., 17:].sum(-1)
        return share / (1 - share)

    plain = odds()
    assert part.gate is not None
    opening = torch.randn(part.gate.shape, dtype=torch.float64)
    with torch.no_grad():
        part.gate.copy_(opening)
    of_block = opening[2:4].exp().view(1, 2, 1)  # two heads in each of three blocks
    torch.testing.assert_close(odds(), plain * of_block)
    delta.set_strength(0.25)
    torch.testing.assert_close(odds(), plain * of_block * 0.25)


@pytest.mark.parametrize("family", ["vit", "eva02-split", "beit", "rope-grouped", "swinv2"])
def test_a_gated_prompt_at_strength_0_and_1_is_exact_and_the_gate_has_its_gradient(family: str) -> None:
    backbone, _, delta, part = prompt_on(family, gate={"init": -1.0})
    delta.set_strength(0.0)
    off = backbone(images(family))
    delta.set_strength(1.0)
    tuned = backbone(images(family))
    delta.detach()
    assert torch.equal(off, backbone(images(family)))
    delta.attach()
    assert torch.equal(tuned, backbone(images(family)))
    assert part.gate is not None
    (grad,) = torch.autograd.grad(tuned.square().sum(), part.gate)
    step = torch.zeros_like(part.gate)
    step[1] = 1e-6
    with torch.no_grad():
        part.gate.add_(step)
        above = backbone(images(family)).square().sum()
        part.gate.sub_(2 * step)
        below = backbone(images(family)).square().sum()
    assert float(grad[1]) == pytest.approx(float(above - below) / 2e-6, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("per", ["head", "block"])
@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_a_gate_counts_its_numbers_and_learns_faster_without_decay(name: str, per: str) -> None:
    deltas = [{"name": name, "num_tokens": 2, "gate": {"per": per, "lr_scale": 7.0}}]
    task = DeltaTuning(**BASE, deltas=deltas)
    part = cast("Any", task.model.parts()[0])
    assert part.gate.shape == (18,) if per == "head" else (6,)
    assert sum(each.numel() for each in part.parameters()) == part.expected_parameters()
    assert rate_scales(task.model, task.hparams) == {part.gate: 7.0}
    trainer(epochs=1).fit(task, datamodule=data())
    groups = cast("Any", task.optimizers()).param_groups
    (own,) = [group for group in groups if any(each is part.gate for each in group["params"])]
    (other,) = [group for group in groups if any(each is task.model.head.weight for each in group["params"])]
    assert (own["weight_decay"], other["weight_decay"]) == (0.0, 1e-4)
    assert own["initial_lr"] == pytest.approx(7 * other["initial_lr"])


def test_gradients_and_openings_are_curves(tmp_path: Path) -> None:
    task = DeltaTuning(**BASE, deltas=[{"name": "prompt", "num_tokens": 2, "gate": {"init": -2.0}}])
    runs = trainer(tmp_path, epochs=1)
    runs.fit(task, datamodule=data())
    (folder,) = {path.parent for path in tmp_path.rglob("events.*")}
    events = EventAccumulator(str(folder)).Reload()
    named = {name for name in events.Tags()["scalars"] if name.startswith(("gradient/", "gate/"))}
    assert named == {"gradient/delta", "gradient/head", *(f"gate/block_{block:02d}" for block in range(6))}
    first = events.Scalars("gate/block_00")[0]
    assert (first.step, first.value) == (0, pytest.approx(math.exp(-2), rel=1e-5))
    assert all(event.value > 0 for event in events.Scalars("gradient/delta"))
    assert not {name for name in runs.callback_metrics if name.startswith(("gradient", "gate"))}


@pytest.mark.parametrize(("family", "deep"), [("vit", True), ("vit", False), ("eva-token", True), ("swin", True)])
def test_a_fourier_share_is_the_transform_written_out(family: str, deep: bool) -> None:
    backbone, twin, _, part = prompt_on(family, num_tokens=5, fourier=0.5, deep=deep)
    found = []
    for own in tokens_of(part)[: len(part.blocks) if deep else 1]:
        n, dim = 2, own.shape[1]  # 0.5 · 5, rounded down
        rows, columns = (torch.outer(torch.arange(m), torch.arange(m)).double() * 2 * math.pi / m for m in (n, dim))
        first = own[:n]
        real = rows.cos() @ first @ columns.cos() - rows.sin() @ first @ columns.sin()
        found.append(torch.cat([real, own[n:]]))
    theirs = concatenated_features(twin, images(family), found, deep=deep)
    ours = backbone(images(family))
    assert relative(ours, theirs) <= 1e-10
    assert relative(ours, concatenated_features(twin, images(family), tokens_of(part), deep=deep)) > 1e-4


def entering(twin: Any, pixels: Tensor) -> list[Tensor]:
    """What enters each block of a plain ViT, block by block."""
    x = twin.norm_pre(twin._pos_embed(twin.patch_embed(pixels)))
    found = []
    for block in twin.blocks:
        found.append(x)
        x = block(x)
    return found


@pytest.mark.parametrize("init", ["token", "mean", "max"])
def test_prompts_start_as_tokens_or_pooled_chunks_of_some_image(init: str) -> None:
    _, twin, delta, part = prompt_on("vit", init=init)
    delta.set_strength(0.0)
    pixels = images()
    part.start_from_images(TrainingImages(3, lambda rows: pixels[list(rows)]), np.random.default_rng(0))
    for own, theirs in zip(tokens_of(part), entering(twin, pixels), strict=True):
        pool = theirs
        if init == "mean":  # 17 tokens in four chunks of 5, 4, 4 and 4
            sums = [theirs[:, a:b].mean(dim=1) for a, b in ((0, 5), (5, 9), (9, 13), (13, 17))]
            pool = torch.stack(sums, dim=1)
        elif init == "max":
            pool = torch.stack([theirs[:, a:b].amax(dim=1) for a, b in ((0, 5), (5, 9), (9, 13), (13, 17))], dim=1)
        gaps = (own.unsqueeze(1) - pool.flatten(0, 1).unsqueeze(0)).abs().amax(dim=2)
        assert float(gaps.min(dim=1).values.max().detach()) < 1e-9
        assert len(set(gaps.argmin(dim=1).tolist())) == 4, "different ones"


@pytest.mark.parametrize("head", [None, "probe"])
def test_a_run_starts_from_tokens_of_its_training_images(head: str | None) -> None:
    task = DeltaTuning(**BASE, deltas=[{"name": "prompt", "num_tokens": 3, "init": "token"}], init_head=head)
    runs = trainer(epochs=0)
    runs.fit(task, datamodule=data())
    part = cast("Prompt", task.model.parts()[0])
    split = data().split("train")
    backbone = create_backbone("vit_nano_patch8_64")
    with torch.no_grad():
        pixels = backbone.normalize(split.batch(range(len(split)))["image"])
        for own, theirs in zip(tokens_of(part), entering(backbone.model, pixels), strict=True):
            gaps = torch.cdist(own, theirs.flatten(0, 1), compute_mode="donot_use_mm_for_euclid_dist")
            assert float(gaps.min(dim=1).values.max()) < 1e-3
    before = cast("Tensor", part.tokens).clone()
    runs.fit(task, datamodule=data())
    assert torch.equal(cast("Tensor", part.tokens), before), "what has started goes on"


def test_a_model_of_a_file_has_started() -> None:
    model = TunedModel(make("vit")[0], 3, [{"name": "prompt", "num_tokens": 4, "init": "mean"}])
    (part,) = model.parts()
    assert part.starts_from_images
    fill(model, {key: tensor.detach() for key, tensor in model.owned().items()}, "a file")
    assert not part.starts_from_images


def test_processes_agree_on_what_the_first_has_computed() -> None:
    model = TunedModel(make("vit")[0], 3, [{"name": "prompt", "num_tokens": 4}])
    alone = {key: tensor.clone() for key, tensor in model.owned().items()}
    first = SimpleNamespace(broadcast=lambda tensor: tensor + 1)
    agree(model, cast("Any", SimpleNamespace(world_size=1, strategy=first)))
    assert all(torch.equal(tensor, alone[key]) for key, tensor in model.owned().items())
    agree(model, cast("Any", SimpleNamespace(world_size=2, strategy=first)))
    assert all(torch.equal(tensor, alone[key] + 1) for key, tensor in model.owned().items())


@pytest.mark.parametrize(
    "spec", [{"gate": {"init": -1.0}}, {"adaptive": {"dropout": 0.0}}, {"fourier": 0.5}, {"temperature": {}}], ids=str
)
def test_activation_checkpointing_and_copies_change_nothing(spec: dict[str, Any]) -> None:
    backbone, _, delta, part = prompt_on("vit", **spec)
    with torch.no_grad():
        for each in part.parameters():
            each.normal_()

    def gradients() -> list[Tensor]:
        return list(torch.autograd.grad(backbone(images()).square().sum(), list(delta.parameters())))

    plain = gradients()
    backbone.model.set_grad_checkpointing(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(), strict=True))
    backbone.model.set_grad_checkpointing(False)
    model = TunedModel(make("vit")[0], 3, [{"name": "prompt", "num_tokens": 4} | spec]).eval()
    other = pickle.loads(pickle.dumps(copy.deepcopy(model)))  # noqa: S301  # our own
    assert torch.equal(other(images()), model(images()))


def test_nothing_of_a_call_is_left_behind() -> None:
    backbone, _, _, part = prompt_on("vit", adaptive={"dropout": 0.0})
    backbone(images())
    backbone.model(images())  # timm's own forward pass, in no context of its own
    with pytest.raises(ConfigError, match="while their block runs"):
        part.prompts(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gate_moves_in_half_precision(dtype: torch.dtype) -> None:
    backbone, _, _, part = prompt_on("vit", gate={"init": -5.0})
    backbone.to(dtype)
    part.to(dtype)
    assert part.gate is not None
    for _ in range(50):
        with torch.no_grad():
            part.gate.add_(0.008)
    opening = part.opening(0)
    assert opening is not None
    assert float(opening[0].detach()) == pytest.approx(-4.6, abs=0.01)


def test_a_run_starts_from_its_seed_and_a_resumed_one_goes_on(tmp_path: Path) -> None:
    def run(seed: int, folder: Path | None = None, **options: Any) -> Any:
        L.seed_everything(seed, verbose=False)
        task = DeltaTuning(**BASE, deltas=[{"name": "prompt", "num_tokens": 3, "init": "mean"}])
        trainer(folder, **options).fit(task, datamodule=data())
        return task.model.state_dict()["delta.parts.0.tokens"]

    first = run(0, epochs=0)
    assert torch.equal(run(0, epochs=0), first)
    assert not torch.equal(run(1, epochs=0), first)
    keep = ModelCheckpoint(tmp_path, filename="last", save_on_train_epoch_end=True)
    trained = run(0, tmp_path, epochs=1, callbacks=[keep, DeltaWriter()])
    task = DeltaTuning(**BASE, deltas=[{"name": "prompt", "num_tokens": 3, "init": "mean"}])
    trainer(epochs=1).fit(task, datamodule=data(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert torch.equal(task.model.state_dict()["delta.parts.0.tokens"], trained)
    (file,) = tmp_path.rglob("delta.safetensors")
    assert read_header(file)["specs"][0]["init"] == "uniform"
    assert torch.equal(load_classifier(file).state_dict()["delta.parts.0.tokens"], trained)


def adapted_features(twin: Any, pixels: Tensor, part: Prompt) -> Tensor:
    """VAPT on a plain ViT as the paper writes it, image by image and position by position."""
    own = cast("Any", part.adaptive)
    x = twin.norm_pre(twin._pos_embed(twin.patch_embed(pixels)))
    for layer, block in enumerate(twin.blocks):
        prompts = []
        for tokens in x:
            if layer == 0:
                prompts.append(part.prompts(0))
                continue
            norm, kernel, pool = own.norms[layer - 1], own.kernels[layer - 1], own.pools[layer - 1]
            patches = tokens[1:]
            centred = patches - patches.mean(dim=1, keepdim=True)
            normed = centred / (patches.var(dim=1, correction=0, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias
            field = normed.reshape(4, 4, -1)
            places = [(row, column) for row in range(3) for column in range(3)]
            found = [
                sum(kernel[i, j] * field[row + i, column + j] for i in range(2) for j in range(2))
                for row, column in places
            ]
            pooled = pool.weight @ torch.stack(cast("list[Tensor]", found)) + pool.bias.unsqueeze(1)
            prompts.append(pooled + (pooled @ own.down.weight.T).clamp(min=0) @ own.up.weight.T)
        number = len(prompts[0])
        x = block(torch.cat([torch.stack(prompts), x], dim=1))[:, number:]
    pooled_features: Tensor = twin.forward_head(twin.norm(x), pre_logits=True)
    return pooled_features


def test_adaptive_prompts_are_the_concatenation_of_functions_of_each_image() -> None:
    backbone, twin, delta, part = prompt_on("vit", adaptive={"hidden": 3})
    bare = backbone.model(images())
    assert part.expected_parameters() == sum(each.numel() for each in part.parameters())
    with torch.no_grad():
        for each in part.parameters():
            each.normal_()
    delta.eval()
    ours, theirs = backbone(images()), adapted_features(twin, images(), part)
    assert relative(ours, theirs) <= 1e-10
    assert relative(ours, bare) > 1e-3
    parameters = list(part.parameters())
    grads = torch.autograd.grad(ours.square().sum(), parameters)
    expected = torch.autograd.grad(theirs.square().sum(), parameters)
    assert all(relative(a, b) <= 1e-9 for a, b in zip(grads, expected, strict=True))
    with recording(backbone) as calls:
        backbone(images())
    asked = calls[2].as_called(part.queries, 2)
    assert asked is not None
    assert asked.shape == (3, 2, 4, 12)
    own = calls[2].weights_of(asked)
    torch.testing.assert_close(own.sum(dim=-1), torch.ones(3, 2, 4, dtype=torch.float64))
    alone = torch.cat([backbone(image[None]) for image in images()])
    assert relative(alone, ours) <= 1e-10, "no image sees another's prompts"


def test_adaptive_prompts_count_as_in_the_paper() -> None:
    # ViT-B/16, four tokens: 2·768 + 4 + 4·170 for 11 blocks, a shared projector of 2·768·8, and four first prompts
    grid, like = (14, 14), torch.zeros(1)
    made = ImagePrompts([(4, 768)] * 11, grid, Adaptive(), like)
    assert made.expected_parameters() == sum(each.numel() for each in made.parameters()) == 11 * 2220 + 12288


def test_a_shared_prefix_has_its_keys_as_values() -> None:
    backbone, _ = make("vit")
    shared = attach(backbone, [{"name": "prefix", "num_tokens": 3, "shared": True}])
    (keys,) = shared.parameters()
    assert keys.numel() == cast("Prefix", shared.parts[0]).expected_parameters() == 3 * 3 * 24
    with torch.no_grad():
        keys.normal_()
    ours = backbone(images())
    shared.detach()
    other = cast("Prefix", attach(backbone, [{"name": "prefix", "num_tokens": 3}]).parts[0])
    with torch.no_grad():
        cast("Tensor", other.keys).copy_(keys)
        cast("Tensor", other.values).copy_(keys)
    assert torch.equal(backbone(images()), ours)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"gate": {"inti": 0}}, UnknownNameError, "did you mean 'init'"),
        ({"gate": {"per": "token"}}, UnknownNameError, "head, block"),
        ({"gate": {"init": -31}}, ConfigError, "at least -30"),
        ({"gate": {"lr_scale": 0}}, ConfigError, "never open"),
        ({"gate": 3.0}, ConfigError, "a mapping of init, per, lr_scale"),
        ({"gate": {}, "deep": False}, ConfigError, "only with deep prompts"),
        ({"fourier": 1.5}, ConfigError, "from 0 to 1"),
        ({"init": "kmeans"}, UnknownNameError, "uniform, token, mean, max"),
        ({"init": "mean", "deep": False}, ConfigError, "deep prompts of each layer's own"),
        ({"adaptive": {}, "shared": True}, ConfigError, "each layer's own"),
        ({"adaptive": {}, "deep": False}, ConfigError, "only with deep prompts"),
        ({"adaptive": {"kernel": 5}}, ConfigError, "a map of 4 by 4 patches"),
        ({"adaptive": {}, "layers": [1, 2]}, ConfigError, "a second block"),
        ({"adaptive": {"hidden": 2**40}}, ConfigError, "at most 65,536"),
        ({"fourier": 0.2}, ConfigError, "transforms none"),
        ({"init": "mean", "num_tokens": 18}, ConfigError, "17 enter block 0, for 18 prompts"),
        ({"adaptive": {"dropout": 1}}, ConfigError, "drops everything"),
        ({"init": "mean", "project": 3}, ConfigError, "leave out shared and project"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], error: type[VPTError], message: str) -> None:
    with pytest.raises(error, match=message):
        attach(make("vit")[0], [{"name": "prompt", "num_tokens": 4} | options])


def test_a_start_that_cannot_be_is_refused() -> None:
    _, _, delta, part = prompt_on("vit", num_tokens=52, init="token")
    delta.set_strength(0.0)
    pixels = images()
    with pytest.raises(ConfigError, match="3 images have 51 of them for block 0, for 52 prompts"):
        part.start_from_images(TrainingImages(3, lambda rows: pixels[list(rows)]), np.random.default_rng(0))
    deltas = [{"name": "prompt", "num_tokens": 3, "init": "mean"}]
    with pytest.raises(ConfigError, match="reads the prompts past it"):
        attach(make("swin")[0], [{"name": "prompt", "num_tokens": 3, "gate": {}, "reference_pooling": True}])
    with pytest.raises(ConfigError, match="needs a data module"):
        trainer().fit(DeltaTuning(**BASE, deltas=deltas), data().train_dataloader())
    with pytest.raises(ConfigError, match="hidden network"):
        attach(make("vit")[0], [{"name": "prefix", "num_tokens": 4, "shared": True, "hidden": 4}])
