"""Maps are the softmax of the concatenated form, on every family; rollout is the product of its matrices."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.backbones.test_attention_recording import KINDS, with_prompts
from tests.deltas.families import FAMILIES, SWINS, images, make
from vpt.backbones import recording
from vpt.backbones.attention.windows import BESIDE, merge_tokens, rest_of_block
from vpt.deltas import attach
from vpt.deltas.prompts.prompt import Prompt
from vpt.models import TunedModel
from vpt.visualize import attention_maps

NO_CLASS_TOKEN = {"avg-pool", "siglip", "post-norm", *SWINS}


def concatenated(model: Any, x: Tensor, prompts: Tensor) -> Tensor:
    """Attention in a plain ViT block over [tokens, prompts], every token asking: (B, heads, N + n, N + n)."""
    block = model.blocks[0]
    tokens = block.norm1(torch.cat([x, prompts.expand(len(x), -1, -1)], dim=1))
    q, k, _ = torch.nn.functional.linear(tokens, block.attn.qkv.weight, block.attn.qkv.bias).chunk(3, dim=-1)
    heads = block.attn.num_heads
    logits = torch.stack(
        [
            q_h @ k_h.transpose(1, 2) / q_h.shape[-1] ** 0.5
            for q_h, k_h in zip(q.chunk(heads, -1), k.chunk(heads, -1), strict=True)
        ],
        dim=1,
    )
    return logits.softmax(dim=-1)


@torch.no_grad()
def test_every_map_is_read_from_the_concatenated_softmax() -> None:
    backbone, delta, batch = with_prompts("vit", "deep")
    entering: list[Tensor] = []
    hook = backbone.layout.blocks[0].register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    backbone(batch)
    hook.remove()
    prompts = cast("Prompt", delta.parts[0]).prompts(0)
    weights = concatenated(backbone.model, entering[0], prompts).numpy()
    rows, columns = backbone.layout.grid
    grid, patches, last = (len(batch), -1, rows, columns), slice(1, 1 + rows * columns), slice(1 + rows * columns, None)
    layer = attention_maps(backbone, batch).layers[0]
    close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-7}
    np.testing.assert_allclose(layer.patches, weights[:, :, 0, patches].reshape(grid), **close)
    np.testing.assert_allclose(layer.share, weights[:, :, 0, last].sum(-1), **close)
    np.testing.assert_allclose(layer.patch_share, weights[:, :, patches, last].sum(-1).mean(-1), **close)
    to = weights[:, :, patches, last].mean(1).transpose(0, 2, 1).reshape(grid)
    np.testing.assert_allclose(layer.to_prompts, to, **close)
    np.testing.assert_allclose(layer.mass, to.sum(1), **close)
    np.testing.assert_allclose(layer.from_prompts, weights[:, :, last, patches].mean(1).reshape(grid), **close)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_the_first_block_deep_prompts_ask_as_the_same_shallow_ones_do(family: str) -> None:
    """Shallow prompts are tokens of the sequence: timm's own code gives them queries, positions and biases."""
    backbone, _ = make(family)
    batch, found = images(family), []
    drawn = torch.randn(3, backbone.layout.dims[0], dtype=torch.float64)
    for deep in (True, False):
        delta = attach(backbone, [{"name": "prompt", "num_tokens": 3, "deep": deep}])
        with torch.no_grad():
            next(delta.parameters())[0] = drawn
        found.append(attention_maps(backbone, batch))
        delta.detach()
    deep_maps, shallow = (maps.layers[0] for maps in found)
    for name in ("patches", "share", "patch_share", "to_prompts", "from_prompts"):
        np.testing.assert_allclose(getattr(deep_maps, name), getattr(shallow, name), rtol=1e-5, atol=1e-7)
    assert deep_maps.from_prompts.shape[1] == 3
    assert [maps.dead_queries for maps in found] == [True, False]


