"""Pruned prompts: the concatenation without them, and scores as the gradient of a mask that is written out."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.deltas.families import FAMILIES, images, make, relative
from tests.deltas.oracle import concatenated_features
from vpt.backbones import create_backbone
from vpt.deltas import attach
from vpt.deltas.base import TrainingImages
from vpt.deltas.prompts.prompt import Prompt
from vpt.deltas.prompts.pruning import least_important, mask_gradients
from vpt.errors import ConfigError, DeltaFileError
from vpt.experiments.prune import importance
from vpt.models import TunedModel, load_classifier, save_delta
from vpt.models.delta_file import start_from
from vpt.robustness.soups.averaging import averaged

MASK = "xxx ... x.x .xx"  # of four prompts in three segments; the second is gone


def left(prompts: Tensor, line: str) -> Tensor:
    """What is left of prompts (n, dim), one token and one channel after the other."""
    rows = []
    for prompt, word in zip(prompts, line.split(), strict=True):
        if word == "." * len(word):
            continue
        width = len(prompt) // len(word)
        rows.append(torch.stack([v if word[c // width] == "x" else v * 0 for c, v in enumerate(prompt)]))
    return torch.stack(rows)


def pruned_on(family: str, line: str = MASK, **options: Any) -> tuple[Any, Any, Any, list[Tensor]]:
    """Backbone, twin of its timm model, a pruned delta, and the prompts before pruning, large enough to matter."""
    backbone, twin = make(family)
    layers = len(backbone.attention_layout.blocks) if options.get("deep", True) else 1
    delta = attach(backbone, [{"name": "prompt", "num_tokens": 4, "mask": [line] * layers} | options])
    part = cast("Prompt", delta.parts[0])
    generator = torch.Generator().manual_seed(4)
    whole = [torch.randn(4, dim, dtype=torch.float64, generator=generator) for _, dim in part.shapes]
    runs = part.tokens if isinstance(part.tokens, nn.ParameterList) else [part.tokens]
    with torch.no_grad():
        rows = iter([part.mask.cut(layer, each) for layer, each in enumerate(whole)]) if part.mask else iter(())
        for run in runs:
            for stored in run:
                stored.copy_(next(rows))
    return backbone, twin, delta, whole


@pytest.mark.parametrize("line", [MASK, "x . x x", "xxx ... xxx xxx"])
@pytest.mark.parametrize("family", FAMILIES)
def test_deep_prompts_are_the_concatenation_of_what_is_left(family: str, line: str) -> None:
    backbone, twin, _, whole = pruned_on(family, line)
    theirs = concatenated_features(twin, images(family), [left(each, line) for each in whole])
    assert relative(backbone(images(family)), theirs) <= 1e-10


@pytest.mark.parametrize("family", ["vit", "dinov2-reg", "eva02-split", "beit"])
def test_shallow_prompts_are_the_concatenation_of_what_is_left(family: str) -> None:
    backbone, twin, _, whole = pruned_on(family, deep=False)
    theirs = concatenated_features(twin, images(family), [left(whole[0], MASK)], deep=False)
    assert relative(backbone(images(family)), theirs) <= 1e-10


def test_a_pruned_prompt_is_absent_where_one_of_zeros_would_be_attended_to() -> None:
    backbone, twin, _, whole = pruned_on("vit", "x . x x")
    zeros = [each * torch.tensor([[1.0], [0.0], [1.0], [1.0]]) for each in whole]
    theirs = concatenated_features(twin, images("vit"), zeros)
    assert relative(backbone(images("vit")), theirs) > 1e-3


def test_log_bias_counts_the_prompts_that_are_left() -> None:
    backbone, _, _, _ = pruned_on("vit", log_bias=True)
    part = cast("Prompt", backbone.attached[0])
    bias = part.key_bias(0, torch.zeros(1, 2, 5, 12, dtype=torch.float64), part.constants()[0][0].shape[2], 0)
    assert bias is not None
    torch.testing.assert_close(bias.flatten(), torch.full((3,), -np.log(3), dtype=torch.float64))


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_strength_0_and_1_are_exact_and_copies_are_equal(family: str) -> None:
    backbone, _, delta, _ = pruned_on(family)
    tuned = backbone(images(family))
    half = copy.deepcopy(backbone)
    assert torch.equal(half(images(family)), tuned)
    assert torch.equal(pickle.loads(pickle.dumps(backbone))(images(family)), tuned)  # noqa: S301  # our own
    delta.set_strength(0.0)
    off = backbone(images(family))
    delta.set_strength(1.0)
    assert torch.equal(backbone(images(family)), tuned)
    delta.detach()
    assert torch.equal(backbone(images(family)), off)


def test_all_that_is_kept_trains_and_nothing_else_is_stored() -> None:
    backbone, _, delta, _ = pruned_on("vit")
    backbone(images("vit")).square().sum().backward()
    part = cast("Prompt", delta.parts[0])
    (tokens,) = part.parameters()
    assert tokens.shape == (3, 7, 8)  # blocks, x in the mask, 24 channels in three segments
    assert tokens.grad is not None
    assert bool((tokens.grad != 0).all())
    assert part.expected_parameters() == tokens.numel()
    assert set(part.state_dict()) == {"tokens"}


def test_numbers_are_counted_as_the_released_code_counts_them() -> None:
    """12 · n · 768 less the masked ones: utils/vis_utils_pvk.py of ChengHan111/E2VPT, with 16 segments as there."""
    backbone = create_backbone("vit_base_patch16_224", "random")
    words = ["." * 16] * 5 + ["." * 4 + "x" * 12] * 5
    part = Prompt(backbone, 10, mask=[" ".join(words)] * 12)
    kept = torch.ones(10, 16)
    kept[:5], kept[5:, :4] = 0, 0
    masked = 12 * int((1 - kept.repeat(1, 768 // 16)).sum())
    assert part.expected_parameters() == 12 * 10 * 768 - masked == 34_560
    assert sum(each.numel() for each in part.parameters()) == 34_560


@pytest.mark.parametrize("name", ["vit_nano_patch8_64", "swin_tiny_patch4_window7_224"])
@pytest.mark.parametrize("line", ["xxxx .... x.x.", "x . x"])
def test_what_is_left_starts_as_without_a_mask_and_so_does_the_head(name: str, line: str) -> None:
    def model(**mask: Any) -> TunedModel:
        torch.manual_seed(3)
        return TunedModel(create_backbone(name, "random:1"), 3, [{"name": "prompt", "num_tokens": 3} | mask])

    whole, pruned = model(), model(mask=[line] * len(create_backbone(name, "random").layout.blocks))
    parts = [cast("Prompt", each.parts()[0]) for each in (whole, pruned)]
    for layer in range(len(parts[0].blocks)):
        assert torch.equal(parts[1].prompts(layer), left(parts[0].prompts(layer), line))
    assert torch.equal(whole.head.weight, pruned.head.weight)


def test_prompts_from_images_start_as_without_a_mask() -> None:
    found = []
    for line in (None, MASK):
        backbone, _ = make("vit")
        options = {} if line is None else {"mask": [line] * 3}
        part = Prompt(backbone, 4, init="token", **cast("Any", options))
        part.start_from_images(TrainingImages(2, lambda rows: images("vit")[list(rows)]), np.random.default_rng(5))
        found.append(part)
    for layer in range(3):
        assert torch.equal(found[1].prompts(layer), left(found[0].prompts(layer), MASK))


def test_a_file_holds_the_mask_and_another_delta_does_not_start_from_it(tmp_path: Path) -> None:
    def model(*lines: str) -> TunedModel:
        spec = {"name": "prompt", "num_tokens": 3, "layers": [4, 6], "mask": list(lines)}
        return TunedModel(create_backbone("vit_nano_patch8_64"), 3, [spec]).eval()

    kept = model("xx.. .... xxxx", ".... x..x xx..")
    save_delta(tmp_path / "a.safetensors", kept)
    loaded = load_classifier(tmp_path / "a.safetensors")
    pixels = kept.backbone.random_images(2, seed=0)
    assert torch.equal(loaded(pixels), kept(pixels))
    start_from(tmp_path / "a.safetensors", other := model("xx.. .... xxxx", ".... x..x xx.."))
    for layer in range(2):
        assert torch.equal(cast("Any", other.parts()[0]).prompts(layer), cast("Any", kept.parts()[0]).prompts(layer))
    with pytest.raises(DeltaFileError, match="are to be trained: give the same"):
        start_from(tmp_path / "a.safetensors", model("xx.. .... xxxx", "x... x..x x..."))


def test_a_mean_matches_whole_prompts_and_leaves_segments_where_they_are() -> None:
    rows = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    files = [{"delta.parts.0.tokens": rows}, {"delta.parts.0.tokens": rows.flip(1)}]
    spec = {"name": "prompt", "fourier": 0.0, "adaptive": None}
    whole = averaged([spec | {"mask": ["xx .. xx xx xx"] * 2}], files)[1]["delta.parts.0.tokens"]
    torch.testing.assert_close(whole, rows)
    parts = averaged([spec | {"mask": ["xx .. x. .x"] * 2}], files)[1]["delta.parts.0.tokens"]
    torch.testing.assert_close(parts, (rows + rows.flip(1)) / 2)


@pytest.mark.parametrize(
    ("family", "deep"), [("vit", True), ("vit", False), ("eva-token", True), ("eva-token", False), ("swin", True)]
)
def test_scores_are_the_gradients_of_a_mask_written_out(family: str, deep: bool) -> None:
    backbone, twin, _, whole = pruned_on(family, "x x x x", deep=deep)
    part = cast("Prompt", backbone.attached[0])
    pixels = images(family)
    weights = torch.randn(len(pixels), backbone.num_features, dtype=torch.float64)

    def loss() -> Tensor:
        return cast("Tensor", (backbone(pixels) * weights).sum(1).square().sum())

    found = mask_gradients({part: part.shapes}, 3, len(pixels), loss, backbone.mean)[part]
    for image in range(len(pixels)):
        of_tokens = [torch.ones(4, 1, dtype=torch.float64, requires_grad=True) for _ in whole]
        of_segments = [torch.ones(4, 3, dtype=torch.float64, requires_grad=True) for _ in whole]
        masked = [
            prompts * (tokens * segments).repeat_interleave(prompts.shape[1] // 3, dim=1)
            for prompts, tokens, segments in zip(whole, of_tokens, of_segments, strict=True)
        ]
        features = concatenated_features(twin, pixels[image : image + 1], masked, deep=deep)[0]
        grads = torch.autograd.grad((features * weights[image]).sum().square(), [*of_tokens, *of_segments])
        for layer in range(len(whole)):
            torch.testing.assert_close(found[layer][image], grads[len(whole) + layer], rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(found[layer][image].sum(1, keepdim=True), grads[layer], rtol=1e-9, atol=1e-12)
    assert torch.equal(backbone(pixels), backbone(pixels))  # no mask is left behind
    assert part.prompts(0).ndim == 2


def test_of_a_whole_prompt_a_norm_lets_through_what_its_epsilon_does() -> None:
    backbone, _, _, _ = pruned_on("vit", "x x x x")
    part = cast("Prompt", backbone.attached[0])

    def sizes() -> tuple[float, float]:
        found = mask_gradients({part: part.shapes}, 3, 3, lambda: backbone(images("vit")).square().sum(), backbone.mean)
        every = torch.stack(found[part])
        return float(every.sum(3).abs().max()), float(every.abs().max())

    of_tokens, of_segments = sizes()
    assert 0 < of_tokens < 1e-4 * of_segments
    for norm in backbone.layout.norms:
        cast("Any", norm).eps = 0.0
    of_tokens, of_segments = sizes()
    assert of_tokens < 1e-12 * of_segments


def test_importance_is_the_mean_size_of_the_gradient_of_each_image_whatever_the_batch() -> None:
    backbone = create_backbone("vit_nano_patch8_64").double()
    model = TunedModel(backbone, 4, [{"name": "prompt", "num_tokens": 3, "layers": [3, 6]}]).double().eval()
    with torch.no_grad():
        model.head.weight.normal_()
    pixels, labels = backbone.random_images(5, seed=2), torch.tensor([0, 3, 1, 1, 2])

    class Split:
        def __len__(self) -> int:
            return 5

        def batch(self, rows: Any) -> dict[str, Tensor]:
            return {"image": pixels[list(rows)], "label": labels[list(rows)]}

    data: Any = SimpleNamespace(split=lambda name: {"train": Split()}[name])
    tokens = cast("Tensor", cast("Prompt", model.parts()[0]).tokens)
    every = []
    for image in range(5):
        loss = nn.functional.cross_entropy(model(pixels[image : image + 1]), labels[image : image + 1])
        (grad,) = torch.autograd.grad(loss, tokens)
        every.append((grad * tokens).detach().reshape(3, 3, 8, 24).sum(3))  # ∂L/∂ρ = Σ P ∂L/∂P at ρ = 1
    expected = torch.stack(every)
    for size in (2, 5):
        (found,) = importance(model, data, 8, size).values()
        for layer, (of_tokens, of_segments) in enumerate(found):
            torch.testing.assert_close(of_tokens, expected[:, layer].sum(2).abs().mean(0), rtol=1e-9, atol=1e-15)
            torch.testing.assert_close(of_segments, expected[:, layer].abs().mean(0), rtol=1e-9, atol=1e-15)


def test_the_least_important_go_rounded_down_and_of_equal_ones_the_first() -> None:
    tokens = torch.tensor([0.3, 0.1, 0.2, 0.1])
    segments = torch.tensor([[4.0, 3, 2, 1], [1, 2, 3, 4], [0, 0, 0, 0], [2, 1, 2, 1]])
    assert least_important(tokens, segments, 0, 0) == "x x x x"
    assert least_important(tokens, segments, 74, 24) == "x . x ."
    assert least_important(tokens, segments, 49, 50) == "xx.. .... ..xx x.x."
    assert least_important(tokens, segments, 75, 25) == "xxx. .... .... ...."
    assert least_important(tokens, segments, 99, 99) == "x... .... .... ...."


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mask": ["x x"]}, "mask has 1 lines for 3 layers"),
        ({"mask": ["x x x"] * 3}, "3 words in line 0 .counted from 0., for 2 prompts"),
        ({"mask": ["x x", "x x", "x o"]}, "a word of x and . for each prompt"),
        ({"mask": ["x x", "x x", "x xx"]}, "of which all prompts have as many"),
        ({"mask": ["x x", ". .", "x x"]}, "leaves no prompt in line 1"),
        ({"mask": [""] * 3}, "a word of x and . for each prompt"),
        ({"mask": ["xxxx. xxxxx"] * 3}, "5 segments, which do not divide 24"),
        ({"mask": ["x x"], "shared": True}, "leave shared out"),
        ({"mask": ["x x"] * 3, "project": 4}, "leave project out"),
        ({"mask": ["x x"] * 3, "adaptive": {}, "fourier": 0.5}, "leave adaptive and fourier out"),
        ({"mask": "x x"}, "mask of delta 'prompt' must be a list"),
        ({"mask": [1, 1, 1]}, "mask of delta 'prompt' must be a list"),
    ],
)
def test_a_mask_of_something_else_is_refused(options: dict[str, Any], says: str) -> None:
    backbone, _ = make("vit")
    with pytest.raises(ConfigError, match=says):
        attach(backbone, [{"name": "prompt", "num_tokens": 2} | options])
    assert not backbone.attached
