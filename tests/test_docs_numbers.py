"""Tables of measured numbers are those that are made of the kept records; every delta's page shows its own rows."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks.docs import ROOT, ROWS, blocks, found_blocks, pages
from benchmarks.real_protocol import METHODS, OTHERS
from benchmarks.records import RESULTS, Records
from vpt.backbones import create_backbone
from vpt.deltas import DELTAS
from vpt.experiments.profile import counted_flops, training_step
from vpt.models import TunedModel

from . import suite_tables

SUITES = {suite_tables.page(suite): suite for suite in suite_tables.SUITES}


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_has_the_numbers_of_the_records(page: Path) -> None:
    found = found_blocks(page)
    made = blocks(page) | (suite_tables.blocks(SUITES[page]) if page in SUITES else {})
    assert {name: made.get(name) for name in found} == found, "run python -m benchmarks.docs"
    assert page.read_text(encoding="utf-8").count("<!-- ") == len(found)


def test_every_table_of_numbers_is_on_a_page() -> None:
    shown = Counter(name for page in pages() for name in found_blocks(page))
    for_readme = {"robustness"}
    assert set(blocks(ROOT / "README.md")) - set(shown) <= for_readme


def test_every_method_of_the_protocol_is_on_the_page_of_its_delta() -> None:
    assert set(ROWS) <= set(DELTAS)
    assert {method for rows in ROWS.values() for method in rows} | {"linear", "full"} == set(METHODS | OTHERS)
    measured = {row["method"] for row in Records(RESULTS / "real_protocol.jsonl").rows()}
    for name in DELTAS:
        text = (ROOT / "docs" / "deltas" / f"{name}.md").read_text(encoding="utf-8")
        shown = name in ROWS and not {name} & set(OTHERS) - measured
        assert ("<!-- protocol -->" in text) == shown, name
        assert ("protocol](../protocol.md) does not measure it" in text) != shown, name


def test_operations_and_bytes_that_a_page_reckons_with_are_those_of_the_model() -> None:
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    backbone = create_backbone("vit_base_patch16_224.orig_in21k", "random")
    model = TunedModel(backbone, 10, [{"name": "prompt", "num_tokens": 50}]).to("meta")
    images = torch.zeros(2, 3, 224, 224, dtype=torch.uint8, device="meta")
    step, forward = counted_flops(training_step(model, images)), counted_flops(lambda: model(images))
    assert f"| {step / 2e9:.1f} GFLOP an image |" in page
    assert f"| {forward / 2e9:.1f} GFLOP an image |" in page
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert f"| {4 * trained / 1e6:.1f} MB |" in page  # fp32