@torch.no_grad()
@pytest.mark.parametrize("family", SWINS)
def test_travelling_prompts_gather_what_their_weights_say(family: str) -> None:
    backbone, delta, batch = with_prompts(family, "shallow")
    prompt = cast("Prompt", delta.parts[0])
    with recording(backbone) as calls:
        backbone(batch)
    layout = backbone.layout
    beside = [call.as_called(BESIDE.get) for call in calls]
    arriving = [tokens.tokens[prompt] for tokens in beside if tokens is not None]
    maps = attention_maps(backbone, batch)
    for block, call in enumerate(calls):
        queries = call.as_called(prompt.queries, block)
        assert queries is not None
        entering = layout.norms[block](arriving[block])
        _, keys, values, _ = call.attention.prepare(*call.args, **call.kwargs)
        _, values, _ = call.as_called(call.attention.edited, keys, values, None)
        out = (call.weights_of(queries) @ values).unflatten(0, (-1, call.places.windows)).mean(dim=1)  # type: ignore[no-untyped-call]
        answers = call.attention.finish(entering, out.transpose(1, 2).flatten(2))
        after = rest_of_block(layout.blocks[block], arriving[block], answers)
        if block + 1 in layout.mergings:
            after = merge_tokens(layout.mergings[block + 1], after)
        if block + 1 < len(calls):
            torch.testing.assert_close(after, arriving[block + 1], rtol=1e-9, atol=1e-10)
        if family != "swin-padded":
            to_patches = call.weights_of(queries)[..., : call.tokens].sum(dim=-1).mean(dim=1)
            of_image = to_patches.unflatten(0, (-1, call.places.windows)).mean(dim=1)  # type: ignore[no-untyped-call]
            np.testing.assert_allclose(maps.layers[block].from_prompts.sum(axis=(2, 3)), of_image, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_shares_of_one_softmax_fit_together(family: str, kind: str) -> None:
    backbone, _, batch = with_prompts(family, kind)
    maps = attention_maps(backbone, batch)
    assert maps.has_class_token == (family not in NO_CLASS_TOKEN)
    assert ("no class token" in maps.subject) == (family in NO_CLASS_TOKEN)
    for layer in maps.layers:
        assert layer.mass.shape[1:] == layer.patches.shape[2:] == layer.from_prompts.shape[2:]
        np.testing.assert_allclose(layer.mass.mean(axis=(1, 2)), layer.patch_share.mean(axis=1), rtol=1e-5)
        assert layer.from_prompts.shape[1] == layer.to_prompts.shape[1] == 3
        if not backbone.layout.num_prefix and family != "swin-padded":
            np.testing.assert_allclose(layer.patches.sum(axis=(2, 3)) + layer.share, 1, rtol=1e-5)
    total = maps.rollout.patches.sum(axis=(1, 2)) + maps.rollout.prompts.sum(axis=0)
    assert np.all(total <= 1 + 1e-6)
    if not backbone.layout.num_prefix and family != "swin-padded":
        np.testing.assert_allclose(total, 1, rtol=1e-5)


def dense(calls: list[Any], image: int) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Of each block (A + I) / 2 over the tokens of one image as a full matrix, and half of what goes to extra keys."""
    found = []
    for call in calls:
        places, start = call.places, call.first_patch
        patches = int(np.prod(places.grid))
        numbers = places.cut(torch.arange(1, patches + 1, dtype=torch.float64).reshape(1, *places.grid)).long() - 1
        size = start + patches
        matrix, extra = np.eye(size) / 2, np.zeros(size)
        rows = call.weights().mean(dim=1).unflatten(0, (-1, places.windows))[image].numpy()
        for window, weights in enumerate(rows):
            place = [*range(start), *(start + numbers[window]).tolist()]
            real = [i for i, number in enumerate(place) if number >= start or i < start]
            index = [place[i] for i in real]
            matrix[np.ix_(index, index)] += weights[np.ix_(real, real)] / 2
            extra[index] += weights[real][:, call.tokens :].sum(axis=1) / 2
        found.append((matrix, extra))
    return found


@pytest.mark.parametrize("family", ["vit", "distilled", "dinov2-reg", "avg-pool", "dinov3", "swin", "swin-padded"])
def test_rollout_is_the_product_of_the_matrices_with_prompts_as_sources(family: str) -> None:
    backbone, _, batch = with_prompts(family, "deep")
    with recording(backbone) as calls, torch.no_grad():
        backbone(batch)
    found = attention_maps(backbone, batch).rollout
    layout = backbone.layout
    for image in range(len(batch)):
        matrices = dense(calls, image)
        start = calls[-1].first_patch
        row = np.zeros(len(matrices[-1][0]))
        if layout.pooled is None:
            row[start:] = 1 / (len(row) - start)
        else:
            row[: layout.pooled] = 1 / layout.pooled
        prompts: list[float] = []
        for (matrix, extra), call in zip(reversed(matrices), reversed(calls), strict=True):
            if len(matrix) > len(row):
                side = call.places.grid
                merged = np.arange(len(row)).reshape((side[0] + 1) // 2, -1)
                finer = merged.repeat(2, axis=0).repeat(2, axis=1)[: side[0], : side[1]].ravel()
                row = row[finer] / 4
            prompts.insert(0, float(row @ extra))
            row = row @ matrix
        np.testing.assert_allclose(found.patches[image].ravel(), row[start:], rtol=1e-5, atol=1e-9)
        np.testing.assert_allclose(found.prompts[:, image], prompts, rtol=1e-5)


def test_rollout_ends_at_shallow_prompts() -> None:
    backbone, _, batch = with_prompts("avg-pool", "shallow")
    with recording(backbone) as calls, torch.no_grad():
        backbone(batch)
    found = attention_maps(backbone, batch).rollout
    mean = calls[-1].weights().mean(dim=1)
    last = mean[:, 3:, :3].sum(dim=2).mean(dim=1) / 2
    np.testing.assert_allclose(found.prompts[-1], last, rtol=1e-5)


def test_batches_do_not_matter_and_modes_are_put_back() -> None:
    backbone, _, batch = with_prompts("vit", "deep", torch.float32)
    model = TunedModel(make("vit")[0].float(), 3, [{"name": "prompt", "num_tokens": 2, "dropout": 0.5}]).train()
    model.set_strength(0.5)
    modes = [module.training for module in model.modules()]
    many = batch.repeat(6, 1, 1, 1)
    state = torch.get_rng_state()
    maps = attention_maps(model, many)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert model.strength == 0.5
    for name in ("patches", "to_prompts", "from_prompts"):
        whole = getattr(maps.layers[1], name)
        assert len(whole) == 18
        np.testing.assert_allclose(whole[15:], getattr(attention_maps(model, batch).layers[1], name), rtol=1e-4)
    assert attention_maps(backbone, many).rollout.prompts.shape == (3, 18)


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_without_prompts_there_is_nothing_to_and_from_them(family: str) -> None:
    backbone, delta, batch = with_prompts(family, "deep")
    bare = make(family)[0]
    delta.set_strength(0.0)
    for one, other in zip(attention_maps(backbone, batch).layers, attention_maps(bare, batch).layers, strict=True):
        assert one.to_prompts.shape[1] == one.from_prompts.shape[1] == 0
        assert not one.share.any()
        assert one.uniform == 0
        assert np.array_equal(one.patches, other.patches)


def test_prompts_in_some_blocks_are_seen_there_and_prefixes_only_by_their_keys() -> None:
    backbone, _ = make("vit")
    attach(backbone, [{"name": "prompt", "num_tokens": 2, "layers": [1, 3]}, {"name": "prefix", "num_tokens": 4}])
    layers = attention_maps(backbone, images()).layers
    assert [layer.to_prompts.shape[1] for layer in layers] == [4, 6, 6]
    assert [layer.from_prompts.shape[1] for layer in layers] == [0, 2, 2]
