"""Greedy soups by layer, held against weights that are mixed by hand."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from tests.robustness.fakes import PROMPTS, task, write_delta, write_full
from vpt.models import load_classifier
from vpt.models.delta_file import fill, unfilled
from vpt.models.delta_format import read_delta
from vpt.robustness.soups.averaging import low_rank_changes
from vpt.robustness.soups.layers import layers_of
from vpt.robustness.soups.model_soups import Step, count_hits, greedy

LAST = 7  # of six blocks: the embeddings are 0, the head is 7
LORA: tuple[dict[str, Any], ...] = ({"name": "lora", "rank": 2, "scale": 3.0, "targets": ["q", "fc1"]},)
KINDS: dict[str, tuple[dict[str, Any], ...]] = {
    "prompt": PROMPTS,
    "bias": ({"name": "bias"},),
    "whole": (),
    "two": ({"name": "prefix", "num_tokens": 3}, {"name": "adapter", "rank": 2}),
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layers")


def written(folder: Path, kind: str, number: int = 3) -> list[Path]:
    if kind == "whole":
        return [write_full(folder / f"whole{seed}.safetensors", seed, 0.3) for seed in range(number)]
    return [write_delta(folder / f"{kind}{seed}.safetensors", KINDS[kind], seed) for seed in range(number)]


def layer_by_name(key: str) -> int:
    if found := re.search(r"blocks[./](\d+)[./]|\.(\d+)_\w+", key):
        return 1 + int(found[1] or found[2])
    if key.startswith("head.") or "fc_norm" in key or "model.head" in key:
        return LAST
    return 6 if re.search(r"[./]norm[./]", key) else 0


def in_order(first: Tensor, second: Tensor, kind: str) -> list[int]:
    """The order of a layer's rows that is nearest to the first's, of all there are."""
    one, two = (layer_norm(x.double(), x.shape[-1:]) if kind == "prompt" else x.double() for x in (first, second))
    return list(min(permutations(range(len(two))), key=lambda order: float((one - two[list(order)]).square().sum())))


def mixed(
    tensors: Sequence[Mapping[str, Tensor]], members: Mapping[int, Sequence[int]], kind: str
) -> dict[str, Tensor]:
    """Each layer as the mean of its members, the first of which gives the order of tokens."""
    found = {}
    for key, example in tensors[0].items():
        if kind in ("prompt", "two") and re.fullmatch(r"delta\.parts\.0\.(tokens|keys|values)", key):
            compared = "delta.parts.0." + ("tokens" if kind == "prompt" else "keys")
            rows = []
            for layer in range(len(example)):
                own = members[layer + 1]
                orders = [
                    in_order(tensors[own[0]][compared][layer], tensors[run][compared][layer], kind) for run in own
                ]
                each = [tensors[run][key][layer][order] for run, order in zip(own, orders, strict=True)]
                rows.append(torch.stack(each).double().mean(dim=0).float())
            found[key] = torch.stack(rows)
        else:
            own = members[layer_by_name(key)]
            found[key] = torch.stack([tensors[run][key].double() for run in own]).mean(dim=0).to(example.dtype)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_each_layer_is_the_mean_of_the_runs_that_do_it_no_harm(kind: str, folder: Path, tmp_path: Path) -> None:
    runs = written(folder, kind)
    trace: list[Step] = []
    out = greedy(runs, tmp_path / "soup.safetensors", task(), 4, report=trace.append, by_layer=True)
    held_out, tensors = task().split("val"), [read_delta(run)[1] for run in runs]
    model, _ = unfilled(runs[0])

    def hits(members: Mapping[int, Sequence[int]]) -> int:
        fill(model, mixed(tensors, members, kind), "by hand")
        return count_hits(model, held_out, 6)[0]

    alone = [count_hits(load_classifier(run), held_out, 6)[0] for run in runs]
    order = sorted(range(len(runs)), key=lambda run: -alone[run])
    members, best, kept = dict.fromkeys(range(LAST + 1), order[:1]), alone[order[0]], []
    layers = range(0 if kind in ("whole", "bias") else 1, LAST + 1)
    for layer in layers:
        for run in order[1:]:
            tried = members | {layer: [*members[layer], run]}
            if (found := hits(tried)) >= best:
                members, best = tried, found
            kept.append((layer, runs[run].name, members is tried))
    assert [(step.layer, Path(step.file).name, step.kept) for step in trace[1:]] == kept
    header, soup = read_delta(out)
    for key, expected in mixed(tensors, members, kind).items():
        torch.testing.assert_close(soup[key], expected, rtol=1e-6, atol=1e-7)
    assert count_hits(load_classifier(out), held_out, 6)[0] == best >= max(alone)
    told = header["info"]["soup"]
    assert told["evaluations"] == len(runs) + (len(runs) - 1) * len(layers) == len(runs) + len(trace) - 1
    assert {int(layer): [Path(name).name for name in names] for layer, names in told["layers"].items()} == {
        layer: [runs[run].name for run in members[layer]] for layer in layers
    }


def test_changes_of_low_rank_have_the_runs_of_their_layer_alone(folder: Path, tmp_path: Path) -> None:
    runs = [write_delta(folder / f"lora{seed}.safetensors", LORA, seed) for seed in range(3)]
    out = greedy(runs, tmp_path / "soup.safetensors", task(), by_layer=True)
    header, soup = read_delta(out)
    places, used = header["info"]["soup"]["layers"], set[str]()
    names = {f"{folder.name}/{run.name}": read_delta(run)[1] for run in runs}
    for block in range(6):
        for target in (f"{block}_q", f"{block}_fc1"):
            changes = [low_rank_changes("delta.parts.0.", names[name])[target] for name in places[str(block + 1)]]
            found = low_rank_changes("delta.parts.0.", soup)[target]
            torch.testing.assert_close(found, torch.stack(changes).mean(dim=0), rtol=1e-5, atol=1e-5)
        used |= set(places[str(block + 1)])
    wide = len(used | set(places["7"]))
    assert (header["specs"][0]["rank"], header["specs"][0]["scale"]) == (2 * wide, 3.0 * wide)  # the same factor
    with torch.no_grad():
        assert load_classifier(out)(task().split("test")[0]["image"][None]).isfinite().all()


def test_layers_are_those_of_strengths(folder: Path) -> None:
    path = write_delta(
        folder / "mixed.safetensors", ({**PROMPTS[0], "deep": False}, {"name": "prompt_pad", "width": 2})
    )
    model = load_classifier(path)
    found = layers_of(model, read_delta(path)[1])
    assert found["delta.parts.0.tokens"] == (1,)
    assert found["delta.parts.1.rows"] == found["delta.parts.1.columns"] == (0,)
    assert found["head.weight"] == (LAST,)
