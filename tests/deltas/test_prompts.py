"""Prompts equal the paper's concatenation, exactly, on every supported kind of ViT."""

from __future__ import annotations

from typing import Any, cast

import pytest
import timm
import torch
from torch import Tensor, nn

from tests.deltas.families import FAMILIES, SWINS, images, make, relative
from tests.deltas.oracle import concatenated_features, merged, swin_block
from vpt.backbones.factory import Backbone, create_backbone
from vpt.deltas import Delta, attach
from vpt.deltas.prompts.prompt import Prompt
from vpt.errors import ConfigError, UnknownNameError, UnsupportedBackboneError

CASES = [(family, deep) for family in FAMILIES for deep in (True, False)]
NAMES = [f"{family}-{'deep' if deep else 'shallow'}" for family, deep in CASES]


def prompts(delta: Delta, depth: int) -> list[Tensor]:
    """The prompts of each layer, whatever they are stacked in."""
    (part,) = delta.parts
    assert isinstance(part, Prompt)
    return [part.prompts(layer) for layer in range(depth if part.deep else 1)]


@pytest.mark.parametrize(("family", "deep"), CASES, ids=NAMES)
def test_features_and_gradients_equal_the_concatenation(family: str, deep: bool) -> None:
    backbone, twin = make(family)
    bare = backbone(images(family))
    delta = attach(backbone, [{"name": "prompt", "num_tokens": 9, "deep": deep}])
    for parameter in delta.parameters():  # where no norm precedes attention, small prompts hardly matter
        nn.init.normal_(parameter, std=3.0)
    head = torch.randn(bare.shape[1], 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ours = backbone(images(family)) @ head
    assert relative(ours, bare @ head) > 1e-3, "the prompts must matter for the comparison to mean anything"
    tokens = prompts(delta, len(backbone.layout.blocks))
    theirs = concatenated_features(twin, images(family), tokens, deep=deep) @ head
    assert relative(ours, theirs) <= 1e-10
    parameters = list(delta.parameters())
    grads = torch.autograd.grad(ours.square().sum(), parameters)
    expected = torch.autograd.grad(theirs.square().sum(), parameters)
    assert all(relative(a, b) <= 1e-10 for a, b in zip(grads, expected, strict=True))


@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
@pytest.mark.parametrize("mode", ["sample", "shared"])
def test_dropout_on_prompts_equals_the_concatenation_with_equal_masks(
    mode: str, deep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, twin = make("vit")
    spec = {"name": "prompt", "num_tokens": 5, "deep": deep, "dropout": 0.4, "dropout_mode": mode}
    delta = attach(backbone, [spec]).train()
    (tokens,) = delta.parameters()
    drawn: list[Tensor] = []

    def dropout(x: Tensor, p: float) -> Tensor:
        mask = (torch.rand_like(x) >= p).to(x.dtype) / (1 - p)
        drawn.append(mask)
        return x * mask

    monkeypatch.setattr("vpt.deltas.prompts.prompt.drop", dropout)
    ours = backbone(images())
    assert drawn[0].shape[0] == (3 if mode == "sample" else 1)
    masks = torch.stack([mask.expand(3, -1, -1) for mask in drawn])
    theirs = concatenated_features(twin, images(), tokens, masks, deep=deep)
    assert relative(ours, theirs) <= 1e-10
    (grad,) = torch.autograd.grad(ours.square().sum(), tokens)
    (expected,) = torch.autograd.grad(theirs.square().sum(), tokens)
    assert relative(grad, expected) <= 1e-10


def test_key_value_dropout_zeroes_channels_of_keys_and_values_per_image(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, _ = make("vit")
    spec = {"name": "prompt", "num_tokens": 5, "dropout": 0.5, "dropout_mode": "key_value"}
    attach(backbone, [spec]).train()
    shapes: list[tuple[int, ...]] = []

    def record(x: Tensor, p: float) -> Tensor:
        shapes.append(tuple(x.shape))
        return x

    monkeypatch.setattr("vpt.deltas.extra_key_values.drop", record)
    backbone(images())
    assert shapes == [(3, 2, 5, 12)] * 6  # keys and values of three layers


def test_whole_prompt_dropout_equals_removing_those_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, twin = make("vit")
    spec = {"name": "prompt", "num_tokens": 5, "dropout": 0.5, "dropout_mode": "prompt"}
    delta = attach(backbone, [spec]).train()
    (tokens,) = delta.parameters()
    x = images()
    uniform = torch.tensor([0.9, 0.1, 0.8, 0.2, 0.7]).view(1, 1, 1, 5)
    monkeypatch.setattr("torch.rand", lambda *size, **options: uniform.expand(size))
    ours = backbone(x)
    monkeypatch.undo()
    assert relative(ours, concatenated_features(twin, x, tokens[:, [0, 2, 4]])) <= 1e-10


@pytest.mark.parametrize("mode", ["sample", "shared", "key_value", "prompt"])
def test_dropout_is_off_in_eval_mode(mode: str) -> None:
    backbone, twin = make("vit")
    spec = {"name": "prompt", "num_tokens": 5, "dropout": 0.5, "dropout_mode": mode}
    delta = attach(backbone, [spec]).eval()
    (tokens,) = delta.parameters()
    assert relative(backbone(images()), concatenated_features(twin, images(), tokens)) <= 1e-10


@pytest.mark.parametrize(("family", "deep"), CASES, ids=NAMES)
def test_strength_0_and_detach_restore_the_backbone_bit_for_bit(family: str, deep: bool) -> None:
    backbone, twin = make(family)
    before = backbone(images(family))
    delta = attach(backbone, [{"name": "prompt", "num_tokens": 5, "deep": deep}])
    tuned = backbone(images(family))
    delta.set_strength(0.0)
    assert torch.equal(backbone(images(family)), before)
    delta.set_strength(1.0)
    assert torch.equal(backbone(images(family)), tuned)
    delta.detach()
    assert torch.equal(backbone(images(family)), before)
    assert torch.equal(backbone.tokens(images(family)), cast("Any", twin).forward_features(images(family)))
    state = backbone.model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in twin.state_dict().items())


def test_strength_scales_the_odds_of_attending_to_prompts() -> None:
    backbone, _ = make("vit")
    delta = attach(backbone, [{"name": "prompt", "num_tokens": 5}])
    attention = backbone.layout.attentions[0]
    x = torch.randn(2, 17, 24, dtype=torch.float64)

    def odds() -> Tensor:
        share = attention.weights(None, x)[..., 17:].sum(-1)
        return share / (1 - share)

    full = odds()
    delta.set_strength(0.25)
    assert relative(odds(), 0.25 * full) <= 1e-12


@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
def test_two_prompts_of_n_equal_one_of_2n(deep: bool) -> None:
    backbone, twin = make("dinov2-reg")
    spec = {"name": "prompt", "num_tokens": 3, "deep": deep}
    delta = attach(backbone, [spec, spec])
    both = torch.cat(list(delta.parameters()), dim=1)
    assert relative(backbone(images()), concatenated_features(twin, images(), both, deep=deep)) <= 1e-10


@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
def test_whole_tokens_hold_no_prompt_and_agree_with_the_pooled_features(deep: bool) -> None:
    backbone, _ = make("dinov2-reg")
    attach(backbone, [{"name": "prompt", "num_tokens": 5, "deep": deep}])
    tokens = backbone.tokens(images())
    assert tokens.shape == (3, 5 + 16, 24)
    assert relative(cast("Any", backbone.model).fc_norm(tokens[:, 0]), backbone(images())) <= 1e-12


@pytest.mark.parametrize(
    "family",
    ["vit", "distilled", "dinov2-reg", "clip", "eva-token", "eva-post-norm-token", "rope-axial", "beit-shared"],
)
def test_only_pooled_tokens_pass_the_last_block(family: str) -> None:
    backbone, twin = make(family)
    seen: list[int] = []
    last = cast("Any", backbone.layout.blocks[-1])
    last.mlp.register_forward_hook(lambda mlp, args, out: seen.append(out.shape[1]))
    pooled = backbone(images(family))
    whole = backbone.tokens(images(family))
    assert seen == [2 if family == "distilled" else 1, whole.shape[1]]
    reference = cast("Any", twin).forward_head(cast("Any", twin).forward_features(images(family)), pre_logits=True)
    assert relative(pooled, reference) <= 1e-12


def test_initial_bound_is_the_papers() -> None:
    model = timm.create_model("vit_base_patch16_224", num_classes=0, depth=1)
    backbone = Backbone(model, "vit_base_patch16_224", "random", "random", 224, "none")
    (tokens,) = attach(backbone, [{"name": "prompt", "num_tokens": 50}]).parameters()
    assert 0.062 < float(tokens.detach().abs().max()) <= 0.0625  # √(6/1536): facts/vpt.md §2.1


def test_only_the_prompts_train() -> None:
    backbone, _ = make("vit")
    delta = attach(backbone, [{"name": "prompt", "num_tokens": 5}])
    backbone(images()).sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in backbone.parameters())
    assert sum(p.numel() for p in delta.parameters()) == 3 * 5 * 24


@pytest.mark.parametrize("name", ["xcit_nano_12_p8_224", "convit_tiny", "resnet18"])
def test_unsupported_backbones_are_refused(name: str) -> None:
    model = timm.create_model(name, num_classes=0)
    backbone = Backbone(model, name, "random", "random", 224, "none")
    with pytest.raises(UnsupportedBackboneError, match="known"):
        attach(backbone, [{"name": "prompt", "num_tokens": 5}])


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ({"name": "promt", "num_tokens": 5}, UnknownNameError, "did you mean 'prompt'"),
        ({"name": "prompt", "num_token": 5}, UnknownNameError, "did you mean 'num_tokens'"),
        ({"name": "prompt"}, ConfigError, "needs num_tokens"),
        ({"name": "prompt", "num_tokens": 0}, ConfigError, "at least 1"),
        ({"name": "prompt", "num_tokens": [1, 2]}, ConfigError, "lists 2 numbers for 3 layers"),
        (
            {"name": "prompt", "num_tokens": 2, "layers": [1, 4]},
            ConfigError,
            r"of 3 blocks, counted from 0, got \[1, 4",
        ),
        ({"name": "prompt", "num_tokens": [1, 2, 3], "shared": True}, ConfigError, "same number and width"),
        ({"name": "prompt", "num_tokens": 2, "deep": False, "shared": True}, ConfigError, "only with deep prompts"),
        ({"name": "prompt", "num_tokens": 1, "dropout": 1.0}, ConfigError, r"\[0, 1\)"),
        ({"name": "prompt", "num_tokens": 1, "dropout_mode": "shard"}, UnknownNameError, "'shared'"),
        ({"name": "prompt", "num_tokens": 1, "deep": False, "dropout_mode": "prompt"}, ConfigError, "deep"),
    ],
)
def test_bad_specs_are_refused_in_one_sentence(spec: dict[str, Any], error: type[Exception], message: str) -> None:
    backbone, _ = make("vit")
    with pytest.raises(error, match=message):
        attach(backbone, [spec])


