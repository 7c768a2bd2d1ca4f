"""Layers without prompts, scores of prompts, their moves, and the policy that learns where to: each written out."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any, cast

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import vpt
from tests.deltas.families import FAMILIES, images, make, relative
from tests.deltas.oracle import concatenated_features
from vpt.backbones import create_backbone
from vpt.deltas import attach
from vpt.deltas.base import TrainingImages
from vpt.deltas.prompts.allocation import Policy, state_of
from vpt.deltas.prompts.prompt import Prompt
from vpt.deltas.prompts.pruning import mask_gradients
from vpt.errors import ConfigError, DeltaFileError, VPTError
from vpt.export.onnx_torch import export_onnx
from vpt.models import TunedModel, load_classifier, save_delta
from vpt.models.delta_file import fill, start_from
from vpt.models.delta_format import read_header
from vpt.visualize import Scene, attention_maps, draw

NANO = "vit_nano_patch8_64"


def attached(family: str = "vit", **options: Any) -> tuple[Any, Any, Any, Prompt]:
    """Backbone, twin of its timm model, a delta, and its prompts, large enough to matter."""
    backbone, twin = make(family)
    delta = attach(backbone, [{"name": "prompt", "num_tokens": 2} | options])
    part = cast("Prompt", delta.parts[0])
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for each in part.parameters():
            each.copy_(torch.randn(each.shape, dtype=each.dtype, generator=generator))
    return backbone, twin, delta, part


def prompts_of(part: Prompt) -> list[Tensor]:
    return [part.prompts(layer) for layer in range(len(part.blocks))]


def moving(*moves: tuple[int, int], **options: Any) -> tuple[Any, Any, Any, Prompt]:
    """`attached` with `relocate`, behind moves of rows to layers that keep their size."""
    found = attached(relocate={"scale": 1.0}, **options)
    for row, layer in moves:
        assert found[3].assigned is not None
        found[3].assigned.move(cast("Tensor", found[3].tokens), row, layer)
    return found


# -- layers without prompts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("numbers", [[2, 0, 3], [0, 0, 1], [3, 3, 0]])
@pytest.mark.parametrize("family", ["vit", "post-norm", "eva02-split", "beit", "rope-mixed", "avg-pool"])
def test_a_layer_without_prompts_is_the_block_as_it_is(family: str, numbers: list[int]) -> None:
    backbone, twin, delta, part = attached(family, num_tokens=numbers)
    assert [len(prompts) for prompts in prompts_of(part)] == numbers
    assert part.expected_parameters() == sum(each.numel() for each in part.parameters()) == sum(numbers) * 24
    theirs = concatenated_features(twin, images(family), prompts_of(part))
    tuned = backbone(images(family))
    assert relative(tuned, theirs) <= 1e-10
    assert sorted(part.constants()) == [block for block, number in enumerate(numbers) if number]
    delta.set_strength(0.0)
    off = backbone(images(family))
    delta.set_strength(1.0)
    assert torch.equal(backbone(images(family)), tuned)
    delta.detach()
    assert torch.equal(backbone(images(family)), off)


def test_so_is_one_of_a_swin_and_one_behind_a_projection() -> None:
    backbone, twin, _, part = attached("swin", num_tokens=[1, 0, 0, 2])
    assert relative(backbone(images("swin")), concatenated_features(twin, images("swin"), prompts_of(part))) <= 1e-10
    backbone, twin, _, part = attached(num_tokens=[0, 2, 1], project=5)
    theirs = concatenated_features(twin, images(), prompts_of(part))
    assert relative(backbone(images()), theirs) <= 1e-10
    assert part.expected_parameters() == sum(each.numel() for each in part.parameters())
    changes, tensors = part.folded()
    assert changes["project"] is None
    plain = attach(make("vit")[0], [{"name": "prompt", "num_tokens": [0, 2, 1]}])
    plain.parts[0].load_state_dict(tensors)
    assert all(map(torch.equal, prompts_of(cast("Prompt", plain.parts[0])), prompts_of(part)))


@pytest.mark.parametrize("init", ["token", "mean", "max"])
@pytest.mark.parametrize("options", [{}, {"relocate": {}}])
def test_prompts_of_images_start_in_the_layers_that_have_some(init: str, options: dict[str, Any]) -> None:
    found = []
    for numbers, more in (([2, 0, 3], options), ([2, 0, 3], {}), ([2, 1, 3], {})):
        part = Prompt(make("vit")[0], numbers, init=cast("Any", init), **more)
        part.start_from_images(TrainingImages(2, lambda rows: images()[list(rows)]), np.random.default_rng(5))
        found.append(prompts_of(part))
    assert all(map(torch.equal, found[0], found[1]))
    assert torch.equal(found[0][0], found[2][0])


def test_banks_exports_and_figures_take_layers_without_prompts(tmp_path: Path) -> None:
    def saved(name: str, numbers: Any) -> Path:
        torch.manual_seed(len(name))
        model = TunedModel(create_backbone(NANO), 3, [{"name": "prompt", "num_tokens": numbers, "log_bias": True}])
        with torch.no_grad():
            for tensor in model.owned().values():
                tensor.normal_(std=0.5)
        return save_delta(tmp_path / f"{name}.safetensors", model)

    files = {"some": saved("some", [0, 2, 0, 0, 3, 1]), "all": saved("all", 2)}
    model = load_classifier(files["some"])
    pixels = model.backbone.random_images(2)
    bank = vpt.PromptBank(files)
    for task, logits in zip(files, bank(pixels, [*files]), strict=True):
        with torch.no_grad():
            alone = load_classifier(files[task])(pixels)
        torch.testing.assert_close(logits, alone[[*files].index(task)], rtol=1e-4, atol=1e-4)
    assert export_onnx(model, tmp_path / "model.onnx").difference < 1e-3
    maps = attention_maps(model, pixels)
    assert (maps.share() > 0).all(axis=1).tolist() == [False, True, False, False, True, True]
    assert [layer.from_prompts.shape[1] for layer in maps.layers] == [0, 2, 0, 0, 3, 1]
    scene = Scene(model, pixels, None, pixels, None)
    for kind in ("compare", "class", "rollout", "share", "mass", "prompts", "patches"):
        plt.close(draw(scene, kind))


@pytest.mark.parametrize("numbers", [[0, 0, 0], [-1, 2, 2], [2, 2]])
def test_some_layer_has_a_prompt(numbers: list[int]) -> None:
    with pytest.raises(ConfigError, match="num_tokens"):
        Prompt(make("vit")[0], numbers)


@pytest.mark.parametrize("options", [{"shared": True}, {"adaptive": {}}, {"fourier": 0.5}, {"koopman": {}}])
def test_what_needs_prompts_in_each_layer_says_so(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        attach(make("vit")[0], [{"name": "prompt", "num_tokens": [2, 0, 2]} | options])


# -- where prompts stand, and how one moves ---------------------------------------------------------------------------


def test_prompts_begin_as_without_the_option_and_are_as_many() -> None:
    found, options = [], list[Any]([None, {}])
    for relocate in options:
        torch.manual_seed(3)
        backbone = create_backbone("vit_base_patch16_224", "random:1")
        found.append(Prompt(backbone, 10, relocate=relocate))
    assert all(map(torch.equal, prompts_of(found[0]), prompts_of(found[1])))
    assert found[1].expected_parameters() == 12 * 10 * 768  # of VPT-deep
    assert [each.numel() for each in found[1].parameters()] == [12 * 10 * 768]


@pytest.mark.parametrize("family", ["vit", "eva02-split", "post-norm"])
def test_prompts_that_moved_are_the_concatenation_in_their_new_layers(family: str) -> None:
    backbone, twin, delta, part = moving((0, 2), (1, 2), (4, 1), family=family)
    rows = cast("Tensor", part.tokens)
    expected = [rows[:0], rows[[2, 3, 4]], rows[[0, 1, 5]]]
    assert all(map(torch.equal, prompts_of(part), expected))
    tuned = backbone(images(family))
    assert relative(tuned, concatenated_features(twin, images(family), expected)) <= 1e-10
    assert torch.equal(copy.deepcopy(backbone)(images(family)), tuned)
    assert torch.equal(pickle.loads(pickle.dumps(backbone))(images(family)), tuned)  # noqa: S301  # our own
    assert {name: float(value) for name, value in part.curves().items()} == {
        "prompts/block_00": 0,
        "prompts/block_01": 3,
        "prompts/block_02": 3,
    }
    delta.set_strength([0.0, 0.0, 0.5, 1.0, 1.0])
    half = backbone(images(family))
    plain = attach(make(family)[0], [{"name": "prompt", "num_tokens": [0, 3, 3]}])
    plain.parts[0].load_state_dict(part.folded()[1])
    plain.set_strength([0.0, 0.0, 0.5, 1.0, 1.0])
    assert torch.equal(cast("Prompt", plain.parts[0]).backbone(images(family)), half)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_prompt_moves_with_the_moments_that_the_optimiser_has_of_it(optimizer: Any) -> None:
    backbone, _, _, part = attached(relocate={})
    assert part.assigned is not None
    tokens = cast("nn.Parameter", part.tokens)
    options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {"weight_decay": 0.1}
    steps = optimizer([tokens], lr=0.1, **options)
    gradients = []

    def step() -> None:
        steps.zero_grad()
        backbone(images()).square().sum().backward()
        assert tokens.grad is not None
        gradients.append(tokens.grad.clone())
        steps.step()

    for _ in range(3):
        step()
    before = tokens.detach().clone()
    part.assigned.move(tokens, 3, 0)
    moved = tokens.detach().clone()
    assert torch.equal(moved[3], before[3] * 1e-3)
    assert torch.equal(moved[[0, 1, 2, 4, 5]], before[[0, 1, 2, 4, 5]])
    assert part.assigned.layers.tolist() == [0, 0, 1, 0, 2, 2]
    step()
    if optimizer is torch.optim.SGD:
        expected = moved - 0.1 * sum(0.9 ** (3 - age) * each for age, each in enumerate(gradients))
    else:
        first, second = torch.zeros_like(moved), torch.zeros_like(moved)
        for each in gradients:
            first, second = 0.9 * first + 0.1 * each, 0.999 * second + 0.001 * each.square()
        first, second = first / (1 - 0.9**4), second / (1 - 0.999**4)
        expected = moved * (1 - 0.1 * 0.1) - 0.1 * first / (second.sqrt() + 1e-8)
    torch.testing.assert_close(tokens.detach(), expected, rtol=1e-9, atol=1e-12)


def test_a_prompt_whose_own_layer_is_chosen_stays_as_it_is() -> None:
    _, _, _, part = attached(relocate={})
    assert part.assigned is not None
    before = cast("Tensor", part.tokens).detach().clone()
    part.assigned.move(cast("Tensor", part.tokens), 3, 1)
    assert torch.equal(cast("Tensor", part.tokens), before)
    assert part.assigned.numbers() == [2, 2, 2]


def test_scores_are_the_products_of_prompts_and_their_gradients() -> None:
    backbone, twin, _, part = moving((0, 2), (1, 2))
    head = torch.randn(4, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    labels = torch.tensor([3, 0, 1])
    free = [each.detach().clone().requires_grad_() for each in prompts_of(part)]
    loss = cross_entropy(concatenated_features(twin, images(), free) @ head.T, labels)
    gradients = torch.autograd.grad(loss, free)
    expected = [(gradient * own).sum(dim=1) for gradient, own in zip(gradients, free, strict=True)]
    shapes: dict[nn.Module, Any] = {part: part.shapes}
    found = mask_gradients(shapes, 1, 1, lambda: cross_entropy(backbone(images()) @ head.T, labels), backbone.mean)
    assert [len(each) for each in expected] == [0, 2, 4]
    for ours, theirs in zip(found[part], expected, strict=True):
        assert ours.shape == (1, len(theirs), 1)
        torch.testing.assert_close(ours.flatten(), theirs, rtol=1e-8, atol=1e-14)
    assert max(float(each.detach().abs().max()) for each in expected if len(each)) > 1e-8


# -- files ------------------------------------------------------------------------------------------------------------


def model_of(*moves: tuple[int, int], **options: Any) -> TunedModel:
    torch.manual_seed(5)
    model = TunedModel(create_backbone(NANO), 3, [{"name": "prompt", "num_tokens": 2} | options])
    part = cast("Prompt", model.parts()[0])
    with torch.no_grad():
        cast("Tensor", part.tokens).normal_()
    for row, layer in moves:
        assert part.assigned is not None
        part.assigned.move(cast("Tensor", part.tokens), row, layer)
    return model.eval()


@pytest.mark.parametrize("moves", [(), ((0, 5), (1, 3))])
def test_a_file_holds_plain_prompts_and_answers_bit_for_bit(moves: Any, tmp_path: Path) -> None:
    model = model_of(*moves, relocate={}, gate={}, temperature={})
    save_delta(file := tmp_path / "delta.safetensors", model)
    (spec,) = read_header(file)["specs"]
    assert spec["relocate"] is None
    assert spec["num_tokens"] == ([0, 2, 2, 3, 2, 3] if moves else 2)
    loaded = load_classifier(file)
    pixels = model.backbone.random_images(3)
    with torch.no_grad():
        assert torch.equal(loaded(pixels), model(pixels))


def test_training_starts_from_a_file_with_as_many_in_each_layer(tmp_path: Path) -> None:
    save_delta(plain := tmp_path / "plain.safetensors", model_of())
    save_delta(moved := tmp_path / "moved.safetensors", model_of((0, 5), (1, 3), relocate={}))
    start_from(plain, again := model_of(relocate={}))
    assert all(
        map(torch.equal, *(prompts_of(cast("Any", each.parts()[0])) for each in (load_classifier(plain), again)))
    )
    start_from(moved, again := model_of(num_tokens=[0, 2, 2, 3, 2, 3], relocate={}))
    assert all(
        map(torch.equal, *(prompts_of(cast("Any", each.parts()[0])) for each in (load_classifier(moved), again)))
    )
    with pytest.raises(DeltaFileError, match="give the same"):
        start_from(moved, model_of(relocate={}))


def test_where_prompts_stand_is_part_of_a_state_and_of_nothing_else() -> None:
    model, other = model_of((0, 5), relocate={}), model_of(relocate={})
    key = "delta.parts.0.assigned._extra_state"
    tensors = {name: tensor.detach().clone() for name, tensor in model.owned().items()}
    assert tensors[key].tolist() == [5, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    fill(other, tensors, "a state")
    pixels = model.backbone.random_images(3)
    assert torch.equal(other.eval()(pixels), model(pixels))
    other = model_of(relocate={})
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(pixels), model(pixels))
    for wrong in (-1, 6):
        tensors[key][3] = wrong
        with pytest.raises(DeltaFileError, match="stand in layers that are none"):
            fill(other, tensors, "a state")


# -- the policy -------------------------------------------------------------------------------------------------------


def test_the_policy_sees_scores_the_distribution_and_the_layer() -> None:
    scores, numbers = np.array([0.3, -0.1, 0.0, 2.0]), np.array([2, 1, 0, 4])
    own = np.eye(4)[3]
    left = numbers - own
    expected = [(scores - scores.mean()) / (scores.std() + 1e-8), left / left.sum(), own]
    found = state_of(scores.tolist(), numbers.tolist(), 3)
    np.testing.assert_allclose(found.numpy(), np.concatenate(expected), rtol=1e-12)


def test_the_policy_draws_what_its_actor_says_and_remembers_it() -> None:
    policy = Policy(3, torch.Generator().manual_seed(0))
    assert [tuple(each.shape) for each in policy.actor.parameters()] == [(64, 9), (64,), (64, 64), (64,), (3, 64), (3,)]
    assert [tuple(each.shape) for each in policy.critic.parameters()][-2:] == [(1, 64), (1,)]
    widths = [9, 9, 64, 64, 64, 64]
    for network in (policy.actor, policy.critic):
        for parameter, width in zip(network.parameters(), widths, strict=True):
            assert 0.8 * width**-0.5 < float(parameter.detach().abs().max()) < width**-0.5 or parameter.numel() < 4
    state = torch.linspace(-1, 1, 9)
    odds = policy.actor(state).softmax(dim=0).detach()
    generator = torch.Generator().manual_seed(1)
    drawn = [policy.choose(state, generator) for _ in range(4000)]
    frequencies = torch.bincount(torch.tensor(drawn), minlength=3) / 4000
    assert float((frequencies - odds).abs().max()) < 0.03
    assert policy.log_odds[0] == pytest.approx(float(odds[drawn[0]].log()), rel=1e-5)
    assert policy.expected[0] == pytest.approx(float(policy.critic(state).detach()), rel=1e-5)


def test_the_policy_learns_by_the_clipped_surrogate_written_out() -> None:
    """As `update` of src/models/ppo.py of ckshang/PRO-VPT computes it: K = 60, ε = 0.2, γ = 1, entropy 0.01."""
    torch.manual_seed(0)
    policy = Policy(3, torch.Generator().manual_seed(0), torch.float64)
    generator = torch.Generator().manual_seed(1)
    actor, critic = copy.deepcopy(policy.actor), copy.deepcopy(policy.critic)
    moments: list[dict[str, Any]] = [
        {"lr": rate, "of": each, "m": torch.zeros_like(each), "v": torch.zeros_like(each)}
        for network, rate in ((actor, 3e-4), (critic, 1e-3))
        for each in network.parameters()
    ]
    time = 0
    for first, second in ((0.5, -0.25), (-1.0, -0.5), (0.3, 0.3)):
        states = torch.randn(2, 9, dtype=torch.float64)
        with torch.no_grad():
            old, expected = actor(states).softmax(dim=1), critic(states)[:, 0]
        actions = []
        for state, reward in zip(states, (first, second), strict=True):
            actions.append(policy.choose(state, generator))
            policy.learn(reward)
        chosen = torch.tensor(actions)
        before = old[[0, 1], chosen]
        returns = torch.tensor([first + second, second], dtype=torch.float64)
        returns = (returns - returns.mean()) / (returns.std() + 1e-8)
        advantages = returns - expected
        for _ in range(60):
            now = actor(states).softmax(dim=1)
            ratios = now[[0, 1], chosen] / before
            surrogate = torch.min(ratios * advantages, torch.clamp(ratios, 0.8, 1.2) * advantages)
            value = 0.5 * ((critic(states)[:, 0] - returns) ** 2).mean()
            loss = (-surrogate + value + 0.01 * (now * now.log()).sum(dim=1)).mean()
            gradients = torch.autograd.grad(loss, [each["of"] for each in moments])
            time += 1
            with torch.no_grad():
                for each, gradient in zip(moments, gradients, strict=True):
                    each["m"] = 0.9 * each["m"] + 0.1 * gradient
                    each["v"] = 0.999 * each["v"] + 0.001 * gradient**2
                    root = (each["v"] / (1 - 0.999**time)).sqrt() + 1e-8
                    each["of"] -= each["lr"] * each["m"] / (1 - 0.9**time) / root
        assert not policy.rewards
        assert not policy.states
    ours = [*policy.actor.parameters(), *policy.critic.parameters()]
    for one, each in zip(ours, moments, strict=True):
        torch.testing.assert_close(one.detach(), each["of"].detach(), rtol=1e-7, atol=1e-9)
    fresh = Policy(3, torch.Generator().manual_seed(0), torch.float64)
    assert not torch.allclose(next(fresh.actor.parameters()), next(policy.actor.parameters()), atol=1e-3)


def test_a_policy_goes_on_from_its_state() -> None:
    whole = Policy(4, torch.Generator().manual_seed(0))
    states = torch.randn(7, 12, generator=torch.Generator().manual_seed(2))

    def moves(policy: Policy, first: int, last: int) -> list[int]:
        found = []
        for index in range(first, last):
            found.append(policy.choose(states[index], torch.Generator().manual_seed(index)))
            policy.learn(float(states[index, 0]))
        return found

    moves(whole, 0, 3)  # one update, and one move that waits for the next
    resumed = Policy(4, torch.Generator().manual_seed(9))
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    assert moves(resumed, 3, 7) == moves(whole, 3, 7)
    for one, other in zip(whole.actor.parameters(), resumed.actor.parameters(), strict=True):
        assert torch.equal(one, other)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"deep": False}, "relocate: only with deep prompts"),
        ({"shared": True}, "leave shared out"),
        ({"project": 8}, "leave project out"),
        ({"adaptive": {}}, "leave adaptive out"),
        ({"fourier": 0.5}, "leave fourier out"),
        ({"mask": ["x x"] * 3}, "leave mask out"),
        ({"koopman": {}}, "leave koopman out"),
        ({"layers": [1, 2]}, "two layers and two prompts"),
        ({"num_tokens": [0, 1, 0]}, "two layers and two prompts"),
        ({"relocate": {"warmup": -1}}, "warmup of relocate"),
        ({"relocate": {"warmup": 1.5}}, "warmup of relocate"),
        ({"relocate": {"scale": 2}}, "scale of relocate"),
        ({"relocate": {"scale": 0}}, "scale of relocate must be positive"),
        ({"relocate": {"policy": "ts"}}, "policy"),
    ],
)
def test_what_cannot_move_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(VPTError, match=said):
        attach(make("vit")[0], [{"name": "prompt", "num_tokens": 2, "relocate": {}} | options])


def test_prompts_move_between_layers_of_one_width() -> None:
    assert "swin" in FAMILIES
    with pytest.raises(ConfigError, match="layers of one width, and these have 12, 24"):
        attach(make("swin")[0], [{"name": "prompt", "num_tokens": 2, "relocate": {}}])
    backbone, twin, _, part = moving((0, 1), family="swin", layers=[2, 4])
    prompts = [torch.zeros(0, 12, dtype=torch.float64)] * 2 + prompts_of(part)
    assert [len(each) for each in prompts] == [0, 0, 1, 3]
    assert relative(backbone(images("swin")), concatenated_features(twin, images("swin"), prompts)) <= 1e-10
    options = {"layers": [2, 4], "relocate": {}, "reference_pooling": True}
    with pytest.raises(ConfigError, match="leave reference_pooling out"):
        attach(make("swin")[0], [{"name": "prompt", "num_tokens": 2} | options])