def test_strength_outside_0_and_1_is_refused() -> None:
    backbone, _ = make("vit")
    delta = attach(backbone, [{"name": "prompt", "num_tokens": 5}])
    with pytest.raises(ConfigError, match="between 0"):
        delta.set_strength(1.5)


@pytest.mark.parametrize("family", ["beit", "dinov3", "swin", "swinv2"])
@pytest.mark.parametrize("mode", ["sample", "shared"])
def test_an_image_gets_its_own_mask_in_all_of_its_windows(
    family: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, twin = make(family)
    spec = {"name": "prompt", "num_tokens": 5, "dropout": 0.4, "dropout_mode": mode}
    delta = attach(backbone, [spec]).train()
    drawn: list[Tensor] = []

    def keep(x: Tensor, p: float) -> Tensor:
        drawn.append((torch.rand_like(x) >= p) / (1 - p))
        return x * drawn[-1]

    monkeypatch.setattr("vpt.deltas.prompts.prompt.drop", keep)
    ours = backbone(images(family))
    tokens = prompts(delta, len(backbone.layout.blocks))
    assert [len(mask) for mask in drawn] == [3 if mode == "sample" else 1] * len(tokens)
    theirs = concatenated_features(twin, images(family), tokens, drawn)
    assert relative(ours, theirs) <= 1e-10


@pytest.mark.parametrize("mode", ["key_value", "prompt"])
def test_dropout_on_keys_leaves_images_independent_within_windows(mode: str) -> None:
    backbone, _ = make("swin")
    attach(backbone, [{"name": "prompt", "num_tokens": 5, "dropout": 0.5, "dropout_mode": mode}]).train()
    torch.manual_seed(0)
    once = backbone(images("swin"))
    torch.manual_seed(0)
    assert torch.equal(backbone(images("swin")), once)
    assert not torch.equal(backbone(images("swin")), once)


@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
@pytest.mark.parametrize("family", SWINS)
def test_an_image_does_not_depend_on_its_neighbours(family: str, deep: bool) -> None:
    backbone, _ = make(family)
    attach(backbone, [{"name": "prompt", "num_tokens": 5, "deep": deep}])
    batch = images(family)
    alone = torch.cat([backbone(image[None]) for image in batch])
    assert relative(backbone(batch), alone) <= 1e-12


@pytest.mark.parametrize("family", ["swin", "swinv2"])
def test_the_pool_of_the_reference_also_reads_the_prompts(family: str) -> None:
    backbone, twin = make(family)
    spec = {"name": "prompt", "num_tokens": 5, "deep": False}
    (tokens,) = attach(backbone, [spec | {"reference_pooling": True}]).parameters()
    with_prompts = backbone(images(family))
    model: Any = twin
    x, travelling = model.patch_embed(images(family)), tokens[0].expand(3, -1, -1)
    for number, stage in enumerate(model.layers):
        x = stage.downsample(x)
        travelling = merged(stage.downsample, travelling) if number else travelling
        for block in stage.blocks:
            x, travelling = swin_block(block, x, travelling)
    everything = torch.cat([x.flatten(1, 2), travelling], dim=1)
    assert relative(with_prompts, model.norm(everything).mean(dim=1)) <= 1e-10


@pytest.mark.parametrize("family", SWINS)
def test_deep_prompts_are_pooled_as_the_reference_pools_them(family: str) -> None:
    """Those of the last block, behind it; `docs/porting.md` says what of the reference is meant."""
    backbone, twin = make(family)
    (part,) = attach(backbone, [{"name": "prompt", "num_tokens": 5, "reference_pooling": True}]).parts
    assert isinstance(part, Prompt)
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.normal_()
    model: Any = twin
    x, layer = model.patch_embed(images(family)), 0
    for stage in model.layers:
        x = stage.downsample(x)
        for block in stage.blocks:
            x, after = swin_block(block, x, part.prompts(layer).expand(3, -1, -1))
            layer += 1
    tokens = torch.cat([x.flatten(1, 2), after], dim=1)
    assert relative(backbone(images(family)), model.norm(tokens).mean(dim=1)) <= 1e-10
    gradients = torch.autograd.grad(backbone(images(family)).square().sum(), list(part.parameters()))
    expected = torch.autograd.grad(model.norm(tokens).mean(dim=1).square().sum(), list(part.parameters()))
    assert all(relative(one, other) <= 1e-10 for one, other in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("family", SWINS)
def test_shallow_prompts_on_swin_pass_adapters_as_the_patches_do(family: str) -> None:
    """Behind the attention and behind the MLP: the oracle has each adapter in the place of the layer before it."""
    backbone, twin = make(family)
    specs = [{"name": "prompt", "num_tokens": 5, "deep": False}, {"name": "adapter", "rank": 3, "placement": "houlsby"}]
    delta = attach(backbone, specs)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.normal_()
    prompts, adapters = (cast("Any", part) for part in delta.parts)

    class Behind(nn.Module):
        def __init__(self, layer: nn.Module, key: str) -> None:
            super().__init__()
            self.layer, self.down, self.up = layer, adapters.down[key], adapters.up[key]

        def forward(self, x: Tensor) -> Tensor:
            out = self.layer(x)
            return cast("Tensor", out + self.up(torch.nn.functional.gelu(self.down(out))))

    blocks = [block for stage in cast("Any", twin).layers for block in stage.blocks]
    for index, block in enumerate(blocks):
        block.attn.proj, block.mlp = Behind(block.attn.proj, f"{index}_attn"), Behind(block.mlp, f"{index}_mlp")
    expected = concatenated_features(twin, images(family), [prompts.tokens[0]], deep=False)
    assert relative(backbone(images(family)), expected) <= 1e-10


def test_two_shallow_prompts_are_pooled_in_one_average() -> None:
    spec = {"name": "prompt", "num_tokens": 3, "deep": False, "reference_pooling": True}
    apart, _ = make("swin")
    delta = attach(apart, [spec, spec])
    together, _ = make("swin")
    (joined,) = attach(together, [spec | {"num_tokens": 6}]).parameters()
    with torch.no_grad():
        joined.copy_(torch.cat(list(delta.parameters()), dim=1))
    assert relative(apart(images("swin")), together(images("swin"))) <= 1e-12


def test_only_prompts_in_the_last_block_of_a_swin_know_the_pool_of_the_reference() -> None:
    largest = create_backbone("swin_nano_patch4_window8_64", pool="max")
    with pytest.raises(ConfigError, match="is a mean, but the backbone pools by 'max'"):
        attach(largest, [{"name": "prompt", "num_tokens": 5, "reference_pooling": True}])
    with pytest.raises(ConfigError, match="last block of a Swin"):
        attach(make("swin")[0], [{"name": "prompt", "num_tokens": 5, "layers": [0, 2], "reference_pooling": True}])
    backbone, _ = make("vit")
    with pytest.raises(ConfigError, match="last block of a Swin"):
        attach(backbone, [{"name": "prompt", "num_tokens": 5, "deep": False, "reference_pooling": True}])


@pytest.mark.parametrize(
    ("family", "options", "numbers"),
    [
        ("vit", {"num_tokens": 4, "layers": [1, 3]}, [0, 4, 4]),
        ("vit", {"num_tokens": [4, 2, 3]}, [4, 2, 3]),
        ("vit", {"num_tokens": 4, "shared": True}, [4, 4, 4]),
        ("swin", {"num_tokens": [2, 2, 1, 3]}, [2, 2, 1, 3]),
        ("swinv2", {"num_tokens": 2, "layers": [1, 4]}, [0, 2, 2, 2]),
    ],
)
def test_layers_numbers_and_sharing_equal_the_concatenation(
    family: str, options: dict[str, Any], numbers: list[int]
) -> None:
    backbone, twin = make(family)
    delta = attach(backbone, [{"name": "prompt", **options}])
    (part,) = delta.parts
    assert isinstance(part, Prompt)
    with_prompts = [block for block, number in enumerate(numbers) if number]
    tokens = [torch.zeros(0, dim, dtype=torch.float64) for dim in backbone.layout.dims]
    for layer, block in enumerate(with_prompts):
        tokens[block] = part.prompts(layer)
    assert [len(own) for own in tokens] == numbers
    assert relative(backbone(images(family)), concatenated_features(twin, images(family), tokens)) <= 1e-10
    assert sum(p.numel() for p in delta.parameters()) == part.expected_parameters()


def test_a_log_bias_gives_n_equal_prompts_the_attention_of_one() -> None:
    outputs = []
    for number in (1, 6):
        backbone, _ = make("vit")
        delta = attach(backbone, [{"name": "prompt", "num_tokens": number, "log_bias": True}])
        (tokens,) = delta.parameters()
        one = torch.randn(3, 1, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        tokens.data = one.repeat(1, number, 1)
        outputs.append(backbone(images()))
        delta.set_strength(0.5)
        outputs.append(backbone(images()))
    assert relative(outputs[2], outputs[0]) <= 1e-12
    assert relative(outputs[3], outputs[1]) <= 1e-12


@pytest.mark.parametrize(("deep", "times"), [(False, 1), (True, 3)])
def test_projected_prompts_are_projected_once_for_each_layer_that_has_them(deep: bool, times: int) -> None:
    backbone, _ = make("vit")
    (part,) = attach(backbone, [{"name": "prompt", "num_tokens": 3, "project": 5, "deep": deep}]).parts
    assert isinstance(part, Prompt)
    assert part.projection is not None
    called: list[int] = []
    part.projection.register_forward_hook(lambda *_: called.append(1))
    backbone(images("vit"))
    assert len(called) == times
